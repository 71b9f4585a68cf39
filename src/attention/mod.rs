//! Attention of a few queries over some rows of one KV head: scores, online softmax, values.
//!
//! Rows come in two kinds: exact ones, up to 64 at a time, and tiles of codes, up to [`BATCH`] at a time, whose keys are never rebuilt: a query is
//! rotated into the frame of the tiles and projected into the basis once for all neighbouring tiles with the same frame, then a row's score is a sum
//! over its codes; values are summed as coefficients and leave the basis once, in [`Accumulator::leave`]. Fine rows are looked at once more, with
//! what coding left of them. Softmax state is f32 with the running maximum of Milakov and Gimelshein (2018); partial results of different rows merge
//! exactly. Semantics are those of `ggml_flash_attn_ext`. Must not know about cells, arenas or plans.

pub mod prefill;

use crate::codec::Basis;
use crate::config::Scoring;
use crate::error::Result;
use crate::layout::{gain, Side, TileForm, FINE_ROWS, PARTS, TILE};
use crate::rope::{Rope, Turn};
use crate::simd::lanes::LANES;
use crate::simd::{self, Ahead, Kernels, Lines, MatMut, MatRef, Pass, Products};
use std::ops::Range;

pub use crate::simd::BATCH;

/// Floats of one query in a partial result: maximum, sum, then the unnormalised output.
pub const fn partial_floats(d_v: usize) -> usize {
    d_v + 2
}

/// Share of a query's sum of probabilities under which the values of a whole tile are left out: half a unit in the last place of f32.
const NEGLIGIBLE: f32 = 1.0 / (1 << 25) as f32;
/// Floats that scores of one batch may take, so that they stay in a core's cache.
const SCORE_FLOATS: usize = 1 << 17;

/// What a token sees of some rows: `-inf` hides, other values are added.
#[derive(Debug, Clone, Copy)]
pub enum Visible<'a> {
    /// Everything, with nothing added.
    All,
    /// `mask[token * TILE + row]`.
    Some(&'a [f32]),
}

/// How stored keys rotate to where they are now.
#[derive(Debug, Clone, Copy)]
pub enum Turns<'a> {
    /// All rows alike.
    One(i32),
    /// Each row by its own.
    Each(&'a [i32; TILE]),
}

/// One coded tile.
pub struct Tile<'a> {
    /// Gains and codes.
    pub bytes: &'a [u8],
    /// Rotation of its keys.
    pub turns: Turns<'a>,
    /// What is seen of it.
    pub visible: Visible<'a>,
}

impl Tile<'_> {
    fn one_turn(&self) -> Option<i32> {
        match self.turns {
            Turns::One(turn) => Some(turn),
            Turns::Each(_) => None,
        }
    }
}

/// What stays the same for all blocks of a call.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// Kernels of the level.
    pub kernels: &'static Kernels,
    /// How products become scores.
    pub scoring: Scoring,
    /// Rotation of the layer.
    pub rope: &'a Rope,
}

/// The bases of one KV head, in the forms that attention needs.
#[derive(Debug, Default)]
pub struct HeadBases {
    /// Keys.
    pub k: Basis,
    /// Values.
    pub v: Basis,
    /// Transpose of the keys' decode matrix: it takes a query to its coefficients.
    projection: Lines,
    /// Floats from a row of `projection` to the next.
    stride: usize,
    /// What coefficients of residuals, of keys and of values, are to be multiplied by.
    finer: [Vec<f32>; 2],
}

impl HeadBases {
    /// Read what is `stored` of a head's bases of K and V.
    pub fn load(&mut self, (k, v): (&[u8], &[u8]), d_k: usize, d_v: usize) -> Result<()> {
        self.k.load(k, d_k, false)?;
        self.v.load(v, d_v, false)?;
        self.prepare();
        Ok(())
    }

    /// Bases that are not stored.
    pub fn of(k: Basis, v: Basis) -> Self {
        let mut bases = HeadBases { k, v, ..HeadBases::default() };
        bases.prepare();
        bases
    }

    fn prepare(&mut self) {
        let d = self.k.d;
        self.stride = d.next_multiple_of(LANES);
        self.projection.resize(d * self.stride * 4);
        (simd::kernels().transpose)(MatRef::new(&self.k.decode, d), MatMut::new(self.projection.floats_mut(), self.stride), d, d);
        for (finer, basis) in self.finer.iter_mut().zip([&self.k, &self.v]) {
            finer.clear();
            finer.extend(basis.weight.iter().map(|w| w.sqrt().recip()));
        }
    }
}

