//! Which cells the query tokens of a step see, and what that means for up to 64 rows of them at a time. Must not know what the rows are.

use crate::layout::TILE;
use half::f16;
use std::ops::Range;

/// The visibility of cells for each query token.
#[derive(Debug, Clone, Copy)]
pub enum Mask<'a> {
    /// Every row is visible.
    All,
    /// ggml's: f16, one row per token, `stride` elements apart; 0 shows, -inf hides, other values are added. Cells from
    /// `n_kv` on are hidden.
    F16 {
        /// Rows of the mask.
        values: &'a [f16],
        /// Elements from a row to the next.
        stride: usize,
        /// Cells covered.
        n_kv: usize,
    },
    /// The same in f32.
    F32 {
        /// Rows of the mask.
        values: &'a [f32],
        /// Elements from a row to the next.
        stride: usize,
        /// Cells covered.
        n_kv: usize,
    },
}

/// How the tokens see some rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Seen {
    Nothing,
    All,
    /// The mask has been written.
    Some,
}

impl Mask<'_> {
    /// What is added to a token's score of a cell; -inf hides it.
    fn at(&self, token: usize, cell: usize) -> f32 {
        match *self {
            Mask::All => 0.0,
            Mask::F16 { values, stride, n_kv } if cell < n_kv => values[token * stride + cell].to_f32(),
            Mask::F32 { values, stride, n_kv } if cell < n_kv => values[token * stride + cell],
            _ => f32::NEG_INFINITY,
        }
    }

    /// True when a token sees a run of cells and nothing is added.
    fn shows(&self, token: usize, cells: Range<usize>) -> bool {
        match *self {
            Mask::All => true,
            Mask::F16 { stride, n_kv, .. } | Mask::F32 { stride, n_kv, .. } if cells.end > n_kv || n_kv > stride && token > 0 => false,
            Mask::F16 { values, stride, .. } => {
                let bits: &[u16] = bytemuck::cast_slice(&values[token * stride + cells.start..token * stride + cells.end]);
                bits.iter().fold(0, |all, x| all | x) == 0
            }
            Mask::F32 { values, stride, .. } => values[token * stride + cells.start..token * stride + cells.end].iter().all(|x| *x == 0.0),
        }
    }

    /// True when a token certainly sees nothing of a run of cells.
    fn hides(&self, token: usize, cells: Range<usize>) -> bool {
        match *self {
            Mask::F16 { values, stride, n_kv } if cells.end <= n_kv => {
                let hidden = f16::NEG_INFINITY.to_bits();
                let bits: &[u16] = bytemuck::cast_slice(&values[token * stride + cells.start..token * stride + cells.end]);
                bits.iter().fold(0, |all, x| all | (x ^ hidden)) == 0
            }
            _ => false,
        }
    }

    /// The mask of the tokens from `token` on.
    pub(super) fn from(&self, token: usize) -> Self {
        match *self {
            Mask::All => Mask::All,
            Mask::F16 { values, stride, n_kv } => Mask::F16 { values: &values[token * stride..], stride, n_kv },
            Mask::F32 { values, stride, n_kv } => Mask::F32 { values: &values[token * stride..], stride, n_kv },
        }
    }

    /// Write what `n` tokens see of `rows` rows to `out[token * TILE + row]`, unless it is everything or nothing. `cell` gives the cell of each row, or
    /// `None` for one that is not there; `run` is the first cell, when they follow each other without a gap.
    pub(super) fn see(&self, n: usize, rows: usize, run: Option<usize>, cell: impl Fn(usize) -> Option<usize>, out: &mut [f32]) -> Seen {
        if run.is_some_and(|first| (0..n).all(|t| self.shows(t, first..first + rows))) {
            return Seen::All;
        }
        if run.is_some_and(|first| (0..n).all(|t| self.hides(t, first..first + rows))) {
            return Seen::Nothing;
        }
        let mut seen = false;
        for (token, out) in out.chunks_exact_mut(TILE).enumerate().take(n) {
            for (row, out) in out.iter_mut().enumerate().take(rows) {
                *out = cell(row).map_or(f32::NEG_INFINITY, |cell| self.at(token, cell));
                seen |= *out != f32::NEG_INFINITY;
            }
        }
        if seen {
            Seen::Some
        } else {
            Seen::Nothing
        }
    }
}
