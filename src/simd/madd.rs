//! Tiles of codes in whole numbers of 16 bits (AVX2): codes of 1 to 5 bits become bytes, and 16 products of them are one instruction.
//!
//! The arithmetic is that of [`whole`]: exact sums of levels times queries, or probabilities, of 16 bits. Levels are stored with 128 added, as in
//! [`vnni`], here because unsigned bytes become words with a mask or a shift, and signed ones with a shuffle or two shifts.
//! Scores have two coefficients' words of a row beside each other, so that their sums lie in lanes; sums of values have neighbouring rows there.

#![expect(clippy::needless_range_loop, reason = "indices into arrays of registers are unrolled, iterators over them not always")]

use super::lanes::{Ymm, LANES};
use super::memory::Ahead;
use super::products::{Pass, Products, BATCH};
use super::vnni::{table, OFFSET};
use super::{tile, whole};
use crate::layout::quant::{self, STEP};
use crate::layout::widths::with_width;
use crate::layout::{Widths, TILE};
use std::arch::x86_64::*;

/// Queries whose sums are in registers together, with those of 16 rows or of two coefficients.
const QUERIES: usize = 4;
/// Most coefficients of a row whose sums stay in 32 bits, whatever they are (levels are under 128, queries under 2^15); sums that leave them on
/// the way, by what was added to levels, come back.
const MOST: usize = 512;

static TABLE_1: [u8; 32] = table(&quant::UNITS_1, 0, 2);
static TABLE_2: [u8; 32] = table(&quant::UNITS_2, 0, 4);
static TABLE_3: [u8; 32] = table(&quant::UNITS_3, 0, 8);
static TABLE_4: [u8; 32] = table(&quant::UNITS_4, 0, 16);
static TABLE_5: [[u8; 32]; 2] = [table(&quant::UNITS_5, 0, 16), table(&quant::UNITS_5, 16, 16)];

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
                1 | 3 | 5 => is_set(p.add(quant::coefficient_bytes(WIDTH - 1) + 4 * i)),
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

/// See [`super::Kernels::prepare`].
///
/// # Safety
/// AVX2 and FMA are there.
#[inline(always)]
pub unsafe fn prepare(s: &mut Products, part: usize) {
    whole::prepare(s, part);
    let p = &mut s.parts[part];
    let padded = (p.widths.rank() - p.widths.narrow_from()).next_multiple_of(TILE);
    p.offsets.clear();
    for q in 0..s.frames * s.n {
        let digits = &p.digits.bytes()[q * padded * 2..][..padded * 2];
        // SAFETY: pieces have 32 bytes; features are the caller's.
        unsafe {
            let mut total = _mm256_setzero_si256();
            for x in digits.chunks_exact(32) {
                let x = _mm256_loadu_si256(x.as_ptr().cast());
                total = _mm256_add_epi32(total, _mm256_madd_epi16(x, _mm256_set1_epi16(OFFSET as i16)));
            }
            p.offsets.push(sum(total));
        }
    }
}