/// Residuals of the fine rows of some tiles.
#[derive(Debug, Default)]
struct FineRows {
    /// Tile and row of each.
    at: Vec<(usize, usize)>,
    /// Their coefficients in units of importance, `d` each.
    rows: Lines,
}

impl FineRows {
    fn unpack<'a>(&mut self, kernels: &Kernels, form: &TileForm, side: &Side, tiles: impl Iterator<Item = &'a [u8]>) {
        self.at.clear();
        self.rows.resize(BATCH * FINE_ROWS * side.d * 4);
        for (t, tile) in tiles.enumerate() {
            for (row, step, nibbles) in form.residuals(side, tile) {
                let out = &mut self.rows.floats_mut()[self.at.len() * side.d..][..side.d];
                (kernels.unpack_fine)(nibbles, step, out);
                self.at.push((t, row));
            }
        }
    }
    /// Those of tiles `tiles`.
    fn of(&self, tiles: Range<usize>) -> Range<usize> {
        self.at.partition_point(|(t, _)| *t < tiles.start)..self.at.partition_point(|(t, _)| *t < tiles.end)
    }
}

/// Queries on their way to scores of coded rows.
#[derive(Debug, Default)]
struct Scorer {
    /// Projected queries; also has the largest score of each query in the current block.
    products: Products,
    turn: Turn,
    rotated: Lines,
    /// All coefficients of the rotated queries.
    z: Lines,
    /// Those, as residuals of keys want them.
    finer: Lines,
    fine: FineRows,
    /// Products of the queries with fine rows: for each query those of all rows.
    fine_scores: Lines,
}

impl Scorer {
    /// Rotate `n` queries into frames, given by their turns, and project them into the key basis.
    fn project(&mut self, c: Context, queries: &[f32], n: usize, frames: &[i32], bases: &HeadBases, form: &TileForm) {
        let (all, d) = (frames.len() * n, form.k.d);
        self.rotated.resize(all * d * 4);
        let rotated = &mut self.rotated.floats_mut()[..all * d];
        for (turn, rotated) in frames.iter().zip(rotated.chunks_exact_mut(n * d)) {
            c.rope.turn(-i64::from(*turn), &mut self.turn);
            rotated.copy_from_slice(&queries[..n * d]);
            rotated.chunks_exact_mut(d).for_each(|q| c.rope.rotate(&self.turn, q));
        }
        let p = &mut self.products;
        p.means.clear();
        p.means.resize(all, 0.0);
        if !bases.k.mean.is_empty() {
            (c.kernels.dots)(MatRef::new(rotated, d), MatRef::new(&bases.k.mean, d), MatMut::new(&mut p.means, 1), all, d, 1);
        }
        (p.n, p.frames, p.frame, p.scale) = (n, frames.len(), 0, c.scoring.scale);
        // Whole vectors: what lies behind a band's rank is not looked at.
        let needed = if self.fine.at.is_empty() { form.k.widths.rank() } else { d };
        let (stride, columns) = (bases.stride, needed.next_multiple_of(LANES));
        self.z.resize(all * stride * 4);
        let z = &mut self.z.floats_mut()[..all * stride];
        z.fill(0.0);
        let projection = MatRef::new(bases.projection.floats(), stride);
        (c.kernels.multiply)(MatRef::new(rotated, d), projection, MatMut::new(z, stride), all, d, columns);
        for (i, part) in form.k.some_parts() {
            let (rank, own) = (part.rank(), &mut p.parts[i]);
            (own.widths, own.stride) = (part.widths, rank.next_multiple_of(LANES));
            own.z.resize((all * own.stride + 64) * 4);
            let (own_z, behind) = own.z.floats_mut().split_at_mut(all * own.stride);
            behind[..64].fill(0.0);
            for (to, z) in own_z.chunks_exact_mut(own.stride).zip(z.chunks_exact(stride)) {
                to[..rank].copy_from_slice(&z[part.first..part.first + rank]);
                to[rank..].fill(0.0);
            }
            (c.kernels.prepare)(p, i);
        }
        if !self.fine.at.is_empty() {
            self.finer.resize(all * d * 4);
            for (to, z) in self.finer.floats_mut().chunks_exact_mut(d).zip(z.chunks_exact(stride)) {
                to.iter_mut().zip(z).zip(&bases.finer[0]).for_each(|((to, z), finer)| *to = z * finer);
            }
        }
    }

    /// Products of the queries of frame `frame` with some fine rows.
    fn score_fine(&mut self, kernels: &Kernels, frame: usize, d: usize, rows: Range<usize>) {
        let (n, m) = (self.products.n, self.fine.at.len());
        self.fine_scores.resize(n * m * 4);
        if rows.is_empty() {
            return;
        }
        let (queries, fine) = (&self.finer.floats()[frame * n * d..], &self.fine.rows.floats()[rows.start * d..]);
        let out = MatMut::new(&mut self.fine_scores.floats_mut()[rows.start..], m);
        (kernels.dots)(MatRef::new(queries, d), MatRef::new(fine, d), out, n, d, rows.len());
    }

