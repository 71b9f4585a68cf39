//! Fit of one head: second moments, weighted Karhunen-Loeve bases, and how many bits each half of a head (its keys, its values) is worth.
//!
//! In three steps: [`analyse`] finds the transforms of a head in its rows and queries, and measures what coding keys and values at an equal rate does
//! to the residual stream; [`share`] turns such errors, of as many heads and layers as there are, into rates; [`basis`] spends the rate of a half on
//! its coefficients. The last two may happen elsewhere, see [`super::calibration`], and later.
//!
//! Keys are weighted by the second moment of the queries as tiles see them, which makes the *score* error diagonal. Values count alike whatever
//! their size, and are not centred: rows that soak up attention without saying anything have tiny values, which an error in proportion to a mean
//! would ruin. Sums of these errors over heads and layers predict the KL divergence of a model, which energies of attention do not
//! (`docs/measurements.md`): starving a head that these think little of costs more than all the others gain. Must not know about arenas, nor how often
//! there is a fit.

use super::bits::allocate;
use super::measure::{measure, Measured};
use super::{encode_tile, Basis, TileWork};
use crate::error::{Error, Result};
use crate::layout::{Fine, Heads, TileForm, Widths, ANCHOR_GRID, BANDS, TILE};
use crate::rope::{Rope, Turn};
use crate::simd::{Kernels, MatMut, MatRef};
use nalgebra::{DMatrix, SymmetricEigen};

/// Bits that a half gets for an error four times as large: 1 would make all errors alike, but those of a short sample are not all of a model's.
pub const POWER: f64 = 0.7;
/// Bits per element that no half has less of: insurance for heads that wake up later.
pub const LEAST: f64 = 0.5;
/// Most bits per element of a half.
const MOST: f64 = 8.0;
/// Least eigenvalue of a weight matrix, as a share of its mean eigenvalue.
const DAMP: f64 = 1e-3;
/// Steps that the search for eigenvalues may take for each of them; two are usual.
const ROUNDS: usize = 30;
/// Distances at which tiles will look at a query, in rows; extended by doubling up to the context.
const DISTANCES: [i64; 9] = [64, 128, 192, 320, 512, 768, 1024, 1536, 2048];
/// What is left of the error of a row that is fine: 4 bits less, and a little more than that.
const FINE_ERROR: f32 = 1.4 / 16.0;

/// What every direction of values is taken to have, as a share of the mean: where all rows were alike, other rows to come must not be coefficients so
/// large that they drown the one which was seen.
const OTHER: f64 = 1e-3;
/// The same of keys. Less would do for the rows that a fit has seen; where nearly all of them were one word again and again, the first rows of what
/// follows are lost without it.
const OTHER_KEYS: f64 = 0.03;
/// Coefficients of equal width are mixed whose variances are no further apart: what a row unlike all others has in one of few must not drown those of many.
const MIXED: f64 = 16.0;

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
    /// Values.
    pub v: Vec<f32>,
    /// Roped queries: query-major, then the heads of the group.
    pub q: Vec<f32>,
    /// Numbers of the rows that will be coded finer.
    pub fine: Vec<usize>,
}

/// What the rows and queries are that the heads of a layer are fitted on.
pub struct Sample<'a> {
    /// Where each row stands.
    pub rows: &'a [Place],
    /// What turns each key into the frame of the tile that it will lie in.
    pub turns: &'a [i32],
    /// Where each query stands.
    pub queries: &'a [Place],
    /// The residual stream where the queries are.
    pub residual: Residual<'a>,
    /// Rows of the output projection, `n_head * d_v` each; empty for identity.
    pub projection: &'a [f32],
    /// Scale of the scores.
    pub scale: f32,
    /// Soft cap of the scores, 0 for none.
    pub softcap: f32,
    /// Rows nearer than this stay exact.
    pub window: i32,
    /// Rows at positions before this stay exact, and are not fitted on.
    pub sinks: i32,
    /// Longest distance there can be.
    pub n_cells: i64,
    /// Bits per element at which errors are measured.
    pub bits: f64,
}

/// What is known of the residual stream: squared norms, by query.
#[derive(Debug, Clone, Copy)]
pub enum Residual<'a> {
    /// Nothing: errors are in proportion to what attention gives.
    Unknown,
    /// Before attention is added to it.
    Before(&'a [f32]),
    /// With attention in it.
    After(&'a [f32]),
}

impl Residual<'_> {
    /// The squared norm at a query, 1 where it is not known.
    pub fn power(&self, query: usize) -> f64 {
        match self {
            Residual::Unknown => 1.0,
            Residual::Before(x) | Residual::After(x) => x.get(query).map_or(1.0, |x| f64::from(*x).max(1e-30)),
        }
    }
}

