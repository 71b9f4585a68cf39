//! What there is to kernels with AVX2, FMA and F16C.
//!
//! Products of levels and factors: levels have 128 added, because unsigned bytes become words with a mask or a shift, and signed ones with a shuffle or
//! two shifts; 16 products of words are then one instruction. Scores have two coefficients' words of a row beside each other, so that their sums lie
//! in lanes; sums of values have neighbouring rows there. Must not know what kernels are made of it.

#![expect(clippy::needless_range_loop, reason = "indices into arrays of registers are unrolled, iterators over them not always")]

use super::lanes::{Lanes, EXP, EXP_RANGE, LANES, ROUND};
use super::tiles_float::Unpack;
use super::tiles_whole::{round, table, Queries, Scores, Sums, Whole, OFFSET};
use crate::layout::quant::{self, coefficient_bytes, A_8, B_8, LEVELS_1, LEVELS_2, LEVELS_3, LEVELS_4, LEVELS_5, LEVELS_6, STEP};
use crate::layout::TILE;
use half::f16;
use std::arch::x86_64::*;
use std::f32::consts::{LN_2, LOG2_E};

/// AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub struct Ymm(__m256);

/// Sums over the lanes of four vectors.
///
/// # Safety
/// AVX2 is there.
#[inline(always)]
pub unsafe fn sums_ymm(v: [__m256; 4]) -> [f32; 4] {
    // SAFETY: the caller's contract: AVX2.
    unsafe {
        let low = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
        let sum = _mm_add_ps(_mm256_castps256_ps128(low), _mm256_extractf128_ps::<1>(low));
        std::mem::transmute::<__m128, [f32; 4]>(sum)
    }
}

// SAFETY, for all: the trait's contract; intrinsics have no other conditions than features and what pointers cover.
impl Lanes for Ymm {
    const N: usize = 8;
    const COLUMNS: usize = 2;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: see above.
        Ymm(unsafe { _mm256_set1_ps(x) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: see above.
        Ymm(unsafe { _mm256_loadu_ps(p) })
    }
    #[inline(always)]
    unsafe fn load_half(p: *const f16) -> Self {
        // SAFETY: see above.
        Ymm(unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) })
    }
    #[inline(always)]
    unsafe fn lookup(table: &[f32; 256], index: *const u8) -> Self {
        // SAFETY: see above; the table has an entry for every byte.
        Ymm(unsafe { _mm256_i32gather_ps::<4>(table.as_ptr(), _mm256_cvtepu8_epi32(_mm_loadl_epi64(index.cast()))) })
    }
    #[inline(always)]
    unsafe fn nibbles(table: &[f32; 16], p: *const u8) -> [Self; 2] {
        // SAFETY: see above.
        unsafe {
            let low = _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()));
            let (first, second) = (_mm256_loadu_ps(table.as_ptr()), _mm256_loadu_ps(table.as_ptr().add(8)));
            let mut out = [Ymm(_mm256_setzero_ps()); 2];
            for (out, code) in out.iter_mut().zip([low, _mm256_srli_epi32::<4>(low)]) {
                // Permutations look at the low three bits, a blend at the sign: the fourth bit.
                let halves = [_mm256_permutevar8x32_ps(first, code), _mm256_permutevar8x32_ps(second, code)];
                *out = Ymm(_mm256_blendv_ps(halves[0], halves[1], _mm256_castsi256_ps(_mm256_slli_epi32::<28>(code))));
            }
            out
        }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: see above.
        unsafe { _mm256_storeu_ps(p, self.0) }
    }
    #[inline(always)]
    unsafe fn add_product(self, a: Self, b: Self) -> Self {
        // SAFETY: see above.
        Ymm(unsafe { _mm256_fmadd_ps(a.0, b.0, self.0) })
    }
    #[inline(always)]
    unsafe fn times(self, x: Self) -> Self {
        // SAFETY: see above.
        Ymm(unsafe { _mm256_mul_ps(self.0, x.0) })
    }
    #[inline(always)]
    unsafe fn exp(self) -> Self {
        // SAFETY: see above.
        unsafe {
            let x = _mm256_min_ps(_mm256_max_ps(self.0, _mm256_set1_ps(EXP_RANGE[0])), _mm256_set1_ps(EXP_RANGE[1]));
            let t = _mm256_mul_ps(x, _mm256_set1_ps(LOG2_E));
            let rounded = _mm256_add_ps(t, _mm256_set1_ps(ROUND));
            let f = _mm256_mul_ps(_mm256_sub_ps(t, _mm256_sub_ps(rounded, _mm256_set1_ps(ROUND))), _mm256_set1_ps(LN_2));
            let mut p = _mm256_set1_ps(EXP[0]);
            for c in &EXP[1..] {
                p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(*c));
            }
            let e = _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32::<23>(_mm256_castps_si256(rounded)));
            Ymm(_mm256_and_ps(_mm256_castsi256_ps(e), _mm256_cmp_ps::<_CMP_GT_OQ>(self.0, _mm256_set1_ps(f32::NEG_INFINITY))))
        }
    }
    #[inline(always)]
    unsafe fn transpose(from: *const f32, stride: usize, to: *mut f32, to_stride: usize) {
        // SAFETY: see above.
        unsafe {
            let (mut a, mut b) = ([_mm256_setzero_ps(); 8], [_mm256_setzero_ps(); 8]);
            for (i, row) in a.iter_mut().enumerate() {
                *row = _mm256_loadu_ps(from.add(i * stride));
            }
            // Pairs of rows, then fours, then the halves of registers change places.
            for i in 0..4 {
                b[2 * i] = _mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]);
                b[2 * i + 1] = _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]);
            }
            for i in 0..2 {
                for k in 0..2 {
                    a[4 * i + 2 * k] = _mm256_shuffle_ps::<0x44>(b[4 * i + k], b[4 * i + k + 2]);
                    a[4 * i + 2 * k + 1] = _mm256_shuffle_ps::<0xee>(b[4 * i + k], b[4 * i + k + 2]);
                }
            }
            for i in 0..4 {
                _mm256_storeu_ps(to.add(i * to_stride), _mm256_permute2f128_ps::<0x20>(a[i], a[i + 4]));
                _mm256_storeu_ps(to.add((i + 4) * to_stride), _mm256_permute2f128_ps::<0x31>(a[i], a[i + 4]));
            }
        }
    }
    #[inline(always)]
    unsafe fn sums(v: [Self; 4]) -> [f32; 4] {
        // SAFETY: see above.
        unsafe { sums_ymm([v[0].0, v[1].0, v[2].0, v[3].0]) }
    }
}

