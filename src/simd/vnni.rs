//! Tiles of codes in whole numbers (AVX-512 VNNI and VBMI): codes of 1 to 5 bits become bytes, and 64 products of bytes are one instruction.
//!
//! Levels of these widths are whole multiples of a step ([`quant::STEP`]), so codes are exact as bytes; they are stored with 128 added, because the
//! instruction multiplies unsigned by signed. The other factor, queries or probabilities, is cut into two digits of base 256 relative to
//! its largest element: 16 bits, where llama.cpp rounds queries to the 11 of f16. Beside what coding does to a row that is nothing
//! (`attention` has a test); a third digit would be as exact as f32 and took 3.3 of 28 ns per row and KV head. Sums of whole numbers do
//! not depend on their order. Wider codes are rare and take the f32 way.

#![expect(clippy::needless_range_loop, reason = "indices into arrays of registers are unrolled, iterators over them not always")]

use super::lanes::{Zmm, LANES};
use super::memory::Ahead;
use super::products::{Pass, Products, BATCH};
use super::tile::{self, FULL};
use crate::layout::quant::{self, STEP};
use crate::layout::widths::with_width;
use crate::layout::{Widths, TILE};
use std::arch::x86_64::*;

/// Digits of base 256 of a factor, the lowest first.
const DIGITS: usize = 2;
/// What is added to a level to make it unsigned.
pub const OFFSET: i32 = 128;

/// Bytes of the levels by code, repeated to a vector: an index is looked at in its low bits only.
pub const fn table<const N: usize, const BYTES: usize>(units: &[i8; N], from: usize, n: usize) -> [u8; BYTES] {
    let mut out = [0; BYTES];
    let mut i = 0;
    while i < BYTES {
        out[i] = (units[from + i % n] as i32 + OFFSET) as u8;
        i += 1;
    }
    out
}

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

/// See [`super::Kernels::prepare`].
///
/// # Safety
/// AVX-512 F, BW, VL, DQ, VNNI and VBMI are there.
#[inline(always)]
pub unsafe fn prepare(s: &mut Products, part: usize) {
    let (queries, s) = (s.frames * s.n, &mut s.parts[part]);
    let (first, rank) = (s.widths.narrow_from(), s.widths.rank());
    let padded = (rank - first).next_multiple_of(64);
    tile::fill_steps(s, padded);
    s.digits.resize(queries * DIGITS * padded);
    s.offsets.clear();
    s.scales.clear();
    assert!(queries == 0 || s.z.floats().len() >= (queries - 1) * s.stride + first + padded);
    for q in 0..queries {
        // SAFETY: sizes were checked or made above; features are the caller's. What is read behind a query's last coefficient has a step of zero.
        unsafe {
            let (z, steps) = (s.z.floats().as_ptr().add(q * s.stride + first), s.steps.1.floats().as_ptr());
            let at = |i: usize| _mm512_mul_ps(_mm512_loadu_ps(z.add(i)), _mm512_loadu_ps(steps.add(i)));
            let mut largest = _mm512_setzero_ps();
            for i in (0..padded).step_by(LANES) {
                largest = _mm512_max_ps(largest, _mm512_abs_ps(at(i)));
            }
            let largest = _mm512_reduce_max_ps(largest);
            s.scales.push(largest / FULL);
            let up = _mm512_set1_ps(if largest > 0.0 { FULL / largest } else { 0.0 });
            let out = s.digits.bytes_mut().as_mut_ptr().add(q * DIGITS * padded);
            for i in (0..padded).step_by(LANES) {
                let d = digits(_mm512_mul_ps(at(i), up));
                for k in 0..DIGITS {
                    _mm_storeu_si128(out.add(k * padded + i).cast(), d[k]);
                }
            }
            for k in 0..DIGITS {
                let mut sum = _mm512_setzero_si512();
                for i in (0..padded).step_by(64) {
                    sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(OFFSET as i8), _mm512_loadu_si512(out.add(k * padded + i).cast()));
                }
                s.offsets.push(_mm512_reduce_add_epi32(sum));
            }
        }
    }
}

