//! Fit of one layer: second moments, weighted Karhunen-Loeve bases and the layer's bit widths.
//!
//! Keys are weighted by the second moment of the queries as tiles see them, which makes the *score* error diagonal; values by
//! the output projection. One bit budget covers all heads, K and V: a coefficient counts by what its error does to the layer's
//! output, which is proportional to the head's attention energy on rows that will be coded (most heads look at the window only).
//! Measured on the small model at 2 bits: budget per head 0.0029, per layer 0.0004 mean KL divergence. Must not know about arenas.

use super::bits::allocate;
use super::Basis;
use crate::config::{LayerGeometry, BANDS, TILE};
use crate::error::{Error, Result};
use crate::rope::{Rope, Turn};
use crate::simd::{Kernels, Widths};
use faer::{Mat, Side};

/// Energy every head gets on top of its own, as a share of the layer's mean: insurance for heads that wake up later. Simulated
/// at 2 bits on the small model, mean KL divergence at a floor of 1 %, 3 %, 10 %, 30 %: 0.00062, 0.00072, 0.00096, 0.00133. The younger
/// bands take more: their rows become neighbours again when a long answer is taken back.
const ENERGY_FLOOR: [f64; BANDS] = [0.1, 0.1, 0.02];
/// Own energy, as a share of the layer's mean, at which half of that floor is granted: a head whose attention never leaves the
/// window (scores far apart) would not wake up, and its wide scores would take the bits of the others.
const DORMANT: f64 = 1e-5;
/// Least eigenvalue of a weight matrix, as a share of its mean eigenvalue.
const DAMP: f64 = 1e-3;
/// Distances at which tiles will look at a query, in rows; extended by doubling up to the context.
const DISTANCES: [i64; 9] = [64, 128, 192, 320, 512, 768, 1024, 1536, 2048];

/// Where and when something was: enough to know what sees what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Position in its sequence.
    pub pos: i32,
    /// Sequence.
    pub seq: i32,
}

/// Rows and queries a layer is fitted on; `k`, `k_framed` and `v` hold one vector per KV head, rows one after another.
pub struct Sample<'a> {
    /// Where each row stands.
    pub rows: &'a [Place],
    /// Keys as the model gives them (roped).
    pub k: Vec<Vec<f32>>,
    /// Keys in the frames of the tiles they will lie in.
    pub k_framed: Vec<Vec<f32>>,
    /// Values.
    pub v: Vec<Vec<f32>>,
    /// Where each query stands.
    pub queries: &'a [Place],
    /// Roped queries, one vector per KV head: query-major, then the heads of its group.
    pub q: Vec<Vec<f32>>,
    /// Rows of the output projection, `n_head * d_v` each; empty for identity.
    pub projection: &'a [f32],
    /// Scale of the scores.
    pub scale: f32,
    /// Soft cap of the scores, 0 for none.
    pub softcap: f32,
    /// Rows nearer than this stay exact.
    pub window: i32,
    /// Longest distance there can be.
    pub n_cells: i64,
    /// Rows behind the window at which each band ends.
    pub band_ends: [i64; BANDS],
}

struct Moments {
    mean: Vec<f32>,
    covariance: Mat<f64>,
}

fn to_matrix(d: usize, upper: &[f32], scale: f64) -> Mat<f64> {
    Mat::from_fn(d, d, |i, j| f64::from(upper[i.min(j) * d + i.max(j)]) * scale)
}

/// `sum += weight * x x^T`, upper triangle.
fn add_outer(kernels: &Kernels, sum: &mut [f32], x: &[f32], weight: f32) {
    let d = x.len();
    for (i, xi) in x.iter().enumerate() {
        (kernels.accumulate)(&x[i..], &[weight * xi], &mut sum[i * d + i..(i + 1) * d]);
    }
}

fn moments(kernels: &Kernels, rows: &[f32], d: usize) -> Moments {
    let n = (rows.len() / d).max(1) as f64;
    let mut mean = vec![0.0f64; d];
    for row in rows.chunks_exact(d) {
        mean.iter_mut().zip(row).for_each(|(m, x)| *m += f64::from(*x) / n);
    }
    let mean: Vec<f32> = mean.iter().map(|m| *m as f32).collect();
    let (mut sum, mut centred) = (vec![0.0f32; d * d], vec![0.0f32; d]);
    for row in rows.chunks_exact(d) {
        centred.iter_mut().zip(row).zip(&mean).for_each(|((c, x), m)| *c = x - m);
        add_outer(kernels, &mut sum, &centred, 1.0);
    }
    Moments { mean, covariance: to_matrix(d, &sum, 1.0 / n) }
}

fn eigen(m: &Mat<f64>) -> Result<(Vec<f64>, Mat<f64>)> {
    let e = m.self_adjoint_eigen(Side::Lower).map_err(|e| Error::Numeric(format!("eigenvalues did not converge: {e:?}")))?;
    let values = e.S().column_vector().iter().copied().collect();
    Ok((values, e.U().to_owned()))
}

/// Eigenvectors of `W^(1/2) C W^(1/2)`: decreasing eigenvalues, and matrices of full rank.
struct Transform {
    variance: Vec<f64>,
    encode: Mat<f64>,
    decode: Mat<f64>,
}