/// What a sample says about a KV head.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadSpectrum {
    /// Keys, in the frames of their tiles.
    pub k: Transform,
    /// Values.
    pub v: Transform,
    /// Errors that coding keys alone, and values alone, makes in the residual stream: `E[|e|^2 / |x|^2]` for the `x` of the sample.
    pub errors: [f64; 2],
    /// What of the stream is not in that `x`: what the head adds to it, in the same measure.
    pub output: f64,
    /// What of the stream is that `x`: 1, or 0 when it is not known.
    pub stream: f64,
}

struct Moments {
    mean: Vec<f32>,
    covariance: DMatrix<f64>,
}

fn to_matrix(d: usize, upper: &[f32], scale: f64) -> DMatrix<f64> {
    DMatrix::from_fn(d, d, |i, j| f64::from(upper[i.min(j) * d + i.max(j)]) * scale)
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
        self.columns.resize(d * n, 0.0);
        (self.kernels.transpose)(MatRef::new(&self.rows, d), MatMut::new(&mut self.columns, n), n, d);
        (self.kernels.multiply)(MatRef::new(&self.columns, n), MatRef::new(&self.rows, d), MatMut::new(&mut self.sum, d), d, n, d);
        self.rows.clear();
    }

    fn finish(mut self, scale: f64) -> DMatrix<f64> {
        self.add();
        to_matrix(self.d, &self.sum, scale)
    }
}

/// Those of keys.
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
    Moments { covariance: with_others(gram.finish(1.0 / n), OTHER_KEYS), mean }
}

/// Those of values: of rows that all have the norm that is their geometric mean. There is no mean.
fn directions(kernels: &Kernels, rows: &[f32], d: usize) -> Moments {
    let norm = |row: &[f32]| row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    let norms: Vec<f64> = rows.chunks_exact(d).map(norm).collect();
    let some = norms.iter().filter(|n| **n > 0.0);
    let n = some.clone().count().max(1) as f64;
    let typical = (some.map(|n| n.ln()).sum::<f64>() / n).exp();
    let mut gram = Gram::new(kernels, d);
    for (row, norm) in rows.chunks_exact(d).zip(&norms).filter(|(_, norm)| **norm > 0.0) {
        let scale = ((d as f64).sqrt() / norm) as f32;
        gram.next().iter_mut().zip(row).for_each(|(out, x)| *out = x * scale);
    }
    let moment = gram.finish(typical * typical / (n * d as f64));
    Moments { covariance: with_others(moment, OTHER), mean: Vec::new() }
}

/// Moments of rows among which there are others, `share` of all, that are alike in all directions.
fn with_others(mut moment: DMatrix<f64>, share: f64) -> DMatrix<f64> {
    let least = share * moment.trace() / moment.nrows() as f64;
    (0..moment.nrows()).for_each(|i| moment[(i, i)] += least);
    moment
}

/// A factor `L` of weights that are `L L^T`, damped so that there is one.
fn root(mut weight: DMatrix<f64>) -> Result<DMatrix<f64>> {
    let damp = (weight.trace() / weight.nrows() as f64 * DAMP).max(1e-30);
    (0..weight.nrows()).for_each(|i| weight[(i, i)] += damp);
    let factor = weight.cholesky().ok_or_else(|| Error::Numeric("weights without a root".into()))?;
    Ok(factor.unpack())
}

/// Eigenvalues in decreasing order, and their vectors as columns. Of the matrix only the lower half is looked at.
fn eigen(m: DMatrix<f64>) -> Result<(Vec<f64>, DMatrix<f64>)> {
    let rounds = ROUNDS * m.nrows();
    let found = SymmetricEigen::try_new(m, f64::EPSILON, rounds).filter(|e| e.eigenvalues.iter().all(|x| x.is_finite()));
    let e = found.ok_or_else(|| Error::Numeric("eigenvalues did not converge".into()))?;
    let mut order: Vec<usize> = (0..e.eigenvalues.len()).collect();
    order.sort_by(|a, b| e.eigenvalues[*b].total_cmp(&e.eigenvalues[*a]));
    Ok((order.iter().map(|i| e.eigenvalues[*i]).collect(), e.eigenvectors.select_columns(&order)))
}

