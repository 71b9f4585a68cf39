//! Tiles of codes in whole numbers of 16 bits: the driver, over what an instruction set does with levels and factors ([`Whole`]).
//!
//! Levels of 1 to 5 bits are whole multiples of a step ([`STEP`]), so codes are exact as bytes. The other factor, a query or its probabilities in one
//! call, is rounded to 16 bits of its largest element ([`FULL`]), where llama.cpp rounds queries to the 11 of f16: beside what coding does to a row that
//! is nothing (`attention` has a test). Products are then summed exactly, in any order. Wider codes are rare and take the f32 way
//! ([`super::tiles_float`]). Must not know about bases or heads, nor about any instruction.

use super::lanes::{LANES, ROUND};
use super::memory::{Ahead, Lines};
use super::products::{Pass, Products, Projected, BATCH};
use super::projection::Projection;
use super::tiles_float::{self, Unpack};
use crate::layout::gain::Gains;
use crate::layout::quant::{coefficient_bytes, STEP};
use crate::layout::widths::{with_width, Run};
use crate::layout::{Widths, TILE};

/// What the largest element of a factor becomes that is rounded to a whole number: two digits of base 256 are then between -128 and 127, and
/// products with levels of a byte stay under 2^22.
pub const FULL: f32 = 32_630.0;
/// What makes levels unsigned where an instruction wants them so.
pub const OFFSET: i32 = 128;
/// Bytes of a factor's number.
const NUMBER: usize = 2;
/// Most queries whose sums of values are made together.
const MOST_QUERIES: usize = 8;

/// Queries whose scores are made together.
pub struct Queries<'a> {
    /// How many.
    pub n: usize,
    /// What [`Whole::digits`] made of each, `padded` numbers.
    pub digits: &'a [u8],
    /// See `digits`.
    pub padded: usize,
    /// What [`Whole::offsets`] found for them.
    pub offsets: &'a [i32],
    /// For each what a unit of its sums stands for.
    pub scales: &'a [f32],
}

/// Where scores of some queries go, and what makes them of sums.
pub struct Scores<'a> {
    /// Rows of scores, `stride` apart.
    pub out: &'a mut [f32],
    /// See `out`.
    pub stride: usize,
    /// Sums in f32, 64 for each query, that belong to those made here.
    pub wide: Option<&'a [f32]>,
    /// What is to be done.
    pub pass: Pass,
    /// Per row.
    pub gains: &'a [f32; TILE],
    /// Per query: its product with the mean key.
    pub means: &'a [f32],
    /// Factor on all scores.
    pub scale: f32,
    /// Per query: its largest score so far, in lanes.
    pub largest: &'a mut [[f32; LANES]],
    /// What will be read later.
    pub ahead: &'a mut Ahead,
}

/// Where sums of values go, and what their factors are.
pub struct Sums<'a, W: Whole> {
    /// Queries.
    pub queries: usize,
    /// What [`Whole::row_digits`] made of the probabilities of each, a number for each row of all tiles.
    pub digits: &'a [u8],
    /// What it found levels' offsets to add to the sums of each.
    pub offsets: [W::Offset; MOST_QUERIES],
    /// For each what a unit of its sums stands for, but for the step of the levels.
    pub scales: [f32; MOST_QUERIES],
    /// Per coefficient: 16 lanes for each of `n` queries, from the first of these on.
    pub out: &'a mut [f32],
    /// See `out`.
    pub n: usize,
    /// Room for the levels of two coefficients of all tiles, [`Whole::LEVEL_BYTES`] each, in whole cache lines.
    pub levels: &'a mut [u8],
    /// What will be read later.
    pub ahead: &'a mut Ahead,
}

/// What an instruction set does with levels, a byte each, and factors, two bytes each. How both lie in memory is its own affair.
///
/// Functions are `unsafe` because the set must be there; they look at no sizes but those that they are said to.
pub trait Whole: Sized {
    /// What computes in f32 beside it.
    type Float: Unpack;
    /// What is taken from sums of values because levels had something added.
    type Offset: Copy;
    /// Nothing.
    const NO_OFFSET: Self::Offset;
    /// Numbers that are taken from the scores' sums of a query for the same reason.
    const OFFSETS: usize;
    /// Queries whose scores are made together.
    const QUERIES: usize;
    /// Queries whose sums of values are made together, [`MOST_QUERIES`] at most.
    const VALUE_QUERIES: usize;
    /// Most coefficients of a row whose sums stay in 32 bits.
    const MOST: usize;
    /// Coefficients that [`Whole::arrange`] brings together.
    const GROUP: usize;
    /// Bytes that a level takes where products are made.
    const LEVEL_BYTES: usize;