fn transform(covariance: &Mat<f64>, weight: &Mat<f64>) -> Result<Transform> {
    let d = covariance.nrows();
    let (values, vectors) = eigen(weight)?;
    let mean = values.iter().sum::<f64>() / d as f64;
    let root: Vec<f64> = values.iter().map(|v| v.max(mean * DAMP).max(1e-30).sqrt()).collect();
    let scaled = |power: i32| {
        let left = Mat::from_fn(d, d, |i, j| vectors[(i, j)] * root[j].powi(power));
        &left * vectors.transpose()
    };
    let (half, inverse) = (scaled(1), scaled(-1));
    let (values, vectors) = eigen(&(&half * covariance * &half))?;
    // A floor relative to the largest eigenvalue: a direction without variance gets no bits, but must divide safely.
    let floor = values.iter().fold(0.0f64, |a, x| a.max(*x)) * 1e-12;
    let variance: Vec<f64> = values.iter().rev().map(|v| v.max(floor).max(1e-30)).collect();
    let flipped = Mat::from_fn(d, d, |i, j| vectors[(i, d - 1 - j)]);
    let encode = Mat::from_fn(d, d, {
        let e = flipped.transpose() * &half;
        let v = &variance;
        move |i, j| e[(i, j)] / v[i].sqrt()
    });
    let decode = Mat::from_fn(d, d, {
        let e = flipped.transpose() * &inverse;
        let v = &variance;
        move |i, j| e[(i, j)] * v[i].sqrt()
    });
    Ok(Transform { variance, encode, decode })
}

/// The basis with what each band codes; `widths` holds a width per coefficient, which falls with the coefficient's variance.
fn build_basis(d: usize, mean: Vec<f32>, t: &Transform, widths: [&[u32]; BANDS]) -> Basis {
    let widths = widths.map(|band| Widths { counts: Widths::BITS.map(|bits| band.iter().filter(|w| **w == bits).count()) });
    let mut basis = Basis { d, widths, mean, ..Basis::default() };
    let rank = basis.rank();
    let rows = |m: &Mat<f64>| (0..rank).flat_map(|j| (0..d).map(move |i| (j, i))).map(|at| m[at] as f32).collect();
    (basis.encode, basis.decode) = (rows(&t.encode), rows(&t.decode));
    basis.weight = t.variance[..rank].iter().map(|v| (v / t.variance[0]) as f32).collect();
    basis
}

/// Attention energy of each query head of a group on rows that will be coded: `E[sum of p^2 over rows outside the window]`, for
/// each band those up to its end. A fit sees few rows as old as those of the last bands, so these count all the younger ones, too.
fn energies(kernels: &Kernels, s: &Sample, g: &LayerGeometry, head: usize) -> Vec<[f64; BANDS]> {
    let (group, d) = (g.group(), g.d_k);
    let mut energy = vec![[0.0; BANDS]; group];
    let mut scores = vec![0.0f32; s.rows.len()];
    for (i, place) in s.queries.iter().enumerate() {
        for (a, energy) in energy.iter_mut().enumerate() {
            let q = &s.q[head][(i * group + a) * d..][..d];
            (kernels.matvec)(&s.k[head], q, &mut scores);
            let mut largest = f32::NEG_INFINITY;
            for (score, row) in scores.iter_mut().zip(s.rows) {
                *score *= s.scale;
                if s.softcap > 0.0 {
                    *score = s.softcap * (*score / s.softcap).tanh();
                }
                if row.seq != place.seq || row.pos > place.pos {
                    *score = f32::NEG_INFINITY;
                }
                largest = largest.max(*score);
            }
            if largest == f32::NEG_INFINITY {
                continue;
            }
            let sum = f64::from((kernels.exp_sum)(&mut scores, largest));
            let mut squares = [0.0; BANDS];
            for (p, row) in scores.iter().zip(s.rows) {
                let behind = i64::from(place.pos) - i64::from(row.pos) - i64::from(s.window);
                for (sum, end) in squares.iter_mut().zip(s.band_ends) {
                    if (0..end).contains(&behind) {
                        *sum += f64::from(*p) * f64::from(*p);
                    }
                }
            }
            energy.iter_mut().zip(squares).for_each(|(e, x)| *e += x / (sum * sum) / s.queries.len() as f64);
        }
    }
    energy
}

