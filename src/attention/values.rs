//! The values' half of decode attention: sums of coefficients over coded rows, which leave the basis once.
//!
//! Must not know how scores are made.

use super::scores::FineRows;
use super::{HeadBases, Tile, BATCH};
use crate::layout::{gain, TileForm, PARTS, TILE};
use crate::simd::lanes::LANES;
use crate::simd::{Kernels, Lines, MatMut, MatRef, Products};

/// Share of a query's sum of probabilities under which the values of a whole tile are left out: half a unit in the last place of f32.
const NEGLIGIBLE: f32 = 1.0 / (1 << 25) as f32;

/// Probabilities of the rows of some tiles, 64 behind each other for each query and tile, and what those of a query sum up to, of all rows so far.
#[derive(Clone, Copy)]
pub(super) struct Probabilities<'a> {
    pub(super) scores: &'a [f32],
    pub(super) sums: &'a [f32],
}

/// Sums of values in their basis.
#[derive(Debug, Default)]
pub(super) struct Values {
    /// Coefficients of the value basis that `sums` has; nothing is in those behind.
    rank: usize,
    /// Per coefficient and query: value coefficients summed over coded rows, in lanes.
    sums: Lines,
    /// There is something in `fine_sums`.
    has_fine: bool,
    /// Per query: residuals of values summed over fine rows, `d_v` each.
    fine_sums: Lines,
    /// Probabilities times gains, for each part of the values.
    weighed: [Lines; PARTS],
    /// Probabilities of the fine rows.
    fine_weights: Lines,
    fine: FineRows,
}

impl Values {
    /// There are none.
    pub(super) fn begin(&mut self) {
        (self.rank, self.has_fine) = (0, false);
    }

    /// There are none that have not left their basis.
    pub(super) fn have_left(&self) -> bool {
        self.rank == 0 && !self.has_fine
    }

    /// Multiply the sums of query `i` of `n`.
    pub(super) fn shrink(&mut self, i: usize, n: usize, d_v: usize, factor: f32) {
        for j in 0..self.rank {
            self.sums.floats_mut()[(j * n + i) * LANES..][..LANES].iter_mut().for_each(|x| *x *= factor);
        }
        if self.has_fine {
            self.fine_sums.floats_mut()[i * d_v..][..d_v].iter_mut().for_each(|x| *x *= factor);
        }
    }

    /// Sum value coefficients, but of tiles whose probability cannot matter.
    pub(super) fn add(&mut self, kernels: &Kernels, form: &TileForm, tiles: &[Tile], p: Probabilities, work: &mut Products) {
        let (n, stride) = (p.sums.len(), tiles.len() * TILE);
        self.weighed.iter_mut().for_each(|w| w.resize(n * stride * 4));
        // Tiles that are kept, and which they are; probabilities of each lie beside those of the last that was kept.
        let (mut kept, mut which, mut n_kept) = ([&[][..]; BATCH], [0; BATCH], 0);
        for (t, tile) in tiles.iter().enumerate() {
            if self.weigh_tile(kernels, form, tile.bytes, (t, n_kept), stride, p) {
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
            (kernels.tile_values)(part.widths, &codes[..n_kept], self.weighed[i].floats(), stride, n, sums, work);
        }
        self.fine.unpack(kernels, form, &form.v, kept.iter().copied());
        self.add_fine(kernels, form.v.d, &which, stride, p);
    }

    /// Probabilities of a tile times gains of each part, as those of number `to`. False when they cannot matter.
    fn weigh_tile(&mut self, kernels: &Kernels, form: &TileForm, tile: &[u8], (t, to): (usize, usize), stride: usize, p: Probabilities) -> bool {
        let rows = |q: usize, t: usize| q * stride + t * TILE..q * stride + (t + 1) * TILE;
        let (mut matters, mut gains) = (false, [0.0; TILE]);
        for (i, part) in form.v.some_parts() {
            (kernels.lookup)(gain::gains(), part.gains(tile), &mut gains);
            let weighed = self.weighed[i].floats_mut();
            for (q, sum) in p.sums.iter().enumerate() {
                let p = (&p.scores[rows(q, t)]).try_into().expect("invariant: the rows of a tile");
                let out = (&mut weighed[rows(q, to)]).try_into().expect("invariant: the rows of a tile");
                matters |= (kernels.weigh)(p, &gains, out) > NEGLIGIBLE * sum;
            }
        }
        matters || form.v.widths.rank() == 0
    }

    /// Sum residuals of the values of the tiles whose numbers are `which`.
    fn add_fine(&mut self, kernels: &Kernels, d: usize, which: &[usize; BATCH], stride: usize, p: Probabilities) {
        let (n, m) = (p.sums.len(), self.fine.at.len());
        if m == 0 {
            return;
        }
        self.fine_sums.resize(n * d * 4);
        if !self.has_fine {
            self.fine_sums.floats_mut()[..n * d].fill(0.0);
            self.has_fine = true;
        }
        self.fine_weights.resize(n * m * 4);
        for (p, scores) in self.fine_weights.floats_mut().chunks_exact_mut(m).zip(p.scores.chunks_exact(stride)).take(n) {
            p.iter_mut().zip(&self.fine.at).for_each(|(p, (t, row))| *p = scores[which[*t] * TILE + row]);
        }
        let (p, rows) = (MatRef::new(self.fine_weights.floats(), m), MatRef::new(self.fine.rows.floats(), d));
        (kernels.multiply)(p, rows, MatMut::new(self.fine_sums.floats_mut(), d), n, m, d);
    }

    /// Leave the value basis: add what the sums of `n` queries stand for to `out`. Tiles with other bases may follow.
    pub(super) fn leave(&mut self, kernels: &Kernels, bases: &HeadBases, work: &mut Lines, n: usize, out: &mut [f32]) {
        let (d, rank, has_fine) = (bases.v.d, self.rank, self.has_fine);
        (self.rank, self.has_fine) = (0, false);
        let needed = if has_fine { d } else { rank };
        if needed == 0 {
            return;
        }
        work.resize((n * rank + n * d) * 4);
        let (by_coefficient, by_query) = work.floats_mut().split_at_mut(n * rank);
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
        (kernels.multiply)(MatRef::new(by_query, d), MatRef::new(&bases.v.decode, d), MatMut::new(out, d), n, needed, d);
    }
}
