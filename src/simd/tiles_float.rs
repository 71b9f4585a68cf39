//! Tiles of codes in f32: unpacking, scores, and sums of values over rows. One body each, for every [`Unpack`].
//!
//! The way of coefficients with too many bits for whole numbers ([`super::tiles_whole`]), and of all at a level that does not multiply these faster.
//! Must not know about bases or heads.

use super::dense;
use super::dense::{MatMut, MatRef};
use super::lanes::{Lanes, LANES};
use super::products::{Pass, Products};
pub use super::projection::{hold, project};
use crate::layout::gain::Gains;
use crate::layout::quant::coefficient_bytes;
use crate::layout::widths::with_width;
use crate::layout::{Widths, TILE};

/// A level's way from codes to floats.
pub trait Unpack: Lanes {
    /// The 64 values of a packed coefficient.
    ///
    /// # Safety
    /// The level's features are there; `packed` has the bytes of a coefficient of `WIDTH` bits.
    unsafe fn unpack<const WIDTH: u32>(packed: &[u8], out: &mut [f32; TILE]);
}

#[inline(always)]
unsafe fn unpack_run<V: Unpack, const WIDTH: u32>(codes: &[u8], out: &mut [[f32; TILE]]) {
    for (packed, out) in codes.chunks_exact(coefficient_bytes(WIDTH)).zip(out) {
        // SAFETY: the slice has the coefficient's bytes; features are the caller's.
        unsafe { V::unpack::<WIDTH>(packed, out) }
    }
}

/// See [`super::Kernels::unpack`].
///
/// # Safety
/// The features of `V` are there.
#[inline(always)]
pub unsafe fn unpack<V: Unpack>(widths: Widths, codes: &[u8], out: &mut [[f32; TILE]]) {
    // SAFETY: features are the caller's.
    unsafe { unpack_from::<V>(widths, codes, 0, out) }
}

/// The values of coefficients of a tile from number `first` on, as many as there are in `out`.
///
/// # Safety
/// The features of `V` are there.
#[inline(always)]
unsafe fn unpack_from<V: Unpack>(widths: Widths, codes: &[u8], first: usize, out: &mut [[f32; TILE]]) {
    let (mut out, mut skip) = (out, first);
    for run in widths.runs() {
        let skipped = skip.min(run.n);
        skip -= skipped;
        let codes = &codes[run.bytes()][skipped * coefficient_bytes(run.bits)..];
        let (values, rest) = out.split_at_mut((run.n - skipped).min(out.len()));
        // SAFETY: features are the caller's.
        unsafe { with_width!(run.bits, WIDTH => unpack_run::<V, WIDTH>(codes, values)) }
        out = rest;
    }
}

/// `sums[j][q] += sum_i values[j][i] * p[q][i]` for `Q` queries, each sum left in 16 lanes. `n` queries lie between coefficients.
#[inline(always)]
unsafe fn values_block<V: Lanes, const Q: usize>(values: &[[f32; TILE]], p: *const f32, stride: usize, sums: *mut f32, n: usize) {
    for (j, values) in values.iter().enumerate() {
        for lane in (0..LANES).step_by(V::N) {
            // SAFETY: `add_values` checked that all of it is there; features are the caller's.
            unsafe {
                let sums = sums.add(j * n * LANES + lane);
                let mut acc: [V; Q] = std::array::from_fn(|q| V::load(sums.add(q * LANES)));
                for i in (0..TILE).step_by(LANES) {
                    let x = V::load(values.as_ptr().add(i + lane));
                    for (q, acc) in acc.iter_mut().enumerate() {
                        *acc = acc.add_product(x, V::load(p.add(q * stride + i + lane)));
                    }
                }
                for (q, acc) in acc.into_iter().enumerate() {
                    acc.store(sums.add(q * LANES));
                }
            }
        }
    }
}

/// `sums[j][q] += sum_i values[j][i] * p[q][i]` for `n` queries, each sum left in 16 lanes; rows of `p` are `stride` apart.
///
/// # Safety
/// The features of `V` are there.
#[inline(always)]
unsafe fn add_values<V: Lanes>(values: &[[f32; TILE]], p: &[f32], stride: usize, n: usize, sums: &mut [f32]) {
    assert!(sums.len() >= values.len() * n * LANES && p.len() >= (n - 1) * stride + TILE);
    for q in (0..n).step_by(4) {
        // SAFETY: the queries from `q` on are inside of what was checked.
        unsafe {
            let (p, sums) = (p.as_ptr().add(q * stride), sums.as_mut_ptr().add(q * LANES));
            match n - q {
                1 => values_block::<V, 1>(values, p, stride, sums, n),
                2 => values_block::<V, 2>(values, p, stride, sums, n),
                3 => values_block::<V, 3>(values, p, stride, sums, n),
                _ => values_block::<V, 4>(values, p, stride, sums, n),
            }
        }
    }
}