    /// See [`super::Kernels::hold`].
    ///
    /// # Safety
    /// The set is there.
    #[inline(always)]
    unsafe fn hold(matrix: &[f32], d: usize, to: &mut Projection) {
        // SAFETY: the caller's.
        unsafe { tiles_float::hold::<Self::Float>(matrix, d, to) }
    }
    /// See [`super::Kernels::project`].
    ///
    /// # Safety
    /// The set is there.
    #[inline(always)]
    unsafe fn project(by: &Projection, rows: &[f32], n: usize, columns: usize, out: &mut [f32], work: &mut Lines) {
        // SAFETY: the caller's.
        unsafe { tiles_float::project::<Self::Float>(by, rows, n, columns, out, work) }
    }
    /// The gains of the rows of a tile by their codes.
    ///
    /// # Safety
    /// The set is there.
    #[inline(always)]
    unsafe fn lookup(gains: &Gains, codes: &[u8; TILE], out: &mut [f32; TILE]) {
        // SAFETY: the caller's.
        unsafe { tiles_float::lookup::<Self::Float>(gains, codes, out) }
    }
    /// The levels of a packed coefficient.
    ///
    /// # Safety
    /// The set is there; `packed` has the bytes of a coefficient of `WIDTH` bits.
    unsafe fn unpack<const WIDTH: u32>(packed: &[u8], out: &mut [u8; TILE]);
    /// Levels, coefficient by coefficient in the first bytes, come to where [`Whole::scores`] wants them: all are used then.
    ///
    /// # Safety
    /// The set is there; there are whole groups.
    unsafe fn arrange(levels: &mut [u8]);
    /// Coefficients of a query to digits; returns what a unit of the sums stands for.
    ///
    /// # Safety
    /// The set is there; lengths are whole multiples of 64.
    unsafe fn digits(x: &[f32], out: &mut [u8]) -> f32;
    /// What levels' offsets add to sums with these digits: [`Whole::OFFSETS`] numbers.
    ///
    /// # Safety
    /// As [`Whole::digits`].
    unsafe fn offsets(digits: &[u8], out: &mut Vec<i32>);
    /// Scores of arranged levels.
    ///
    /// # Safety
    /// The set is there; what is lent covers as many queries as are said to be there.
    unsafe fn scores(levels: &[u8], queries: Queries, to: Scores);
    /// Probabilities of the rows of tiles to digits; returns what a unit of the sums stands for, and their offset.
    ///
    /// # Safety
    /// As [`Whole::digits`].
    unsafe fn row_digits(x: &[f32], out: &mut [u8]) -> (f32, Self::Offset);
    /// Add the sums of `C` coefficients, the first of which is number `j` and begins at byte `at` of each tile.
    ///
    /// # Safety
    /// The set is there; tiles have these coefficients, and what is lent covers all queries.
    unsafe fn values<const WIDTH: u32, const C: usize>(tiles: &[&[u8]], at: usize, j: usize, s: &mut Sums<Self>);
}

/// Bytes of levels by code with `offset` added, repeated to a vector: an index is looked at in its low bits only.
pub const fn table<const N: usize, const BYTES: usize>(units: &[i8; N], from: usize, n: usize, offset: i32) -> [u8; BYTES] {
    let mut out = [0; BYTES];
    let mut i = 0;
    while i < BYTES {
        out[i] = (units[from + i % n] as i32 + offset) as u8;
        i += 1;
    }
    out
}

/// Numbers as 16 bits of their largest; returns what one of these stands for.
#[inline(always)]
pub fn round(x: &[f32], out: &mut [i16]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    for x in x.as_chunks::<LANES>().0 {
        for (lane, x) in lanes.iter_mut().zip(x) {
            *lane = if x.abs() > *lane { x.abs() } else { *lane };
        }
    }
    let largest = lanes.into_iter().fold(0.0, f32::max);
    let up = if largest > 0.0 { FULL / largest } else { 0.0 };
    for (out, x) in out.iter_mut().zip(x) {
        *out = (x * up + ROUND).to_bits() as i16;
    }
    largest / FULL
}

