//! What there is to tiles with AVX-512 VNNI and VBMI: 64 products of levels and factors are one instruction.
//!
//! Levels have 128 added, because it multiplies unsigned by signed bytes. The other factor is cut into two digits of base 256: a third would be as exact
//! as f32 and took 3.3 of 28 ns per row and KV head. Must not know what kernels are made of it.

#![expect(clippy::needless_range_loop, reason = "indices into arrays of registers are unrolled, iterators over them not always")]

use super::avx512::Zmm;
use super::dense::{self, MatMut, MatRef};
use super::lanes::LANES;
use super::memory::Lines;
use super::projection::Projection;
use super::tiles_whole::{table, Queries, Scores, Sums, Whole, FULL, OFFSET};
use crate::layout::gain::Gains;
use crate::layout::quant::{self, coefficient_bytes, STEP};
use crate::layout::TILE;
use std::arch::x86_64::*;

/// The set, beside [`Zmm`] for floats.
pub struct Vnni;

/// Digits of base 256 of a factor, the lowest first.
const DIGITS: usize = 2;
static TABLE_1: [[u8; 64]; 2] = [table(&quant::UNITS_1, 0, 1, OFFSET), table(&quant::UNITS_1, 1, 1, OFFSET)];
static TABLE_2: [u8; 64] = table(&quant::UNITS_2, 0, 4, OFFSET);
static TABLE_3: [[u8; 64]; 2] = [table(&quant::UNITS_3, 0, 4, OFFSET), table(&quant::UNITS_3, 4, 4, OFFSET)];
static TABLE_4: [u8; 64] = table(&quant::UNITS_4, 0, 16, OFFSET);
static TABLE_5: [[u8; 64]; 2] = [table(&quant::UNITS_5, 0, 16, OFFSET), table(&quant::UNITS_5, 16, 16, OFFSET)];

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

/// Where the lowest bytes of 32 whole numbers are in two vectors, and then their second ones.
static LOW_BYTES: [u8; 64] = {
    let mut out = [0; 64];
    let mut i = 0;
    while i < 64 {
        out[i] = (i % 32 * 4 + i / 32) as u8;
        i += 1;
    }
    out
};

/// Multiply 64 numbers by `up`, which brings the largest to [`FULL`], and cut them into digits, the lowest first.
#[inline(always)]
unsafe fn digits(x: *const f32, up: __m512) -> [__m512i; DIGITS] {
    // SAFETY: the caller's features, and its numbers.
    unsafe {
        // With half of the base added, the second byte is the higher digit, and the lowest is off by as much.
        let number = |i: usize| _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x.add(i * LANES)), up)), _mm512_set1_epi32(OFFSET));
        let places = _mm512_loadu_si512(LOW_BYTES.as_ptr().cast());
        let front = _mm512_permutex2var_epi8(number(0), places, number(1));
        let back = _mm512_permutex2var_epi8(number(2), places, number(3));
        let low = _mm512_inserti64x4::<1>(front, _mm512_castsi512_si256(back));
        [_mm512_xor_si512(low, _mm512_set1_epi8(OFFSET as i8)), _mm512_shuffle_i64x2::<0b11_10_11_10>(front, back)]
    }
}

/// Numbers of a row come to words in whole vectors of these.
const WORDS: usize = 32;

/// A row as words, of which its length is [`FULL`]: so sums of products of two such rows, whichever they are, stay in 32 bits. Returns what a unit
/// stands for.
#[inline(always)]
unsafe fn words(x: &[f32], out: &mut [i16]) -> f32 {
    // SAFETY: the caller's features; vectors lie inside of slices, but for the last of `x`, of which no more is read than there is.
    unsafe {
        let some = |i: usize| {
            let there = x.len().saturating_sub(i).min(LANES);
            _mm512_maskz_loadu_ps(((1u32 << there) - 1) as u16, x.as_ptr().wrapping_add(i))
        };
        let mut squares = _mm512_setzero_ps();
        for i in (0..out.len()).step_by(LANES) {
            squares = _mm512_fmadd_ps(some(i), some(i), squares);
        }
        let length = _mm512_reduce_add_ps(squares).sqrt();
        let up = _mm512_set1_ps(if length > 0.0 { FULL / length } else { 0.0 });
        for (i, out) in out.chunks_exact_mut(LANES).enumerate() {
            let word = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(some(i * LANES), up)));
            _mm256_storeu_si256(out.as_mut_ptr().cast(), word);
        }
        length / FULL
    }
}

/// Products of `R` rows of words and `C` vectors of columns, of which there are `pairs` pairs of words; rows of the result are `stride` apart.
#[inline(always)]
unsafe fn project<const R: usize, const C: usize>(rows: &[i32], units: &[f32], by: &Projection, column: usize, out: &mut [f32]) {
    let (pairs, stride) = (by.d.next_multiple_of(WORDS) / 2, by.stride);
    // SAFETY: the caller's: rows, columns and results are there.
    unsafe {
        let mut acc = [[_mm512_setzero_si512(); C]; R];
        let columns = by.columns.floats().as_ptr().add(column);
        for i in 0..pairs {
            let mut y = [_mm512_setzero_si512(); C];
            for c in 0..C {
                y[c] = _mm512_loadu_si512(columns.add(i * stride + c * LANES).cast());
            }
            for r in 0..R {
                let x = _mm512_set1_epi32(*rows.get_unchecked(r * pairs + i));
                for c in 0..C {
                    acc[r][c] = _mm512_dpwssd_epi32(acc[r][c], y[c], x);
                }
            }
        }
        for r in 0..R {
            for c in 0..C {
                let unit = _mm512_mul_ps(_mm512_loadu_ps(by.units.floats().as_ptr().add(column + c * LANES)), _mm512_set1_ps(units[r]));
                _mm512_storeu_ps(out.as_mut_ptr().add(r * stride + column + c * LANES), _mm512_mul_ps(_mm512_cvtepi32_ps(acc[r][c]), unit));
            }
        }
    }
}

