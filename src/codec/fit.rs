//! Fit of one layer: second moments, weighted Karhunen-Loeve bases and the layer's bit widths.
//!
//! In two halves: [`analyse`] finds in rows and queries of a head what can be found without knowing a cache, [`Spectrum::bases`] spends
//! the bits of one on the heads of a layer. The second may happen elsewhere, see [`super::calibration`], and later: heads need not be
//! analysed in one step.
//!
//! Keys are weighted by the second moment of the queries as tiles see them, which makes the *score* error diagonal; values by
//! the output projection. One bit budget covers all heads, K and V: a coefficient counts by what its error does to the layer's
//! output, which is proportional to the head's attention energy on rows that will be coded (most heads look at the window only).
//! Measured on the small model at 2 bits: budget per head 0.0029, per layer 0.0004 mean KL divergence. One budget for the whole model
//! would halve it again (simulated), but a layer's arena has its size before anything was seen. There is no second fit: with rates by age a change
//! of topic after the first one costs less than it costs stock types (0.7 to 1.0 times the divergence on the same text without the change).
//! Must not know about arenas.

use super::bits::allocate;
use super::Basis;
use crate::config::{LayerGeometry, ANCHOR_GRID, BANDS, TILE};
use crate::error::{Error, Result};
use crate::rope::{Rope, Turn};
use crate::simd::{Kernels, MatMut, MatRef, Widths};
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

/// Rows and queries of one KV head.
#[derive(Debug, Default)]
pub struct HeadRows {
    /// Keys as the model gives them (roped), one row after another.
    pub k: Vec<f32>,
    /// Keys in the frames of the tiles they will lie in.
    pub k_framed: Vec<f32>,
    /// Values.
    pub v: Vec<f32>,
    /// Roped queries: query-major, then the heads of the group.
    pub q: Vec<f32>,
}

/// What the rows and queries are that the heads of a layer are fitted on.
pub struct Sample<'a> {
    /// Where each row stands.
    pub rows: &'a [Place],
    /// Where each query stands.
    pub queries: &'a [Place],
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
    /// Rows behind the window up to which attention energy is added up, ascending; the last is `i64::MAX`.
    pub edges: Vec<i64>,
}

/// What a sample says about a layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Spectrum {
    /// [`Sample::edges`].
    pub edges: Vec<i64>,
    /// The KV heads.
    pub heads: Vec<HeadSpectrum>,
}

/// What a sample says about a KV head.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadSpectrum {
    /// Keys, in the frames of their tiles.
    pub k: Transform,
    /// Values.
    pub v: Transform,
    /// How much the values seen spread in the output: what a wrong score stirs up.
    pub spread: f64,
    /// Attention energy of each query head of the group, up to each edge.
    pub energy: Vec<Vec<f64>>,
}

struct Moments {
    mean: Vec<f32>,
    covariance: Mat<f64>,
}

fn to_matrix(d: usize, upper: &[f32], scale: f64) -> Mat<f64> {
    Mat::from_fn(d, d, |i, j| f64::from(upper[i.min(j) * d + i.max(j)]) * scale)
}

/// Sum of `x x^T` over rows that come one by one; its upper triangle is what [`to_matrix`] looks at.
struct Gram<'a> {
    kernels: &'a Kernels,
    d: usize,
    sum: Vec<f32>,
    rows: Vec<f32>,
    columns: Vec<f32>,
}

impl<'a> Gram<'a> {
    /// Rows of one product: these and their transposed copy stay in a core's cache.
    const BLOCK: usize = 128;

    fn new(kernels: &'a Kernels, d: usize) -> Self {
        Gram { kernels, d, sum: vec![0.0; d * d], rows: Vec::with_capacity(Self::BLOCK * d), columns: Vec::new() }
    }

    /// The next row, to be written.
    fn next(&mut self) -> &mut [f32] {
        if self.rows.len() == Self::BLOCK * self.d {
            self.add();
        }
        let at = self.rows.len();
        self.rows.resize(at + self.d, 0.0);
        &mut self.rows[at..]
    }