/// The values of eight rows of 1 bit, the first of which is row `row` of a word.
#[inline(always)]
unsafe fn one_bit(word: i32, row: usize) -> __m256 {
    // SAFETY: the caller's features.
    unsafe {
        // The row's bit becomes a sign.
        let lifts = _mm256_sub_epi32(_mm256_set1_epi32(31 - row as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
        let sign = _mm256_sllv_epi32(_mm256_set1_epi32(word), lifts);
        let sign = _mm256_and_ps(_mm256_castsi256_ps(sign), _mm256_set1_ps(-0.0));
        _mm256_xor_ps(sign, _mm256_set1_ps(LEVELS_1[0]))
    }
}

impl Unpack for Ymm {
    #[inline(always)]
    unsafe fn unpack<const WIDTH: u32>(packed: &[u8], out: &mut [f32; TILE]) {
        let (p, out) = (packed.as_ptr(), out.as_mut_ptr());
        // SAFETY: loads of 8 bytes lie inside the planes of `WIDTH`; tables have an entry for every index that is made.
        unsafe {
            let bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
            let wide = |at: usize| _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.add(at).cast()));
            // All ones where the row's bit in a 1-bit plane is set.
            let is_set = |at: usize| _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(i32::from(*p.add(at))), bits), bits);
            let right = |x: __m256i, n: usize| _mm256_srl_epi32(x, _mm_cvtsi32_si128(n as i32));
            let masked = |x: __m256i, n: usize, mask: i32| _mm256_and_si256(right(x, n), _mm256_set1_epi32(mask));
            // Loaded before anything is stored: the compiler cannot know that the two do not overlap.
            let words = [p.cast::<i32>().read_unaligned(), p.add(4).cast::<i32>().read_unaligned()];
            let bytes = match WIDTH {
                2 => [wide(0), wide(8), wide(0), wide(8)],
                4 => [wide(0), wide(8), wide(16), wide(24)],
                _ => [_mm256_setzero_si256(); 4],
            };
            let mut values = [_mm256_setzero_ps(); TILE / 8];
            for row in (0..TILE).step_by(8) {
                let (group, half) = (row / 16, row % 16);
                let value = match WIDTH {
                    1 => one_bit(words[row / 32], row % 32),
                    2 => {
                        let levels = _mm256_broadcast_ps(&_mm_loadu_ps(LEVELS_2.as_ptr()));
                        _mm256_permutevar_ps(levels, right(bytes[half / 8], 2 * group))
                    }
                    3 => {
                        let high = _mm256_and_si256(is_set(16 + row / 8), _mm256_set1_epi32(4));
                        let code = _mm256_or_si256(masked(wide(half), 2 * group, 3), high);
                        _mm256_permutevar8x32_ps(_mm256_loadu_ps(LEVELS_3.as_ptr()), code)
                    }
                    4 => {
                        let code = right(bytes[row % 32 / 8], row / 32 * 4);
                        let low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(LEVELS_4.as_ptr()), code);
                        let high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(LEVELS_4.as_ptr().add(8)), code);
                        _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(code)))
                    }
                    5 => {
                        let high = _mm256_and_si256(is_set(32 + row / 8), _mm256_set1_epi32(16));
                        _mm256_i32gather_ps::<4>(LEVELS_5.as_ptr(), _mm256_or_si256(masked(wide(row % 32), row / 32 * 4, 15), high))
                    }
                    6 => {
                        let high = _mm256_slli_epi32::<4>(masked(wide(32 + half), 2 * group, 3));
                        _mm256_i32gather_ps::<4>(LEVELS_6.as_ptr(), _mm256_or_si256(masked(wide(row % 32), row / 32 * 4, 15), high))
                    }
                    8 => {
                        let c = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.add(row).cast())));
                        _mm256_mul_ps(c, _mm256_fmadd_ps(_mm256_mul_ps(c, c), _mm256_set1_ps(B_8), _mm256_set1_ps(A_8)))
                    }
                    _ => _mm256_setzero_ps(),
                };
                values[row / 8] = value;
            }
            for (i, value) in values.into_iter().enumerate() {
                _mm256_storeu_ps(out.add(8 * i), value);
            }
        }
    }
}