/// `WIDTH` bits of some coefficients to bytes.
#[inline(always)]
unsafe fn unpack_run<const WIDTH: u32>(codes: &[u8], out: &mut [u8]) {
    for (packed, out) in codes.chunks_exact(quant::coefficient_bytes(WIDTH)).zip(out.chunks_exact_mut(TILE)) {
        // SAFETY: both slices have a coefficient's bytes; features are the caller's.
        unsafe {
            let x = bytes::<WIDTH>(packed.as_ptr());
            for i in 0..2 {
                _mm256_storeu_si256(out.as_mut_ptr().add(32 * i).cast(), x[i]);
            }
        }
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

/// Where scores go, and what makes them of sums.
struct Scores<'a> {
    out: *mut f32,
    stride: usize,
    /// Sums in f32, 64 for each query, that belong to those made here.
    wide: Option<*const f32>,
    pass: Pass,
    gains: &'a [f32; TILE],
    means: &'a [f32],
    scale: f32,
    largest: &'a mut [f32],
    ahead: &'a mut Ahead,
}

/// Scores of `Q` queries: `rows` has 8 interleaved vectors for every four coefficients.
#[inline(always)]
unsafe fn scores<const Q: usize>(rows: &[u8], digits: *const i16, padded: usize, offsets: &[i32], scales: &[f32], s: Scores) {
    // SAFETY: `tile_scores` checked what pointers cover; features are the caller's.
    unsafe {
        let mut largest = [_mm256_setzero_ps(); Q];
        for q in 0..Q {
            largest[q] = _mm256_set1_ps(s.largest[q]);
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
                    let out = s.out.add(q * s.stride + row);
                    let wide = s.wide.map_or(_mm256_setzero_ps(), |wide| _mm256_loadu_ps(wide.add(q * TILE + row)));
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
            let x = _mm_max_ps(_mm256_castps256_ps128(largest[q]), _mm256_extractf128_ps::<1>(largest[q]));
            let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
            s.largest[q] = _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
        }
    }
}

/// See [`super::Kernels::tile_scores`].
///
/// # Safety
/// As [`prepare`], which was called.
#[inline(always)]
pub unsafe fn tile_scores(s: &mut Products, pass: Pass, codes: &[u8], gains: &[f32; TILE], out: &mut [f32], stride: usize) {
    let widths = s.parts[pass.part].widths;
    let (first, rank) = (widths.narrow_from(), widths.rank());
    let (length, padded) = ((rank - first).next_multiple_of(4) * TILE, (rank - first).next_multiple_of(TILE));
    assert!(codes.len() >= widths.bytes() && s.n > 0 && out.len() >= (s.n - 1) * stride + TILE);
    // The first of the frame's queries.
    let base = s.frame * s.n;
    assert!(s.parts[pass.part].digits.bytes().len() >= (base + s.n) * padded * 2);
    // SAFETY: features are the caller's, sizes were checked.
    unsafe {
        if rank == first || rank - first > MOST {
            tile::tile_scores::<Ymm, 2>(s, pass, codes, gains, out, stride);
            return;
        }
        if first > 0 {
            tile::wide_sums::<Ymm, 2>(s, pass.part, codes, first);
        }
        let p = &s.parts[pass.part];
        s.unpacked.resize(length);
        let rows = &mut s.unpacked.bytes_mut()[..length];
        for run in widths.narrow_runs() {
            let (codes, out) = (&codes[run.bytes()], &mut rows[(run.first - first) * TILE..][..run.n * TILE]);
            with_width!(narrow run.bits, WIDTH => unpack_run::<WIDTH>(codes, out));
        }
        for four in rows.chunks_exact_mut(4 * TILE) {
            interleave(four.as_mut_ptr());
        }
        for q in (0..s.n).step_by(QUERIES) {
            let digits = p.digits.bytes().as_ptr().cast::<i16>().add((base + q) * padded);
            let (offsets, scales) = (&p.offsets[base + q..], &p.scales[base + q..]);
            let wide = (first > 0).then(|| s.sums.floats().as_ptr().add(q * TILE));
            let out = out.as_mut_ptr().add(q * stride);
            let (means, largest, ahead) = (&s.means[base + q..], &mut s.largest[q..], &mut s.ahead);
            let to = Scores { out, stride, wide, pass, gains, means, scale: s.scale, largest, ahead };
            match s.n - q {
                1 => scores::<1>(rows, digits, padded, offsets, scales, to),
                2 => scores::<2>(rows, digits, padded, offsets, scales, to),
                3 => scores::<3>(rows, digits, padded, offsets, scales, to),
                _ => scores::<4>(rows, digits, padded, offsets, scales, to),
            }
        }
    }
}

/// What sums of some queries start from, and where they go.
struct Sums<'a> {
    /// Digits of the probabilities: for each query the tiles' one after another, in the order that [`words`] makes of rows.
    digits: *const i16,
    /// Per query, what the levels' offset adds to the sums, in lanes.
    offsets: [__m256i; QUERIES],
    scales: [f32; QUERIES],
    /// Coefficients' sums, 16 lanes for each of `n` queries, the first query's.
    out: *mut f32,
    n: usize,
    /// Room for the levels of two coefficients of all tiles, a byte each.
    levels: &'a mut [__m256i],
    ahead: &'a mut Ahead,
}