    fn add(&mut self) {
        let (d, n) = (self.d, self.rows.len() / self.d);
        transpose(&self.rows, d, &mut self.columns);
        (self.kernels.multiply)(MatRef::new(&self.columns, n), MatRef::new(&self.rows, d), MatMut::new(&mut self.sum, d), d, n, d);
        self.rows.clear();
    }

    fn finish(mut self, scale: f64) -> Mat<f64> {
        self.add();
        to_matrix(self.d, &self.sum, scale)
    }
}

/// `columns[j][i] = rows[i][j]` for rows of `d` floats.
fn transpose(rows: &[f32], d: usize, columns: &mut Vec<f32>) {
    const BLOCK: usize = 16;
    let n = rows.len() / d;
    columns.resize(d * n, 0.0);
    for (from, block) in rows.chunks(BLOCK * d).enumerate() {
        for (j, column) in columns.chunks_exact_mut(n.max(1)).enumerate() {
            for (out, row) in column[from * BLOCK..].iter_mut().zip(block.chunks_exact(d)) {
                *out = row[j];
            }
        }
    }
}

fn moments(kernels: &Kernels, rows: &[f32], d: usize) -> Moments {
    let n = (rows.len() / d).max(1) as f64;
    let mut mean = vec![0.0f64; d];
    for row in rows.chunks_exact(d) {
        mean.iter_mut().zip(row).for_each(|(m, x)| *m += f64::from(*x));
    }
    let mean: Vec<f32> = mean.iter().map(|m| (m / n) as f32).collect();
    let mut gram = Gram::new(kernels, d);
    for row in rows.chunks_exact(d) {
        gram.next().iter_mut().zip(row).zip(&mean).for_each(|((c, x), m)| *c = x - m);
    }
    Moments { covariance: gram.finish(1.0 / n), mean }
}

fn eigen(m: &Mat<f64>) -> Result<(Vec<f64>, Mat<f64>)> {
    let e = m.self_adjoint_eigen(Side::Lower).map_err(|e| Error::Numeric(format!("eigenvalues did not converge: {e:?}")))?;
    let values = e.S().column_vector().iter().copied().collect();
    Ok((values, e.U().to_owned()))
}

/// Mean, and eigenvectors of `W^(1/2) C W^(1/2)` for second moments `C` and weights `W`: all of them, by decreasing eigenvalue.
#[derive(Debug, Clone, PartialEq)]
pub struct Transform {
    /// Mean of the rows.
    pub mean: Vec<f32>,
    /// The eigenvalues.
    pub variance: Vec<f64>,
    /// `d x d`: row `j` gives coefficient `j` with unit variance from a row less the mean.
    pub encode: Vec<f32>,
    /// `d x d`: what a unit of coefficient `j` adds to a row.
    pub decode: Vec<f32>,
}

fn transform(moments: Moments, weight: &Mat<f64>) -> Result<Transform> {
    let covariance = &moments.covariance;
    let d = covariance.nrows();
    // Any root of the weights gives the same coefficients, up to signs: `L^T` of a Cholesky factor is the cheapest.
    let mean = (0..d).map(|i| weight[(i, i)]).sum::<f64>() / d as f64;
    let damp = (mean * DAMP).max(1e-30);
    let damped = Mat::from_fn(d, d, |i, j| weight[(i, j)] + if i == j { damp } else { 0.0 });
    let factor = damped.llt(Side::Lower).map_err(|e| Error::Numeric(format!("weights without a root: {e:?}")))?;
    let root = factor.L().to_owned();
    let (values, vectors) = eigen(&(root.transpose() * covariance * &root))?;
    // A floor relative to the largest eigenvalue: a direction without variance gets no bits, but must divide safely.
    let floor = values.iter().fold(0.0f64, |a, x| a.max(*x)) * 1e-12;
    let variance: Vec<f64> = values.iter().rev().map(|v| v.max(floor).max(1e-30)).collect();
    let flipped = Mat::from_fn(d, d, |i, j| vectors[(i, d - 1 - j)]);
    let rows = |m: Mat<f64>, scale: &dyn Fn(f64, f64) -> f64| -> Vec<f32> {
        (0..d).flat_map(|i| (0..d).map(move |j| (i, j))).map(|(i, j)| scale(m[(i, j)], variance[i].sqrt()) as f32).collect()
    };
    let encode = rows(flipped.transpose() * root.transpose(), &|x, deviation| x / deviation);
    // What undoes it: `U^T L^-1`.
    let mut undo = flipped;
    faer::linalg::triangular_solve::solve_upper_triangular_in_place(root.transpose(), undo.as_mut(), faer::Par::Seq);
    let decode = rows(undo.transpose().to_owned(), &|x, deviation| x * deviation);
    Ok(Transform { mean: moments.mean, variance, encode, decode })
}

