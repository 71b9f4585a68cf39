//! Attention of a few queries, running over some rows of one KV head.
//!
//! Must not know how scores of coded rows are made, nor their values summed.

use super::scores::Scorer;
use super::values::{Probabilities, Values};
use super::{partial_floats, Context, HeadBases, Tile, Turns, Visible, BATCH};
use crate::layout::{TileForm, TILE};
use crate::simd::lanes::LANES;
use crate::simd::{Ahead, Kernels, Lines, MatMut, MatRef};

/// Floats that scores of one batch may take, so that they stay in a core's cache.
const SCORE_FLOATS: usize = 1 << 17;

/// Running attention of the queries of one KV head over some of its rows.
#[derive(Debug, Default)]
pub struct Accumulator {
    d_k: usize,
    d_v: usize,
    group: usize,
    n: usize,
    queries: Lines,
    max: Vec<f32>,
    sum: Vec<f32>,
    out: Lines,
    scores: Lines,
    scorer: Scorer,
    values: Values,
}

impl Accumulator {
    /// Begin with `queries`: token-major, then the heads of the group, `d_k` elements each.
    pub fn begin<'q>(&mut self, d_k: usize, d_v: usize, group: usize, queries: impl ExactSizeIterator<Item = &'q [f32]>) {
        let n = queries.len();
        (self.d_k, self.d_v, self.group, self.n) = (d_k, d_v, group, n);
        self.values.begin();
        self.scorer.begin(n);
        self.queries.resize(n * d_k * 4);
        self.queries.floats_mut().chunks_exact_mut(d_k).zip(queries).for_each(|(to, q)| to.copy_from_slice(q));
        for (buffer, value) in [(&mut self.max, f32::NEG_INFINITY), (&mut self.sum, 0.0)] {
            buffer.clear();
            buffer.resize(n, value);
        }
        self.out.resize(n * d_v * 4);
        self.out.floats_mut()[..n * d_v].fill(0.0);
    }

    /// Tiles that one batch may have.
    pub fn batch(&self) -> usize {
        (SCORE_FLOATS / (self.n.max(1) * TILE)).clamp(1, BATCH)
    }

    /// Scores of `rows` rows, `stride` apart, become probabilities relative to the running maximum; older sums shrink when it grows.
    fn softmax(&mut self, kernels: &Kernels, rows: usize, stride: usize) {
        let (d_v, n) = (self.d_v, self.n);
        for (i, scores) in self.scores.floats_mut().chunks_mut(stride).enumerate().take(n) {
            let largest = self.max[i].max((kernels.largest)(&self.scorer.products.largest[i]));
            if largest == f32::NEG_INFINITY {
                scores[..rows].fill(0.0);
                continue;
            }
            let shrink = (self.max[i] - largest).exp();
            if shrink != 1.0 && self.sum[i] > 0.0 {
                self.sum[i] *= shrink;
                self.out.floats_mut()[i * d_v..][..d_v].iter_mut().for_each(|x| *x *= shrink);
                self.values.shrink(i, n, d_v, shrink);
            }
            self.max[i] = largest;
            self.sum[i] += (kernels.exp_sum)(&mut scores[..rows], largest);
        }
    }

    /// Add a mask to scores.
    fn show(&mut self, at: usize, rows: usize, stride: usize, visible: Visible) {
        let Visible::Some(mask) = visible else { return };
        for (i, scores) in self.scores.floats_mut().chunks_mut(stride).enumerate().take(self.n) {
            let mask = &mask[i / self.group * TILE..][..rows];
            scores[at..at + rows].iter_mut().zip(mask).for_each(|(s, m)| *s = if *m == f32::NEG_INFINITY { *m } else { *s + m });
        }
    }

    /// Rows as they are: `k` and `v` hold up to 64 rows one after another.
    pub fn exact_block(&mut self, c: Context, k: &[f32], v: &[f32], visible: Visible) {
        let (n, d_k, d_v, rows) = (self.n, self.d_k, self.d_v, k.len() / self.d_k);
        self.scores.resize(n * TILE * 4);
        let queries = MatRef::new(self.queries.floats(), d_k);
        (c.kernels.dots)(queries, MatRef::new(k, d_k), MatMut::new(self.scores.floats_mut(), TILE), n, d_k, rows);
        for scores in self.scores.floats_mut().chunks_exact_mut(TILE).take(n) {
            scores[..rows].iter_mut().for_each(|s| *s *= c.scoring.scale);
            c.scoring.cap(&mut scores[..rows]);
        }
        self.show(0, rows, TILE, visible);
        for (largest, scores) in self.scorer.products.largest.iter_mut().zip(self.scores.floats().chunks_exact(TILE)) {
            *largest = [(c.kernels.largest)(&scores[..rows]); LANES];
        }
        self.softmax(c.kernels, rows, TILE);
        let p = MatRef::new(self.scores.floats(), TILE);
        (c.kernels.multiply)(p, MatRef::new(v, d_v), MatMut::new(self.out.floats_mut(), d_v), n, rows, d_v);
    }

    /// Up to [`Accumulator::batch`] tiles of one form. Tiles that nobody sees are for the caller to leave out. `ahead` is what will be read next.
    pub fn tile_batch(&mut self, c: Context, bases: &HeadBases, form: &TileForm, tiles: &[Tile], ahead: Ahead) {
        let (n, stride) = (self.n, tiles.len() * TILE);
        self.scores.resize(n * stride * 4);
        self.scorer.products.ahead = ahead;
        self.scorer.score_tiles(c, self.queries.floats(), bases, form, tiles, self.scores.floats_mut());
        for (t, tile) in tiles.iter().enumerate() {
            let at = t * TILE;
            if c.scoring.softcap > 0.0 {
                self.scores.floats_mut().chunks_exact_mut(stride).take(n).for_each(|s| c.scoring.cap(&mut s[at..at + TILE]));
            }
            self.show(at, TILE, stride, tile.visible);
            if c.scoring.softcap > 0.0 || matches!(tile.visible, Visible::Some(_)) || matches!(tile.turns, Turns::Each(_)) {
                self.scorer.products.largest.fill([f32::INFINITY; LANES]);
            }
        }
        // Where scores changed after their largest was noted, it is looked for again.
        let noted = self.scorer.products.largest.iter_mut().zip(self.scores.floats().chunks_exact(stride));
        for (largest, scores) in noted.filter(|(l, _)| l[0] == f32::INFINITY) {
            *largest = [(c.kernels.largest)(scores); LANES];
        }
        self.softmax(c.kernels, stride, stride);
        let p = Probabilities { scores: self.scores.floats(), sums: &self.sum };
        self.values.add(c.kernels, form, tiles, p, &mut self.scorer.products);
    }

    /// Leave the value basis: tiles with other bases may follow.
    pub fn leave(&mut self, kernels: &Kernels, bases: &HeadBases) {
        self.values.leave(kernels, bases, &mut self.scores, self.n, self.out.floats_mut());
    }

    /// Write `[maximum, sum, output]` of every query. Value bases have been left.
    pub fn finish(&mut self, partials: &mut [f32]) {
        debug_assert!(self.values.have_left());
        let d_v = self.d_v;
        for (i, partial) in partials.chunks_exact_mut(partial_floats(d_v)).enumerate().take(self.n) {
            (partial[0], partial[1]) = (self.max[i], self.sum[i]);
            partial[2..].copy_from_slice(&self.out.floats()[i * d_v..][..d_v]);
        }
    }
}