/// Mean, and eigenvectors of `W^(1/2) C W^(1/2)` for second moments `C` and weights `W`: all of them, by decreasing eigenvalue.
#[derive(Debug, Clone, PartialEq)]
pub struct Transform {
    /// Mean of the rows; empty for values.
    pub mean: Vec<f32>,
    /// The eigenvalues.
    pub variance: Vec<f64>,
    /// `d x d`: row `j` gives coefficient `j` with unit variance from a row less the mean.
    pub encode: Vec<f32>,
    /// `d x d`: what a unit of coefficient `j` adds to a row.
    pub decode: Vec<f32>,
}

/// The transform that fits moments and weights; no weights are those of a unit matrix.
fn transform(moments: Moments, weight: Option<DMatrix<f64>>) -> Result<Transform> {
    let d = moments.covariance.nrows();
    // Any root of the weights gives the same coefficients, up to signs: `L^T` of a Cholesky factor is the cheapest.
    let roots = weight.map(root).transpose()?.map(|l| (l.transpose(), l));
    let weighted = match &roots {
        Some((upper, lower)) => upper * moments.covariance * lower,
        None => moments.covariance,
    };
    let (values, vectors) = eigen(weighted)?;
    // A floor relative to the largest eigenvalue: a direction without variance gets no bits, but must divide safely.
    let floor = values[0].max(0.0) * 1e-12;
    let variance: Vec<f64> = values.iter().map(|v| v.max(floor).max(1e-30)).collect();
    // Rows of the transform are columns of `L U`, and of `L^-T U`, which undoes it.
    let (encode, decode) = match &roots {
        Some((upper, lower)) => {
            let undo = upper.solve_upper_triangular(&vectors).ok_or_else(|| Error::Numeric("weights without an inverse".into()))?;
            (lower * vectors, undo)
        }
        None => (vectors.clone(), vectors),
    };
    let rows = |columns: DMatrix<f64>, scale: fn(f64, f64) -> f64| -> Vec<f32> {
        let columns = columns.as_slice().chunks_exact(d).zip(&variance);
        columns.flat_map(|(column, v)| column.iter().map(|x| scale(*x, v.sqrt()) as f32)).collect()
    };
    let (encode, decode) = (rows(encode, |x, deviation| x / deviation), rows(decode, |x, deviation| x * deviation));
    Ok(Transform { mean: moments.mean, variance, encode, decode })
}

