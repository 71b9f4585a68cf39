//! The keys' half of decode attention: scores of coded rows, from queries that are rotated into a tile's frame and projected into the key basis.
//!
//! Must not know what scores are for.

use super::{Context, HeadBases, Tile, Turns, BATCH};
use crate::layout::{gain, Side, TileForm, FINE_ROWS, TILE};
use crate::rope::Turn;
use crate::simd::lanes::LANES;
use crate::simd::{Kernels, Lines, MatMut, MatRef, Pass, Products};
use std::ops::Range;

/// Residuals of the fine rows of some tiles.
#[derive(Debug, Default)]
pub(super) struct FineRows {
    /// Tile and row of each.
    pub(super) at: Vec<(usize, usize)>,
    /// Their coefficients in units of importance, `d` each.
    pub(super) rows: Lines,
}

impl FineRows {
    /// Those of some tiles.
    pub(super) fn unpack<'a>(&mut self, kernels: &Kernels, form: &TileForm, side: &Side, tiles: impl Iterator<Item = &'a [u8]>) {
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
pub(super) struct Scorer {
    /// Projected queries; also has the largest score of each query in the current block.
    pub(super) products: Products,
    turn: Turn,
    rotated: Lines,
    /// All coefficients of the rotated queries.
    z: Lines,
    /// Those, as residuals of keys want them.
    finer: Lines,
    fine: FineRows,
    /// Products of the queries with fine rows: for each query those of all rows.
    fine_scores: Lines,
    /// Scores of a tile whose rows went apart, by one of their turns.
    few_rows: Lines,
    work: Lines,
}

impl Scorer {
    /// Begin with `n` queries.
    pub(super) fn begin(&mut self, n: usize) {
        self.products.n = n;
        self.products.largest.clear();
        self.products.largest.resize(n, [0.0; LANES]);
    }

    /// Scores of tiles of one form, 64 behind each other for each tile and query, and the largest of each query where nothing will change them.
    pub(super) fn score_tiles(&mut self, c: Context, queries: &[f32], bases: &HeadBases, form: &TileForm, tiles: &[Tile], scores: &mut [f32]) {
        self.products.largest.fill([f32::NEG_INFINITY; LANES]);
        self.fine.unpack(c.kernels, form, &form.k, tiles.iter().map(|t| t.bytes));
        // Tiles whose rows went apart have frames of their own; the queries are projected for those of all others at once.
        for (t, tile) in tiles.iter().enumerate() {
            self.score_rows(c, queries, bases, form, (t, tile), (scores, tiles.len() * TILE));
        }
        self.score_frames(c, queries, bases, form, tiles, scores);
    }

    /// Tiles whose rows share a turn.
    fn score_frames(&mut self, c: Context, queries: &[f32], bases: &HeadBases, form: &TileForm, tiles: &[Tile], scores: &mut [f32]) {
        // Neighbours in one frame together.
        let neighbours = || tiles.chunk_by(|a, b| a.one_turn() == b.one_turn());
        let (mut frames, mut n_frames) = ([0; BATCH], 0);
        for turn in neighbours().filter_map(|some| some[0].one_turn()) {
            frames[n_frames] = turn;
            n_frames += 1;
        }
        if n_frames == 0 {
            return;
        }
        self.project(c, queries, &frames[..n_frames], bases, form);
        let (mut at, mut frame, stride) = (0, 0, tiles.len() * TILE);
        for some in neighbours() {
            let which = at..at + some.len();
            at = which.end;
            if some[0].one_turn().is_some() {
                self.products.frame = frame;
                frame += 1;
                let rows = self.fine.of(which.clone());
                self.score_fine(c.kernels, self.products.frame, form.k.d, rows.clone());
                self.score(c.kernels, form, (which.start, some), rows, (&mut scores[which.start * TILE..], stride));
            }
        }
    }

    /// A tile whose rows were shifted or moved apart: each distinct turn costs a projection.
    fn score_rows(
        &mut self,
        c: Context,
        queries: &[f32],
        bases: &HeadBases,
        form: &TileForm,
        (t, tile): (usize, &Tile),
        (scores, stride): (&mut [f32], usize),
    ) {
        let Turns::Each(turns) = tile.turns else { return };
        let mut left = u64::MAX;
        let mut few = std::mem::take(&mut self.few_rows);
        few.resize(self.products.n * TILE * 4);
        let fine = self.fine.of(t..t + 1);
        while left != 0 {
            let wanted = turns[left.trailing_zeros() as usize];
            let rows = (0..TILE).filter(|r| left >> r & 1 == 1 && turns[*r] == wanted).fold(0u64, |m, r| m | 1 << r);
            left &= !rows;
            self.project(c, queries, &[wanted], bases, form);
            self.score_fine(c.kernels, 0, form.k.d, fine.clone());
            self.score(c.kernels, form, (t, std::slice::from_ref(tile)), fine.clone(), (few.floats_mut(), TILE));
            for (scored, scores) in few.floats().chunks_exact(TILE).zip(scores.chunks_exact_mut(stride)).take(self.products.n) {
                for row in (0..TILE).filter(|r| rows >> r & 1 == 1) {
                    scores[t * TILE + row] = scored[row];
                }
            }
        }
        self.few_rows = few;
    }

    /// Rotate queries into frames, given by their turns, and project them into the key basis.
    fn project(&mut self, c: Context, queries: &[f32], frames: &[i32], bases: &HeadBases, form: &TileForm) {
        let n = self.products.n;
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
        (p.frames, p.frame, p.scale) = (frames.len(), 0, c.scoring.scale);
        // Whole vectors: what lies behind a band's rank is not looked at.
        let needed = if self.fine.at.is_empty() { form.k.widths.rank() } else { d };
        let stride = bases.projection.stride();
        self.z.resize(all * stride * 4);
        let z = &mut self.z.floats_mut()[..all * stride];
        (c.kernels.project)(&bases.projection, rotated, all, needed.next_multiple_of(LANES), z, &mut self.work);
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

    /// Scores of neighbouring tiles of the present frame, whose fine rows are `rows`, from number `first` on; those of a query are `stride` apart.
    fn score(
        &mut self,
        kernels: &Kernels,
        form: &TileForm,
        (first, tiles): (usize, &[Tile]),
        rows: Range<usize>,
        (out, stride): (&mut [f32], usize),
    ) {
        let (parts, n) = (form.k.some_parts().count(), tiles.len());
        let mut begun = false;
        if parts < 2 && !rows.is_empty() {
            out.chunks_mut(stride).take(self.products.n).for_each(|out| out[..n * TILE].fill(0.0));
            self.add_fine(rows.clone(), first, out, stride);
            begun = true;
        }
        let (mut gains, mut codes) = ([[0.0; TILE]; BATCH], [&[][..]; BATCH]);
        for (done, (part, own)) in form.k.some_parts().enumerate() {
            for ((tile, codes), gains) in tiles.iter().zip(&mut codes).zip(&mut gains) {
                (kernels.lookup)(gain::gains(), own.gains(tile.bytes), gains);
                *codes = own.codes(tile.bytes);
            }
            let pass = Pass { part, add: begun, finish: done + 1 == parts };
            (kernels.tile_scores)(&mut self.products, pass, &codes[..n], &gains[..n], out, stride);
            if !begun {
                self.add_fine(rows.clone(), first, out, stride);
            }
            begun = true;
        }
        if parts == 0 {
            self.score_means(begun, n, out, stride);
        }
    }

    /// Scores of rows of some tiles that have no coefficients.
    fn score_means(&mut self, add: bool, tiles: usize, out: &mut [f32], stride: usize) {
        let p = &mut self.products;
        let means = &p.means[p.frame * p.n..];
        for ((out, mean), largest) in out.chunks_mut(stride).zip(means).zip(&mut p.largest) {
            for x in &mut out[..tiles * TILE] {
                *x = p.scale * (if add { *x } else { 0.0 } + mean);
                largest[0] = largest[0].max(*x);
            }
        }
    }

    /// Add what residuals give to products that are not scores yet: those of tiles from number `first` on.
    fn add_fine(&self, rows: Range<usize>, first: usize, out: &mut [f32], stride: usize) {
        let m = self.fine.at.len();
        for i in rows {
            let (tile, row) = self.fine.at[i];
            let scores = self.fine_scores.floats()[i..].iter().step_by(m);
            let out = out[(tile - first) * TILE + row..].iter_mut().step_by(stride);
            out.zip(scores).take(self.products.n).for_each(|(out, x)| *out += x);
        }
    }
}