/// Second moment of the group's queries in the frames of tiles at all distances, in units of squared score.
fn query_moment(kernels: &Kernels, s: &Sample, g: &LayerGeometry, rope: &Rope, head: usize) -> Mat<f64> {
    let (group, d) = (g.group(), g.d_k);
    let mut distances: Vec<i64> = DISTANCES.to_vec();
    while distances[distances.len() - 1] * 2 <= s.n_cells {
        distances.push(distances[distances.len() - 1] * 2);
    }
    let distances: &[i64] = if rope.is_identity() { &distances[..1] } else { &distances };
    let (mut sum, mut n) = (vec![0.0f32; d * d], 0usize);
    let (mut turn, mut x) = (Turn::default(), vec![0.0f32; d]);
    for (i, place) in s.queries.iter().enumerate() {
        for (k, distance) in distances.iter().enumerate() {
            // A fixed scatter over the positions inside a tile.
            let inside = ((i * 37 + k * 23 + head * 11) % TILE) as i64;
            rope.turn(distance + inside - i64::from(place.pos), &mut turn);
            for a in 0..group {
                x.copy_from_slice(&s.q[head][(i * group + a) * d..][..d]);
                rope.rotate(&turn, &mut x);
                add_outer(kernels, &mut sum, &x, 1.0);
                n += 1;
            }
        }
    }
    if n == 0 {
        return Mat::from_fn(d, d, |i, j| if i == j { 1.0 } else { 0.0 });
    }
    to_matrix(d, &sum, f64::from(s.scale) * f64::from(s.scale) / n as f64)
}

/// `sum_a weight_a * W_a^T W_a` over the heads of a group, `W_a` the columns of the output projection that read head `a`.
fn projection_gram(kernels: &Kernels, s: &Sample, g: &LayerGeometry, head: usize, weights: &[f64]) -> Mat<f64> {
    let d = g.d_v;
    if s.projection.is_empty() {
        let total: f64 = weights.iter().sum();
        return Mat::from_fn(d, d, |i, j| if i == j { total } else { 0.0 });
    }
    // Weights are put in relative to their sum, which keeps the f32 sum in range.
    let total = weights.iter().sum::<f64>().max(1e-300);
    let mut sum = vec![0.0f32; d * d];
    for row in s.projection.chunks_exact(g.n_head * d) {
        for (a, weight) in weights.iter().enumerate() {
            let at = (head * g.group() + a) * d;
            add_outer(kernels, &mut sum, &row[at..at + d], (weight / total) as f32);
        }
    }
    to_matrix(d, &sum, total)
}

/// Raise the energies of a layer's heads `[head][query head of its group]` by the floor.
fn with_floor(energy: &mut [Vec<f64>], floor: f64) {
    let mean = energy.iter().flatten().sum::<f64>() / energy.len() as f64;
    for e in energy {
        let own: f64 = e.iter().sum();
        let n = e.len() as f64;
        for x in e.iter_mut() {
            // The floor is spread like the energy itself. Without any energy (no query reaches behind the window) all heads are alike.
            *x = if mean > 0.0 { *x * (1.0 + floor * mean / (own + DORMANT * mean)) } else { 1.0 / n };
        }
    }
}

/// Fit all heads of a layer: `(K, V)` bases within `g.code_bytes` per tile.
pub fn fit(kernels: &Kernels, g: &LayerGeometry, rope: &Rope, s: &Sample) -> Result<Vec<(Basis, Basis)>> {
    let heads = g.n_head_kv;
    let by_band: Vec<Vec<[f64; BANDS]>> = (0..heads).map(|h| energies(kernels, s, g, h)).collect();
    let energy: [Vec<Vec<f64>>; BANDS] = std::array::from_fn(|band| {
        let mut e: Vec<Vec<f64>> = by_band.iter().map(|head| head.iter().map(|x| x[band]).collect()).collect();
        with_floor(&mut e, ENERGY_FLOOR[band]);
        e
    });
    let mut parts = Vec::with_capacity(heads);
    let mut variances: [Vec<f64>; BANDS] = Default::default();
    for h in 0..heads {
        let k = moments(kernels, &s.k_framed[h], g.d_k);
        let v = moments(kernels, &s.v[h], g.d_v);
        let tk = transform(&k.covariance, &query_moment(kernels, s, g, rope, h))?;
        // One basis serves all bands; how much each query head counts in it is taken from the last, which has most rows.
        let gram = projection_gram(kernels, s, g, h, &energy[BANDS - 1][h]);
        let tv = transform(&v.covariance, &gram)?;
        let whole: f64 = energy[BANDS - 1][h].iter().sum();
        // How much the values seen spread in the output: what a wrong score stirs up.
        let spread: f64 = (0..g.d_v).map(|i| (0..g.d_v).map(|j| gram[(i, j)] * v.covariance[(j, i)]).sum::<f64>()).sum();
        for (variances, energy) in variances.iter_mut().zip(&energy) {
            let share = energy[h].iter().sum::<f64>() / whole.max(1e-300);
            variances.extend(tk.variance.iter().map(|x| x * spread * share));
            variances.extend(tv.variance.iter().map(|x| x * share));
        }
        parts.push((k.mean, tk, v.mean, tv));
    }
    let widths: [Vec<u32>; BANDS] = std::array::from_fn(|band| allocate(&variances[band], g.row_bits(band)));
    Ok(parts
        .into_iter()
        .enumerate()
        .map(|(h, (mk, tk, mv, tv))| {
            let at = h * g.head_elements();
            let part = |from: usize, n: usize| std::array::from_fn(|band| &widths[band][at + from..at + from + n]);
            (build_basis(g.d_k, mk, &tk, part(0, g.d_k)), build_basis(g.d_v, mv, &tv, part(g.d_k, g.d_v)))
        })
        .collect())
}
