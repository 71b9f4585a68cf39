//! What there is to tiles with AVX-512 VNNI and VBMI: 64 products of levels and factors are one instruction.
//!
//! Levels have 128 added, because it multiplies unsigned by signed bytes. The other factor is cut into two digits of base 256: a third would be as exact
//! as f32 and took 3.3 of 28 ns per row and KV head. Must not know what kernels are made of it.

#![expect(clippy::needless_range_loop, reason = "indices into arrays of registers are unrolled, iterators over them not always")]

use super::avx512::Zmm;
use super::lanes::LANES;
use super::tiles_whole::{table, Queries, Scores, Sums, Whole, FULL, OFFSET};
use crate::layout::quant::{self, coefficient_bytes, STEP};
use crate::layout::TILE;
use std::arch::x86_64::*;

/// The set, beside [`Zmm`] for floats.
pub struct Vnni;

/// Digits of base 256 of a factor, the lowest first.
const DIGITS: usize = 2;
static TABLE_1: [[u8; 64]; 2] = [table(&quant::UNITS_1, 0, 1), table(&quant::UNITS_1, 1, 1)];
static TABLE_2: [u8; 64] = table(&quant::UNITS_2, 0, 4);
static TABLE_3: [[u8; 64]; 2] = [table(&quant::UNITS_3, 0, 4), table(&quant::UNITS_3, 4, 4)];
static TABLE_4: [u8; 64] = table(&quant::UNITS_4, 0, 16);
static TABLE_5: [[u8; 64]; 2] = [table(&quant::UNITS_5, 0, 16), table(&quant::UNITS_5, 16, 16)];

/// Levels of a packed coefficient, a byte per row.
#[inline(always)]
unsafe fn bytes<const WIDTH: u32>(p: *const u8) -> __m512i {
    // SAFETY: the caller's features, and the planes of a coefficient of `WIDTH` bits at `p`.
    unsafe {
        let load = |t: &[u8; 64]| _mm512_loadu_si512(t.as_ptr().cast());
        let mask = |at: usize| p.add(at).cast::<u64>().read_unaligned();
        // Each 128-bit lane gets its own two bits (or nibble) lowest in every byte; what lies above is not looked at.
        let pairs = || {
            let shifts = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6);
            _mm512_srlv_epi32(_mm512_broadcast_i32x4(_mm_loadu_si128(p.cast())), shifts)
        };
        let nibbles = || {
            let shifts = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4);
            _mm512_srlv_epi32(_mm512_broadcast_i64x4(_mm256_loadu_si256(p.cast())), shifts)
        };
        let two = |code: __m512i, mask: u64, t: &[[u8; 64]; 2]| {
            _mm512_mask_permutexvar_epi8(_mm512_permutexvar_epi8(code, load(&t[0])), mask, code, load(&t[1]))
        };
        match WIDTH {
            1 => _mm512_mask_blend_epi8(mask(0), load(&TABLE_1[0]), load(&TABLE_1[1])),
            2 => _mm512_permutexvar_epi8(pairs(), load(&TABLE_2)),
            3 => two(pairs(), mask(16), &TABLE_3),
            4 => _mm512_permutexvar_epi8(nibbles(), load(&TABLE_4)),
            _ => two(nibbles(), mask(32), &TABLE_5),
        }
    }
}

/// Cut 16 numbers, scaled to [`FULL`], into digits; the lowest first.
#[inline(always)]
unsafe fn digits(x: __m512) -> [__m128i; DIGITS] {
    // SAFETY: the caller's features.
    unsafe {
        let mut x = _mm512_cvtps_epi32(x);
        std::array::from_fn(|_| {
            let digit = _mm512_cvtepi32_epi8(x);
            // What is left after a digit from -128 to 127.
            x = _mm512_srai_epi32::<8>(_mm512_add_epi32(x, _mm512_set1_epi32(OFFSET)));
            digit
        })
    }
}

/// The number that sums over each digit stand for, times `scale`.
#[inline(always)]
unsafe fn join(sums: [__m512i; DIGITS], scale: __m512) -> __m512 {
    // SAFETY: the caller's features.
    unsafe {
        let (low, high) = (_mm512_cvtepi32_ps(sums[0]), _mm512_cvtepi32_ps(sums[1]));
        _mm512_mul_ps(_mm512_fmadd_ps(high, _mm512_set1_ps(256.0), low), scale)
    }
}

/// The largest magnitude; lengths are whole multiples of 16.
#[inline(always)]
unsafe fn magnitude(x: &[f32]) -> f32 {
    // SAFETY: the caller's features; pieces have 16 floats.
    unsafe {
        let mut largest = _mm512_setzero_ps();
        for x in x.chunks_exact(LANES) {
            largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_loadu_ps(x.as_ptr())));
        }
        _mm512_reduce_max_ps(largest)
    }
}