/// Step of each narrow coefficient's levels, zeros behind the last up to `padded`.
fn fill_steps(p: &mut Projected, padded: usize) {
    if p.steps.0 == p.widths && p.steps.1.floats().len() >= padded {
        return;
    }
    p.steps.0 = p.widths;
    p.steps.1.resize(padded * 4);
    let steps = p.steps.1.floats_mut();
    let mut n = 0;
    for run in p.widths.narrow_runs() {
        steps[n..n + run.n].fill(STEP[run.bits as usize]);
        n += run.n;
    }
    steps[n..].fill(0.0);
}

/// See [`super::Kernels::prepare`].
///
/// # Safety
/// The set is there.
#[inline(always)]
pub unsafe fn prepare<W: Whole>(s: &mut Products, part: usize) {
    let (queries, p) = (s.frames * s.n, &mut s.parts[part]);
    let first = p.widths.narrow_from();
    let padded = (p.widths.rank() - first).next_multiple_of(TILE);
    fill_steps(p, padded);
    p.digits.resize(queries * padded * NUMBER);
    s.values.resize(padded * 4);
    p.scales.clear();
    p.offsets.clear();
    let scaled = &mut s.values.floats_mut()[..padded];
    for q in 0..queries {
        // What is read behind a query's last coefficient has a step of zero.
        let z = &p.z.floats()[q * p.stride + first..][..padded];
        for ((scaled, z), step) in scaled.iter_mut().zip(z).zip(p.steps.1.floats()) {
            *scaled = z * step;
        }
        let digits = &mut p.digits.bytes_mut()[q * padded * NUMBER..][..padded * NUMBER];
        // SAFETY: lengths are whole multiples of 64; the set is the caller's.
        unsafe {
            p.scales.push(W::digits(scaled, digits));
            W::offsets(digits, &mut p.offsets);
        }
    }
}

/// See [`super::Kernels::hold`].
///
/// # Safety
/// The set is there.
#[inline(always)]
pub unsafe fn hold<W: Whole>(matrix: &[f32], d: usize, to: &mut Projection) {
    // SAFETY: the set is the caller's.
    unsafe { W::hold(matrix, d, to) }
}

/// See [`super::Kernels::project`].
///
/// # Safety
/// The set is there.
#[inline(always)]
pub unsafe fn project<W: Whole>(by: &Projection, rows: &[f32], n: usize, columns: usize, out: &mut [f32], work: &mut Lines) {
    assert!(columns <= by.stride && columns.is_multiple_of(LANES) && rows.len() >= n * by.d && out.len() >= n * by.stride);
    // SAFETY: the set is the caller's.
    unsafe { W::project(by, rows, n, columns, out, work) }
}

/// See [`super::Kernels::lookup`].
///
/// # Safety
/// The set is there.
#[inline(always)]
pub unsafe fn lookup<W: Whole>(gains: &Gains, codes: &[u8], out: &mut [f32; TILE]) {
    let codes = codes.first_chunk().expect("a gain for each row");
    // SAFETY: the set is the caller's.
    unsafe { W::lookup(gains, codes, out) }
}

#[inline(always)]
unsafe fn unpack_run<W: Whole, const WIDTH: u32>(codes: &[u8], out: &mut [u8]) {
    for (packed, out) in codes.chunks_exact(coefficient_bytes(WIDTH)).zip(out.as_chunks_mut().0) {
        // SAFETY: the slice has the coefficient's bytes; the set is the caller's.
        unsafe { W::unpack::<WIDTH>(packed, out) }
    }
}