/// `sums[q] = sum_j z[q][j] * value[j]` over the first `first` coefficients of a part, zeros when there is none.
///
/// # Safety
/// The features of `V` are there.
#[inline(always)]
pub unsafe fn wide_sums<V: Unpack>(s: &mut Products, part: usize, codes: &[u8], first: usize) {
    s.sums.resize(s.n * TILE * 4);
    let sums = &mut s.sums.floats_mut()[..s.n * TILE];
    sums.fill(0.0);
    s.values.resize(first * TILE * 4);
    let (p, values) = (&s.parts[part], &mut s.values.floats_mut()[..first * TILE]);
    // SAFETY: features are the caller's.
    unsafe {
        unpack_from::<V>(p.widths, codes, 0, values.as_chunks_mut().0);
        let z = &p.z.floats()[s.frame * s.n * p.stride..];
        dense::multiply::<V>(MatRef::new(z, p.stride), MatRef::new(values, TILE), MatMut::new(sums, TILE), s.n, first, TILE);
    }
}

/// See [`super::Kernels::lookup`].
///
/// # Safety
/// The features of `V` are there.
#[inline(always)]
pub unsafe fn lookup<V: Lanes>(gains: &Gains, codes: &[u8], out: &mut [f32; TILE]) {
    let codes = &codes[..TILE];
    for i in (0..TILE).step_by(V::N) {
        // SAFETY: both have the rows of a tile; features are the caller's.
        unsafe { V::lookup(&gains.values, codes.as_ptr().add(i)).store(out.as_mut_ptr().add(i)) }
    }
}

/// Cache lines that are asked for with the scores of a tile, and with the values of a block of coefficients.
const LINES_A_TILE: usize = 20;
const LINES_A_BLOCK: usize = 4;

/// See [`super::Kernels::prepare`]: queries are ready as they are.
///
/// # Safety
/// None; the other ways have some.
#[inline(always)]
pub unsafe fn prepare<V: Unpack>(_: &mut Products, _: usize) {}

/// See [`super::Kernels::tile_scores`].
///
/// # Safety
/// The features of `V` are there.
#[inline(always)]
pub unsafe fn tile_scores<V: Unpack>(s: &mut Products, pass: Pass, tiles: &[&[u8]], gains: &[[f32; TILE]], out: &mut [f32], stride: usize) {
    for ((t, codes), gains) in tiles.iter().enumerate().zip(gains) {
        s.ahead.fetch(LINES_A_TILE);
        // SAFETY: features are the caller's.
        unsafe { wide_sums::<V>(s, pass.part, codes, s.parts[pass.part].widths.rank()) }
        scale_sums(s, pass, gains, &mut out[t * TILE..], stride);
    }
}

/// Sums of products of a part to scores.
#[inline(always)]
fn scale_sums(s: &mut Products, pass: Pass, gains: &[f32; TILE], out: &mut [f32], stride: usize) {
    let means = &s.means[s.frame * s.n..];
    let queries = out.chunks_mut(stride).take(s.n).zip(s.sums.floats().as_chunks::<TILE>().0).zip(means).zip(&mut s.largest);
    for (((out, sums), mean), largest) in queries {
        let out = (&mut out[..TILE]).try_into().expect("invariant: the rows of a tile");
        to_scores(sums, pass, gains, (*mean, s.scale), out, largest);
    }
}

/// One query's sums of products of a part to scores.
#[inline(always)]
pub fn to_scores(sums: &[f32; TILE], pass: Pass, gains: &[f32; TILE], (mean, scale): (f32, f32), out: &mut [f32; TILE], largest: &mut [f32; LANES]) {
    if !pass.add {
        *out = [0.0; TILE];
    }
    for ((out, sum), gain) in out.iter_mut().zip(sums).zip(gains) {
        *out += sum * gain;
    }
    if pass.finish {
        dense::scale_scores(out, mean, scale, largest);
    }
}

/// Coefficients whose sums are made together.
const BLOCK: usize = 16;

/// [`add_values`] of the first `first` coefficients of some tiles, whose probabilities follow each other in `p`.
///
/// # Safety
/// The features of `V` are there.
#[expect(clippy::too_many_arguments, reason = "two factors and where their product goes")]
#[inline(always)]
pub unsafe fn wide_values<V: Unpack>(
    widths: Widths,
    tiles: &[&[u8]],
    first: usize,
    p: &[f32],
    stride: usize,
    n: usize,
    sums: &mut [f32],
    work: &mut Products,
) {
    work.values.resize(BLOCK * TILE * 4);
    let (values, _) = work.values.floats_mut()[..BLOCK * TILE].as_chunks_mut();
    // Few coefficients at a time: their sums, in lanes, stay in the first cache over all tiles.
    for j in (0..first).step_by(BLOCK) {
        let values = &mut values[..BLOCK.min(first - j)];
        for (t, codes) in tiles.iter().enumerate() {
            work.ahead.fetch(LINES_A_BLOCK);
            // SAFETY: features are the caller's.
            unsafe {
                unpack_from::<V>(widths, codes, j, values);
                add_values::<V>(values, &p[t * TILE..], stride, n, &mut sums[j * n * LANES..]);
            }
        }
    }
}

/// See [`super::Kernels::tile_values`].
///
/// # Safety
/// The features of `V` are there.
#[inline(always)]
pub unsafe fn tile_values<V: Unpack>(widths: Widths, tiles: &[&[u8]], p: &[f32], stride: usize, n: usize, sums: &mut [f32], work: &mut Products) {
    // SAFETY: features are the caller's.
    unsafe { wide_values::<V>(widths, tiles, widths.rank(), p, stride, n, sums, work) }
}