/// The basis with what each band codes; `widths` holds a width per coefficient, which falls with the coefficient's variance.
fn build_basis(t: &Transform, widths: [&[u32]; BANDS]) -> Basis {
    let d = t.mean.len();
    let widths = widths.map(|band| Widths { counts: Widths::BITS.map(|bits| band.iter().filter(|w| **w == bits).count()) });
    let mut basis = Basis { d, widths, mean: t.mean.clone(), ..Basis::default() };
    let rank = basis.rank();
    (basis.encode, basis.decode) = (t.encode[..rank * d].to_vec(), t.decode[..rank * d].to_vec());
    basis.weight = t.variance[..rank].iter().map(|v| (v / t.variance[0]) as f32).collect();
    basis
}

/// Sum of squares, in lanes.
fn squares(x: &[f32]) -> f64 {
    let (chunks, rest) = x.as_chunks::<16>();
    let mut sums = [0.0f32; 16];
    for chunk in chunks {
        sums.iter_mut().zip(chunk).for_each(|(sum, x)| *sum += x * x);
    }
    sums.into_iter().chain(rest.iter().map(|x| x * x)).map(f64::from).sum()
}

/// The largest, in lanes.
fn largest(x: &[f32]) -> f32 {
    let (chunks, rest) = x.as_chunks::<16>();
    let mut most = [f32::NEG_INFINITY; 16];
    for chunk in chunks {
        most.iter_mut().zip(chunk).for_each(|(most, x)| *most = if *x > *most { *x } else { *most });
    }
    most.iter().chain(rest).fold(f32::NEG_INFINITY, |a, x| a.max(*x))
}