/// See [`super::Kernels::tile_scores`].
///
/// # Safety
/// The set is there. [`prepare`] was called.
#[inline(always)]
pub unsafe fn tile_scores<W: Whole>(s: &mut Products, pass: Pass, tiles: &[&[u8]], gains: &[[f32; TILE]], out: &mut [f32], stride: usize) {
    let widths = s.parts[pass.part].widths;
    let (first, bytes) = (widths.narrow_from(), widths.bytes());
    let (narrow, padded) = (widths.rank() - first, (widths.rank() - first).next_multiple_of(TILE));
    assert!(tiles.iter().all(|codes| codes.len() >= bytes) && gains.len() >= tiles.len());
    assert!(s.n > 0 && out.len() >= (s.n - 1) * stride + tiles.len() * TILE);
    // The first of the frame's queries.
    let base = s.frame * s.n;
    let p = &s.parts[pass.part];
    assert!(p.digits.bytes().len() >= (base + s.n) * padded * NUMBER && p.offsets.len() >= (base + s.n) * W::OFFSETS);
    assert!(p.scales.len() >= base + s.n && s.means.len() >= base + s.n && s.largest.len() >= s.n);
    // SAFETY: the set is the caller's, sizes were checked.
    unsafe {
        if narrow == 0 || narrow > W::MOST {
            tiles_float::tile_scores::<W::Float>(s, pass, tiles, gains, out, stride);
            return;
        }
        let length = narrow.next_multiple_of(W::GROUP) * TILE * W::LEVEL_BYTES;
        s.unpacked.resize(length);
        for ((t, codes), gains) in tiles.iter().enumerate().zip(gains) {
            if first > 0 {
                tiles_float::wide_sums::<W::Float>(s, pass.part, codes, first);
            }
            let levels = &mut s.unpacked.bytes_mut()[..length];
            for run in widths.narrow_runs().filter(|run| run.n > 0) {
                let (codes, levels) = (&codes[run.bytes()], &mut levels[(run.first - first) * TILE..][..run.n * TILE]);
                with_width!(narrow run.bits, WIDTH => unpack_run::<W, WIDTH>(codes, levels));
            }
            W::arrange(levels);
            let p = &s.parts[pass.part];
            for q in (0..s.n).step_by(W::QUERIES) {
                let digits = &p.digits.bytes()[(base + q) * padded * NUMBER..];
                let (offsets, scales) = (&p.offsets[(base + q) * W::OFFSETS..], &p.scales[base + q..]);
                let queries = Queries { n: W::QUERIES.min(s.n - q), digits, padded, offsets, scales };
                let wide = (first > 0).then(|| &s.sums.floats()[q * TILE..]);
                let (means, largest, ahead) = (&s.means[base + q..], &mut s.largest[q..], &mut s.ahead);
                let out = &mut out[q * stride + t * TILE..];
                W::scores(levels, queries, Scores { out, stride, wide, pass, gains, means, scale: s.scale, largest, ahead });
            }
        }
    }
}

/// Sums of a run of coefficients: two at a time, so that each load of probabilities serves both.
#[inline(always)]
unsafe fn value_run<W: Whole, const WIDTH: u32>(tiles: &[&[u8]], run: Run, s: &mut Sums<W>) {
    let at = |i: usize| run.at + i * coefficient_bytes(WIDTH);
    // SAFETY: the caller's.
    unsafe {
        for i in (0..run.n / 2 * 2).step_by(2) {
            W::values::<WIDTH, 2>(tiles, at(i), run.first + i, s);
        }
        if run.n % 2 == 1 {
            W::values::<WIDTH, 1>(tiles, at(run.n - 1), run.first + run.n - 1, s);
        }
    }
}

/// See [`super::Kernels::tile_values`].
///
/// # Safety
/// The set is there.
#[inline(always)]
pub unsafe fn tile_values<W: Whole>(widths: Widths, tiles: &[&[u8]], p: &[f32], stride: usize, n: usize, sums: &mut [f32], work: &mut Products) {
    let length = tiles.len() * TILE;
    // As many tiles' sums do not overflow.
    assert!(tiles.iter().all(|t| t.len() >= widths.bytes()) && tiles.len() <= BATCH);
    assert!(n > 0 && length <= stride && p.len() >= (n - 1) * stride + length && sums.len() >= widths.rank() * n * LANES);
    // SAFETY: the set is the caller's, sizes were checked.
    unsafe {
        tiles_float::wide_values::<W::Float>(widths, tiles, widths.narrow_from(), p, stride, n, sums, work);
        if widths.narrow_from() == widths.rank() {
            return;
        }
        work.unpacked.resize(length * W::VALUE_QUERIES * NUMBER);
        work.values.resize(length * 2 * W::LEVEL_BYTES);
        for q in (0..n).step_by(W::VALUE_QUERIES) {
            let queries = W::VALUE_QUERIES.min(n - q);
            let (mut offsets, mut scales) = ([W::NO_OFFSET; MOST_QUERIES], [0.0; MOST_QUERIES]);
            for i in 0..queries {
                let digits = &mut work.unpacked.bytes_mut()[i * length * NUMBER..][..length * NUMBER];
                (scales[i], offsets[i]) = W::row_digits(&p[(q + i) * stride..][..length], digits);
            }
            let (digits, levels, ahead) = (work.unpacked.bytes(), work.values.bytes_mut(), &mut work.ahead);
            let mut s = Sums::<W> { queries, digits, offsets, scales, out: &mut sums[q * LANES..], n, levels, ahead };
            for run in widths.narrow_runs() {
                with_width!(narrow run.bits, WIDTH => value_run::<W, WIDTH>(tiles, run, &mut s));
            }
        }
    }
}
