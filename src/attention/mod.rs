//! Attention of a few queries over blocks of at most 64 rows of one KV head: scores, online softmax, values.
//!
//! Two kinds of blocks: exact rows, and tiles of codes, whose keys are never rebuilt: a query is rotated into the tile's frame
//! and projected into the basis once, then a row's score is a sum over its codes; values are summed as coefficients and
//! leave the basis once, in [`Accumulator::finish`]. Softmax state is f32 with the running maximum of Milakov and Gimelshein
//! (2018); partial results of different rows merge exactly. Semantics are those of `ggml_flash_attn_ext`. Must not know about
//! cells, arenas or plans.

use crate::codec::{split_tile, Basis, TilePlace};
use crate::config::TILE;
use crate::error::{argument, Result};
use crate::rope::{Rope, Turn};
use crate::simd::{quant, Kernels, Widths};

/// How a raw product becomes a score.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scoring {
    /// Factor on `q . k`.
    pub scale: f32,
    /// `cap * tanh(score / cap)`, 0 for none.
    pub softcap: f32,
}

impl Scoring {
    /// Refuse what gives no scores.
    pub fn check(&self) -> Result<()> {
        if self.scale.is_finite() && self.softcap.is_finite() && self.softcap >= 0.0 {
            return Ok(());
        }
        argument(format!("score scale {} and soft cap {}", self.scale, self.softcap))
    }
    fn apply(&self, x: f32) -> f32 {
        let s = x * self.scale;
        if self.softcap > 0.0 {
            self.softcap * (s / self.softcap).tanh()
        } else {
            s
        }
    }
}

/// Floats of one query in a partial result: maximum, sum, then the unnormalised output.
pub const fn partial_floats(d_v: usize) -> usize {
    d_v + 2
}

/// Running attention of the queries of one KV head over some of its rows.
#[derive(Debug, Default)]
pub struct Accumulator {
    d_k: usize,
    d_v: usize,
    group: usize,
    queries: Vec<f32>,
    max: Vec<f32>,
    sum: Vec<f32>,
    out: Vec<f32>,
    /// Per query: value coefficients summed over coded rows.
    latent: Vec<f32>,
    /// Per query: probability on coded rows.
    coded_mass: Vec<f32>,
    scores: Vec<f32>,
    rotated: Vec<f32>,
    projected: Vec<f32>,
    tile_scores: Vec<f32>,
}

/// Values to score against: which rows of the block each token sees. `-inf` hides; `mask[token * TILE + row]`.
pub type BlockMask<'a> = &'a [f32];

impl Accumulator {
    /// Begin with `queries`: token-major, then the heads of the group, `d_k` elements each.
    pub fn begin(&mut self, d_k: usize, d_v: usize, group: usize, value_rank: usize, queries: impl Iterator<Item = f32>) {
        self.queries.clear();
        self.queries.extend(queries);
        (self.d_k, self.d_v, self.group) = (d_k, d_v, group);
        let n = self.queries.len() / d_k;
        for (buffer, len, value) in [
            (&mut self.max, n, f32::NEG_INFINITY),
            (&mut self.sum, n, 0.0),
            (&mut self.coded_mass, n, 0.0),
            (&mut self.out, n * d_v, 0.0),
            (&mut self.latent, n * value_rank, 0.0),
            (&mut self.scores, n * TILE, 0.0),
        ] {
            buffer.clear();
            buffer.resize(len, value);
        }
    }

    fn len(&self) -> usize {
        self.max.len()
    }

    /// Scores to probabilities relative to the running maximum; older sums shrink when it grows.
    fn softmax(&mut self, kernels: &Kernels, scoring: Scoring, mask: BlockMask) {
        let rank = self.latent.len() / self.len().max(1);
        for (i, scores) in self.scores.chunks_exact_mut(TILE).enumerate() {
            let mask = &mask[i / self.group * TILE..][..TILE];
            let mut largest = self.max[i];
            for (s, m) in scores.iter_mut().zip(mask) {
                *s = if *m == f32::NEG_INFINITY { f32::NEG_INFINITY } else { scoring.apply(*s) + m };
                largest = largest.max(*s);
            }
            if largest == f32::NEG_INFINITY {
                scores.fill(0.0);
                continue;
            }
            let shrink = (self.max[i] - largest).exp();
            if shrink != 1.0 {
                self.sum[i] *= shrink;
                self.coded_mass[i] *= shrink;
                self.out[i * self.d_v..][..self.d_v].iter_mut().for_each(|x| *x *= shrink);
                self.latent[i * rank..][..rank].iter_mut().for_each(|x| *x *= shrink);
            }
            self.max[i] = largest;
            self.sum[i] += (kernels.exp_sum)(scores, largest);
        }
    }

    /// Rows as they are: `k` and `v` hold the block's rows (up to 64) one after another.
    pub fn exact_block(&mut self, kernels: &Kernels, scoring: Scoring, k: &[f32], v: &[f32], mask: BlockMask) {
        for (q, s) in self.queries.chunks_exact(self.d_k).zip(self.scores.chunks_exact_mut(TILE)) {
            s.fill(0.0);
            (kernels.matvec)(k, q, &mut s[..k.len() / self.d_k]);
        }
        self.softmax(kernels, scoring, mask);
        let n = v.len() / self.d_v;
        for (p, out) in self.scores.chunks_exact(TILE).zip(self.out.chunks_exact_mut(self.d_v)) {
            (kernels.accumulate)(v, &p[..n], out);
        }
    }

