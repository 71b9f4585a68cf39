//! Tiles of codes in whole numbers of 16 bits, in plain Rust that every target vectorises.
//!
//! Levels of 1 to 5 bits are whole multiples of a step ([`quant::STEP`]), and a query, or its probabilities in one call, is rounded to 16 bits of its
//! largest element ([`FULL`]); products are then summed exactly. Compilers know an instruction for sums of products of neighbours (`pmaddwd`,
//! `smlal`), so scores want each row's coefficients together: codes are unpacked as bytes, then transposed. Wider codes are rare and take the
//! f32 way.

use super::lanes::{Plain, LANES, ROUND};
use super::products::{Pass, Products};
use super::tile::{self, FULL};
use super::unpack::unpack_units;
use crate::layout::quant::{self, STEP};
use crate::layout::widths::with_width;
use crate::layout::{Widths, TILE};

/// Coefficients of a row that are summed at once; as many as a tile has rows, so that both sums are one function.
const BLOCK: usize = TILE;
/// Queries whose digits lie in the first cache together.
const QUERIES: usize = 8;

/// 64 numbers relative to the largest of some.
type Digits = [i16; TILE];

/// The sum of 64 products. Written out in eights and not inlined: only so does the compiler make one reduction of it, with its best instruction for
/// that. In a loop it goes for four sums at a time, and in view of where the numbers come from for other products.
#[inline(never)]
fn dot(a: &Digits, b: &Digits) -> i32 {
    let product = |i: usize| i32::from(a[i]) * i32::from(b[i]);
    let eight = |i: usize| {
        let four = |i: usize| product(i) + product(i + 1) + product(i + 2) + product(i + 3);
        four(8 * i) + four(8 * i + 4)
    };
    eight(0) + eight(1) + eight(2) + eight(3) + eight(4) + eight(5) + eight(6) + eight(7)
}

/// Numbers as 16 bits of their largest; returns what one of these stands for.
#[inline(always)]
pub fn round(x: &[f32], out: &mut [Digits]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    for x in x.as_chunks::<LANES>().0 {
        for (lane, x) in lanes.iter_mut().zip(x) {
            *lane = if x.abs() > *lane { x.abs() } else { *lane };
        }
    }
    let largest = lanes.into_iter().fold(0.0, f32::max);
    let up = if largest > 0.0 { FULL / largest } else { 0.0 };
    for (out, x) in out.as_flattened_mut().iter_mut().zip(x) {
        *out = (x * up + ROUND).to_bits() as i16;
    }
    largest / FULL
}

/// See [`super::Kernels::prepare`].
#[inline(always)]
pub fn prepare(s: &mut Products, part: usize) {
    let (queries, p) = (s.frames * s.n, &mut s.parts[part]);
    let (first, rank) = (p.widths.narrow_from(), p.widths.rank());
    let padded = (rank - first).next_multiple_of(BLOCK);
    tile::fill_steps(p, padded);
    p.digits.resize(queries * padded * 2);
    s.values.resize(padded * 4);
    p.scales.clear();
    let scaled = &mut s.values.floats_mut()[..padded];
    let (digits, _) = bytemuck::cast_slice_mut::<u8, i16>(p.digits.bytes_mut()).as_chunks_mut();
    for q in 0..queries {
        // What is read behind a query's last coefficient has a step of zero.
        let z = &p.z.floats()[q * p.stride + first..][..padded];
        for ((scaled, z), step) in scaled.iter_mut().zip(z).zip(p.steps.1.floats()) {
            *scaled = z * step;
        }
        p.scales.push(round(scaled, &mut digits[q * padded / BLOCK..][..padded / BLOCK]));
    }
}

#[inline(always)]
fn unpack_run(width: u32, codes: &[u8], out: &mut [[i8; TILE]]) {
    for (packed, out) in codes.chunks_exact(quant::coefficient_bytes(width)).zip(out) {
        *out = unpack_units(width, packed);
    }
}

/// `out[i] = [a[i], b[i]]`.
#[inline(always)]
fn zip<T: Copy>(a: &[T; TILE], b: &[T; TILE], out: &mut [[T; 2]; TILE]) {
    for i in 0..TILE {
        out[i] = [a[i], b[i]];
    }
}

/// Levels of coefficients become levels of rows.
#[inline(always)]
fn transpose(units: &[[i8; TILE]], rows: &mut [Digits]) {
    let (mut twos, mut fours, mut bytes) = ([[[0; 2]; TILE]; 4], [[[[0; 2]; 2]; TILE]; 2], [[0; BLOCK]; TILE]);
    for (i, units) in units.as_chunks::<8>().0.iter().enumerate() {
        for (k, two) in twos.iter_mut().enumerate() {
            zip(&units[2 * k], &units[2 * k + 1], two);
        }
        for (k, four) in fours.iter_mut().enumerate() {
            zip(&twos[2 * k], &twos[2 * k + 1], four);
        }
        for ((row, low), high) in bytes.iter_mut().zip(&fours[0]).zip(&fours[1]) {
            row[8 * i..][..8].copy_from_slice([*low, *high].as_flattened().as_flattened());
        }
    }
    for (x, unit) in rows.as_flattened_mut().iter_mut().zip(bytes.as_flattened()) {
        *x = i16::from(*unit);
    }
}