/// Attention energy of each query head of a group on rows that will be coded: `E[sum of p^2 over rows outside the window]`, up to
/// each edge.
fn energies(kernels: &Kernels, s: &Sample, g: &LayerGeometry, own: &HeadRows) -> Vec<Vec<f64>> {
    /// Queries of one product.
    const QUERIES: usize = 16;
    let (group, d, n) = (g.group(), g.d_k, s.rows.len());
    let mut energy = vec![vec![0.0; s.edges.len()]; group];
    // Keys in panels of 64, transposed, so that a panel stays near while all queries of a product meet it.
    let panels: Vec<Vec<f32>> = own
        .k
        .chunks(TILE * d)
        .map(|rows| {
            let mut columns = Vec::new();
            transpose(rows, d, &mut columns);
            columns
        })
        .collect();
    let mut scores = vec![0.0f32; QUERIES * group * n];
    let mut hidden = vec![0.0f32; n];
    // Runs of rows between the same edges, and which: those of the window have none.
    let mut runs: Vec<(std::ops::Range<usize>, usize)> = Vec::new();
    for (block, places) in s.queries.chunks(QUERIES).enumerate() {
        let sees = |place: &Place, row: &Place| row.seq == place.seq && row.pos <= place.pos;
        let q = &own.q[block * QUERIES * group * d..];
        let seen = |rows: &[Place]| places.iter().any(|place| rows.iter().any(|row| sees(place, row)));
        for (i, (panel, rows)) in panels.iter().zip(s.rows.chunks(TILE)).enumerate() {
            if !seen(rows) {
                continue;
            }
            let (m, nq) = (rows.len(), places.len() * group);
            (0..nq).for_each(|q| scores[q * n + i * TILE..][..m].fill(0.0));
            let out = MatMut::new(&mut scores[i * TILE..], n);
            (kernels.multiply)(MatRef::new(q, d), MatRef::new(panel, m), out, nq, d, m);
        }
        for (i, place) in places.iter().enumerate() {
            hidden.iter_mut().zip(s.rows).for_each(|(h, row)| *h = if sees(place, row) { 0.0 } else { f32::NEG_INFINITY });
            let Some(first) = hidden.iter().position(|h| *h == 0.0) else { continue };
            let end = n - hidden.iter().rev().take_while(|h| **h != 0.0).count();
            runs.clear();
            for (at, row) in s.rows.iter().enumerate().take(end).skip(first) {
                let behind = i64::from(place.pos) - i64::from(row.pos) - i64::from(s.window);
                let edge = if behind < 0 { s.edges.len() } else { s.edges.partition_point(|end| *end <= behind) };
                match runs.last_mut() {
                    Some((run, e)) if *e == edge => run.end = at + 1,
                    _ => runs.push((at..at + 1, edge)),
                }
            }
            for (a, energy) in energy.iter_mut().enumerate() {
                let scores = &mut scores[(i * group + a) * n..][..end];
                let seen = &mut scores[first..];
                for (score, hidden) in seen.iter_mut().zip(&hidden[first..end]) {
                    // What is hidden may not have been computed.
                    *score = if *hidden == 0.0 { *score * s.scale } else { f32::NEG_INFINITY };
                }
                if s.softcap > 0.0 {
                    seen.iter_mut().filter(|x| x.is_finite()).for_each(|x| *x = s.softcap * (*x / s.softcap).tanh());
                }
                let largest = largest(seen);
                let sum = f64::from((kernels.exp_sum)(seen, largest));
                for (run, edge) in &runs {
                    let share = squares(&scores[run.clone()]) / (sum * sum) / s.queries.len() as f64;
                    energy.iter_mut().skip(*edge).for_each(|e| *e += share);
                }
            }
        }
    }
    energy
}