/// The same for all columns.
#[inline(always)]
unsafe fn project_rows<const R: usize>(rows: &[i32], units: &[f32], by: &Projection, columns: usize, out: &mut [f32]) {
    const C: usize = 4;
    let whole = columns / (C * LANES) * C * LANES;
    // SAFETY: the caller's.
    unsafe {
        for column in (0..whole).step_by(C * LANES) {
            project::<R, C>(rows, units, by, column, out);
        }
        for column in (whole..columns).step_by(LANES) {
            project::<R, 1>(rows, units, by, column, out);
        }
    }
}

/// Where codes go before they are looked up, so that what bytes are put together to lies in order: [`interleave`]'s places.
static IN_FOURS: [u8; 64] = {
    let mut out = [0; 64];
    let mut i = 0;
    while i < 64 {
        out[i] = (i % 16 / 4 * 16 + i / 16 * 4 + i % 4) as u8;
        i += 1;
    }
    out
};

/// The entries of a table of 256 bytes.
#[inline(always)]
unsafe fn look_up(table: &[u8; 256], index: __m512i) -> __m512i {
    // SAFETY: the caller's features; loads are inside of the table.
    unsafe {
        let part = |i: usize| _mm512_loadu_si512(table.as_ptr().add(64 * i).cast());
        let (low, high) = (_mm512_permutex2var_epi8(part(0), index, part(1)), _mm512_permutex2var_epi8(part(2), index, part(3)));
        _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, high)
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
            let mut largest = _mm512_loadu_ps(s.largest[q].as_ptr());
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
            _mm512_storeu_ps(s.largest[q].as_mut_ptr(), largest);
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

    /// Pairs of words of each row beside each other: 32 products of words are one instruction.
    #[inline(always)]
    unsafe fn hold(matrix: &[f32], d: usize, to: &mut Projection) {
        to.set(d, true);
        let (padded, stride) = (d.next_multiple_of(WORDS), to.stride);
        to.units.resize(stride * 4);
        to.work.resize(d * padded * 2);
        to.columns.resize(padded / 2 * stride * 4);
        let rows = bytemuck::cast_slice_mut::<u8, i16>(to.work.bytes_mut());
        // SAFETY: see above.
        unsafe {
            for ((row, out), unit) in matrix.chunks_exact(d).zip(rows.chunks_exact_mut(padded)).zip(to.units.floats_mut()) {
                *unit = words(row, out);
            }
            let (pairs, columns) = (MatRef::new(to.work.floats(), padded / 2), MatMut::new(to.columns.floats_mut(), stride));
            dense::transpose::<Zmm>(pairs, columns, d, padded / 2);
        }
    }
    #[inline(always)]
    unsafe fn project(by: &Projection, rows: &[f32], n: usize, columns: usize, out: &mut [f32], work: &mut Lines) {
        const ROWS: usize = 4;
        assert!(by.is_words);
        let padded = by.d.next_multiple_of(WORDS);
        work.resize(ROWS * padded * 2);
        for (rows, out) in rows[..n * by.d].chunks(ROWS * by.d).zip(out.chunks_mut(ROWS * by.stride)) {
            let mut units = [0.0; ROWS];
            let numbers = bytemuck::cast_slice_mut::<u8, i16>(work.bytes_mut());
            // SAFETY: see above.
            unsafe {
                for ((row, out), unit) in rows.chunks_exact(by.d).zip(numbers.chunks_exact_mut(padded)).zip(&mut units) {
                    *unit = words(row, out);
                }
                let pairs = bytemuck::cast_slice(work.bytes());
                match rows.len() / by.d {
                    1 => project_rows::<1>(pairs, &units, by, columns, out),
                    2 => project_rows::<2>(pairs, &units, by, columns, out),
                    3 => project_rows::<3>(pairs, &units, by, columns, out),
                    _ => project_rows::<4>(pairs, &units, by, columns, out),
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn lookup(gains: &Gains, codes: &[u8; TILE], out: &mut [f32; TILE]) {
        // SAFETY: see above.
        unsafe {
            let codes = _mm512_permutexvar_epi8(_mm512_loadu_si512(IN_FOURS.as_ptr().cast()), _mm512_loadu_si512(codes.as_ptr().cast()));
            let [a, b, c, d] = &gains.bytes;
            let bytes = [look_up(a, codes), look_up(b, codes), look_up(c, codes), look_up(d, codes)];
            for (i, x) in interleave(bytes).into_iter().enumerate() {
                _mm512_storeu_si512(out.as_mut_ptr().add(i * LANES).cast(), x);
            }
        }
    }
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
            for i in (0..x.len()).step_by(64) {
                let d = digits(x.as_ptr().add(i), up);
                for k in 0..DIGITS {
                    _mm512_storeu_si512(out.as_mut_ptr().add(k * x.len() + i).cast(), d[k]);
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
                let d = digits(x.as_ptr(), up);
                for k in 0..DIGITS {
                    _mm512_storeu_si512(out.as_mut_ptr().add(k * TILE).cast(), d[k]);
                    offsets[k] = _mm512_dpbusd_epi32(offsets[k], _mm512_set1_epi8(OFFSET as i8), d[k]);
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