/// See [`super::Kernels::tile_scores`].
pub fn tile_scores(s: &mut Products, pass: Pass, codes: &[u8], gains: &[f32; TILE], out: &mut [f32], stride: usize) {
    let widths = s.parts[pass.part].widths;
    let (first, rank) = (widths.narrow_from(), widths.rank());
    let blocks = (rank - first).div_ceil(BLOCK);
    // SAFETY: plain Rust needs no features.
    unsafe { tile::wide_sums::<Plain, 1>(s, pass.part, codes, first) }
    s.unpacked.resize(blocks * BLOCK * TILE);
    let (units, _) = bytemuck::cast_slice_mut::<u8, i8>(s.unpacked.bytes_mut()).as_chunks_mut();
    for run in widths.narrow_runs() {
        let (codes, units) = (&codes[run.bytes()], &mut units[run.first - first..][..run.n]);
        with_width!(narrow run.bits, WIDTH => unpack_run(WIDTH, codes, units));
    }
    s.values.resize(TILE * BLOCK * 2);
    let (rows, _) = bytemuck::cast_slice_mut::<f32, i16>(s.values.floats_mut()).as_chunks_mut();
    let p = &s.parts[pass.part];
    let (digits, _) = bytemuck::cast_slice::<u8, i16>(p.digits.bytes()).as_chunks();
    // The frame's queries.
    let (digits, scales) = (&digits[s.frame * s.n * blocks..], &p.scales[s.frame * s.n..]);
    for (block, units) in units.chunks_exact(BLOCK).enumerate().take(blocks) {
        transpose(units, rows);
        for (q, out) in s.sums.floats_mut().as_chunks_mut::<TILE>().0.iter_mut().enumerate().take(s.n) {
            let mut sums = [0; TILE];
            for (sum, row) in sums.iter_mut().zip(&*rows) {
                *sum = dot(row, &digits[q * blocks + block]);
            }
            for (out, sum) in out.iter_mut().zip(sums) {
                *out += sum as f32 * scales[q];
            }
        }
    }
    tile::scale_sums(s, pass, gains, out, stride);
}

/// Probabilities of some queries, `tiles` times 64 for each, and what one of theirs stands for; `rows` is memory for the levels of a coefficient.
struct Factors<'a> {
    digits: &'a [Digits],
    scales: &'a [f32],
    rows: &'a mut [Digits],
}

/// Sums of a run of coefficients, the first of which begins at byte `from` of each tile; sums of `n` queries lie between coefficients.
#[inline(always)]
fn value_run(width: u32, tiles: &[&[u8]], from: usize, f: &mut Factors, sums: &mut [f32], n: usize) {
    for (i, sums) in sums.chunks_mut(n * LANES).enumerate() {
        let at = from + i * quant::coefficient_bytes(width);
        // Levels of all tiles before all sums: the compiler would make other products of what it knows to be bytes.
        for (row, tile) in f.rows.iter_mut().zip(tiles) {
            let units = unpack_units(width, &tile[at..at + quant::coefficient_bytes(width)]);
            for (x, unit) in row.iter_mut().zip(units) {
                *x = i16::from(unit);
            }
        }
        for ((sum, digits), scale) in sums.iter_mut().step_by(LANES).zip(f.digits.chunks_exact(tiles.len())).zip(f.scales) {
            // 64 products stay under 2^28, and as many of these as there are tiles are more than 32 bits.
            let total: i64 = f.rows.iter().zip(digits).map(|(row, digits)| i64::from(dot(row, digits))).sum();
            *sum += total as f32 * (scale * STEP[width as usize]);
        }
    }
}

/// See [`super::Kernels::tile_values`].
pub fn tile_values(widths: Widths, tiles: &[&[u8]], p: &[f32], stride: usize, n: usize, sums: &mut [f32], work: &mut Products) {
    let (first, length) = (widths.narrow_from(), tiles.len() * TILE);
    // SAFETY: plain Rust needs no features.
    unsafe { tile::wide_values::<Plain>(widths, tiles, first, p, stride, n, sums, work) }
    work.unpacked.resize(QUERIES * length * 2);
    work.values.resize(length * 2);
    let (digits, _) = bytemuck::cast_slice_mut::<u8, i16>(work.unpacked.bytes_mut()).as_chunks_mut();
    let (rows, _) = bytemuck::cast_slice_mut::<f32, i16>(work.values.floats_mut()).as_chunks_mut();
    for q in (0..n).step_by(QUERIES) {
        let queries = QUERIES.min(n - q);
        let digits = &mut digits[..queries * tiles.len()];
        let mut scales = [0.0; QUERIES];
        for ((scale, digits), p) in scales.iter_mut().zip(digits.chunks_exact_mut(tiles.len())).zip(p[q * stride..].chunks(stride)) {
            *scale = round(&p[..length], digits);
        }
        let mut factors = Factors { digits, scales: &scales[..queries], rows: &mut rows[..tiles.len()] };
        for run in widths.narrow_runs() {
            let sums = &mut sums[run.first * n * LANES..(run.first + run.n) * n * LANES];
            let sums = sums.get_mut(q * LANES..).unwrap_or_default();
            with_width!(narrow run.bits, WIDTH => value_run(WIDTH, tiles, run.at, &mut factors, sums, n));
        }
    }
}