/// Second moment of the group's queries in the frames of tiles at all distances, in units of squared score. A query is seen from a
/// quarter of the distances only, its neighbours from the others: that is enough to tell the moment.
fn query_moment(kernels: &Kernels, s: &Sample, g: &LayerGeometry, rope: &Rope, head: usize, own: &HeadRows) -> Mat<f64> {
    const SHARE: usize = 4;
    let (group, d) = (g.group(), g.d_k);
    let mut distances: Vec<i64> = DISTANCES.to_vec();
    while distances[distances.len() - 1] * 2 <= s.n_cells {
        distances.push(distances[distances.len() - 1] * 2);
    }
    let (distances, share) = if rope.is_identity() { (&distances[..1], 1) } else { (&distances[..], SHARE) };
    let (mut gram, mut n) = (Gram::new(kernels, d), 0usize);
    let mut turn = Turn::default();
    for (i, place) in s.queries.iter().enumerate() {
        for (k, distance) in distances.iter().enumerate().filter(|(k, _)| (i + k).is_multiple_of(share)) {
            // A fixed scatter over the distances of rows from their anchor.
            let inside = (i * 37 + k * 23 + head * 11) as i64 % i64::from(ANCHOR_GRID) - i64::from(ANCHOR_GRID) / 2 + TILE as i64 / 2;
            rope.turn(distance + inside - i64::from(place.pos), &mut turn);
            for a in 0..group {
                let x = gram.next();
                x.copy_from_slice(&own.q[(i * group + a) * d..][..d]);
                rope.rotate(&turn, x);
                n += 1;
            }
        }
    }
    if n == 0 {
        return Mat::from_fn(d, d, |i, j| if i == j { 1.0 } else { 0.0 });
    }
    gram.finish(f64::from(s.scale) * f64::from(s.scale) / n as f64)
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
    let mut gram = Gram::new(kernels, d);
    for row in s.projection.chunks_exact(g.n_head * d) {
        for (a, weight) in weights.iter().enumerate() {
            let (at, root) = ((head * g.group() + a) * d, (weight / total).sqrt() as f32);
            gram.next().iter_mut().zip(&row[at..at + d]).for_each(|(out, x)| *out = root * x);
        }
    }
    gram.finish(total)
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

/// Energies up to a number of rows behind the window, between edges by the logarithm of the distance. `edges` as in [`Sample`].
fn energy_at(edges: &[i64], energy: &[f64], rows: i64) -> f64 {
    let i = edges.partition_point(|e| *e < rows);
    // Nothing lies behind the last finite edge that was seen.
    if i + 1 >= edges.len() || edges[i] == rows {
        return energy[i.min(edges.len() - 1)];
    }
    let (low, high) = if i == 0 { ((1, 0.0), (edges[0], energy[0])) } else { ((edges[i - 1], energy[i - 1]), (edges[i], energy[i])) };
    let at = |x: i64| (x.max(1) as f64).ln();
    let share = (at(rows) - at(low.0)) / (at(high.0) - at(low.0)).max(1e-9);
    low.1 + share.clamp(0.0, 1.0) * (high.1 - low.1)
}

/// What the sample says about a KV head by itself: values count by its own energies, whose sum is taken for 1 until [`Spectrum::new`].
pub fn analyse(kernels: &Kernels, g: &LayerGeometry, rope: &Rope, s: &Sample, head: usize, own: &HeadRows) -> Result<HeadSpectrum> {
    let energy = energies(kernels, s, g, own);
    // One basis serves all bands; how much each query head counts in it is taken from the last, which has most rows.
    let weights: Vec<f64> = energy.iter().map(|e| e[e.len() - 1]).collect();
    let total: f64 = weights.iter().sum();
    let weights: Vec<f64> = weights.iter().map(|w| if total > 0.0 { w / total } else { 1.0 / weights.len() as f64 }).collect();
    let (k, v) = (moments(kernels, &own.k_framed, g.d_k), moments(kernels, &own.v, g.d_v));
    let k = transform(k, &query_moment(kernels, s, g, rope, head, own))?;
    let gram = projection_gram(kernels, s, g, head, &weights);
    let spread: f64 = (0..g.d_v).map(|i| (0..g.d_v).map(|j| gram[(i, j)] * v.covariance[(j, i)]).sum::<f64>()).sum();
    Ok(HeadSpectrum { k, v: transform(v, &gram)?, spread, energy })
}

impl Spectrum {
    /// A layer of heads that [`analyse`] looked at one by one.
    pub fn new(edges: Vec<i64>, mut heads: Vec<HeadSpectrum>) -> Self {
        let mut weights: Vec<Vec<f64>> = heads.iter().map(|h| h.energy.iter().map(|e| e[e.len() - 1]).collect()).collect();
        with_floor(&mut weights, ENERGY_FLOOR[BANDS - 1]);
        for (head, weights) in heads.iter_mut().zip(weights) {
            let total: f64 = weights.iter().sum();
            head.spread *= total;
            head.v.variance.iter_mut().for_each(|x| *x = (*x * total).max(1e-30));
        }
        Spectrum { edges, heads }
    }

    /// `(K, V)` bases of all heads within `g.code_bytes` per tile; `band_ends` are the rows behind the window at which each band ends.
    /// A sample sees few rows as old as those of the last bands, so these count all the younger ones, too.
    pub fn bases(&self, g: &LayerGeometry, band_ends: [i64; BANDS]) -> Vec<(Basis, Basis)> {
        let energy: [Vec<Vec<f64>>; BANDS] = std::array::from_fn(|band| {
            let at = |head: &HeadSpectrum| head.energy.iter().map(|e| energy_at(&self.edges, e, band_ends[band])).collect();
            let mut e: Vec<Vec<f64>> = self.heads.iter().map(at).collect();
            with_floor(&mut e, ENERGY_FLOOR[band]);
            e
        });
        let mut variances: [Vec<f64>; BANDS] = Default::default();
        for (h, head) in self.heads.iter().enumerate() {
            let whole: f64 = energy[BANDS - 1][h].iter().sum();
            for (variances, energy) in variances.iter_mut().zip(&energy) {
                let share = energy[h].iter().sum::<f64>() / whole.max(1e-300);
                variances.extend(head.k.variance.iter().map(|x| x * head.spread * share));
                variances.extend(head.v.variance.iter().map(|x| x * share));
            }
        }
        let widths: [Vec<u32>; BANDS] = std::array::from_fn(|band| allocate(&variances[band], g.row_bits(band)));
        let basis = |(h, head): (usize, &HeadSpectrum)| {
            let at = h * g.head_elements();
            let part = |from: usize, n: usize| std::array::from_fn(|band| &widths[band][at + from..at + from + n]);
            (build_basis(&head.k, part(0, g.d_k)), build_basis(&head.v, part(g.d_k, g.d_v)))
        };
        self.heads.iter().enumerate().map(basis).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::LayerShape;
    use crate::rope::{Pairing, RopeParams};

    #[test]
    fn edges_that_no_band_ends_at_change_nothing() {
        let g = LayerGeometry { code_bytes: [4096, 2048, 1024], ..LayerGeometry::heads(&LayerShape { n_head: 4, n_head_kv: 2, d_k: 16, d_v: 8 }) };
        let rope = Rope::new(&RopeParams::plain(Pairing::Halves, 16, 10000.0), 16).unwrap();
        let noise = |seed: usize, n: usize| -> Vec<f32> { (0..n).map(|i| ((i * 7919 + seed * 104_729 + 13) as f32).sin() * 2.0).collect() };
        let places: Vec<Place> = (0..600).map(|pos| Place { pos, seq: 0 }).collect();
        let ends = [128, 384, i64::MAX];
        let stored = |edges: &[i64]| -> Vec<Vec<u8>> {
            let sample = Sample {
                rows: &places,
                queries: &places,
                projection: &[],
                scale: 0.25,
                softcap: 0.0,
                window: 32,
                n_cells: 1000,
                edges: edges.to_vec(),
            };
            let analysed = |h: usize| {
                let own =
                    HeadRows { k: noise(1 + h, 600 * 16), k_framed: noise(3 + h, 600 * 16), v: noise(5 + h, 600 * 8), q: noise(7 + h, 600 * 2 * 16) };
                analyse(crate::simd::kernels(), &g, &rope, &sample, h, &own).unwrap()
            };
            let bases = Spectrum::new(sample.edges.clone(), (0..2).map(analysed).collect()).bases(&g, ends);
            let bytes = |b: &Basis| {
                let mut bytes = vec![0; LayerGeometry::basis_bytes_of(b.d)];
                b.store(&mut bytes);
                bytes
            };
            bases.iter().flat_map(|(k, v)| [bytes(k), bytes(v)]).collect()
        };
        assert!(stored(&ends) == stored(&[64, 128, 256, 384, 512, i64::MAX]));
    }

    #[test]
    fn energies_between_edges_lie_between_and_edges_are_met() {
        let (edges, energy) = ([64, 128, 256, i64::MAX], [1.0, 3.0, 4.0, 4.0]);
        let at = |rows| energy_at(&edges, &energy, rows);
        assert_eq!([0, 64, 128, 256, 300, i64::MAX].map(at), [0.0, 1.0, 3.0, 4.0, 4.0, 4.0]);
        assert!(at(90) > 1.9 && at(90) < 2.1, "{}", at(90));
        assert_eq!([1, i64::MAX].map(|rows| energy_at(&[i64::MAX], &[5.0], rows)), [5.0, 5.0]);
        // Bands without tiles end where they begin; a fit knows their ends exactly.
        assert_eq!([0, i64::MAX].map(|rows| energy_at(&[0, 0, i64::MAX], &[0.0, 0.0, 7.0], rows)), [0.0, 7.0]);
    }
}