    /// A tile of codes, where `place` says how wide they are. `turns[row]` rotates a stored key to where it is now; rows hidden for every token are not looked at.
    #[expect(clippy::too_many_arguments, reason = "one tile is two coded matrices and what places them")]
    pub fn tile_block(
        &mut self,
        kernels: &Kernels,
        scoring: Scoring,
        rope: &Rope,
        bases: (&Basis, &Basis),
        place: &TilePlace,
        tile: &[u8],
        turns: &[i32; TILE],
        mask: BlockMask,
    ) {
        let table = quant::gains();
        let [k, v] = split_tile(tile, place.k);
        let mut left: u64 = 0;
        for row in 0..TILE {
            let visible = mask.chunks_exact(TILE).any(|m| m[row] != f32::NEG_INFINITY);
            left |= u64::from(visible) << row;
        }
        self.scores.fill(0.0);
        let mut turn = Turn::default();
        // Rows of a tile share one turn unless they were shifted or moved apart; each distinct turn costs one projection.
        while left != 0 {
            let wanted = turns[left.trailing_zeros() as usize];
            let rows = (0..TILE).filter(|r| left >> r & 1 == 1 && turns[*r] == wanted).fold(0u64, |m, r| m | 1 << r);
            left &= !rows;
            rope.turn(-i64::from(wanted), &mut turn);
            self.project(kernels, rope, &turn, bases.0, place.k, k.1);
            let offsets = &self.projected[self.max.len() * place.k.rank()..];
            for (i, (s, offset)) in self.scores.chunks_exact_mut(TILE).zip(offsets).enumerate() {
                for row in (0..TILE).filter(|r| rows >> r & 1 == 1) {
                    s[row] = offset + table[k.0[row] as usize] * self.tile_scores[i * TILE + row];
                }
            }
        }
        self.softmax(kernels, scoring, mask);
        for (i, p) in self.scores.chunks_exact_mut(TILE).enumerate() {
            for (p, g) in p.iter_mut().zip(v.0) {
                self.coded_mass[i] += *p;
                *p *= table[*g as usize];
            }
        }
        if place.v.rank() > 0 {
            (kernels.tile_values)(place.v, v.1, &self.scores, &mut self.latent, bases.1.rank());
        }
    }

    /// Rotate the queries, project them into the key basis and sum over codes. `projected` ends with one offset per query.
    fn project(&mut self, kernels: &Kernels, rope: &Rope, turn: &Turn, basis: &Basis, widths: Widths, codes: &[u8]) {
        let (n, rank) = (self.len(), widths.rank());
        self.projected.resize(n * rank + n, 0.0);
        self.tile_scores.clear();
        self.tile_scores.resize(n * TILE, 0.0);
        let (projected, offsets) = self.projected.split_at_mut(n * rank);
        for (i, q) in self.queries.chunks_exact(self.d_k).enumerate() {
            self.rotated.clear();
            self.rotated.extend_from_slice(q);
            rope.rotate(turn, &mut self.rotated);
            (kernels.matvec)(&basis.decode[..rank * self.d_k], &self.rotated, &mut projected[i * rank..][..rank]);
            (kernels.matvec)(&basis.mean, &self.rotated, &mut offsets[i..i + 1]);
        }
        if rank > 0 {
            (kernels.tile_scores)(widths, codes, projected, &mut self.tile_scores);
        }
    }

    /// Leave the value basis and write `[maximum, sum, output]` of every query.
    pub fn finish(&mut self, kernels: &Kernels, value_basis: Option<&Basis>, partials: &mut [f32]) {
        let rank = self.latent.len() / self.len().max(1);
        for (i, partial) in partials.chunks_exact_mut(partial_floats(self.d_v)).enumerate() {
            let out = &mut self.out[i * self.d_v..][..self.d_v];
            if let Some(b) = value_basis {
                (kernels.accumulate)(&b.decode, &self.latent[i * rank..][..rank], out);
                (kernels.accumulate)(&b.mean, &self.coded_mass[i..i + 1], out);
            }
            (partial[0], partial[1]) = (self.max[i], self.sum[i]);
            partial[2..].copy_from_slice(out);
        }
    }
}

/// Merge partial results of one query, and an attention sink's logit, into its output. No visible row gives zeros.
pub fn merge<'a>(partials: impl Iterator<Item = &'a [f32]> + Clone, sink: Option<f32>, out: &mut [f32]) {
    let largest = partials.clone().map(|p| p[0]).fold(sink.unwrap_or(f32::NEG_INFINITY), f32::max);
    out.fill(0.0);
    if largest == f32::NEG_INFINITY {
        return;
    }
    let mut sum = sink.map_or(0.0, |s| (s - largest).exp());
    for p in partials.filter(|p| p[0] != f32::NEG_INFINITY) {
        let w = (p[0] - largest).exp();
        sum += w * p[1];
        out.iter_mut().zip(&p[2..]).for_each(|(o, x)| *o += w * x);
    }
    if sum > 0.0 {
        out.iter_mut().for_each(|o| *o /= sum);
    }
}