static TABLE_1: [u8; 32] = table(&quant::UNITS_1, 0, 2, OFFSET);
static TABLE_2: [u8; 32] = table(&quant::UNITS_2, 0, 4, OFFSET);
static TABLE_3: [u8; 32] = table(&quant::UNITS_3, 0, 8, OFFSET);
static TABLE_4: [u8; 32] = table(&quant::UNITS_4, 0, 16, OFFSET);
static TABLE_5: [[u8; 32]; 2] = [table(&quant::UNITS_5, 0, 16, OFFSET), table(&quant::UNITS_5, 16, 16, OFFSET)];

/// Levels of a packed coefficient, a byte per row.
#[inline(always)]
unsafe fn bytes<const WIDTH: u32>(p: *const u8) -> [__m256i; 2] {
    // SAFETY: the caller's features, and the planes of a coefficient of `WIDTH` bits at `p`.
    unsafe {
        let low = match WIDTH {
            1 => _mm256_setzero_si256(),
            2 | 3 => _mm256_srlv_epi32(_mm256_broadcastsi128_si256(_mm_loadu_si128(p.cast())), _mm256_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2)),
            _ => _mm256_loadu_si256(p.cast()),
        };
        let low = [low, _mm256_srli_epi16::<4>(low)];
        let mut out = [_mm256_setzero_si256(); 2];
        for i in 0..2 {
            let set = match WIDTH {
                1 | 3 | 5 => is_set(p.add(coefficient_bytes(WIDTH - 1) + 4 * i)),
                _ => _mm256_setzero_si256(),
            };
            out[i] = match WIDTH {
                // A blend would be two instructions at least, and is what the compiler makes of logic.
                1 => _mm256_shuffle_epi8(load(&TABLE_1), _mm256_and_si256(set, _mm256_set1_epi8(1))),
                2 => _mm256_shuffle_epi8(load(&TABLE_2), _mm256_and_si256(low[i], _mm256_set1_epi8(3))),
                3 => {
                    let code = _mm256_or_si256(_mm256_and_si256(low[i], _mm256_set1_epi8(3)), _mm256_and_si256(set, _mm256_set1_epi8(4)));
                    _mm256_shuffle_epi8(load(&TABLE_3), code)
                }
                4 => _mm256_shuffle_epi8(load(&TABLE_4), _mm256_and_si256(low[i], _mm256_set1_epi8(15))),
                _ => {
                    let code = _mm256_and_si256(low[i], _mm256_set1_epi8(15));
                    _mm256_blendv_epi8(_mm256_shuffle_epi8(load(&TABLE_5[0]), code), _mm256_shuffle_epi8(load(&TABLE_5[1]), code), set)
                }
            };
        }
        out
    }
}

