//! Where every row of a stream is: in an exact slot or in a tile, and which tiles are in which bases.
//!
//! Cells and the rows' places point at each other. Must not know why rows go where they go.

use super::Cells;
use crate::cache::plan::{Change, Filling, Source};
use crate::layout::geometry::Geometry;
use crate::layout::TILE;
use std::sync::Arc;

/// In place of a cell or a row's place: there is none.
pub const NOWHERE: u32 = u32::MAX;
/// Marks the place of a coded row, `tile * 64 + row`; others are slots.
pub const CODED: u32 = 1 << 31;

/// Where a row is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Location {
    /// In an exact slot.
    Slot(usize),
    /// In a tile: tile, row.
    Coded(usize, usize),
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Places {
    geometry: Arc<Geometry>,
    /// Of each cell: its slot, or its row of a tile with [`CODED`].
    pub location: Vec<u32>,
    /// Cell of each row of a tile.
    pub row_cell: Vec<u32>,
    /// `turn - position` of a coded row: constant under shifts.
    pub row_turn: Vec<i32>,
    /// Which rows of a tile have a cell.
    pub live: Vec<u64>,
    /// When the rows of a tile were sealed: counts tiles.
    pub sealed_at: Vec<u64>,
    /// Tiles sealed so far.
    pub sealed: u64,
    /// Cell of each slot, and the position of its row when it was stored.
    pub slot_cell: Vec<u32>,
    /// See `slot_cell`.
    pub slot_pos: Vec<i32>,
    /// Tiles in the former bases.
    pub former: Vec<bool>,
}

impl Places {
    /// No rows.
    pub fn new(geometry: Arc<Geometry>) -> Self {
        let tiles = geometry.tiles + geometry.waiting;
        Places {
            location: vec![NOWHERE; geometry.config.n_cells as usize],
            row_cell: vec![NOWHERE; tiles * TILE],
            row_turn: vec![0; tiles * TILE],
            live: vec![0; tiles],
            sealed_at: vec![0; tiles],
            sealed: 0,
            slot_cell: vec![NOWHERE; geometry.exact],
            slot_pos: vec![0; geometry.exact],
            former: vec![false; geometry.tiles],
            geometry,
        }
    }

    /// Whether there are rows at all.
    pub fn is_empty(&self) -> bool {
        self.location.iter().all(|l| *l == NOWHERE)
    }

    /// Tiles of waiting rows up to the last one in use.
    pub fn waited(&self) -> usize {
        self.live[self.geometry.tiles..].iter().rposition(|l| *l != 0).map_or(0, |last| last + 1)
    }

    /// The number under which plans speak of a tile.
    pub fn number(&self, tile: usize) -> usize {
        if self.is_former(tile) {
            self.geometry.former(tile)
        } else {
            tile
        }
    }

    /// Where a cell's row is, and its turn less its position; `None` when there is none.
    pub fn locate(&self, cell: usize) -> Option<(Location, i32)> {
        match *self.location.get(cell)? {
            NOWHERE => None,
            l if l & CODED == 0 => Some((Location::Slot(l as usize), self.slot_pos[l as usize].wrapping_neg())),
            l => {
                let row = (l & !CODED) as usize;
                Some((Location::Coded(row / TILE, row % TILE), self.row_turn[row]))
            }
        }
    }

    /// A tile without rows is in no bases.
    fn leave_former(&mut self, tile: usize) {
        if self.live[tile] == 0 && tile < self.former.len() {
            self.former[tile] = false;
        }
    }

    /// A cell's row is no more.
    pub fn free(&mut self, cell: usize) {
        match self.locate(cell) {
            Some((Location::Slot(slot), _)) => self.slot_cell[slot] = NOWHERE,
            Some((Location::Coded(tile, row), _)) => {
                self.row_cell[tile * TILE + row] = NOWHERE;
                self.live[tile] &= !(1 << row);
                self.leave_former(tile);
            }
            None => {}
        }
        self.location[cell] = NOWHERE;
    }

