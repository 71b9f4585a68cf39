//! The rows of a step, exact ones and tiles, in the order in which attention looks at them, cut into blocks of up to 64.
//!
//! Exact rows come first, then the step's own in blocks that they begin, then tiles as the plan lists them: band by band, those of rows that wait
//! behind all others, and then those in the former bases. Must not know what is in the rows, nor what attention does with a block.

use crate::cache::mask::{Mask, Seen};
use crate::cache::plan::{Plan, Source, TileView};
use crate::layout::TILE;
use std::ops::Range;

/// Up to 64 rows.
pub(super) enum Block<'a> {
    /// Some of those that are listed one by one.
    Exact(Range<usize>),
    /// A tile.
    Tile(TileView<'a>),
}

/// See the module.
pub(super) struct Seating<'a> {
    /// Exact rows, then the step's own: source, cell, turn.
    exact: Vec<(Source, usize, i32)>,
    /// How many of them come before the step's own.
    stored: usize,
    plan: &'a Plan<'a>,
}

impl<'a> Seating<'a> {
    pub(super) fn new(plan: &'a Plan<'a>) -> Self {
        let stored = plan.exact().map(|(slot, cell, turn)| (Source::Slot(slot), cell, turn));
        let own = plan.tokens().enumerate().map(|(t, (cell, _))| (Source::Token(t), cell, 0));
        Seating { exact: stored.chain(own).collect(), stored: plan.exact().len(), plan }
    }

    /// Number of blocks.
    pub(super) fn len(&self) -> usize {
        self.exact_blocks() + self.plan.tiles().len()
    }

    fn exact_blocks(&self) -> usize {
        self.stored.div_ceil(TILE) + (self.exact.len() - self.stored).div_ceil(TILE)
    }

    /// Some of the blocks.
    pub(super) fn blocks(&self, which: Range<usize>) -> impl Iterator<Item = Block<'a>> + use<'a> {
        let cut = |rows: Range<usize>| rows.clone().step_by(TILE).map(move |at| Block::Exact(at..(at + TILE).min(rows.end)));
        let exact = cut(0..self.stored).chain(cut(self.stored..self.exact.len()));
        let n = self.exact_blocks();
        let exact = exact.skip(which.start).take(which.len());
        let tiles = which.start.saturating_sub(n)..which.end.saturating_sub(n);
        exact.chain(self.plan.tiles().skip(tiles.start).take(tiles.len()).map(Block::Tile))
    }

    /// Source, cell and turn of each row of an exact block.
    pub(super) fn exact(&self, rows: &Range<usize>) -> &[(Source, usize, i32)] {
        &self.exact[rows.clone()]
    }

    /// What `n` tokens of a mask see of a block: in `out[token * TILE + row]`, if it is neither all nor nothing. Rows that a block does not have are hidden
    /// there.
    pub(super) fn see(&self, block: &Block, mask: &Mask, n: usize, out: &mut [f32]) -> Seen {
        match block {
            Block::Exact(rows) => {
                let rows = self.exact(rows);
                let run = rows.iter().enumerate().all(|(i, (_, cell, _))| *cell == rows[0].1 + i).then_some(rows[0].1);
                let seen = mask.see(n, rows.len(), run, |row| Some(rows[row].1), out);
                if seen == Seen::Some {
                    out.chunks_exact_mut(TILE).take(n).for_each(|out| out[rows.len()..].fill(f32::NEG_INFINITY));
                }
                seen
            }
            Block::Tile(t) => mask.see(n, TILE, t.run().map(|(cell, _)| cell), |row| t.cell(row), out),
        }
    }

    /// [`Seating::see`] for who looks at 64 rows of every block.
    pub(super) fn see_whole(&self, block: &Block, mask: &Mask, n: usize, out: &mut [f32]) -> Seen {
        let seen = self.see(block, mask, n, out);
        match block {
            Block::Exact(rows) if rows.len() < TILE && seen == Seen::All => {
                for out in out.chunks_exact_mut(TILE).take(n) {
                    out[..rows.len()].fill(0.0);
                    out[rows.len()..].fill(f32::NEG_INFINITY);
                }
                Seen::Some
            }
            _ => seen,
        }
    }
}