#[inline(always)]
unsafe fn load(table: &[u8; 32]) -> __m256i {
    // SAFETY: 32 bytes; features are the caller's.
    unsafe { _mm256_loadu_si256(table.as_ptr().cast()) }
}

/// All ones in the bytes of the 32 rows whose bit is set.
#[inline(always)]
unsafe fn is_set(p: *const u8) -> __m256i {
    // SAFETY: the caller's features, and 4 bytes at `p`.
    unsafe {
        let step = 0x0101_0101_0101_0101;
        let places = _mm256_setr_epi64x(0, step, 2 * step, 3 * step);
        let bits = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
        let copies = _mm256_shuffle_epi8(_mm256_set1_epi32(p.cast::<i32>().read_unaligned()), places);
        _mm256_cmpeq_epi8(_mm256_and_si256(copies, bits), bits)
    }
}

/// Even and odd bytes as words.
#[inline(always)]
unsafe fn words(x: __m256i) -> [__m256i; 2] {
    // SAFETY: the caller's features.
    unsafe { [_mm256_and_si256(x, _mm256_set1_epi16(255)), _mm256_srli_epi16::<8>(x)] }
}

/// The sum of all lanes.
#[inline(always)]
unsafe fn sum(x: __m256i) -> i32 {
    // SAFETY: the caller's features.
    unsafe {
        let x = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
        let x = _mm_add_epi32(x, _mm_shuffle_epi32::<0b01_00_11_10>(x));
        _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32::<0b10_11_00_01>(x)))
    }
}

/// Bytes of four coefficients of 64 rows become rows of four, the second and third exchanged: even bytes are then the first two coefficients.
/// Vector `4 h + r`, lane `l`, word `t` has row `32 h + 16 l + 4 r + t`.
#[inline(always)]
unsafe fn interleave(four: *mut u8) {
    // SAFETY: the caller's features, and four coefficients' bytes.
    unsafe {
        let mut c = [[_mm256_setzero_si256(); 2]; 4];
        for k in 0..4 {
            for h in 0..2 {
                c[k][h] = _mm256_loadu_si256(four.add(k * TILE + 32 * h).cast());
            }
        }
        for h in 0..2 {
            let low = [_mm256_unpacklo_epi8(c[0][h], c[2][h]), _mm256_unpacklo_epi8(c[1][h], c[3][h])];
            let high = [_mm256_unpackhi_epi8(c[0][h], c[2][h]), _mm256_unpackhi_epi8(c[1][h], c[3][h])];
            let rows = [
                _mm256_unpacklo_epi16(low[0], low[1]),
                _mm256_unpackhi_epi16(low[0], low[1]),
                _mm256_unpacklo_epi16(high[0], high[1]),
                _mm256_unpackhi_epi16(high[0], high[1]),
            ];
            for r in 0..4 {
                _mm256_storeu_si256(four.add(32 * (4 * h + r)).cast(), rows[r]);
            }
        }
    }
}