    /// Whether a tile is in the former bases.
    pub fn is_former(&self, tile: usize) -> bool {
        self.former.get(tile).is_some_and(|f| *f)
    }

    /// Tiles with rows in the former bases.
    pub fn former_tiles(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.former.len()).filter(|t| self.former[*t])
    }

    /// Move a row of a tile to another; a dead one stays where it is.
    fn move_coded(&mut self, from: usize, to: usize) {
        let cell = std::mem::replace(&mut self.row_cell[from], NOWHERE);
        if cell != NOWHERE {
            self.live[from / TILE] &= !(1 << (from % TILE));
            self.put_coded(cell, to, self.row_turn[from]);
        }
    }

    /// A cell's row is this one of a tile.
    pub fn put_coded(&mut self, cell: u32, row: usize, turn: i32) {
        self.row_cell[row] = cell;
        self.row_turn[row] = turn;
        self.live[row / TILE] |= 1 << (row % TILE);
        self.location[cell as usize] = CODED | row as u32;
    }

    /// A cell's row is in this slot.
    pub fn put_exact(&mut self, cell: u32, slot: usize, pos: i32) {
        self.slot_cell[slot] = cell;
        self.slot_pos[slot] = pos;
        self.location[cell as usize] = slot as u32;
    }

    /// Slot, cell and turn of each exact row.
    pub fn exact_rows<'a>(&'a self, cells: &'a Cells) -> impl Iterator<Item = (u32, u32, i32)> + 'a {
        let taken = self.slot_cell.iter().zip(&self.slot_pos).zip(0..).filter(|((cell, _), _)| **cell != NOWHERE);
        taken.map(|((cell, pos), slot)| (slot, *cell, cells.pos[*cell as usize].wrapping_sub(*pos)))
    }

    /// Tiles with rows, those in the former bases last: number, and cell and turn of each row; a cell of -1 for a dead one.
    pub fn tiles<'a>(&'a self, cells: &'a Cells) -> impl Iterator<Item = (u32, [(i32, i32); TILE])> + 'a {
        let (former, own): (Vec<usize>, Vec<usize>) = (0..self.live.len()).filter(|t| self.live[*t] != 0).partition(|t| self.is_former(*t));
        own.into_iter().chain(former).map(|tile| {
            let row = |row: usize| match self.row_cell[row] {
                NOWHERE => (-1, 0),
                cell => (cell as i32, self.row_turn[row].wrapping_add(cells.pos[cell as usize])),
            };
            (self.number(tile) as u32, std::array::from_fn(|i| row(tile * TILE + i)))
        })
    }

    /// Changes of a plan become fact. `sealed` has, in the order of the tiles that are filled, when their rows were sealed, and cell and `turn - position` of
    /// each. Without the tokens, tile rows that were meant for them stay dead.
    pub fn carry_out(&mut self, changes: &[Change<Filling>], sealed: &[(u64, [(u32, i32); TILE])], with_tokens: bool) {
        let mut sealed = sealed.iter();
        for change in changes {
            match change {
                Change::Move { from, to } => self.move_coded(*from, *to),
                Change::Recode { from, to } => {
                    let from = self.geometry.tile_of(*from);
                    (0..TILE).for_each(|row| self.move_coded(from * TILE + row, to * TILE + row));
                    self.sealed_at[*to] = self.sealed_at[from];
                    self.leave_former(from);
                }
                Change::Seal { tile, filling } => {
                    let (age, places) = sealed.next().expect("invariant: a place for every sealed row");
                    self.sealed = self.sealed.max(*age);
                    self.sealed_at[*tile] = *age;
                    for (row, (r, (cell, turn))) in filling.rows.iter().zip(places).enumerate() {
                        match r.source {
                            Source::Slot(s) => self.slot_cell[s] = NOWHERE,
                            _ if !with_tokens => continue,
                            _ => {}
                        }
                        self.put_coded(*cell, *tile * TILE + row, *turn);
                    }
                }
            }
        }
    }
}