    /// Scores of a tile, whose fine rows are `rows`; those of a query are `stride` apart.
    fn score(&mut self, kernels: &Kernels, form: &TileForm, tile: &[u8], rows: Range<usize>, out: &mut [f32], stride: usize) {
        let parts = form.k.some_parts().count();
        let mut begun = false;
        if parts < 2 && !rows.is_empty() {
            out.chunks_mut(stride).take(self.products.n).for_each(|out| out[..TILE].fill(0.0));
            self.add_fine(rows.clone(), out, stride);
            begun = true;
        }
        let mut gains = [0.0; TILE];
        for (done, (part, own)) in form.k.some_parts().enumerate() {
            (kernels.lookup)(gain::gains(), own.gains(tile), &mut gains);
            let pass = Pass { part, add: begun, finish: done + 1 == parts };
            (kernels.tile_scores)(&mut self.products, pass, own.codes(tile), &gains, out, stride);
            if !begun {
                self.add_fine(rows.clone(), out, stride);
            }
            begun = true;
        }
        if parts == 0 {
            self.score_means(begun, out, stride);
        }
    }

    /// Scores of rows that have no coefficients.
    fn score_means(&mut self, add: bool, out: &mut [f32], stride: usize) {
        let p = &mut self.products;
        let means = &p.means[p.frame * p.n..];
        for ((out, mean), largest) in out.chunks_mut(stride).zip(means).zip(&mut p.largest) {
            for x in &mut out[..TILE] {
                *x = p.scale * (if add { *x } else { 0.0 } + mean);
                *largest = largest.max(*x);
            }
        }
    }

    /// Add what residuals give to products that are not scores yet.
    fn add_fine(&self, rows: Range<usize>, out: &mut [f32], stride: usize) {
        let m = self.fine.at.len();
        for i in rows {
            let row = self.fine.at[i].1;
            let scores = self.fine_scores.floats()[i..].iter().step_by(m);
            out[row..].iter_mut().step_by(stride).zip(scores).take(self.products.n).for_each(|(out, x)| *out += x);
        }
    }
}

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
    /// Coefficients of the value basis that `sums` has; nothing is in those behind.
    rank: usize,
    /// Per coefficient and query: value coefficients summed over coded rows, in lanes.
    sums: Lines,
    /// There is something in `fine_sums`.
    has_fine: bool,
    /// Per query: residuals of values summed over fine rows, `d_v` each.
    fine_sums: Lines,
    scores: Lines,
    scorer: Scorer,
    few_rows: Lines,
    /// Probabilities times gains, for each part of the values.
    weighed: [Lines; PARTS],
    /// Probabilities of the fine rows.
    fine_weights: Lines,
    fine: FineRows,
}