/// Four coefficients of 64 rows become rows of four: vector `r`, lane `l`, word `t` has row `16 l + 4 r + t`.
#[inline(always)]
unsafe fn interleave(c: [__m512i; 4]) -> [__m512i; 4] {
    // SAFETY: the caller's features.
    unsafe {
        let pairs = [
            [_mm512_unpacklo_epi8(c[0], c[1]), _mm512_unpacklo_epi8(c[2], c[3])],
            [_mm512_unpackhi_epi8(c[0], c[1]), _mm512_unpackhi_epi8(c[2], c[3])],
        ];
        [
            _mm512_unpacklo_epi16(pairs[0][0], pairs[0][1]),
            _mm512_unpackhi_epi16(pairs[0][0], pairs[0][1]),
            _mm512_unpacklo_epi16(pairs[1][0], pairs[1][1]),
            _mm512_unpackhi_epi16(pairs[1][0], pairs[1][1]),
        ]
    }
}

/// Scores of `Q` queries: `rows` has four interleaved vectors for every four coefficients.
#[inline(always)]
unsafe fn scores<const Q: usize>(rows: &[u8], queries: Queries, s: Scores) {
    let Queries { digits, padded, offsets, scales, .. } = queries;
    let digits = digits.as_ptr();
    // SAFETY: the caller's: what is lent covers all queries.
    unsafe {
        let mut acc: [[[__m512i; 4]; DIGITS]; Q] = std::array::from_fn(|q| std::array::from_fn(|d| [_mm512_set1_epi32(-offsets[q * DIGITS + d]); 4]));
        for (i, four) in rows.chunks_exact(4 * TILE).enumerate() {
            let codes: [__m512i; 4] = std::array::from_fn(|r| _mm512_loadu_si512(four.as_ptr().add(r * TILE).cast()));
            s.ahead.fetch(i % 2);
            for (q, acc) in acc.iter_mut().enumerate() {
                for (d, acc) in acc.iter_mut().enumerate() {
                    let z = _mm512_set1_epi32(digits.add((q * DIGITS + d) * padded + 4 * i).cast::<i32>().read_unaligned());
                    for (acc, codes) in acc.iter_mut().zip(codes) {
                        *acc = _mm512_dpbusd_epi32(*acc, codes, z);
                    }
                }
            }
        }
        for (q, acc) in acc.into_iter().enumerate() {
            let scale = _mm512_set1_ps(scales[q]);
            let [a, b, c, d]: [__m512; 4] = std::array::from_fn(|r| join(std::array::from_fn(|k| acc[k][r]), scale));
            let (even, odd) = (
                [_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0x88>(c, d)],
                [_mm512_shuffle_f32x4::<0xdd>(a, b), _mm512_shuffle_f32x4::<0xdd>(c, d)],
            );
            let in_order = [
                _mm512_shuffle_f32x4::<0x88>(even[0], even[1]),
                _mm512_shuffle_f32x4::<0x88>(odd[0], odd[1]),
                _mm512_shuffle_f32x4::<0xdd>(even[0], even[1]),
                _mm512_shuffle_f32x4::<0xdd>(odd[0], odd[1]),
            ];
            let mut largest = _mm512_set1_ps(s.largest[q]);
            for (l, x) in in_order.into_iter().enumerate() {
                let out = s.out.as_mut_ptr().add(q * s.stride + l * LANES);
                let x = s.wide.map_or(x, |wide| _mm512_add_ps(_mm512_loadu_ps(wide.as_ptr().add(q * TILE + l * LANES)), x));
                let before = if s.pass.add { _mm512_loadu_ps(out) } else { _mm512_setzero_ps() };
                let mut x = _mm512_fmadd_ps(x, _mm512_loadu_ps(s.gains.as_ptr().add(l * LANES)), before);
                if s.pass.finish {
                    x = _mm512_mul_ps(_mm512_add_ps(x, _mm512_set1_ps(s.means[q])), _mm512_set1_ps(s.scale));
                    largest = _mm512_max_ps(largest, x);
                }
                _mm512_storeu_ps(out, x);
            }
            s.largest[q] = _mm512_reduce_max_ps(largest);
        }
    }
}

/// Sums of `C` coefficients, the first of which is number `j` and begins at byte `at` of each tile.
#[inline(always)]
unsafe fn value_block<const WIDTH: u32, const C: usize, const Q: usize>(tiles: &[&[u8]], at: usize, j: usize, s: &mut Sums<Vnni>) {
    // SAFETY: the caller's: what is lent covers all queries, and lies in whole cache lines.
    unsafe {
        let mut acc = [[[_mm512_setzero_si512(); C]; DIGITS]; Q];
        let (mut p, length) = (s.digits.as_ptr(), tiles.len() * TILE);
        for tile in tiles {
            s.ahead.fetch(1);
            let mut codes = [_mm512_setzero_si512(); C];
            for c in 0..C {
                codes[c] = bytes::<WIDTH>(tile.as_ptr().add(at + c * coefficient_bytes(WIDTH)));
            }
            for q in 0..Q {
                for d in 0..DIGITS {
                    let x = _mm512_load_si512(p.add(q * DIGITS * length + d * TILE).cast());
                    for c in 0..C {
                        acc[q][d][c] = _mm512_dpbusd_epi32(acc[q][d][c], codes[c], x);
                    }
                }
            }
            p = p.add(DIGITS * TILE);
        }
        for c in 0..C {
            for q in 0..Q {
                let mut sums = [_mm512_setzero_si512(); DIGITS];
                for d in 0..DIGITS {
                    sums[d] = _mm512_sub_epi32(acc[q][d][c], s.offsets[q][d]);
                }
                let out = s.out.as_mut_ptr().add(((j + c) * s.n + q) * LANES);
                let x = join(sums, _mm512_set1_ps(s.scales[q] * STEP[WIDTH as usize]));
                _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), x));
            }
        }
    }
}