/// Second moment of the group's queries in the frames of tiles at all distances, in units of squared score. (Each query at a quarter of them would do
/// for SmolLM2, but not for a model of sharp heads: `docs/measurements.md`.)
fn query_moment(kernels: &Kernels, s: &Sample, g: &Heads, rope: &Rope, head: usize, own: &HeadRows) -> Option<DMatrix<f64>> {
    let (group, d) = (g.group(), g.d_k);
    let mut distances: Vec<i64> = DISTANCES.to_vec();
    while distances[distances.len() - 1] * 2 <= s.n_cells {
        distances.push(distances[distances.len() - 1] * 2);
    }
    let distances = if rope.is_identity() { &distances[..1] } else { &distances[..] };
    let (mut gram, mut n) = (Gram::new(kernels, d), 0usize);
    let mut turn = Turn::default();
    for (i, place) in s.queries.iter().enumerate() {
        for (k, distance) in distances.iter().enumerate() {
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
    (n > 0).then(|| gram.finish(f64::from(s.scale) * f64::from(s.scale) / n as f64))
}

/// Multiply rows `a`, `b`, .. of a matrix by the orthonormal cosine transform of their number.
fn mix(rows: &mut [f32], d: usize) {
    let n = rows.len() / d;
    let old = rows.to_vec();
    for (k, out) in rows.chunks_exact_mut(d).enumerate() {
        let norm = (if k == 0 { 1.0 } else { 2.0 } / n as f64).sqrt();
        out.fill(0.0);
        for (i, row) in old.chunks_exact(d).enumerate() {
            let c = (norm * (std::f64::consts::PI * (i as f64 + 0.5) * k as f64 / n as f64).cos()) as f32;
            out.iter_mut().zip(row).for_each(|(out, x)| *out += c * x);
        }
    }
}

/// The basis that spends `bits` per element of each band on the coefficients of a transform. Coefficients that have equal widths in all bands are
/// mixed, so that each looks Gaussian, whatever the single ones do, and count alike.
pub fn basis(t: &Transform, bits: [f64; BANDS]) -> Basis {
    let d = t.variance.len();
    // Rates come from sums: what is a whole number but for rounding is one.
    let widths = bits.map(|bits| allocate(&t.variance, (bits * d as f64 + 1e-6) as usize));
    let counts = |band: &Vec<u32>| Widths { counts: Widths::BITS.map(|bits| band.iter().filter(|w| **w == bits).count()) };
    let (mut encode, mut decode) = (t.encode.clone(), t.decode.clone());
    let mut weight: Vec<f32> = t.variance.iter().map(|v| (v / t.variance[0]) as f32).collect();
    let mut first = 0;
    while first < d {
        let alike = |j: &usize| widths.iter().all(|band| band[*j] == band[first]) && t.variance[*j] * MIXED > t.variance[first];
        let end = first + (first..d).take_while(alike).count();
        // What no band codes is only ever part of residuals.
        if widths.iter().any(|band| band[first] > 0) {
            mix(&mut encode[first * d..end * d], d);
            mix(&mut decode[first * d..end * d], d);
            let mean = weight[first..end].iter().sum::<f32>() / (end - first) as f32;
            weight[first..end].fill(mean);
        }
        first = end;
    }
    Basis { d, widths: widths.each_ref().map(counts), mean: t.mean.clone(), encode, decode, weight }
}

/// What coding changes in the rows of a head: in its keys, where they are, and in its values.
fn changes(kernels: &Kernels, s: &Sample, rope: &Rope, bases: (&Basis, &Basis), framed: &[f32], own: &HeadRows) -> (Vec<f32>, Vec<f32>) {
    let (d_k, d_v) = (bases.0.d, bases.1.d);
    let form = TileForm::new(bases.0.widths[0], bases.1.widths[0], d_k, d_v, Fine::Marks);
    let (mut tile, mut work, mut turn) = (vec![0; form.bytes()], TileWork::default(), Turn::default());
    let (mut k, mut v) = (framed.to_vec(), own.v.clone());
    // Whole tiles: what is behind the last row is not looked at.
    let rows = s.rows.len().next_multiple_of(TILE);
    k.resize(rows * d_k, 0.0);
    v.resize(rows * d_v, 0.0);
    for (k, v) in k.chunks_exact_mut(TILE * d_k).zip(v.chunks_exact_mut(TILE * d_v)) {
        encode_tile(kernels, bases, &form, k, v, &[], &mut tile, &mut work);
        super::decode_tile(kernels, bases, &form, &tile, u64::MAX, k, v, &mut work);
    }
    k.iter_mut().zip(framed).for_each(|(k, exact)| *k -= exact);
    v.iter_mut().zip(&own.v).for_each(|(v, exact)| *v -= exact);
    for row in own.fine.iter().filter(|row| **row < s.rows.len()) {
        k[row * d_k..(row + 1) * d_k].iter_mut().for_each(|x| *x *= FINE_ERROR);
        v[row * d_v..(row + 1) * d_v].iter_mut().for_each(|x| *x *= FINE_ERROR);
    }
    rotate(rope, s.turns.iter().map(|turn| -turn), &mut k, d_k, &mut turn);
    (k, v)
}

/// Turn each key by its own angle.
fn rotate(rope: &Rope, turns: impl Iterator<Item = i32>, keys: &mut [f32], d: usize, angles: &mut Turn) {
    let mut last = None;
    for (key, turn) in keys.chunks_exact_mut(d).zip(turns) {
        if last.replace(turn) != Some(turn) {
            rope.turn(i64::from(turn), angles);
        }
        rope.rotate(angles, key);
    }
}

/// What the sample says about a KV head by itself.
pub fn analyse(kernels: &Kernels, g: &Heads, rope: &Rope, s: &Sample, head: usize, own: &HeadRows) -> Result<HeadSpectrum> {
    let mut framed = own.k.clone();
    rotate(rope, s.turns.iter().copied(), &mut framed, g.d_k, &mut Turn::default());
    let fitted = |rows: &[f32], d: usize| -> Vec<f32> {
        rows.chunks_exact(d).zip(s.rows).filter(|(_, place)| place.pos >= s.sinks).flat_map(|(row, _)| row).copied().collect()
    };
    let k = transform(moments(kernels, &fitted(&framed, g.d_k), g.d_k), query_moment(kernels, s, g, rope, head, own))?;
    let v = transform(directions(kernels, &fitted(&own.v, g.d_v), g.d_v), None)?;
    let bases = [&k, &v].map(|t| basis(t, [s.bits; BANDS]));
    let (dk, dv) = changes(kernels, s, rope, (&bases[0], &bases[1]), &framed, own);
    let Measured { errors, output } = measure(kernels, g, s, head, own, &dk, &dv);
    let (output, stream) = match s.residual {
        Residual::Unknown => (output, 0.0),
        Residual::Before(_) => (output, 1.0),
        Residual::After(_) => (0.0, 1.0),
    };
    Ok(HeadSpectrum { k, v, errors, output, stream })
}

impl HeadSpectrum {
    /// The bases of K and of V that spend so many code bits of a row on each, by band.
    pub fn bases(&self, bits: [[usize; 2]; BANDS]) -> (Basis, Basis) {
        let rates = |of: usize, t: &Transform| basis(t, bits.map(|b| b[of] as f64 / t.variance.len() as f64));
        (rates(0, &self.k), rates(1, &self.v))
    }
}

/// The relative errors that the heads of a layer make in the residual stream behind it, keys and values of each. What heads add to it is taken to be
/// uncorrelated: only sizes are known here.
pub fn relative_errors(layer: &[&HeadSpectrum]) -> Vec<[f64; 2]> {
    let stream = layer.iter().map(|h| h.stream).fold(0.0, f64::max) + layer.iter().map(|h| h.output).sum::<f64>();
    layer.iter().map(|h| h.errors.map(|e| e / stream.max(1e-30))).collect()
}

/// Bits per element of halves of heads, given for each its relative error at an equal rate and its elements: `bits` in the mean over all elements, at
/// least `least` (if that is less), more by [`POWER`] where the error is larger.
pub fn share(errors: &[(f64, usize)], bits: f64, least: f64) -> Vec<f64> {
    let size = |error: f64| if error.is_nan() { 0.0 } else { error.clamp(0.0, 1e30) };
    if errors.iter().all(|(e, _)| size(*e) == 0.0) {
        return vec![bits; errors.len()];
    }
    let wanted: Vec<f64> = errors.iter().map(|(e, _)| POWER * 0.5 * (size(*e) + 1e-30).log2()).collect();
    let at = |level: f64| wanted.iter().map(move |w| (w + level).clamp(least.min(bits), MOST));
    let elements: f64 = errors.iter().map(|(_, n)| *n as f64).sum();
    let total = |level: f64| at(level).zip(errors).map(|(bits, (_, n))| bits * *n as f64).sum::<f64>();
    let (least_wanted, most_wanted) = wanted.iter().fold((f64::MAX, f64::MIN), |(a, b), w| (a.min(*w), b.max(*w)));
    let (mut low, mut high) = (-most_wanted, MOST - least_wanted);
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        if total(middle) < bits * elements {
            low = middle;
        } else {
            high = middle;
        }
    }
    at(low).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::LayerShape;
    use crate::layout::anchor;
    use crate::rope::{Pairing, RopeParams};
    use crate::simd::kernels;

    fn noise(n: usize, seed: usize) -> Vec<f32> {
        let one = |i: usize, k: usize| ((i * 7919 + seed * 104_729 + k * 31_337) as f64 * 0.618_034).fract() as f32 - 0.5;
        (0..n).map(|i| (0..4).map(|k| one(i, k)).sum::<f32>() * 1.7).collect()
    }

    #[test]
    fn shares_have_the_mean_and_the_bounds_that_were_asked_for() {
        let errors: Vec<(f64, usize)> = (0..40).map(|i| (10f64.powf(-8.0 * f64::from(i * 17 % 40) / 40.0), 64 + 64 * (i % 2) as usize)).collect();
        let elements: f64 = errors.iter().map(|(_, n)| *n as f64).sum();
        for bits in [0.25, 0.75, 1.5, 2.3, 5.0, 8.0] {
            let shares = share(&errors, bits, LEAST);
            let total: f64 = shares.iter().zip(&errors).map(|(s, (_, n))| s * *n as f64).sum();
            assert!((total / elements - bits).abs() < 1e-9, "{bits}: {}", total / elements);
            assert!(shares.iter().all(|s| (LEAST.min(bits)..=8.0).contains(s)));
            for (a, b) in (0..40).flat_map(|a| (0..40).map(move |b| (a, b))) {
                assert!(errors[a].0 <= errors[b].0 || shares[a] >= shares[b]);
                // Between the bounds, four times the error is worth `POWER` bits.
                let inside = |s: f64| s > LEAST + 1e-9 && s < 8.0 - 1e-9;
                if inside(shares[a]) && inside(shares[b]) {
                    assert!((shares[a] - shares[b] - POWER * 0.5 * (errors[a].0 / errors[b].0).log2()).abs() < 1e-6);
                }
            }
        }
        assert_eq!(share(&[(0.0, 64), (0.0, 128)], 2.0, LEAST), [2.0, 2.0]);
        assert_eq!(share(&[], 2.0, LEAST), [0.0; 0]);
        let odd = share(&[(f64::NAN, 64), (f64::INFINITY, 64), (0.0, 64), (1e-3, 64)], 2.0, LEAST);
        assert!((odd.iter().sum::<f64>() - 8.0).abs() < 1e-9 && odd[0] == odd[2] && odd[1] > odd[3], "{odd:?}");
    }

    /// A transform of unit vectors with these variances.
    fn unit(variance: Vec<f64>) -> Transform {
        let d = variance.len();
        let rows = |scale: &dyn Fn(f64) -> f64| (0..d * d).map(|i| if i / d == i % d { scale(variance[i / d]) as f32 } else { 0.0 }).collect();
        Transform { mean: vec![0.5; d], encode: rows(&|v| v.sqrt().recip()), decode: rows(&f64::sqrt), variance }
    }

    #[test]
    fn mixed_bases_undo_what_they_do_and_mix_what_is_coded_alike() {
        let d = 48;
        let t = unit((0..d).map(|j| 3.0 * 0.87f64.powi(j)).collect());
        let d = d as usize;
        let b = basis(&t, [4.0, 2.5, 1.2]);
        for (band, bits) in b.widths.iter().zip([4.0, 2.5, 1.2]) {
            let used: usize = band.counts.iter().zip(Widths::BITS).map(|(n, bits)| n * bits as usize).sum();
            assert!(used <= (bits * d as f64) as usize && used + 2 > (bits * d as f64) as usize, "{used}");
        }
        let product = |x: &[f32], y: &[f32], i: usize, j: usize| -> f64 { (0..d).map(|k| f64::from(x[k * d + i]) * f64::from(y[k * d + j])).sum() };
        let row = |x: &[f32], y: &[f32], i: usize, j: usize| -> f64 { (0..d).map(|k| f64::from(x[i * d + k]) * f64::from(y[j * d + k])).sum() };
        let width = |j: usize| b.widths.map(|w| w.place(j).0);
        for (i, j) in (0..d).flat_map(|i| (0..d).map(move |j| (i, j))) {
            let one = f64::from(u8::from(i == j));
            // What decoding makes of encoded rows, and coefficients of decoded ones.
            assert!((product(&b.decode, &b.encode, i, j) - one).abs() < 1e-5 && (row(&b.encode, &b.decode, i, j) - one).abs() < 1e-5);
            // Coefficients stay what they were where no other is coded alike.
            assert!(width(i) == width(j) || b.encode[i * d + j] == 0.0, "{i} {j}");
        }
        // Coefficients keep unit variance and stay uncorrelated: `encode C encode^T` is the identity.
        for (i, j) in (0..d).flat_map(|i| (0..d).map(move |j| (i, j))) {
            let c: f64 = (0..d).map(|k| f64::from(b.encode[i * d + k]) * t.variance[k] * f64::from(b.encode[j * d + k])).sum();
            assert!((c - f64::from(u8::from(i == j))).abs() < 1e-5, "{i} {j}: {c}");
        }
        let runs: Vec<usize> = (0..d).filter(|j| *j == 0 || width(*j) != width(j - 1)).chain([d]).collect();
        for run in runs.windows(2).filter(|r| width(r[0]) != [0; BANDS]) {
            let mean = t.variance[run[0]..run[1]].iter().sum::<f64>() / (run[1] - run[0]) as f64 / t.variance[0];
            assert!((run[0]..run[1]).all(|j| (f64::from(b.weight[j]) / mean - 1.0).abs() < 1e-5));
            assert!(run[1] - run[0] == 1 || (run[0]..run[1]).all(|j| b.encode[run[0] * d + j] != 0.0));
        }
    }

    const SHAPE: LayerShape = LayerShape { n_head: 4, n_head_kv: 2, d_k: 16, d_v: 8 };

    struct Case {
        g: Heads,
        rope: Rope,
        rows: Vec<Place>,
        turns: Vec<i32>,
        queries: Vec<Place>,
        residual: Vec<f32>,
        projection: Vec<f32>,
        own: HeadRows,
    }

    fn case(sequences: i32) -> Case {
        let (g, n) = (Heads::of(&SHAPE), 300usize);
        let rope = Rope::new(&RopeParams::plain(Pairing::Halves, 16, 10000.0), 16).unwrap();
        let rows: Vec<Place> = (0..n as i32).map(|i| Place { pos: i / sequences, seq: i % sequences }).collect();
        let turns = rows.iter().map(|r| -anchor(r.pos)).collect();
        let queries: Vec<Place> = rows.iter().step_by(7).copied().collect();
        let residual = (0..queries.len()).map(|i| 2.0 + (i % 5) as f32).collect();
        let tilt = |x: Vec<f32>, d: usize| x.iter().enumerate().map(|(i, x)| x * 2.0 * 0.8f32.powi((i % d) as i32)).collect::<Vec<f32>>();
        let mut own =
            HeadRows { k: tilt(noise(n * 16, 1), 16), v: tilt(noise(n * 8, 2), 8), q: noise(queries.len() * 2 * 16, 3), fine: vec![40, 41] };
        // Keys have a mean; values differ in size, and one is nothing.
        own.k.iter_mut().enumerate().for_each(|(i, x)| *x += (i % 16) as f32 * 0.2);
        own.v.iter_mut().enumerate().for_each(|(i, x)| *x *= if i / 8 == 20 { 0.0 } else { (0.02 * (i / 8 % 64) as f32).exp() });
        let projection = noise(12 * 4 * 8, 4);
        Case { g, rope, rows, turns, queries, residual, projection, own }
    }

    impl Case {
        fn sample(&self, softcap: f32) -> Sample<'_> {
            Sample {
                rows: &self.rows,
                turns: &self.turns,
                queries: &self.queries,
                residual: Residual::Before(&self.residual),
                projection: &self.projection,
                scale: 0.4,
                softcap,
                window: 32,
                sinks: 3,
                n_cells: 1000,
                bits: 2.0,
            }
        }
    }

    /// What [`measure`] says, in f64 and one row at a time. `head` 1 of the layer.
    fn brute(c: &Case, s: &Sample, change_k: &[f32], change_v: &[f32]) -> [f64; 3] {
        let (dk, dv, n) = (16, 8, c.rows.len());
        let mut positions: Vec<i32> = c.rows.iter().map(|r| r.pos).collect();
        positions.sort_unstable();
        let later: Vec<usize> = (0..c.queries.len()).filter(|q| c.queries[*q].pos >= positions[n / 2]).collect();
        let mut sums = [0.0; 3];
        for q in &later {
            let place = c.queries[*q];
            let sees = |r: usize| c.rows[r].seq == place.seq && c.rows[r].pos <= place.pos;
            let coded = |r: usize| c.rows[r].pos >= s.sinks && place.pos - c.rows[r].pos >= s.window;
            let output = |a: usize, keys: bool, values: bool| -> Vec<f64> {
                let query = &c.own.q[(q * 2 + a) * dk..][..dk];
                let score = |r: usize| {
                    let change = |j: usize| if keys && coded(r) { change_k[r * dk + j] } else { 0.0 };
                    let x: f64 = (0..dk).map(|j| f64::from(query[j]) * (f64::from(c.own.k[r * dk + j]) + f64::from(change(j)))).sum();
                    let (x, cap) = (x * f64::from(s.scale), f64::from(s.softcap));
                    (if cap > 0.0 { cap * (x / cap).tanh() } else { x }).exp()
                };
                let p: Vec<f64> = (0..n).map(|r| if sees(r) { score(r) } else { 0.0 }).collect();
                let total: f64 = p.iter().sum();
                let value =
                    |r: usize, j: usize| f64::from(c.own.v[r * dv + j]) + if values && coded(r) { f64::from(change_v[r * dv + j]) } else { 0.0 };
                (0..dv).map(|j| (0..n).map(|r| p[r] * value(r, j)).sum::<f64>() / total).collect()
            };
            for (i, sum) in sums.iter_mut().enumerate() {
                let exact = if i < 2 { 1.0 } else { 0.0 };
                let error: Vec<f64> = (0..2)
                    .flat_map(|a| output(a, i == 0, i == 1).into_iter().zip(output(a, false, false)).map(|(x, y)| x - exact * y).collect::<Vec<_>>())
                    .collect();
                let e: f64 = c.projection.chunks_exact(32).map(|w| (0..16).map(|j| f64::from(w[16 + j]) * error[j]).sum::<f64>().powi(2)).sum();
                *sum += e / f64::from(c.residual[*q]);
            }
        }
        sums.map(|s| s / later.len() as f64)
    }

    #[test]
    fn measured_errors_are_those_of_attention_over_coded_rows() {
        for (sequences, softcap) in [(1, 0.0), (3, 2.0)] {
            let c = case(sequences);
            let s = c.sample(softcap);
            let found = analyse(kernels(), &c.g, &c.rope, &s, 1, &c.own).unwrap();
            let mut framed = c.own.k.clone();
            rotate(&c.rope, c.turns.iter().copied(), &mut framed, 16, &mut Turn::default());
            let bases = [&found.k, &found.v].map(|t| basis(t, [2.0; BANDS]));
            let (dk, dv) = changes(kernels(), &s, &c.rope, (&bases[0], &bases[1]), &framed, &c.own);
            let want = brute(&c, &s, &dk, &dv);
            for (got, want) in found.errors.iter().chain([&found.output]).zip(want) {
                assert!(want > 1e-6 && (got / want - 1.0).abs() < 1e-3, "{sequences}: {found:?} {want:?}");
            }
            let after =
                analyse(kernels(), &c.g, &c.rope, &Sample { residual: Residual::After(&c.residual), ..c.sample(softcap) }, 1, &c.own).unwrap();
            assert_eq!((after.errors, after.output, found.stream, after.stream), (found.errors, 0.0, 1.0, 1.0));
            // Finer rows have smaller errors; more bits make all smaller.
            let rms = |x: &[f32], row: usize, d: usize| x[row * d..(row + 1) * d].iter().map(|x| x * x).sum::<f32>().sqrt();
            assert!(rms(&dk, 40, 16) < 0.3 * rms(&dk, 42, 16) && rms(&dv, 41, 8) < 0.3 * rms(&dv, 42, 8));
            let finer = analyse(kernels(), &c.g, &c.rope, &Sample { bits: 4.0, ..c.sample(softcap) }, 1, &c.own).unwrap();
            assert!(finer.errors.iter().zip(found.errors).all(|(a, b)| *a < 0.3 * b), "{:?} {:?}", finer.errors, found.errors);
        }
    }

    #[test]
    fn errors_are_relative_to_the_stream_behind_the_attention() {
        fn head(c: &Case, residual: Residual, head: usize) -> HeadSpectrum {
            analyse(kernels(), &c.g, &c.rope, &Sample { residual, ..c.sample(0.0) }, head, &c.own).unwrap()
        }
        let c = case(1);
        let small: Vec<f32> = c.residual.iter().map(|x| x * 1e-6).collect();
        let relative = |residual: Residual| {
            let heads = [head(&c, residual, 0), head(&c, residual, 1)];
            relative_errors(&[&heads[0], &heads[1]])
        };
        // A stream that is nothing beside its attention is as if it were not known.
        let (unknown, nothing) = (relative(Residual::Unknown), relative(Residual::Before(&small)));
        for (a, b) in unknown.as_flattened().iter().zip(nothing.as_flattened()) {
            assert!((0.5..2.0).contains(&(a / b)) && *a < 0.5, "{unknown:?} {nothing:?}");
        }
        let large: Vec<f32> = c.residual.iter().map(|x| x * 1e6).collect();
        let errors = head(&c, Residual::Before(&large), 1).errors;
        assert!(relative(Residual::Before(&large))[1].iter().zip(errors).all(|(a, b)| (a / b - 1.0).abs() < 1e-3));
        assert_eq!(relative(Residual::After(&c.residual))[1], head(&c, Residual::After(&c.residual), 1).errors);
    }

    #[test]
    fn a_sample_that_sees_nothing_coded_has_no_errors() {
        let c = case(1);
        let s = Sample { window: 1000, ..c.sample(0.0) };
        assert_eq!(analyse(kernels(), &c.g, &c.rope, &s, 0, &c.own).unwrap().errors, [0.0; 2]);
        let s = Sample { queries: &[], ..c.sample(0.0) };
        let own = HeadRows { q: vec![], ..case(1).own };
        assert_eq!(analyse(kernels(), &c.g, &c.rope, &s, 0, &own).unwrap().errors, [0.0; 2]);
    }

    #[test]
    fn values_count_alike_whatever_their_size() {
        let (d, n) = (8, 400);
        let mut rows: Vec<f32> = noise(n * d, 5).iter().enumerate().map(|(i, x)| x * 0.7f32.powi((i % d) as i32)).collect();
        let fit = |rows: &[f32]| transform(directions(kernels(), rows, d), None).unwrap();
        let even = fit(&rows);
        // A hundredth of the rows become a thousand times as large: nothing but the size of all changes.
        rows.chunks_exact_mut(d).step_by(100).for_each(|row| row.iter_mut().for_each(|x| *x *= 1000.0));
        let uneven = fit(&rows);
        let ratio = 1000f64.powf(0.02);
        for (a, b) in even.variance.iter().zip(&uneven.variance) {
            assert!((b / a / ratio - 1.0).abs() < 1e-4, "{a} {b} {ratio}");
        }
        // Coefficients of typical rows are of size 1.
        let z: f64 = rows
            .chunks_exact(d)
            .skip(1)
            .take(90)
            .map(|row| {
                let z = |j: usize| (0..d).map(|i| f64::from(uneven.encode[j * d + i] * row[i])).sum::<f64>();
                (0..d).map(|j| z(j).powi(2)).sum::<f64>() / d as f64 / 90.0
            })
            .sum();
        assert!((0.3..3.0).contains(&z), "{z}");
    }
}
