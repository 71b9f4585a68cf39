//! Attention of many queries over rows of one KV head that are rebuilt a block at a time and then forgotten: both products are products of matrices.
//!
//! A block has up to 64 rows; up to [`STEP`] blocks are looked at between two updates of the running maximum. What a query gets depends on its own
//! row of every product only, never on the queries beside it, so callers may divide queries as they like. Must not know about cells, arenas or plans.

use super::{Context, HeadBases, Turns, Visible};
use crate::codec::{coefficients, Basis};
use crate::layout::{TileForm, TILE};
use crate::rope::Turn;
use crate::simd::{Kernels, Lines, MatMut, MatRef};

/// Most blocks of one step of the softmax.
pub const STEP: usize = 4;
/// Queries whose scores of one step stay in a core's first cache.
const QUERIES: usize = 32;

/// Up to 64 rows of one KV head as products want them: each coordinate of the keys together, each value together.
#[derive(Debug, Default)]
pub struct RowBlock {
    /// `d_k x 64`.
    keys: Lines,
    /// `64 x d_v`.
    values: Lines,
}

impl RowBlock {
    /// Room for rows of these sizes; all of them are zero.
    pub fn clear(&mut self, d_k: usize, d_v: usize) {
        for (x, d) in [(&mut self.keys, d_k), (&mut self.values, d_v)] {
            x.resize(d * TILE * 4);
            x.floats_mut()[..d * TILE].fill(0.0);
        }
    }

    /// Write row `row`.
    pub fn put(&mut self, row: usize, key: &[f32], value: &[f32]) {
        self.keys.floats_mut().iter_mut().skip(row).step_by(TILE).zip(key).for_each(|(to, x)| *to = *x);
        self.values.floats_mut()[row * value.len()..][..value.len()].copy_from_slice(value);
    }

    /// All keys, all values, row by row.
    #[cfg(test)]
    pub(super) fn rows(&self, d_k: usize, d_v: usize) -> (Vec<f32>, Vec<f32>) {
        let keys = self.keys.floats();
        ((0..TILE * d_k).map(|i| keys[i % d_k * TILE + i / d_k]).collect(), self.values.floats()[..TILE * d_v].to_vec())
    }
}

/// Rebuilds tiles for products: unlike [`crate::codec::decode_tile`], each coordinate of the keys together, turned to where they are, and residuals by the
/// reciprocals that [`HeadBases`] has, in one sum, which may tell in the last bits.
#[derive(Debug, Default)]
pub struct Rebuilder {
    coefficients: Lines,
    /// Those of values, a row's together.
    by_row: Lines,
    turn: Turn,
    key: Vec<f32>,
    /// Coefficients of a residual, and what they add to their row.
    fine: Vec<f32>,
    added: Vec<f32>,
}

impl Rebuilder {
    /// Rebuild all rows of a tile.
    pub fn tile(&mut self, c: Context, bases: &HeadBases, form: &TileForm, tile: &[u8], turns: Turns, out: &mut RowBlock) {
        let (kernels, k, v) = (c.kernels, &bases.k, &bases.v);
        self.coefficients.resize(k.d * TILE * 4);
        coefficients(kernels, &form.k, tile, self.coefficients.floats_mut().as_chunks_mut().0);
        out.keys.resize(k.d * TILE * 4);
        let keys = &mut out.keys.floats_mut()[..k.d * TILE];
        keys.fill(0.0);
        keys.chunks_exact_mut(TILE).zip(&k.mean).for_each(|(to, mean)| to.fill(*mean));
        let (rank, decode) = (form.k.widths.rank(), bases.transposed(kernels));
        (kernels.multiply)(decode, MatRef::new(self.coefficients.floats(), TILE), MatMut::new(keys, TILE), k.d, rank, TILE);
        for (row, step, nibbles) in form.residuals(&form.k, tile) {
            self.residual(kernels, k, &bases.finer[0], step, nibbles);
            keys[row..].iter_mut().step_by(TILE).zip(&self.added).for_each(|(to, x)| *to += x);
        }
        self.turn_keys(c, turns, keys, k.d);

        self.coefficients.resize(v.d * TILE * 4);
        coefficients(kernels, &form.v, tile, self.coefficients.floats_mut().as_chunks_mut().0);
        out.values.resize(TILE * v.d * 4);
        let values = &mut out.values.floats_mut()[..TILE * v.d];
        values.fill(0.0);
        let rank = form.v.widths.rank();
        self.by_row.resize(TILE * v.d * 4);
        let by_row = self.by_row.floats_mut();
        (kernels.transpose)(MatRef::new(self.coefficients.floats(), TILE), MatMut::new(by_row, v.d), rank, TILE);
        (kernels.multiply)(MatRef::new(by_row, v.d), MatRef::new(&v.decode, v.d), MatMut::new(values, v.d), TILE, rank, v.d);
        for (row, step, nibbles) in form.residuals(&form.v, tile) {
            self.residual(kernels, v, &bases.finer[1], step, nibbles);
            values[row * v.d..][..v.d].iter_mut().zip(&self.added).for_each(|(to, x)| *to += x);
        }
    }

    /// What a residual adds to its row.
    fn residual(&mut self, kernels: &Kernels, basis: &Basis, finer: &[f32], step: f32, nibbles: &[u8]) {
        self.fine.resize(basis.d, 0.0);
        (kernels.unpack_fine)(nibbles, step, &mut self.fine);
        self.fine.iter_mut().zip(finer).for_each(|(x, finer)| *x *= finer);
        self.added.clear();
        self.added.resize(basis.d, 0.0);
        (kernels.accumulate)(&basis.decode, &self.fine, &mut self.added);
    }

