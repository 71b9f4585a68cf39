//! What the caller says about the cells of a stream, and what follows from it before a step: rows whose cells were emptied or get others are gone.

use super::Table;
use crate::error::{argument, Result};

/// What the caller knows about the cells of a stream, after the new tokens were put into them.
#[derive(Debug, Clone, Copy)]
pub struct Cells<'a> {
    /// Position of each cell, -1 when empty.
    pub pos: &'a [i32],
    /// Lowest sequence that holds the cell, -1 when empty.
    pub seq: &'a [i32],
}

impl Cells<'_> {
    /// Refuse what does not describe `n_cells` cells, or new rows in cells that are empty or appear twice.
    pub(super) fn check(&self, n_cells: usize, new: &[u32]) -> Result<()> {
        if self.pos.len() != n_cells || self.seq.len() != n_cells {
            return argument(format!("{} positions and {} sequences for {n_cells} cells", self.pos.len(), self.seq.len()));
        }
        // Without an early end: all cells are looked at in each step, and so many at a time.
        if self.pos.iter().zip(self.seq).fold(0, |signs, (p, s)| signs | (p ^ s)) < 0 {
            return argument("a cell has a position but no sequence, or the other way round");
        }
        let mut sorted = new.to_vec();
        sorted.sort_unstable();
        if sorted.windows(2).any(|w| w[0] == w[1]) {
            return argument("a cell appears twice among the new ones");
        }
        match sorted.iter().find(|c| **c as usize >= n_cells || self.pos[**c as usize] < 0) {
            Some(c) => argument(format!("new row in cell {c}, which is empty or not among the {n_cells} cells")),
            None => Ok(()),
        }
    }
}

impl Table {
    /// Bring the table up to date with the cells, before `new` ones get new rows.
    pub(super) fn reconcile(&mut self, cells: &Cells, new: &[u32]) {
        self.places.free_all(cells.pos);
        for cell in new {
            self.places.free(*cell as usize);
        }
        if self.places.is_empty() {
            (self.fitted, self.fitted_on, self.refit_room) = (false, 0, 0);
            self.places.former.fill(false);
            self.findings.forget_drift(self.stream);
            self.queries.fill(None);
            self.recent.fill(None);
            (self.seen, self.recorded) = (0, 0);
            self.give_up();
        }
    }
}
