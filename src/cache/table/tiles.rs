//! The tiles as they will be after a step: makes room in bands, and notes the changes that takes. Must not know which rows are sealed, nor why.

use super::Table;
use crate::cache::plan::{Change, Filling};
use crate::error::{Error, Result};
use crate::layout::geometry::Geometry;
use crate::layout::{BANDS, TILE};
use std::ops::Range;

/// What a tile is filled with, and the cell and the `turn - position` of each row.
pub type Fill = (Filling, [(u32, i32); TILE]);

/// See the module.
pub struct Tiles<'a> {
    geometry: &'a Geometry,
    live: Vec<u64>,
    sealed_at: Vec<u64>,
    sealed: u64,
    /// What that takes.
    pub changes: Vec<Change<Filling>>,
    /// See [`super::Pending::sealed`].
    pub sealed_rows: Vec<(u64, [(u32, i32); TILE])>,
    /// In which tiles rows may wait.
    waiting: Range<usize>,
    /// Tiles of waiting rows up to the last one in use at the beginning of the step: layers are coded one after another.
    waited: usize,
    /// Tiles whose rows were in the former bases at the beginning of the step.
    former: Vec<bool>,
}

impl<'a> Tiles<'a> {
    pub fn new(table: &'a Table) -> Self {
        let (geometry, places) = (&*table.geometry, &table.places);
        let mut waiting = geometry.band(BANDS);
        if table.refit_room > 0 {
            waiting.start += geometry.waiting_in_former();
            waiting.end = waiting.start + table.refit_room;
        }
        Tiles {
            geometry,
            live: places.live.clone(),
            sealed_at: places.sealed_at.clone(),
            sealed: places.sealed,
            changes: Vec::new(),
            sealed_rows: Vec::new(),
            waiting,
            waited: places.waited(),
            former: places.former.clone(),
        }
    }

    fn fill(&mut self, tile: usize, age: u64, (filling, places): Fill) {
        (self.live[tile], self.sealed_at[tile]) = (u64::MAX, age);
        self.sealed = self.sealed.max(age);
        self.changes.push(Change::Seal { tile, filling });
        self.sealed_rows.push((age, places));
    }

    /// Fill a tile of the first band.
    pub fn seal(&mut self, fill: Fill) -> Result<()> {
        let tile = self.take(0)?;
        self.fill(tile, self.sealed + 1, fill);
        Ok(())
    }

    /// Fill a tile of rows that wait.
    pub fn wait(&mut self, fill: Fill) -> Result<()> {
        let free = self.waiting.clone().find(|t| self.live[*t] == 0);
        let tile = match free {
            Some(tile) => tile,
            None if self.holes(self.waiting.clone()) >= TILE => self.compact(self.waiting.clone()),
            None => return Err(Error::Full("no tile is left to wait in".into())),
        };
        self.fill(tile, self.sealed + 1, fill);
        Ok(())
    }

    /// Tiles that rows can wait in.
    pub fn room_to_wait(&self) -> usize {
        let (mut free, mut holes) = (0, 0);
        for live in &self.live[self.waiting.clone()] {
            free += usize::from(*live == 0);
            holes += if *live == 0 { 0 } else { live.count_zeros() as usize };
        }
        free + holes / TILE
    }

    /// Whether there are tiles that wait or are in the former bases.
    pub fn are_to_be_coded(&self) -> bool {
        self.waited > 0 || self.former.contains(&true)
    }

    /// Bases come that take the place of others.
    pub fn outdate(&mut self) {
        self.former = self.live[..self.geometry.tiles].iter().map(|l| *l != 0).collect();
    }

    /// Code the rows that leave in bases that are new, and up to `most` of the tiles that are in the former ones or wait. The former ones are oldest, and
    /// come first and into the last band; then the youngest of those that wait get the finest bands. Layers change their bases one after another, so
    /// nothing is written where in this step a layer may still read something in the former ones.
    pub fn code_again(&mut self, leaving: Vec<Fill>, most: usize) -> Result<()> {
        let age = self.sealed;
        for (i, fill) in leaving.into_iter().enumerate().rev() {
            let tile = self.beside_waiting()?;
            self.fill(tile, age + 1 + i as u64, fill);
        }
        let mut former: Vec<usize> = (0..self.former.len()).filter(|t| self.former[*t] && self.live[*t] != 0).collect();
        former.sort_by_key(|t| self.sealed_at[*t]);
        for from in former.iter().take(most) {
            let bands = (0..BANDS).rev().flat_map(|band| self.geometry.band(band));
            let Some(to) = bands.filter(|t| *t < self.beside()).find(|t| self.is_free(*t)) else { break };
            self.recode(*from, to);
        }
        if !former.is_empty() {
            return Ok(());
        }
        let mut waiting: Vec<usize> = self.geometry.band(BANDS).filter(|t| self.live[*t] != 0).collect();
        waiting.sort_by_key(|t| std::cmp::Reverse(self.sealed_at[*t]));
        for from in waiting.into_iter().take(most) {
            // Where there is no room for all at once, what a step has coded makes room for the next.
            let Ok(to) = self.beside_waiting() else { break };
            self.recode(from, to);
        }
        Ok(())
    }