/// Scores of `Q` queries: `rows` has 8 interleaved vectors for every four coefficients.
#[inline(always)]
unsafe fn scores<const Q: usize>(rows: &[u8], queries: Queries, s: Scores) {
    let Queries { digits, padded, offsets, scales, .. } = queries;
    let digits = digits.as_ptr().cast::<i16>();
    // SAFETY: the caller's: what is lent covers all queries.
    unsafe {
        let mut largest = [_mm256_setzero_ps(); Q];
        for q in 0..Q {
            largest[q] = _mm256_loadu_ps(s.largest[q].as_ptr());
        }
        for part in 0..4 {
            let mut acc = [[_mm256_setzero_si256(); 2]; Q];
            for q in 0..Q {
                acc[q] = [_mm256_set1_epi32(offsets[q].wrapping_neg()); 2];
            }
            for (i, four) in rows.chunks_exact(4 * TILE).enumerate() {
                s.ahead.fetch(usize::from(i % 4 == 0));
                let at = four.as_ptr().add(64 * part);
                let codes = [words(_mm256_loadu_si256(at.cast())), words(_mm256_loadu_si256(at.add(32).cast()))];
                for pair in 0..2 {
                    for q in 0..Q {
                        let z = _mm256_set1_epi32(digits.add(q * padded + 4 * i + 2 * pair).cast::<i32>().read_unaligned());
                        for v in 0..2 {
                            acc[q][v] = _mm256_add_epi32(acc[q][v], _mm256_madd_epi16(codes[v][pair], z));
                        }
                    }
                }
            }
            for q in 0..Q {
                let [a, b] = acc[q];
                let in_order = [_mm256_permute2x128_si256::<0x20>(a, b), _mm256_permute2x128_si256::<0x31>(a, b)];
                for l in 0..2 {
                    let row = part / 2 * 32 + part % 2 * 8 + l * 16;
                    let out = s.out.as_mut_ptr().add(q * s.stride + row);
                    let wide = s.wide.map_or(_mm256_setzero_ps(), |wide| _mm256_loadu_ps(wide.as_ptr().add(q * TILE + row)));
                    let x = _mm256_fmadd_ps(_mm256_cvtepi32_ps(in_order[l]), _mm256_set1_ps(scales[q]), wide);
                    let before = if s.pass.add { _mm256_loadu_ps(out) } else { _mm256_setzero_ps() };
                    let mut x = _mm256_fmadd_ps(x, _mm256_loadu_ps(s.gains.as_ptr().add(row)), before);
                    if s.pass.finish {
                        x = _mm256_mul_ps(_mm256_add_ps(x, _mm256_set1_ps(s.means[q])), _mm256_set1_ps(s.scale));
                        largest[q] = _mm256_max_ps(largest[q], x);
                    }
                    _mm256_storeu_ps(out, x);
                }
            }
        }
        for q in 0..Q {
            _mm256_storeu_ps(s.largest[q].as_mut_ptr(), largest[q]);
        }
    }
}

/// Sums of `C` coefficients, the first of which is number `j` and begins at byte `at` of each tile.
#[inline(always)]
unsafe fn value_block<const WIDTH: u32, const C: usize, const Q: usize>(tiles: &[&[u8]], at: usize, j: usize, s: &mut Sums<Ymm>) {
    // SAFETY: the caller's: what is lent covers all queries, and lies in whole cache lines.
    unsafe {
        // Levels of all tiles first, in memory: with unpacking between them, the sums would not stay in registers.
        let room = std::slice::from_raw_parts_mut(s.levels.as_mut_ptr().cast::<__m256i>(), 2 * C * tiles.len());
        for (tile, levels) in tiles.iter().zip(room.chunks_exact_mut(2 * C)) {
            for c in 0..C {
                let x = bytes::<WIDTH>(tile.as_ptr().add(at + c * coefficient_bytes(WIDTH)));
                (levels[c], levels[C + c]) = (x[0], x[1]);
            }
        }
        let mut acc = [[_mm256_setzero_si256(); C]; Q];
        let (mut p, length) = (s.digits.as_ptr().cast::<i16>(), tiles.len() * TILE);
        for (i, levels) in room.chunks_exact(C).enumerate() {
            s.ahead.fetch(i % 2);
            let mut x = [[_mm256_setzero_si256(); 2]; C];
            for c in 0..C {
                x[c] = words(levels[c]);
            }
            for q in 0..Q {
                for k in 0..2 {
                    let p = _mm256_load_si256(p.add(q * length + 16 * k).cast());
                    for c in 0..C {
                        acc[q][c] = _mm256_add_epi32(acc[q][c], _mm256_madd_epi16(x[c][k], p));
                    }
                }
            }
            p = p.add(TILE / 2);
        }
        for c in 0..C {
            for q in 0..Q {
                let out = s.out.as_mut_ptr().add(((j + c) * s.n + q) * LANES);
                let x = _mm256_cvtepi32_ps(_mm256_sub_epi32(acc[q][c], s.offsets[q]));
                let scale = _mm256_set1_ps(s.scales[q] * STEP[WIDTH as usize]);
                _mm256_storeu_ps(out, _mm256_fmadd_ps(x, scale, _mm256_loadu_ps(out)));
            }
        }
    }
}

