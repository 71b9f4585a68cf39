//! Where the rows of a saved state go. Must not know what a state looks like.

use super::places::NOWHERE;
use super::{Cells, Table};
use crate::error::{Error, Result};
use crate::layout::geometry::{Kind, FORMER, WAITING};
use crate::layout::{anchor, BANDS, QUERY_SLOTS, RECENT_QUERIES, TILE};

/// Where the rows of a saved state go; per-cell vectors are in the order of the cells given.
#[derive(Debug, Clone)]
pub struct Restore {
    /// Bases exist afterwards.
    pub fitted: bool,
    /// The stream takes over the state's bases.
    pub adopt: bool,
    /// The stream takes over what the state's waiting rows are coded relative to.
    pub adopt_plain: bool,
    /// The stream held nothing before.
    pub was_empty: bool,
    /// Exact slot of each cell, or `None` when it is coded.
    pub slots: Vec<Option<u32>>,
    /// Tile row of each coded cell, in the saved band where that has room. Without bases these are rows that wait.
    pub rows: Vec<u32>,
    /// Turn into its tile's frame of each exact row that has to be coded.
    pub turns: Vec<i32>,
    row_turns: Vec<i32>,
    places: Vec<(i32, i32)>,
}

impl Table {
    /// Where the rows of a saved state go. `coded` (the kind, `None` when exact) and `turns` (less position) are the
    /// state's; see [`crate::state`].
    pub fn plan_restore(&mut self, cells: Cells, new: &[u32], coded: &[Option<Kind>], turns: &[i32], saved_fitted: bool) -> Result<Restore> {
        cells.check(self.places.location.len(), new)?;
        self.pending = None;
        self.reconcile(&cells, new);
        let g = self.geometry.clone();
        let was_empty = self.places.is_empty();
        let fitted = self.fitted || saved_fitted;
        let waited = self.places.waited();
        let mut r = Restore {
            fitted,
            adopt: saved_fitted && !self.fitted,
            adopt_plain: waited == 0,
            was_empty,
            slots: vec![None; new.len()],
            rows: vec![NOWHERE; new.len()],
            turns: vec![0; new.len()],
            row_turns: turns.to_vec(),
            places: new.iter().map(|c| (cells.pos[*c as usize], cells.seq[*c as usize])).collect(),
        };
        let mut free: Vec<u32> = (0..g.exact).rev().filter(|s| self.places.slot_cell[*s] == NOWHERE).map(|s| s as u32).collect();
        // Sinks and the newest rows first: what finds no slot is coded.
        let mut exact: Vec<usize> = (0..new.len()).filter(|i| coded[*i].is_none()).collect();
        exact.sort_by_key(|i| (r.places[*i].0 >= g.config.sinks as i32, std::cmp::Reverse(r.places[*i].0)));
        for i in exact {
            r.slots[i] = free.pop();
            if r.slots[i].is_some() {
                continue;
            }
            let pos = r.places[i].0;
            let anchor = anchor(pos);
            r.turns[i] = turns[i].wrapping_add(pos).wrapping_sub(anchor);
            r.row_turns[i] = anchor.wrapping_sub(pos);
        }
        let former = self.places.former_tiles().count();
        let limit = if waited > 0 || former > 0 { g.tiles_beside_all(waited, former > 0) } else { g.tiles };
        let mut is_open: Vec<bool> = (0..self.places.live.len()).map(|t| (t < limit || t >= g.tiles) && !self.places.is_former(t)).collect();
        if former > 0 {
            // What is to be coded again needs free tiles to go to.
            let least = (0..limit).rev().find(|used| g.can_code_all(*used, former, 0..waited)).unwrap_or(0);
            (0..limit).rev().filter(|t| self.places.live[*t] == 0).take(limit - least).for_each(|t| is_open[t] = false);
        }
        let mut holes: [_; BANDS + 1] = std::array::from_fn(|band| {
            let tiles = g.band(band).filter(|t| is_open[*t]);
            let (whole, partial): (Vec<usize>, Vec<usize>) = tiles.partition(|t| self.places.live[*t] == 0);
            let live = &self.places.live;
            whole.into_iter().chain(partial).flat_map(|t| (0..TILE).map(move |row| (t, row))).filter(|(t, row)| live[*t] >> row & 1 == 0)
        });
        for i in (0..new.len()).filter(|i| r.slots[*i].is_none()) {
            // Rows that were exact or waited are young. What a band has no room for is coded again, coarser if possible.
            let band = coded[i].filter(|kind| *kind != WAITING).map_or(0, |kind| kind % FORMER);
            let mut bands = if fitted { (band..BANDS).chain((0..band).rev()) } else { (BANDS..BANDS + 1).chain((0..0).rev()) };
            let (tile, row) = bands.find_map(|b| holes[b].next()).ok_or_else(|| Error::Full("no tile row is free for the saved rows".into()))?;
            r.rows[i] = (tile * TILE + row) as u32;
        }
        Ok(r)
    }

    /// The rows of a state are in their places.
    pub fn commit_restore(&mut self, r: &Restore, new: &[u32]) {
        (self.fitted, self.refit_room) = (r.fitted, 0);
        self.findings.forget_drift(self.stream);
        self.give_up();
        for (i, cell) in new.iter().enumerate() {
            match r.slots[i] {
                Some(slot) => self.places.put_exact(*cell, slot as usize, r.row_turns[i].wrapping_neg()),
                None => {
                    let tile = r.rows[i] as usize / TILE;
                    if self.places.live[tile] == 0 {
                        self.places.sealed += 1;
                        self.places.sealed_at[tile] = self.places.sealed;
                    }
                    self.places.put_coded(*cell, r.rows[i] as usize, r.row_turns[i]);
                }
            }
        }
    }

    /// The places of the queries that are kept, for a fit and as recent ones, how many there were, and what the bases were fitted on.
    pub fn queries_to_bytes(&self) -> Vec<u8> {
        let counts = [self.seen, self.recorded, self.fitted_on as u64].map(u64::to_le_bytes).into_iter().flatten();
        let places = self.queries.iter().chain(&self.recent).map(|q| q.unwrap_or((-1, -1)));
        counts.chain(places.flat_map(|(pos, seq)| [pos.to_le_bytes(), seq.to_le_bytes()]).flatten()).collect()
    }

    /// Take over what [`Table::queries_to_bytes`] gave, as queries of `seq` if one is given.
    pub fn queries_from_bytes(&mut self, bytes: &[u8], as_seq: Option<i32>) -> Result<()> {
        let Some((counts, places)) = bytes.split_first_chunk::<24>().filter(|(_, p)| p.len() == 8 * (QUERY_SLOTS + RECENT_QUERIES)) else {
            return Err(Error::Data("state: the list of queries has another length".into()));
        };
        // More tokens than anyone will have, and no sum with them overflows.
        let long = |b: &[u8]| u64::from_le_bytes(b.try_into().expect("invariant: eight bytes")).min(u64::from(u32::MAX));
        (self.seen, self.recorded, self.fitted_on) = (long(&counts[..8]), long(&counts[8..16]), long(&counts[16..]) as usize);
        let int = |b: &[u8]| i32::from_le_bytes(b.try_into().expect("invariant: four bytes"));
        for (q, p) in self.queries.iter_mut().chain(&mut self.recent).zip(places.chunks_exact(8)) {
            let (pos, seq) = (int(&p[..4]), int(&p[4..]));
            *q = (pos >= 0).then_some((pos, as_seq.unwrap_or(seq)));
        }
        Ok(())
    }
}
