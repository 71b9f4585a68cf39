//! Attention of a few queries over some rows of one KV head: scores, online softmax, values.
//!
//! Rows come in two kinds: exact ones, up to 64 at a time, and tiles of codes, up to [`BATCH`] at a time, whose keys are never rebuilt: a query is rotated
//! into the frame of the tiles and projected into the basis once for all neighbouring tiles with the same frame, then a row's score is a sum over
//! its codes; values are summed as coefficients and leave the basis once, in [`Accumulator::finish`]. Softmax state is f32 with
//! the running maximum of Milakov and Gimelshein (2018); partial results of different rows merge exactly. Semantics are those of
//! `ggml_flash_attn_ext`. Must not know about cells, arenas or plans.

pub mod prefill;

use crate::codec::{split_tile, Basis, TilePlace};
use crate::config::{LayerGeometry, TILE};
use crate::error::{argument, Result};
use crate::rope::{Rope, Turn};
use crate::simd::lanes::LANES;
use crate::simd::{self, quant, Ahead, Kernels, Lines, MatMut, MatRef, Products};

pub use crate::simd::BATCH;

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
    fn cap(&self, scores: &mut [f32]) {
        if self.softcap > 0.0 {
            scores.iter_mut().for_each(|s| *s = self.softcap * (*s / self.softcap).tanh());
        }
    }
}

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
}

impl HeadBases {
    /// Read what is `stored` of a head: its bases of K, then V.
    pub fn load(&mut self, stored: &[u8], d_k: usize, d_v: usize) -> Result<()> {
        let (k, v) = stored.split_at(LayerGeometry::basis_bytes_of(d_k));
        self.k.load(k, d_k, false)?;
        self.v.load(v, d_v, false)?;
        self.prepare();
        Ok(())
    }

    fn prepare(&mut self) {
        let (d, rank) = (self.k.d, self.k.rank());
        self.stride = rank.next_multiple_of(LANES);
        self.projection.resize(d * self.stride * 4);
        (simd::kernels().transpose)(MatRef::new(&self.k.decode, d), MatMut::new(self.projection.floats_mut(), self.stride), rank, d);
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
    /// Coefficients of the value basis that `sums` has.
    rank: usize,
    /// Per coefficient and query: value coefficients summed over coded rows, in lanes.
    sums: Lines,
    /// Per query: probability on coded rows.
    coded_mass: Vec<f32>,
    scores: Lines,
    rotated: Lines,
    /// Projected queries; also has the largest score of each query in the current block.
    products: Products,
    turn: Turn,
    few_rows: Lines,
}

impl Accumulator {
    /// Begin with `queries`: token-major, then the heads of the group, `d_k` elements each.
    pub fn begin<'q>(&mut self, d_k: usize, d_v: usize, group: usize, value_rank: usize, queries: impl ExactSizeIterator<Item = &'q [f32]>) {
        let n = queries.len();
        (self.d_k, self.d_v, self.group, self.n, self.rank) = (d_k, d_v, group, n, value_rank);
        self.queries.resize(n * d_k * 4);
        self.queries.floats_mut().chunks_exact_mut(d_k).zip(queries).for_each(|(to, q)| to.copy_from_slice(q));
        for (buffer, value) in
            [(&mut self.max, f32::NEG_INFINITY), (&mut self.sum, 0.0), (&mut self.coded_mass, 0.0), (&mut self.products.largest, 0.0)]
        {
            buffer.clear();
            buffer.resize(n, value);
        }
        for (buffer, len) in [(&mut self.out, n * d_v), (&mut self.sums, value_rank * n * LANES)] {
            buffer.resize(len * 4);
            buffer.floats_mut()[..len].fill(0.0);
        }
    }

    /// Tiles that one batch may have.
    pub fn batch(&self) -> usize {
        (SCORE_FLOATS / (self.n.max(1) * TILE)).clamp(1, BATCH)
    }