// SAFETY, for all that is unsafe: the trait's contract.
impl Whole for Vnni {
    type Float = Zmm;
    /// For each digit, in lanes.
    type Offset = [__m512i; DIGITS];
    // SAFETY: numbers may be zero.
    const NO_OFFSET: [__m512i; DIGITS] = unsafe { std::mem::zeroed() };
    const OFFSETS: usize = DIGITS;
    const QUERIES: usize = 2;
    const VALUE_QUERIES: usize = 4;
    /// Digits are of 8 bits.
    const MOST: usize = usize::MAX;
    const GROUP: usize = 4;
    const LEVEL_BYTES: usize = 1;

    #[inline(always)]
    unsafe fn unpack<const WIDTH: u32>(packed: &[u8], out: &mut [u8; TILE]) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), bytes::<WIDTH>(packed.as_ptr())) }
    }
    #[inline(always)]
    unsafe fn arrange(levels: &mut [u8]) {
        for four in levels.chunks_exact_mut(4 * TILE) {
            // SAFETY: see above.
            unsafe {
                let p = four.as_mut_ptr();
                let v = interleave(std::array::from_fn(|r| _mm512_loadu_si512(p.add(r * TILE).cast())));
                v.into_iter().enumerate().for_each(|(r, v)| _mm512_storeu_si512(p.add(r * TILE).cast(), v));
            }
        }
    }
    /// All low digits, then all high ones.
    #[inline(always)]
    unsafe fn digits(x: &[f32], out: &mut [u8]) -> f32 {
        // SAFETY: see above.
        unsafe {
            let largest = magnitude(x);
            let up = _mm512_set1_ps(if largest > 0.0 { FULL / largest } else { 0.0 });
            for i in (0..x.len()).step_by(LANES) {
                let d = digits(_mm512_mul_ps(_mm512_loadu_ps(x.as_ptr().add(i)), up));
                for k in 0..DIGITS {
                    _mm_storeu_si128(out.as_mut_ptr().add(k * x.len() + i).cast(), d[k]);
                }
            }
            largest / FULL
        }
    }
    #[inline(always)]
    unsafe fn offsets(digits: &[u8], out: &mut Vec<i32>) {
        let padded = digits.len() / DIGITS;
        for k in 0..DIGITS {
            // SAFETY: see above.
            unsafe {
                let mut sum = _mm512_setzero_si512();
                for i in (0..padded).step_by(64) {
                    sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(OFFSET as i8), _mm512_loadu_si512(digits.as_ptr().add(k * padded + i).cast()));
                }
                out.push(_mm512_reduce_add_epi32(sum));
            }
        }
    }
    #[inline(always)]
    unsafe fn scores(levels: &[u8], queries: Queries, to: Scores) {
        // SAFETY: see above.
        unsafe {
            match queries.n {
                1 => scores::<1>(levels, queries, to),
                _ => scores::<2>(levels, queries, to),
            }
        }
    }
    /// Tile by tile, the low digits of its rows and then the high ones.
    #[inline(always)]
    unsafe fn row_digits(x: &[f32], out: &mut [u8]) -> (f32, [__m512i; DIGITS]) {
        // SAFETY: see above.
        unsafe {
            let mut offsets = [_mm512_setzero_si512(); DIGITS];
            let largest = magnitude(x);
            let up = _mm512_set1_ps(if largest > 0.0 { FULL / largest } else { 0.0 });
            for (x, out) in x.chunks_exact(TILE).zip(out.chunks_exact_mut(DIGITS * TILE)) {
                let to = out.as_mut_ptr();
                for i in (0..TILE).step_by(LANES) {
                    let d = digits(_mm512_mul_ps(_mm512_loadu_ps(x.as_ptr().add(i)), up));
                    d.into_iter().enumerate().for_each(|(k, d)| _mm_storeu_si128(to.add(k * TILE + i).cast(), d));
                }
                for d in 0..DIGITS {
                    let digits = _mm512_loadu_si512(to.add(d * TILE).cast());
                    offsets[d] = _mm512_dpbusd_epi32(offsets[d], _mm512_set1_epi8(OFFSET as i8), digits);
                }
            }
            (largest / FULL, offsets)
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