impl Accumulator {
    /// Begin with `queries`: token-major, then the heads of the group, `d_k` elements each.
    pub fn begin<'q>(&mut self, d_k: usize, d_v: usize, group: usize, queries: impl ExactSizeIterator<Item = &'q [f32]>) {
        let n = queries.len();
        (self.d_k, self.d_v, self.group, self.n) = (d_k, d_v, group, n);
        (self.rank, self.has_fine) = (0, false);
        self.queries.resize(n * d_k * 4);
        self.queries.floats_mut().chunks_exact_mut(d_k).zip(queries).for_each(|(to, q)| to.copy_from_slice(q));
        for (buffer, value) in [(&mut self.max, f32::NEG_INFINITY), (&mut self.sum, 0.0), (&mut self.scorer.products.largest, 0.0)] {
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
        let (d_v, n, rank) = (self.d_v, self.n, self.rank);
        for (i, scores) in self.scores.floats_mut().chunks_mut(stride).enumerate().take(n) {
            let largest = self.max[i].max(self.scorer.products.largest[i]);
            if largest == f32::NEG_INFINITY {
                scores[..rows].fill(0.0);
                continue;
            }
            let shrink = (self.max[i] - largest).exp();
            if shrink != 1.0 && self.sum[i] > 0.0 {
                self.sum[i] *= shrink;
                self.out.floats_mut()[i * d_v..][..d_v].iter_mut().for_each(|x| *x *= shrink);
                for j in 0..rank {
                    self.sums.floats_mut()[(j * n + i) * LANES..][..LANES].iter_mut().for_each(|x| *x *= shrink);
                }
                if self.has_fine {
                    self.fine_sums.floats_mut()[i * d_v..][..d_v].iter_mut().for_each(|x| *x *= shrink);
                }
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
            *largest = (c.kernels.largest)(&scores[..rows]);
        }
        self.softmax(c.kernels, rows, TILE);
        let p = MatRef::new(self.scores.floats(), TILE);
        (c.kernels.multiply)(p, MatRef::new(v, d_v), MatMut::new(self.out.floats_mut(), d_v), n, rows, d_v);
    }

    /// Up to [`Accumulator::batch`] tiles of one form. Tiles that nobody sees are for the caller to leave out. `ahead` is what will be read next.
    pub fn tile_batch(&mut self, c: Context, bases: &HeadBases, form: &TileForm, tiles: &[Tile], ahead: Ahead) {
        let (n, stride) = (self.n, tiles.len() * TILE);
        self.scores.resize(n * stride * 4);
        self.scorer.products.largest.fill(f32::NEG_INFINITY);
        self.scorer.products.ahead = ahead;
        self.scorer.fine.unpack(c.kernels, form, &form.k, tiles.iter().map(|t| t.bytes));
        // Tiles whose rows went apart have frames of their own; the queries are projected for those of all others at once.
        for (t, tile) in tiles.iter().enumerate() {
            if let Turns::Each(turns) = tile.turns {
                self.score_rows(c, turns, bases, form, (t, tile), stride);
            }
        }
        self.score_frames(c, bases, form, tiles, stride);
        for (t, tile) in tiles.iter().enumerate() {
            let at = t * TILE;
            if c.scoring.softcap > 0.0 {
                self.scores.floats_mut().chunks_exact_mut(stride).take(n).for_each(|s| c.scoring.cap(&mut s[at..at + TILE]));
            }
            self.show(at, TILE, stride, tile.visible);
            if c.scoring.softcap > 0.0 || matches!(tile.visible, Visible::Some(_)) || matches!(tile.turns, Turns::Each(_)) {
                self.scorer.products.largest.fill(f32::INFINITY);
            }
        }
        // Where scores changed after their largest was noted, it is looked for again.
        let noted = self.scorer.products.largest.iter_mut().zip(self.scores.floats().chunks_exact(stride));
        for (largest, scores) in noted.filter(|(l, _)| **l == f32::INFINITY) {
            *largest = (c.kernels.largest)(scores);
        }
        self.softmax(c.kernels, stride, stride);
        self.add_values(c.kernels, form, tiles, stride);
    }

    /// Tiles whose rows share a turn.
    fn score_frames(&mut self, c: Context, bases: &HeadBases, form: &TileForm, tiles: &[Tile], stride: usize) {
        let (mut frames, mut n_frames, mut frame_of) = ([0; BATCH], 0, [0; BATCH]);
        let mut last = None;
        for (t, turn) in tiles.iter().enumerate().filter_map(|(t, tile)| tile.one_turn().map(|turn| (t, turn))) {
            if last.replace(turn) != Some(turn) {
                frames[n_frames] = turn;
                n_frames += 1;
            }
            frame_of[t] = n_frames - 1;
        }
        if n_frames == 0 {
            return;
        }
        let scorer = &mut self.scorer;
        scorer.project(c, self.queries.floats(), self.n, &frames[..n_frames], bases, form);
        let mut scored = 0;
        for (t, tile) in tiles.iter().enumerate().filter(|(_, tile)| tile.one_turn().is_some()) {
            scorer.products.frame = frame_of[t];
            if t >= scored {
                // Fine rows of neighbours in one frame together.
                let others = tiles[t..].iter().zip(&frame_of[t..]);
                scored = t + others.take_while(|(other, frame)| other.one_turn().is_some() && **frame == frame_of[t]).count();
                let rows = scorer.fine.of(t..scored);
                scorer.score_fine(c.kernels, frame_of[t], form.k.d, rows);
            }
            let rows = scorer.fine.of(t..t + 1);
            scorer.score(c.kernels, form, tile.bytes, rows, &mut self.scores.floats_mut()[t * TILE..], stride);
        }
    }

    /// A tile whose rows were shifted or moved apart: each distinct turn costs a projection.
    fn score_rows(&mut self, c: Context, turns: &[i32; TILE], bases: &HeadBases, form: &TileForm, (t, tile): (usize, &Tile), stride: usize) {
        let mut left = u64::MAX;
        self.few_rows.resize(self.n * TILE * 4);
        let fine = self.scorer.fine.of(t..t + 1);
        while left != 0 {
            let wanted = turns[left.trailing_zeros() as usize];
            let rows = (0..TILE).filter(|r| left >> r & 1 == 1 && turns[*r] == wanted).fold(0u64, |m, r| m | 1 << r);
            left &= !rows;
            self.scorer.project(c, self.queries.floats(), self.n, &[wanted], bases, form);
            self.scorer.score_fine(c.kernels, 0, form.k.d, fine.clone());
            self.scorer.score(c.kernels, form, tile.bytes, fine.clone(), self.few_rows.floats_mut(), TILE);
            for (scored, scores) in self.few_rows.floats().chunks_exact(TILE).zip(self.scores.floats_mut().chunks_exact_mut(stride)).take(self.n) {
                for row in (0..TILE).filter(|r| rows >> r & 1 == 1) {
                    scores[t * TILE + row] = scored[row];
                }
            }
        }
    }

    /// Sum value coefficients, but of tiles whose probability cannot matter.
    fn add_values(&mut self, kernels: &Kernels, form: &TileForm, tiles: &[Tile], stride: usize) {
        let n = self.n;
        self.weighed.iter_mut().for_each(|w| w.resize(n * stride * 4));
        // Tiles that are kept, and which they are; probabilities of each lie beside those of the last that was kept.
        let (mut kept, mut which, mut n_kept) = ([&[][..]; BATCH], [0; BATCH], 0);
        for (t, tile) in tiles.iter().enumerate() {
            if self.weigh_tile(kernels, form, tile.bytes, t, n_kept, stride) {
                (kept[n_kept], which[n_kept]) = (tile.bytes, t);
                n_kept += 1;
            }
        }
        let kept = &kept[..n_kept];
        if kept.is_empty() {
            return;
        }
        let rank = form.v.widths.rank();
        if rank > self.rank {
            self.sums.resize(rank * n * LANES * 4);
            self.sums.floats_mut()[self.rank * n * LANES..rank * n * LANES].fill(0.0);
            self.rank = rank;
        }
        for (i, part) in form.v.some_parts() {
            let mut codes = [&[][..]; BATCH];
            codes.iter_mut().zip(kept).for_each(|(codes, tile)| *codes = part.codes(tile));
            let sums = &mut self.sums.floats_mut()[part.first * n * LANES..];
            (kernels.tile_values)(part.widths, &codes[..n_kept], self.weighed[i].floats(), stride, n, sums, &mut self.scorer.products);
        }
        self.fine.unpack(kernels, form, &form.v, kept.iter().copied());
        self.add_fine_values(kernels, &which, stride);
    }

    /// Probabilities of a tile times gains of each part, as those of number `to`. False when they cannot matter.
    fn weigh_tile(&mut self, kernels: &Kernels, form: &TileForm, tile: &[u8], t: usize, to: usize, stride: usize) -> bool {
        let (n, scores) = (self.n, self.scores.floats());
        let rows = |q: usize, t: usize| q * stride + t * TILE..q * stride + (t + 1) * TILE;
        let (mut matters, mut gains) = (false, [0.0; TILE]);
        for (i, part) in form.v.some_parts() {
            (kernels.lookup)(gain::gains(), part.gains(tile), &mut gains);
            let weighed = self.weighed[i].floats_mut();
            for q in 0..n {
                let p = (&scores[rows(q, t)]).try_into().expect("invariant: the rows of a tile");
                let out = (&mut weighed[rows(q, to)]).try_into().expect("invariant: the rows of a tile");
                matters |= (kernels.weigh)(p, &gains, out) > NEGLIGIBLE * self.sum[q];
            }
        }
        matters || form.v.widths.rank() == 0
    }

    /// Sum residuals of the values of the tiles whose numbers are `which`.
    fn add_fine_values(&mut self, kernels: &Kernels, which: &[usize; BATCH], stride: usize) {
        let (n, d, m) = (self.n, self.d_v, self.fine.at.len());
        if m == 0 {
            return;
        }
        self.fine_sums.resize(n * d * 4);
        if !self.has_fine {
            self.fine_sums.floats_mut()[..n * d].fill(0.0);
            self.has_fine = true;
        }
        self.fine_weights.resize(n * m * 4);
        for (p, scores) in self.fine_weights.floats_mut().chunks_exact_mut(m).zip(self.scores.floats().chunks_exact(stride)).take(n) {
            p.iter_mut().zip(&self.fine.at).for_each(|(p, (t, row))| *p = scores[which[*t] * TILE + row]);
        }
        let (p, rows) = (MatRef::new(self.fine_weights.floats(), m), MatRef::new(self.fine.rows.floats(), d));
        (kernels.multiply)(p, rows, MatMut::new(self.fine_sums.floats_mut(), d), n, m, d);
    }

    /// Leave the value basis: tiles with other bases may follow.
    pub fn leave(&mut self, kernels: &Kernels, bases: &HeadBases) {
        let (n, d, rank, has_fine) = (self.n, self.d_v, self.rank, self.has_fine);
        (self.rank, self.has_fine) = (0, false);
        let needed = if has_fine { d } else { rank };
        if needed == 0 {
            return;
        }
        self.scores.resize((n * rank + n * d) * 4);
        let (by_coefficient, by_query) = self.scores.floats_mut().split_at_mut(n * rank);
        let by_query = &mut by_query[..n * d];
        by_query.fill(0.0);
        if has_fine {
            for (out, sums) in by_query.chunks_exact_mut(d).zip(self.fine_sums.floats().chunks_exact(d)) {
                out.iter_mut().zip(sums).zip(&bases.finer[1]).for_each(|((out, x), finer)| *out = x * finer);
            }
        }
        (kernels.lane_sums)(self.sums.floats(), by_coefficient);
        for (j, sums) in by_coefficient.chunks_exact(n).enumerate() {
            sums.iter().enumerate().for_each(|(i, x)| by_query[i * d + j] += *x);
        }
        (kernels.multiply)(MatRef::new(by_query, d), MatRef::new(&bases.v.decode, d), MatMut::new(self.out.floats_mut(), d), n, needed, d);
    }

    /// Write `[maximum, sum, output]` of every query. Value bases have been left.
    pub fn finish(&mut self, partials: &mut [f32]) {
        debug_assert!(self.rank == 0 && !self.has_fine);
        let d_v = self.d_v;
        for (i, partial) in partials.chunks_exact_mut(partial_floats(d_v)).enumerate().take(self.n) {
            (partial[0], partial[1]) = (self.max[i], self.sum[i]);
            partial[2..].copy_from_slice(&self.out.floats()[i * d_v..][..d_v]);
        }
    }
}

/// The partial result of a query that saw no row.
pub fn no_rows(partial: &mut [f32]) {
    partial.fill(0.0);
    partial[0] = f32::NEG_INFINITY;
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

#[cfg(test)]
mod tests {
    use super::prefill::{Rebuilder, RowBlock};
    use super::*;
    use crate::codec::{decode_tile, encode_tile, TileWork};
    use crate::layout::{anchor, Fine, Widths, BANDS};
    use crate::rope::{Pairing, RopeParams};
    use crate::simd::{at, plain, Level};

    fn noise(n: usize, seed: usize) -> Vec<f32> {
        (0..n)
            .map(|i| (0..4).map(|k| ((i * 7919 + seed * 104_729 + k * 31_337) as f64 * 0.618_034).fract() as f32 - 0.5).sum::<f32>() * 1.7)
            .collect()
    }

    fn deviation(j: usize) -> f32 {
        1.5 * 0.97f32.powi(j as i32)
    }

    /// A basis of unit vectors for rows whose elements have deviation `deviation(j)`.
    fn basis(d: usize, widths: Widths, mean: Vec<f32>) -> Basis {
        let unit = |scale: &dyn Fn(usize) -> f32| (0..d * d).map(|i| if i / d == i % d { scale(i / d) } else { 0.0 }).collect::<Vec<_>>();
        let weight = (0..d).map(|j| (deviation(j) / deviation(0)).powi(2)).collect();
        Basis { d, widths: [widths; BANDS], mean, encode: unit(&|j| 1.0 / deviation(j)), decode: unit(&deviation), weight }
    }

    const TILES: usize = 5;

    /// Tiles of rows, as given and as coded, and queries in two tokens. The last tile waits for a fit: its bases are others.
    struct Rows {
        d: usize,
        keys: Vec<f32>,
        values: Vec<f32>,
        queries: Vec<f32>,
        tiles: Vec<Vec<u8>>,
        bases: [HeadBases; 2],
        forms: [TileForm; 2],
        rope: Rope,
    }

    fn rows(d: usize, k: Widths, v: Widths) -> Rows {
        let rope = Rope::new(&RopeParams::plain(Pairing::Halves, d, 10000.0), d).unwrap();
        let (mean, scale): (Vec<f32>, Vec<f32>) = (noise(d, 3), (0..d).map(deviation).collect());
        let fitted = HeadBases::of(basis(d, k, mean.clone()), basis(d, v, vec![]));
        let bases = [fitted, HeadBases::of(Basis::diagonal(&mean, &scale, 8), Basis::diagonal(&[], &scale, 8))];
        let eight = bases[1].k.widths[0];
        let forms = [TileForm::new(k, v, d, d, Fine::Residuals), TileForm::new(eight, eight, d, d, Fine::Marks)];
        let draw = |seed: usize, mean: &[f32]| -> Vec<f32> {
            let add = |i: usize| mean.get(i % d).copied().unwrap_or(0.0);
            noise(TILES * TILE * d, seed).iter().enumerate().map(|(i, x)| x * deviation(i % d) + add(i)).collect()
        };
        let (framed, values) = (draw(5, &mean), draw(6, &[]));
        let (kernels, mut tiles, mut work) = (at(Level::Portable).unwrap(), vec![], TileWork::default());
        for (t, (k, v)) in framed.chunks_exact(TILE * d).zip(values.chunks_exact(TILE * d)).enumerate() {
            let (form, b) = (&forms[t / 4], &bases[t / 4]);
            let mut tile = vec![0xa5; form.bytes()];
            // Tile 1 has no fine rows, tile 2 one.
            let fine = &[17, 63][..[2, 0, 1, 2, 2][t]];
            encode_tile(kernels, (&b.k, &b.v), form, k, v, fine, &mut tile, &mut work);
            tiles.push(tile);
        }
        let mut r = Rows { d, keys: framed, values, queries: noise(6 * d, 9), tiles, bases, forms, rope };
        r.turn();
        r
    }

    impl Rows {
        /// Keys leave their frames.
        fn turn(&mut self) {
            let mut turn = Turn::default();
            for (row, key) in self.keys.chunks_exact_mut(self.d).enumerate() {
                self.rope.turn(i64::from(anchor(row as i32)), &mut turn);
                self.rope.rotate(&turn, key);
            }
        }
        /// What is coded, instead of what was given.
        fn decoded(&self) -> Rows {
            let (n, mut work) = (TILE * self.d, TileWork::default());
            let Rows { d, queries, tiles, bases, forms, rope, .. } = rows(self.d, self.forms[0].k.widths, self.forms[0].v.widths);
            let mut r = Rows { d, keys: vec![0.0; TILES * n], values: vec![0.0; TILES * n], queries, tiles, bases, forms, rope };
            for t in 0..TILES {
                let (b, out_k, out_v) = (&r.bases[t / 4], &mut r.keys[t * n..(t + 1) * n], &mut r.values[t * n..(t + 1) * n]);
                decode_tile(plain(), (&b.k, &b.v), &r.forms[t / 4], &r.tiles[t], u64::MAX, out_k, out_v, &mut work);
            }
            r.turn();
            r
        }
    }

    /// The outputs of one level's kernels.
    fn attend(r: &Rows, kernels: &'static Kernels, softcap: f32) -> Vec<f32> {
        let d = r.d;
        let c = Context { kernels, scoring: Scoring { scale: 0.2, softcap }, rope: &r.rope };
        let mut a = Accumulator::default();
        a.begin(d, d, 3, r.queries.chunks_exact(d));
        let turns = |t: usize| anchor((t * TILE) as i32);
        let tile = |t: usize| Tile { bytes: &r.tiles[t], turns: Turns::One(turns(t)), visible: Visible::All };
        a.tile_batch(c, &r.bases[0], &r.forms[0], &[tile(0), tile(1), tile(2)], Ahead::default());
        // A tile is scored as one whose rows went apart, and partly hidden from the second token.
        let each = [turns(3); TILE];
        let mask: Vec<f32> = (0..2 * TILE).map(|i| if i >= TILE + 7 { f32::NEG_INFINITY } else { 0.0 }).collect();
        let apart = Tile { bytes: &r.tiles[3], turns: Turns::Each(&each), visible: Visible::Some(&mask) };
        a.tile_batch(c, &r.bases[0], &r.forms[0], &[apart], Ahead::default());
        a.leave(kernels, &r.bases[0]);
        a.tile_batch(c, &r.bases[1], &r.forms[1], &[tile(4)], Ahead::default());
        a.leave(kernels, &r.bases[1]);
        let mut partials = vec![0.0; 6 * partial_floats(d)];
        a.finish(&mut partials);
        let mut out = vec![0.0; 6 * d];
        partials.chunks_exact(partial_floats(d)).zip(out.chunks_exact_mut(d)).for_each(|(p, out)| merge(std::iter::once(p), None, out));
        out
    }

    /// The same in f64, over rows.
    fn reference(r: &Rows, softcap: f64) -> Vec<f64> {
        let d = r.d;
        let mut out = Vec::new();
        for (i, q) in r.queries.chunks_exact(d).enumerate() {
            let seen: Vec<usize> = (0..TILES * TILE).filter(|row| i < 3 || *row < 3 * TILE + 7 || *row >= 4 * TILE).collect();
            let score = |row: usize| -> f64 {
                let s = 0.2 * (0..d).map(|j| f64::from(q[j]) * f64::from(r.keys[row * d + j])).sum::<f64>();
                if softcap > 0.0 {
                    softcap * (s / softcap).tanh()
                } else {
                    s
                }
            };
            let scores: Vec<f64> = seen.iter().map(|row| score(*row)).collect();
            let largest = scores.iter().copied().fold(f64::MIN, f64::max);
            let p: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
            let sum: f64 = p.iter().sum();
            out.extend((0..d).map(|j| p.iter().zip(&seen).map(|(p, row)| p / sum * f64::from(r.values[row * d + j])).sum::<f64>()));
        }
        out
    }

    fn rel_rms(got: &[f32], want: &[f64]) -> f64 {
        let (mut error, mut size) = (0.0, 0.0);
        for (g, w) in got.iter().zip(want) {
            error += (f64::from(*g) - w).powi(2);
            size += w * w;
        }
        (error / size).sqrt()
    }

    /// Head sizes and widths of K and V: among them none at all, and one part only.
    const CASES: [(usize, [usize; 7], [usize; 7]); 6] = [
        (64, [0, 0, 0, 0, 0, 20, 44], [0, 0, 0, 0, 10, 20, 20]),
        (64, [20, 20, 24, 0, 0, 0, 0], [0, 0, 0, 0, 40, 0, 0]),
        (128, [0, 0, 8, 24, 30, 40, 26], [0, 2, 0, 0, 30, 60, 10]),
        (80, [2, 3, 5, 7, 11, 13, 17], [1, 2, 3, 4, 5, 6, 7]),
        (64, [0, 0, 0, 30, 0, 0, 0], [0; 7]),
        (64, [0; 7], [0, 0, 0, 10, 20, 20, 14]),
    ];

    #[test]
    fn every_level_is_as_near_to_f64_as_plain_f32_is() {
        for (d, k, v) in CASES {
            let r = rows(d, Widths { counts: k }, Widths { counts: v });
            let coded = r.decoded();
            for softcap in [0.0, 3.0] {
                let (want, near) = (reference(&r, f64::from(softcap)), reference(&coded, f64::from(softcap)));
                let plain = attend(&r, plain(), softcap);
                let plain_error = rel_rms(&plain, &want);
                assert!((1e-4..0.95).contains(&plain_error), "{d} {k:?} {v:?}: {plain_error}");
                let plain_f64: Vec<f64> = plain.iter().map(|x| f64::from(*x)).collect();
                for level in Level::ALL {
                    let Some(kernels) = at(level) else {
                        println!("skipped: this CPU has no {level:?}");
                        continue;
                    };
                    let got = attend(&r, kernels, softcap);
                    let (error, apart, of_coded) = (rel_rms(&got, &want), rel_rms(&got, &plain_f64), rel_rms(&got, &near));
                    println!("{level:?} {d} {k:?}: {error:.3e}, plain {plain_error:.3e}, apart {apart:.3e}, of the coded rows {of_coded:.3e}");
                    assert!(error <= 2.0 * plain_error, "{level:?} {d} {k:?}: {error} {plain_error}");
                    // What levels differ by is rounding: 16 bits in whole numbers, 24 in f32.
                    let rounding = if level.rounds_to_16_bits() { 1e-4 } else { 2e-6 };
                    assert!(apart <= rounding && of_coded <= rounding, "{level:?} {d} {k:?}: {apart} {of_coded}");
                }
            }
        }
    }

    #[test]
    fn rebuilt_tiles_have_the_rows_that_were_coded() {
        for (d, k, v) in CASES {
            let r = rows(d, Widths { counts: k }, Widths { counts: v }).decoded();
            for kernels in Level::ALL.into_iter().filter_map(at) {
                let c = Context { kernels, scoring: Scoring { scale: 1.0, softcap: 0.0 }, rope: &r.rope };
                let (mut rebuilder, mut out) = (Rebuilder::default(), RowBlock::default());
                for t in 0..TILES {
                    let turn = anchor((t * TILE) as i32);
                    let turns = if t == 3 { Turns::Each(&[turn; TILE]) } else { Turns::One(turn) };
                    rebuilder.tile(c, &r.bases[t / 4], &r.forms[t / 4], &r.tiles[t], turns, &mut out);
                    let (keys, values) = out.rows(d, d);
                    for (got, want) in [(keys, &r.keys), (values, &r.values)] {
                        let want: Vec<f64> = want[t * TILE * d..(t + 1) * TILE * d].iter().map(|x| f64::from(*x)).collect();
                        // Without coefficients all values are zeros.
                        assert!(rel_rms(&got, &want) < 1e-5 || want.iter().all(|x| *x == 0.0), "{:?} {d} tile {t}", kernels.level);
                    }
                }
            }
        }
    }
}