/// `WIDTH` bits of `n` coefficients to bytes.
#[inline(always)]
unsafe fn unpack_run<const WIDTH: u32>(codes: &[u8], out: &mut [u8]) {
    for (packed, out) in codes.chunks_exact(quant::coefficient_bytes(WIDTH)).zip(out.chunks_exact_mut(TILE)) {
        // SAFETY: both slices have a coefficient's bytes; features are the caller's.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), bytes::<WIDTH>(packed.as_ptr())) }
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

/// Scores of `Q` queries: `rows` has four interleaved vectors for every four coefficients.
#[inline(always)]
unsafe fn scores<const Q: usize>(rows: &[u8], digits: *const u8, padded: usize, offsets: &[i32], scales: &[f32], s: Scores) {
    // SAFETY: `tile_scores` checked what pointers cover; features are the caller's.
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
                let out = s.out.add(q * s.stride + l * LANES);
                let x = s.wide.map_or(x, |wide| _mm512_add_ps(_mm512_loadu_ps(wide.add(q * TILE + l * LANES)), x));
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

/// See [`super::Kernels::tile_scores`].
///
/// # Safety
/// As [`prepare`], which was called.
#[inline(always)]
pub unsafe fn tile_scores(s: &mut Products, pass: Pass, codes: &[u8], gains: &[f32; TILE], out: &mut [f32], stride: usize) {
    let widths = s.parts[pass.part].widths;
    let (first, rank) = (widths.narrow_from(), widths.rank());
    let (narrow, padded) = (rank - first, (rank - first).next_multiple_of(64));
    assert!(codes.len() >= widths.bytes() && s.n > 0 && out.len() >= (s.n - 1) * stride + TILE);
    // The first of the frame's queries.
    let base = s.frame * s.n;
    let p = &s.parts[pass.part];
    assert!(p.digits.bytes().len() >= (base + s.n) * DIGITS * padded && p.offsets.len() >= (base + s.n) * DIGITS);
    assert!(s.means.len() >= base + s.n && s.largest.len() >= s.n);
    // SAFETY: features are the caller's, sizes were checked.
    unsafe {
        if first > 0 || narrow == 0 {
            tile::wide_sums::<Zmm, 4>(s, pass.part, codes, first);
        }
        if narrow == 0 {
            tile::scale_sums(s, pass, gains, out, stride);
            return;
        }
        let p = &s.parts[pass.part];
        s.unpacked.resize(narrow.next_multiple_of(4) * TILE);
        let rows = &mut s.unpacked.bytes_mut()[..narrow.next_multiple_of(4) * TILE];
        for run in widths.narrow_runs() {
            let (codes, out) = (&codes[run.bytes()], &mut rows[(run.first - first) * TILE..][..run.n * TILE]);
            with_width!(narrow run.bits, WIDTH => unpack_run::<WIDTH>(codes, out));
        }
        for four in rows.chunks_exact_mut(4 * TILE) {
            let p = four.as_mut_ptr();
            let v = interleave(std::array::from_fn(|r| _mm512_loadu_si512(p.add(r * TILE).cast())));
            v.into_iter().enumerate().for_each(|(r, v)| _mm512_storeu_si512(p.add(r * TILE).cast(), v));
        }
        for q in (0..s.n).step_by(2) {
            let digits = p.digits.bytes().as_ptr().add((base + q) * DIGITS * padded);
            let (offsets, scales) = (&p.offsets[(base + q) * DIGITS..], &p.scales[base + q..]);
            let wide = (first > 0).then(|| s.sums.floats().as_ptr().add(q * TILE));
            let out = out.as_mut_ptr().add(q * stride);
            let (means, largest, ahead) = (&s.means[base + q..], &mut s.largest[q..], &mut s.ahead);
            let to = Scores { out, stride, wide, pass, gains, means, scale: s.scale, largest, ahead };
            match s.n - q {
                1 => scores::<1>(rows, digits, padded, offsets, scales, to),
                _ => scores::<2>(rows, digits, padded, offsets, scales, to),
            }
        }
    }
}

/// What sums of `Q` queries start from, and where they go.
struct Sums<'a> {
    /// Digits of the probabilities, `tiles x Q x DIGITS x 64`.
    digits: *const u8,
    /// Per query and digit, what the levels' offset adds to the sums, in lanes.
    offsets: &'a [__m512i],
    scales: [f32; 4],
    /// Coefficients' sums, 16 lanes for each of `n` queries, the first query's.
    out: *mut f32,
    n: usize,
    ahead: &'a mut Ahead,
}

/// Sums of `C` coefficients, the first of which is number `j` and begins at byte `at` of each tile.
#[inline(always)]
unsafe fn value_block<const WIDTH: u32, const C: usize, const Q: usize>(tiles: &[&[u8]], at: usize, j: usize, s: &mut Sums) {
    // SAFETY: `tile_values` checked what pointers cover; features are the caller's.
    unsafe {
        let mut acc = [[[_mm512_setzero_si512(); C]; DIGITS]; Q];
        let mut p = s.digits;
        for tile in tiles {
            s.ahead.fetch(1);
            let mut codes = [_mm512_setzero_si512(); C];
            for c in 0..C {
                codes[c] = bytes::<WIDTH>(tile.as_ptr().add(at + c * quant::coefficient_bytes(WIDTH)));
            }
            for q in 0..Q {
                for d in 0..DIGITS {
                    let x = _mm512_load_si512(p.add((q * DIGITS + d) * TILE).cast());
                    for c in 0..C {
                        acc[q][d][c] = _mm512_dpbusd_epi32(acc[q][d][c], codes[c], x);
                    }
                }
            }
            p = p.add(Q * DIGITS * TILE);
        }
        for c in 0..C {
            for q in 0..Q {
                let mut sums = [_mm512_setzero_si512(); DIGITS];
                for d in 0..DIGITS {
                    sums[d] = _mm512_sub_epi32(acc[q][d][c], s.offsets[q * DIGITS + d]);
                }
                let out = s.out.add(((j + c) * s.n + q) * LANES);
                let x = join(sums, _mm512_set1_ps(s.scales[q] * STEP[WIDTH as usize]));
                _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), x));
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

#[inline(always)]
unsafe fn values<const Q: usize>(
    widths: Widths,
    tiles: &[&[u8]],
    p: *const f32,
    stride: usize,
    (digit_bytes, ahead): (&mut [u8], &mut Ahead),
    out: *mut f32,
    n: usize,
) {
    // SAFETY: `tile_values` checked what pointers cover; features are the caller's.
    unsafe {
        let mut offsets = [_mm512_setzero_si512(); 4 * DIGITS];
        let mut scales = [0.0; 4];
        for q in 0..Q {
            let row = std::slice::from_raw_parts(p.add(q * stride), tiles.len() * TILE);
            let largest = magnitude(row);
            let up = _mm512_set1_ps(if largest > 0.0 { FULL / largest } else { 0.0 });
            scales[q] = largest / FULL;
            for t in 0..tiles.len() {
                let to = digit_bytes.as_mut_ptr().add((t * Q + q) * DIGITS * TILE);
                for i in (0..TILE).step_by(LANES) {
                    let d = digits(_mm512_mul_ps(_mm512_loadu_ps(row.as_ptr().add(t * TILE + i)), up));
                    d.into_iter().enumerate().for_each(|(k, d)| _mm_storeu_si128(to.add(k * TILE + i).cast(), d));
                }
                for d in 0..DIGITS {
                    let offset = &mut offsets[q * DIGITS + d];
                    *offset = _mm512_dpbusd_epi32(*offset, _mm512_set1_epi8(OFFSET as i8), _mm512_loadu_si512(to.add(d * TILE).cast()));
                }
            }
        }
        let mut s = Sums { digits: digit_bytes.as_ptr(), offsets: &offsets, scales, out, n, ahead };
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
    assert!(tiles.iter().all(|t| t.len() >= widths.bytes()) && tiles.len() <= BATCH);
    assert!(n > 0 && length <= stride && p.len() >= (n - 1) * stride + length && sums.len() >= widths.rank() * n * LANES);
    // SAFETY: features are the caller's, sizes were checked.
    unsafe {
        tile::wide_values::<Zmm>(widths, tiles, widths.narrow_from(), p, stride, n, sums, work);
        if widths.narrow_from() == widths.rank() {
            return;
        }
        work.unpacked.resize(length * 4 * DIGITS);
        for q in (0..n).step_by(4) {
            let (p, out) = (p.as_ptr().add(q * stride), sums.as_mut_ptr().add(q * LANES));
            let digits = (work.unpacked.bytes_mut(), &mut work.ahead);
            match n - q {
                1 => values::<1>(widths, tiles, p, stride, digits, out, n),
                2 => values::<2>(widths, tiles, p, stride, digits, out, n),
                3 => values::<3>(widths, tiles, p, stride, digits, out, n),
                _ => values::<4>(widths, tiles, p, stride, digits, out, n),
            }
        }
    }
}