/// Bring the digits of 32 rows to the order of [`words`]: even rows, then odd ones. Returns the sums of both.
#[inline(always)]
unsafe fn sort(digits: *mut i16) -> __m256i {
    // SAFETY: the caller's features, and 32 digits.
    unsafe {
        let x = [_mm256_loadu_si256(digits.cast()), _mm256_loadu_si256(digits.add(16).cast())];
        let (mut even, mut odd) = ([_mm256_setzero_si256(); 2], [_mm256_setzero_si256(); 2]);
        for i in 0..2 {
            even[i] = _mm256_srai_epi32::<16>(_mm256_slli_epi32::<16>(x[i]));
            odd[i] = _mm256_srai_epi32::<16>(x[i]);
        }
        // What is packed alternates in pieces of 64 bits.
        let even = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(even[0], even[1]));
        let odd = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(odd[0], odd[1]));
        _mm256_storeu_si256(digits.cast(), even);
        _mm256_storeu_si256(digits.add(16).cast(), odd);
        let offset = _mm256_set1_epi16(OFFSET as i16);
        _mm256_add_epi32(_mm256_madd_epi16(even, offset), _mm256_madd_epi16(odd, offset))
    }
}

// SAFETY, for all that is unsafe: the trait's contract.
impl Whole for Ymm {
    type Float = Ymm;
    /// In lanes.
    type Offset = __m256i;
    // SAFETY: numbers may be zero.
    const NO_OFFSET: __m256i = unsafe { std::mem::zeroed() };
    const OFFSETS: usize = 1;
    /// Queries whose sums are in registers together, with those of 16 rows or of two coefficients.
    const QUERIES: usize = 4;
    const VALUE_QUERIES: usize = 4;
    /// Levels are under 128, queries under 2^15; sums that leave 32 bits on the way, by what was added to levels, come back.
    const MOST: usize = 512;
    const GROUP: usize = 4;
    const LEVEL_BYTES: usize = 1;

    #[inline(always)]
    unsafe fn unpack<const WIDTH: u32>(packed: &[u8], out: &mut [u8; TILE]) {
        // SAFETY: see above.
        unsafe {
            let x = bytes::<WIDTH>(packed.as_ptr());
            for i in 0..2 {
                _mm256_storeu_si256(out.as_mut_ptr().add(32 * i).cast(), x[i]);
            }
        }
    }
    #[inline(always)]
    unsafe fn arrange(levels: &mut [u8]) {
        for four in levels.chunks_exact_mut(4 * TILE) {
            // SAFETY: see above.
            unsafe { interleave(four.as_mut_ptr()) }
        }
    }
    #[inline(always)]
    unsafe fn digits(x: &[f32], out: &mut [u8]) -> f32 {
        round(x, bytemuck::cast_slice_mut(out))
    }
    #[inline(always)]
    unsafe fn offsets(digits: &[u8], out: &mut Vec<i32>) {
        // SAFETY: see above; pieces have 32 bytes.
        unsafe {
            let mut total = _mm256_setzero_si256();
            for x in digits.chunks_exact(32) {
                let x = _mm256_loadu_si256(x.as_ptr().cast());
                total = _mm256_add_epi32(total, _mm256_madd_epi16(x, _mm256_set1_epi16(OFFSET as i16)));
            }
            out.push(sum(total));
        }
    }
    #[inline(always)]
    unsafe fn scores(levels: &[u8], queries: Queries, to: Scores) {
        // SAFETY: see above.
        unsafe {
            match queries.n {
                1 => scores::<1>(levels, queries, to),
                2 => scores::<2>(levels, queries, to),
                3 => scores::<3>(levels, queries, to),
                _ => scores::<4>(levels, queries, to),
            }
        }
    }
    #[inline(always)]
    unsafe fn row_digits(x: &[f32], out: &mut [u8]) -> (f32, __m256i) {
        let digits = bytemuck::cast_slice_mut(out);
        let unit = round(x, digits);
        // SAFETY: see above.
        unsafe {
            let mut offset = _mm256_setzero_si256();
            for rows in digits.chunks_exact_mut(32) {
                offset = _mm256_add_epi32(offset, sort(rows.as_mut_ptr()));
            }
            (unit, offset)
        }
    }
    #[inline(always)]
    unsafe fn values<const WIDTH: u32, const C: usize>(tiles: &[&[u8]], at: usize, j: usize, s: &mut Sums<Self>) {
        // SAFETY: see above.
        unsafe {
            match s.queries {
                1 => value_block::<WIDTH, C, 1>(tiles, at, j, s),
                2 => value_block::<WIDTH, C, 2>(tiles, at, j, s),
                3 => value_block::<WIDTH, C, 3>(tiles, at, j, s),
                _ => value_block::<WIDTH, C, 4>(tiles, at, j, s),
            }
        }
    }
}