    /// Turn keys to where they are.
    fn turn_keys(&mut self, c: Context, turns: Turns, keys: &mut [f32], d: usize) {
        match turns {
            Turns::One(turn) => {
                c.rope.turn(i64::from(turn), &mut self.turn);
                c.rope.rotate_columns(&self.turn, keys, TILE);
            }
            Turns::Each(turns) => {
                self.key.resize(d, 0.0);
                for (row, turn) in turns.iter().enumerate() {
                    c.rope.turn(i64::from(*turn), &mut self.turn);
                    self.key.iter_mut().zip(keys[row..].iter().step_by(TILE)).for_each(|(to, x)| *to = *x);
                    c.rope.rotate(&self.turn, &mut self.key);
                    keys[row..].iter_mut().step_by(TILE).zip(&self.key).for_each(|(to, x)| *to = *x);
                }
            }
        }
    }
}

/// Running attention of any number of queries of one KV head.
#[derive(Debug, Default)]
pub struct Prefill {
    d_k: usize,
    d_v: usize,
    group: usize,
    n: usize,
    /// In units of scores.
    queries: Lines,
    max: Vec<f32>,
    sum: Vec<f32>,
    out: Lines,
    scores: Lines,
}

impl Prefill {
    /// Begin with `queries`: token-major, then the heads of the group, `d_k` elements each.
    pub fn begin<'q>(&mut self, d_k: usize, d_v: usize, group: usize, scale: f32, queries: impl ExactSizeIterator<Item = &'q [f32]>) {
        let n = queries.len();
        (self.d_k, self.d_v, self.group, self.n) = (d_k, d_v, group, n);
        self.queries.resize(n * d_k * 4);
        for (to, q) in self.queries.floats_mut().chunks_exact_mut(d_k).zip(queries) {
            to.iter_mut().zip(q).for_each(|(to, x)| *to = x * scale);
        }
        self.out.resize(n * d_v * 4);
        self.out.floats_mut()[..n * d_v].fill(0.0);
        for (buffer, value) in [(&mut self.max, f32::NEG_INFINITY), (&mut self.sum, 0.0)] {
            buffer.clear();
            buffer.resize(n, value);
        }
        self.scores.resize(QUERIES * STEP * TILE * 4);
    }

    /// Let `n_tokens` tokens from `first` on look at up to [`STEP`] blocks.
    pub fn attend(&mut self, c: Context, first: usize, n_tokens: usize, blocks: &[(&RowBlock, Visible)]) {
        let (d_k, d_v, stride) = (self.d_k, self.d_v, blocks.len() * TILE);
        let (begin, end) = (first * self.group, (first + n_tokens) * self.group);
        for at in (begin..end).step_by(QUERIES) {
            let n = QUERIES.min(end - at);
            let scores = &mut self.scores.floats_mut()[..n * stride];
            scores.fill(0.0);
            let queries = &self.queries.floats()[at * d_k..];
            for (i, (block, _)) in blocks.iter().enumerate() {
                let (q, k) = (MatRef::new(queries, d_k), MatRef::new(block.keys.floats(), TILE));
                (c.kernels.multiply)(q, k, MatMut::new(&mut scores[i * TILE..], stride), n, d_k, TILE);
            }
            c.scoring.cap(scores);
            for (i, (_, visible)) in blocks.iter().enumerate() {
                let Visible::Some(mask) = visible else { continue };
                for (q, scores) in scores.chunks_exact_mut(stride).enumerate() {
                    let mask = &mask[((at + q) / self.group - first) * TILE..][..TILE];
                    scores[i * TILE..][..TILE].iter_mut().zip(mask).for_each(|(s, m)| *s += m);
                }
            }
            for (q, scores) in scores.chunks_exact_mut(stride).enumerate().map(|(q, s)| (at + q, s)) {
                let largest = self.max[q].max((c.kernels.largest)(scores));
                if largest == f32::NEG_INFINITY {
                    scores.fill(0.0);
                    continue;
                }
                if largest > self.max[q] {
                    let shrink = (self.max[q] - largest).exp();
                    self.sum[q] *= shrink;
                    self.out.floats_mut()[q * d_v..][..d_v].iter_mut().for_each(|x| *x *= shrink);
                    self.max[q] = largest;
                }
                self.sum[q] += (c.kernels.exp_sum)(scores, largest);
            }
            let out = &mut self.out.floats_mut()[at * d_v..];
            for (i, (block, _)) in blocks.iter().enumerate() {
                let (p, v) = (MatRef::new(&scores[i * TILE..], stride), MatRef::new(block.values.floats(), d_v));
                (c.kernels.multiply)(p, v, MatMut::new(out, d_v), n, TILE, d_v);
            }
        }
    }

    /// Divide by the sums, in which each head's attention sink has its part, and hand out every query's output. A query that saw nothing gets zeros.
    pub fn finish(&mut self, sinks: Option<&[f32]>, mut put: impl FnMut(usize, &[f32])) {
        for (q, out) in self.out.floats_mut().chunks_exact_mut(self.d_v).enumerate().take(self.n) {
            let sink = sinks.map_or(f32::NEG_INFINITY, |s| s[q % self.group]);
            let largest = self.max[q].max(sink);
            if self.max[q] > f32::NEG_INFINITY {
                let weight = (self.max[q] - largest).exp();
                let factor = weight / (weight * self.sum[q] + (sink - largest).exp());
                out.iter_mut().for_each(|x| *x *= factor);
            }
            put(q, out);
        }
    }
}