/// Sums of `C` coefficients, the first of which is number `j` and begins at byte `at` of each tile.
#[inline(always)]
unsafe fn value_block<const WIDTH: u32, const C: usize, const Q: usize>(tiles: &[&[u8]], at: usize, j: usize, s: &mut Sums) {
    // SAFETY: `tile_values` checked what pointers cover; features are the caller's.
    unsafe {
        // Levels of all tiles first, in memory: with unpacking between them, the sums would not stay in registers.
        for (tile, levels) in tiles.iter().zip(s.levels.chunks_exact_mut(2 * C)) {
            for c in 0..C {
                let x = bytes::<WIDTH>(tile.as_ptr().add(at + c * quant::coefficient_bytes(WIDTH)));
                (levels[c], levels[C + c]) = (x[0], x[1]);
            }
        }
        let mut acc = [[_mm256_setzero_si256(); C]; Q];
        let (mut p, length) = (s.digits, tiles.len() * TILE);
        for (i, levels) in s.levels.chunks_exact(C).take(2 * tiles.len()).enumerate() {
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
                let out = s.out.add(((j + c) * s.n + q) * LANES);
                let x = _mm256_cvtepi32_ps(_mm256_sub_epi32(acc[q][c], s.offsets[q]));
                let scale = _mm256_set1_ps(s.scales[q] * STEP[WIDTH as usize]);
                _mm256_storeu_ps(out, _mm256_fmadd_ps(x, scale, _mm256_loadu_ps(out)));
            }
        }
    }
}

/// Sums of a run of coefficients: two at a time, so that each load of probabilities serves both.
#[inline(always)]
unsafe fn value_run<const WIDTH: u32, const Q: usize>(tiles: &[&[u8]], from: usize, j: usize, n: usize, s: &mut Sums) {
    let at = |i: usize| from + i * quant::coefficient_bytes(WIDTH);
    // SAFETY: the caller's.
    unsafe {
        for i in (0..n / 2 * 2).step_by(2) {
            value_block::<WIDTH, 2, Q>(tiles, at(i), j + i, s);
        }
        if n % 2 == 1 {
            value_block::<WIDTH, 1, Q>(tiles, at(n - 1), j + n - 1, s);
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

#[inline(always)]
unsafe fn values<const Q: usize>(
    widths: Widths,
    tiles: &[&[u8]],
    (p, stride): (&[f32], usize),
    (digits, ahead): (&mut [i16], &mut Ahead),
    out: *mut f32,
    n: usize,
) {
    let length = tiles.len() * TILE;
    // SAFETY: `tile_values` checked what pointers cover; features are the caller's.
    unsafe {
        let levels = &mut [_mm256_setzero_si256(); 2 * 2 * BATCH];
        let mut s = Sums { digits: digits.as_ptr(), offsets: [_mm256_setzero_si256(); QUERIES], scales: [0.0; QUERIES], out, n, levels, ahead };
        for q in 0..Q {
            let digits = &mut digits[q * length..][..length];
            s.scales[q] = whole::round(&p[q * stride..][..length], digits.as_chunks_mut().0);
            for rows in digits.chunks_exact_mut(32) {
                s.offsets[q] = _mm256_add_epi32(s.offsets[q], sort(rows.as_mut_ptr()));
            }
        }
        for run in widths.narrow_runs() {
            with_width!(narrow run.bits, WIDTH => value_run::<WIDTH, Q>(tiles, run.at, run.first, run.n, &mut s));
        }
    }
}

/// See [`super::Kernels::tile_values`].
///
/// # Safety
/// As [`prepare`].
#[inline(always)]
pub unsafe fn tile_values(widths: Widths, tiles: &[&[u8]], p: &[f32], stride: usize, n: usize, sums: &mut [f32], work: &mut Products) {
    let length = tiles.len() * TILE;
    // As many tiles' sums do not overflow.
    assert!(tiles.iter().all(|t| t.len() >= widths.bytes()) && tiles.len() <= BATCH);
    assert!(n > 0 && length <= stride && p.len() >= (n - 1) * stride + length && sums.len() >= widths.rank() * n * LANES);
    // SAFETY: features are the caller's, sizes were checked.
    unsafe {
        tile::wide_values::<Ymm>(widths, tiles, widths.narrow_from(), p, stride, n, sums, work);
        if widths.narrow_from() == widths.rank() {
            return;
        }
        work.unpacked.resize(length * QUERIES * 2);
        for q in (0..n).step_by(QUERIES) {
            let (p, out) = ((&p[q * stride..], stride), sums.as_mut_ptr().add(q * LANES));
            let digits = (bytemuck::cast_slice_mut(work.unpacked.bytes_mut()), &mut work.ahead);
            match n - q {
                1 => values::<1>(widths, tiles, p, digits, out, n),
                2 => values::<2>(widths, tiles, p, digits, out, n),
                3 => values::<3>(widths, tiles, p, digits, out, n),
                _ => values::<4>(widths, tiles, p, digits, out, n),
            }
        }
    }
}