    /// Scores of `rows` rows, `stride` apart, become probabilities relative to the running maximum; older sums shrink when it grows.
    fn softmax(&mut self, kernels: &Kernels, rows: usize, stride: usize) {
        let (d_v, n, rank) = (self.d_v, self.n, self.rank);
        for (i, scores) in self.scores.floats_mut().chunks_mut(stride).enumerate().take(n) {
            let largest = self.max[i].max(self.products.largest[i]);
            if largest == f32::NEG_INFINITY {
                scores[..rows].fill(0.0);
                continue;
            }
            let shrink = (self.max[i] - largest).exp();
            if shrink != 1.0 && self.sum[i] > 0.0 {
                self.sum[i] *= shrink;
                self.coded_mass[i] *= shrink;
                self.out.floats_mut()[i * d_v..][..d_v].iter_mut().for_each(|x| *x *= shrink);
                for j in 0..rank {
                    self.sums.floats_mut()[(j * n + i) * LANES..][..LANES].iter_mut().for_each(|x| *x *= shrink);
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
        for (largest, scores) in self.products.largest.iter_mut().zip(self.scores.floats().chunks_exact(TILE)) {
            *largest = (c.kernels.largest)(&scores[..rows]);
        }
        self.softmax(c.kernels, rows, TILE);
        let p = MatRef::new(self.scores.floats(), TILE);
        (c.kernels.multiply)(p, MatRef::new(v, d_v), MatMut::new(self.out.floats_mut(), d_v), n, rows, d_v);
    }

    /// Up to [`Accumulator::batch`] tiles of one band, coded as `place` says. Tiles that nobody sees are for the caller to leave out. `ahead` is
    /// what will be read next.
    pub fn tile_batch(&mut self, c: Context, bases: &HeadBases, place: &TilePlace, tiles: &[Tile], ahead: &[u8]) {
        let (table, n, stride) = (quant::gains(), self.n, tiles.len() * TILE);
        self.scores.resize(n * stride * 4);
        self.products.largest.fill(f32::NEG_INFINITY);
        self.products.ahead = Ahead::of(ahead);
        let mut gains = [0.0; TILE];
        // Tiles whose rows went apart have frames of their own; the queries are projected for those of all others at once.
        for (t, tile) in tiles.iter().enumerate() {
            if let Turns::Each(turns) = tile.turns {
                let [(gain_codes, codes), _] = split_tile(tile.bytes, place.k);
                (c.kernels.lookup)(table, gain_codes, &mut gains);
                self.score_rows(c, turns, bases, place, codes, &gains, t * TILE, stride);
            }
        }
        let (mut frames, mut n_frames) = ([0; BATCH], 0);
        let mut last = None;
        for turn in tiles.iter().filter_map(Tile::one_turn) {
            if last.replace(turn) != Some(turn) {
                frames[n_frames] = turn;
                n_frames += 1;
            }
        }
        self.project(c, &frames[..n_frames], bases, place);
        for (t, tile) in tiles.iter().enumerate() {
            let at = t * TILE;
            if let Some(turn) = tile.one_turn() {
                let [(gain_codes, codes), _] = split_tile(tile.bytes, place.k);
                (c.kernels.lookup)(table, gain_codes, &mut gains);
                self.products.frame += usize::from(frames[self.products.frame] != turn);
                (c.kernels.tile_scores)(&mut self.products, codes, &gains, &mut self.scores.floats_mut()[at..], stride);
            }
            if c.scoring.softcap > 0.0 {
                self.scores.floats_mut().chunks_exact_mut(stride).take(n).for_each(|s| c.scoring.cap(&mut s[at..at + TILE]));
            }
            self.show(at, TILE, stride, tile.visible);
            if c.scoring.softcap > 0.0 || matches!(tile.visible, Visible::Some(_)) || matches!(tile.turns, Turns::Each(_)) {
                self.products.largest.fill(f32::INFINITY);
            }
        }
        // Where scores changed after their largest was noted, it is looked for again.
        for (largest, scores) in self.products.largest.iter_mut().zip(self.scores.floats().chunks_exact(stride)).filter(|(l, _)| **l == f32::INFINITY)
        {
            *largest = (c.kernels.largest)(scores);
        }
        self.softmax(c.kernels, stride, stride);
        self.add_values(c.kernels, &bases.v, place, tiles, stride);
    }

    /// A tile whose rows were shifted or moved apart: each distinct turn costs a projection.
    #[expect(clippy::too_many_arguments, reason = "a tile in parts, and where its scores go")]
    fn score_rows(
        &mut self,
        c: Context,
        turns: &[i32; TILE],
        bases: &HeadBases,
        place: &TilePlace,
        codes: &[u8],
        gains: &[f32; TILE],
        at: usize,
        stride: usize,
    ) {
        let mut left = u64::MAX;
        self.few_rows.resize(self.n * TILE * 4);
        while left != 0 {
            let wanted = turns[left.trailing_zeros() as usize];
            let rows = (0..TILE).filter(|r| left >> r & 1 == 1 && turns[*r] == wanted).fold(0u64, |m, r| m | 1 << r);
            left &= !rows;
            self.project(c, &[wanted], bases, place);
            (c.kernels.tile_scores)(&mut self.products, codes, gains, self.few_rows.floats_mut(), TILE);
            for (scored, scores) in self.few_rows.floats().chunks_exact(TILE).zip(self.scores.floats_mut().chunks_exact_mut(stride)).take(self.n) {
                for row in (0..TILE).filter(|r| rows >> r & 1 == 1) {
                    scores[at + row] = scored[row];
                }
            }
        }
    }

    /// Rotate the queries into frames, given by their turns, and project them into the key basis.
    fn project(&mut self, c: Context, frames: &[i32], bases: &HeadBases, place: &TilePlace) {
        let (n, d, rank) = (frames.len() * self.n, self.d_k, place.k.rank());
        self.rotated.resize(n * d * 4);
        let rotated = &mut self.rotated.floats_mut()[..n * d];
        for (turn, rotated) in frames.iter().zip(rotated.chunks_exact_mut(self.n * d)) {
            c.rope.turn(-i64::from(*turn), &mut self.turn);
            rotated.copy_from_slice(&self.queries.floats()[..self.n * d]);
            rotated.chunks_exact_mut(d).for_each(|q| c.rope.rotate(&self.turn, q));
        }
        let p = &mut self.products;
        p.means.resize(n, 0.0);
        (c.kernels.dots)(MatRef::new(rotated, d), MatRef::new(&bases.k.mean, d), MatMut::new(&mut p.means, 1), n, d, 1);
        (p.n, p.frames, p.frame) = (self.n, frames.len(), 0);
        (p.widths, p.stride, p.scale) = (place.k, rank.next_multiple_of(LANES), c.scoring.scale);
        p.z.resize((n * p.stride + 64) * 4);
        p.z.floats_mut()[..n * p.stride].fill(0.0);
        let projection = MatRef::new(bases.projection.floats(), bases.stride);
        // Whole vectors: what lies behind a band's rank is not looked at.
        (c.kernels.multiply)(MatRef::new(rotated, d), projection, MatMut::new(p.z.floats_mut(), p.stride), n, d, p.stride.min(bases.stride));
        (c.kernels.prepare)(p);
    }

    /// Sum value coefficients, but of tiles whose probability cannot matter.
    fn add_values(&mut self, kernels: &Kernels, basis: &Basis, place: &TilePlace, tiles: &[Tile], stride: usize) {
        let table = quant::gains();
        let mut kept: [&[u8]; BATCH] = [&[]; BATCH];
        let (mut n_kept, mut gains) = (0, [0.0; TILE]);
        for (t, tile) in tiles.iter().enumerate() {
            let [(..), (gain_codes, codes)] = split_tile(tile.bytes, place.k);
            (kernels.lookup)(table, gain_codes, &mut gains);
            let mut matters = false;
            let scores = &mut self.scores.floats_mut()[..self.n * stride];
            for (i, p) in scores.chunks_exact_mut(stride).enumerate() {
                // Probabilities move up beside those of the last tile that was kept.
                if t > n_kept {
                    p.copy_within(t * TILE..(t + 1) * TILE, n_kept * TILE);
                }
                let rows = (&mut p[n_kept * TILE..(n_kept + 1) * TILE]).try_into().expect("invariant: the rows of a tile");
                let mass = (kernels.weigh)(rows, &gains);
                self.coded_mass[i] += mass;
                matters |= mass > NEGLIGIBLE * self.sum[i];
            }
            if matters {
                kept[n_kept] = codes;
                n_kept += 1;
            }
        }
        if n_kept > 0 && basis.rank() > 0 {
            let (p, sums) = (self.scores.floats(), self.sums.floats_mut());
            (kernels.tile_values)(place.v, &kept[..n_kept], p, stride, self.n, sums, &mut self.products);
        }
    }

    /// Leave the value basis and write `[maximum, sum, output]` of every query.
    pub fn finish(&mut self, kernels: &Kernels, value_basis: Option<&Basis>, partials: &mut [f32]) {
        let (n, d_v, rank) = (self.n, self.d_v, self.rank);
        if let Some(b) = value_basis {
            self.scores.resize(2 * n * rank * 4);
            let (by_coefficient, by_query) = self.scores.floats_mut().split_at_mut(n * rank);
            (kernels.lane_sums)(self.sums.floats(), by_coefficient);
            for (j, sums) in by_coefficient.chunks_exact(n.max(1)).enumerate() {
                sums.iter().enumerate().for_each(|(i, x)| by_query[i * rank + j] = *x);
            }
            let out = self.out.floats_mut();
            if rank > 0 {
                (kernels.multiply)(MatRef::new(by_query, rank), MatRef::new(&b.decode, d_v), MatMut::new(out, d_v), n, rank, d_v);
            }
            (kernels.multiply)(MatRef::new(&self.coded_mass, 1), MatRef::new(&b.mean, d_v), MatMut::new(out, d_v), n, 1, d_v);
        }
        for (i, partial) in partials.chunks_exact_mut(partial_floats(d_v)).enumerate().take(n) {
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
    use super::*;
    use crate::codec::{anchor, encode_row, split_tile_mut, TileMap};
    use crate::config::{LayerShape, BANDS};
    use crate::rope::{Pairing, RopeParams};
    use crate::simd::{at, plain, Level, Widths};

    fn noise(n: usize, seed: usize) -> Vec<f32> {
        (0..n)
            .map(|i| (0..4).map(|k| ((i * 7919 + seed * 104_729 + k * 31_337) as f64 * 0.618_034).fract() as f32 - 0.5).sum::<f32>() * 1.7)
            .collect()
    }

    /// A basis of unit vectors for rows whose elements have deviation `deviation(j)`.
    fn basis(d: usize, widths: [Widths; BANDS], deviation: impl Fn(usize) -> f32) -> Basis {
        let rank = widths[0].rank();
        let unit = |scale: &dyn Fn(usize) -> f32| (0..rank * d).map(|i| if i / d == i % d { scale(i / d) } else { 0.0 }).collect::<Vec<_>>();
        Basis { d, widths, mean: noise(d, 3), encode: unit(&|j| 1.0 / deviation(j)), decode: unit(&deviation), weight: vec![1.0; d] }
    }

    /// Four tiles of rows, as given and as coded, and queries in two tokens.
    struct Rows {
        d: usize,
        keys: Vec<f32>,
        values: Vec<f32>,
        queries: Vec<f32>,
        tiles: Vec<u8>,
        map: TileMap,
        bases: HeadBases,
        rope: Rope,
    }

    fn rows(d: usize, widths: Widths) -> Rows {
        const TILES: usize = 4;
        let g = LayerGeometry::heads(&LayerShape { n_head: 3, n_head_kv: 1, d_k: d as u32, d_v: d as u32 });
        let rope = Rope::new(&RopeParams::plain(Pairing::Halves, d, 10000.0), d).unwrap();
        let deviation = |j: usize| 1.5 * 0.97f32.powi(j as i32);
        let mut bases = HeadBases { k: basis(d, [widths; BANDS], deviation), v: basis(d, [widths; BANDS], deviation), ..HeadBases::default() };
        bases.prepare();
        let mut stored = vec![0; g.basis_bytes()];
        let (bk, bv) = stored.split_at_mut(LayerGeometry::basis_bytes_of(d));
        bases.k.store(bk);
        bases.v.store(bv);
        let map = TileMap::of([0, 0, TILES], &g, &stored);
        let draw = |seed: usize, basis: &Basis| -> Vec<f32> {
            noise(TILES * TILE * d, seed).iter().enumerate().map(|(i, x)| x * deviation(i % d) + basis.mean[i % d]).collect()
        };
        let (framed, values) = (draw(5, &bases.k), draw(6, &bases.v));
        let (mut tiles, mut keys, mut turn, kernels) = (vec![0; map.bytes()], framed.clone(), Turn::default(), at(Level::Portable).unwrap());
        for row in 0..TILES * TILE {
            let place = map.place(row / TILE);
            let [(gk, ck), (gv, cv)] = split_tile_mut(&mut tiles[place.bytes], place.k);
            let mut work = Vec::new();
            encode_row(kernels, &bases.k, place.band, &framed[row * d..(row + 1) * d], row % TILE, gk, ck, &mut work);
            encode_row(kernels, &bases.v, place.band, &values[row * d..(row + 1) * d], row % TILE, gv, cv, &mut work);
            rope.turn(i64::from(anchor(row as i32)), &mut turn);
            rope.rotate(&turn, &mut keys[row * d..(row + 1) * d]);
        }
        Rows { d, keys, values, queries: noise(6 * d, 9), tiles, map, bases, rope }
    }

    /// The outputs of one level's kernels.
    fn attend(r: &Rows, kernels: &'static Kernels, softcap: f32) -> Vec<f32> {
        let d = r.d;
        let c = Context { kernels, scoring: Scoring { scale: 0.2, softcap }, rope: &r.rope };
        let mut a = Accumulator::default();
        a.begin(d, d, 3, r.bases.v.rank(), r.queries.chunks_exact(d));
        let turns = Turns::One(anchor(0));
        let tile = |i: usize| Tile { bytes: &r.tiles[r.map.place(i).bytes], turns, visible: Visible::All };
        a.tile_batch(c, &r.bases, &r.map.place(0), &[tile(0), tile(1), tile(2)], &[]);
        // The last tile is scored as one whose rows went apart, and partly hidden from the second token.
        let each = [anchor(0); TILE];
        let mask: Vec<f32> = (0..2 * TILE).map(|i| if i >= TILE + 7 { f32::NEG_INFINITY } else { 0.0 }).collect();
        let last = Tile { bytes: &r.tiles[r.map.place(3).bytes], turns: Turns::Each(&each), visible: Visible::Some(&mask) };
        a.tile_batch(c, &r.bases, &r.map.place(3), &[last], &[]);
        let mut partials = vec![0.0; 6 * partial_floats(d)];
        a.finish(kernels, Some(&r.bases.v), &mut partials);
        let mut out = vec![0.0; 6 * d];
        partials.chunks_exact(partial_floats(d)).zip(out.chunks_exact_mut(d)).for_each(|(p, out)| merge(std::iter::once(p), None, out));
        out
    }

    /// The same in f64, over the rows as they were given.
    fn reference(r: &Rows, softcap: f64) -> Vec<f64> {
        let d = r.d;
        let mut out = Vec::new();
        for (i, q) in r.queries.chunks_exact(d).enumerate() {
            let seen = if i < 3 { 4 * TILE } else { 3 * TILE + 7 };
            let score = |row: usize| -> f64 {
                let s = 0.2 * (0..d).map(|j| f64::from(q[j]) * f64::from(r.keys[row * d + j])).sum::<f64>();
                if softcap > 0.0 {
                    softcap * (s / softcap).tanh()
                } else {
                    s
                }
            };
            let scores: Vec<f64> = (0..seen).map(score).collect();
            let largest = scores.iter().copied().fold(f64::MIN, f64::max);
            let p: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
            let sum: f64 = p.iter().sum();
            out.extend((0..d).map(|j| p.iter().enumerate().map(|(row, p)| p / sum * f64::from(r.values[row * d + j])).sum::<f64>()));
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

    #[test]
    fn every_level_is_as_near_to_f64_as_plain_f32_is() {
        for (d, counts) in
            [(64, [0, 0, 0, 0, 0, 20, 44]), (64, [20, 20, 24, 0, 0, 0, 0]), (128, [0, 0, 8, 24, 30, 40, 26]), (80, [2, 3, 5, 7, 11, 13, 17])]
        {
            let r = rows(d, Widths { counts });
            for softcap in [0.0, 3.0] {
                let want = reference(&r, f64::from(softcap));
                let plain = attend(&r, plain(), softcap);
                let plain_error = rel_rms(&plain, &want);
                assert!((1e-4..0.5).contains(&plain_error), "{d} {counts:?}: {plain_error}");
                let plain_f64: Vec<f64> = plain.iter().map(|x| f64::from(*x)).collect();
                for level in Level::ALL {
                    let Some(kernels) = at(level) else {
                        println!("skipped: this CPU has no {level:?}");
                        continue;
                    };
                    let got = attend(&r, kernels, softcap);
                    let (error, apart) = (rel_rms(&got, &want), rel_rms(&got, &plain_f64));
                    println!("{level:?} {d} {counts:?}: {error:.3e}, plain {plain_error:.3e}, apart {apart:.3e}");
                    assert!(error <= 2.0 * plain_error, "{level:?} {d} {counts:?}: {error} {plain_error}");
                    // What levels differ by is rounding: 16 bits in whole numbers, 24 in f32.
                    assert!(apart <= if level.rounds_to_16_bits() { 1e-4 } else { 2e-6 }, "{level:?} {d} {counts:?}: {apart}");
                }
            }
        }
    }
}