    fn is_free(&self, tile: usize) -> bool {
        self.live[tile] == 0 && !self.former[tile]
    }

    /// Tiles from the first on that lie before what waits and before former bases.
    fn beside(&self) -> usize {
        self.geometry.tiles_beside_all(self.waited, self.former.contains(&true))
    }

    /// The first free one of these, or one whose rows go to holes of others.
    fn beside_waiting(&mut self) -> Result<usize> {
        let beside = self.beside();
        if let Some(free) = (0..beside).find(|t| self.is_free(*t)) {
            return Ok(free);
        }
        let mut bands = (0..BANDS).map(|band| self.geometry.band(band)).map(|band| band.start.min(beside)..band.end.min(beside));
        match bands.find(|tiles| !self.former.contains(&true) && self.holes(tiles.clone()) >= TILE) {
            Some(tiles) => Ok(self.compact(tiles)),
            None => Err(Error::Full("no tile is free beside the rows that wait for a fit".into())),
        }
    }

    fn recode(&mut self, from: usize, to: usize) {
        let number = if from < self.former.len() && self.former[from] { self.geometry.former(from) } else { from };
        self.changes.push(Change::Recode { from: number, to });
        self.sealed_at[to] = self.sealed_at[from];
        self.live[to] = std::mem::take(&mut self.live[from]);
    }

    fn holes(&self, mut tiles: Range<usize>) -> usize {
        tiles.by_ref().map(|t| self.live[t].count_zeros() as usize).sum()
    }

    /// A free tile of a band, or of a later one when this band has none at all. Where holes make up a tile, its rows move together;
    /// else the oldest tile ages. So younger bands never have a tile of holes when a later one overflows.
    fn take(&mut self, band: usize) -> Result<usize> {
        let mut tiles = self.geometry.band(band);
        if let Some(free) = tiles.clone().find(|t| self.live[*t] == 0) {
            return Ok(free);
        }
        if self.holes(tiles.clone()) >= TILE {
            return Ok(self.compact(tiles));
        }
        if band + 1 == BANDS {
            return Err(Error::Full(format!("no hole is left in {} tiles", self.geometry.tiles)));
        }
        let Some(oldest) = tiles.by_ref().min_by_key(|t| self.sealed_at[*t]) else {
            return self.take(band + 1);
        };
        let to = self.take(band + 1)?;
        self.recode(oldest, to);
        Ok(oldest)
    }

    /// With `waiting` rows of a tile to come, make room for it a change at a time, so that the step that seals it only seals.
    pub fn prepare(&mut self, waiting: usize) {
        if self.geometry.band(0).any(|t| self.live[t] == 0) || self.geometry.band_tiles[0] == 0 {
            return;
        }
        let band = match waiting {
            n if n >= TILE * 2 / 3 => 0,
            n if n >= TILE / 3 && self.holes(self.geometry.band(0)) < TILE => 1,
            _ => return,
        };
        // Where there is no room yet, rows may be removed until the seal.
        let _ = self.take(band);
    }

    /// Empty the sparsest of some tiles into holes of the others.
    fn compact(&mut self, tiles: Range<usize>) -> usize {
        let victim = tiles.clone().min_by_key(|t| self.live[*t].count_ones()).expect("invariant: a band with holes has tiles");
        let mut target = tiles.start;
        let rows = std::mem::take(&mut self.live[victim]);
        for row in (0..TILE).filter(|r| rows >> r & 1 == 1) {
            while target == victim || self.live[target] == u64::MAX {
                target += 1;
            }
            let hole = self.live[target].trailing_ones() as usize;
            self.live[target] |= 1 << hole;
            self.changes.push(Change::Move { from: victim * TILE + row, to: target * TILE + hole });
        }
        victim
    }
}
