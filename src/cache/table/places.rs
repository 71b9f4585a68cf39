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
    /// Tiles whose rows lie in cells in a row and were at positions in a row: nearly all, and what is written of them in each step follows from the first row.
    is_run: Vec<bool>,
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
            is_run: vec![false; tiles],
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
                self.is_run[tile] = false;
                self.leave_former(tile);
            }
            None => {}
        }
        self.location[cell] = NOWHERE;
    }

    /// The rows of cells without a position are no more.
    pub fn free_all(&mut self, positions: &[i32]) {
        // Nearly always there are none among neighbours, or they had no rows: told without a branch for each cell.
        for (i, positions) in positions.chunks(TILE).enumerate() {
            if positions.iter().fold(0, |signs, p| signs | p) >= 0 {
                continue;
            }
            let first = i * TILE;
            let rows = &self.location[first..first + positions.len()];
            if positions.iter().zip(rows).fold(false, |any, (p, l)| any | ((*p < 0) & (*l != NOWHERE))) {
                (first..).zip(positions).filter(|(_, p)| **p < 0).for_each(|(cell, _)| self.free(cell));
            }
        }
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
            self.is_run[from / TILE] = false;
            self.put_coded(cell, to, self.row_turn[from]);
        }
    }

    /// A cell's row is this one of a tile.
    pub fn put_coded(&mut self, cell: u32, row: usize, turn: i32) {
        self.row_cell[row] = cell;
        self.row_turn[row] = turn;
        self.live[row / TILE] |= 1 << (row % TILE);
        self.is_run[row / TILE] = self.live[row / TILE] == u64::MAX && self.rows_are_a_run(row / TILE);
        self.location[cell as usize] = CODED | row as u32;
    }

    fn rows_are_a_run(&self, tile: usize) -> bool {
        let rows = tile * TILE..(tile + 1) * TILE;
        let (cells, turns) = (&self.row_cell[rows.clone()], &self.row_turn[rows]);
        let follow = |(i, (cell, turn)): (u32, (&u32, &i32))| cell.wrapping_sub(i) == cells[0] && turn.wrapping_add(i as i32) == turns[0];
        (0..).zip(cells.iter().zip(turns)).all(follow)
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

    /// Tiles with rows, those in the former bases last: number, and what writes cell and turn of each row; a cell of -1 for a dead one.
    pub fn tiles<'a>(&'a self, cells: &'a Cells) -> impl Iterator<Item = (u32, impl FnOnce(&mut [i32]) + 'a)> + 'a {
        let used = |former: bool| (0..self.live.len()).filter(move |t| self.live[*t] != 0 && self.is_former(*t) == former);
        used(false).chain(used(true)).map(move |tile| (self.number(tile) as u32, move |out: &mut [i32]| self.write_rows(tile, cells, out)))
    }

    /// Cell and turn of each row of a tile, one pair after another.
    fn write_rows(&self, tile: usize, cells: &Cells, out: &mut [i32]) {
        let rows = tile * TILE..(tile + 1) * TILE;
        let out = out[..2 * TILE].chunks_exact_mut(2);
        if self.is_run[tile] {
            let (cell, turn) = (self.row_cell[rows.start], self.row_turn[rows.start]);
            let positions = &cells.pos[cell as usize..][..TILE];
            for ((out, pos), i) in out.zip(positions).zip(0..) {
                (out[0], out[1]) = (cell as i32 + i, turn.wrapping_sub(i).wrapping_add(*pos));
            }
            return;
        }
        for ((out, turn), cell) in out.zip(&self.row_turn[rows.clone()]).zip(&self.row_cell[rows]) {
            (out[0], out[1]) = match *cell {
                NOWHERE => (-1, 0),
                cell => (cell as i32, turn.wrapping_add(cells.pos[cell as usize])),
            };
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, LayerShape};

    const SHAPE: LayerShape = LayerShape { n_head: 2, n_head_kv: 1, d_k: 32, d_v: 32 };

    /// What a plan says of each tile, against what each cell's place says.
    fn agree(places: &Places, pos: &[i32]) {
        let cells = Cells { pos, seq: pos };
        let mut rows = 0;
        for (tile, write) in places.tiles(&cells) {
            let mut written = [7; 2 * TILE];
            write(&mut written);
            for (row, pair) in written.chunks_exact(2).enumerate() {
                let Ok(cell) = usize::try_from(pair[0]) else {
                    assert_eq!((pair, places.live[tile as usize] >> row & 1), (&[-1, 0][..], 0));
                    continue;
                };
                let (at, turn) = places.locate(cell).unwrap();
                assert_eq!((at, turn.wrapping_add(pos[cell])), (Location::Coded(tile as usize, row), pair[1]));
                rows += 1;
            }
        }
        assert_eq!(rows, places.live.iter().map(|l| l.count_ones()).sum::<u32>());
    }

    #[test]
    fn a_tile_is_written_alike_whether_its_rows_follow_each_other_or_not() {
        let geometry = Geometry::new(&Config { n_cells: 2048, calibrated: true, ..Config::default() }, &[SHAPE]).unwrap();
        let mut places = Places::new(Arc::new(geometry));
        let mut pos: Vec<i32> = (0..2048).collect();
        let fill = |places: &mut Places, tile: usize, at: &dyn Fn(u32) -> (u32, i32)| {
            (0..TILE as u32).for_each(|i| places.put_coded(at(i).0, tile * TILE + i as usize, at(i).1));
        };
        fill(&mut places, 0, &|i| (100 + i, 7 - i as i32));
        fill(&mut places, 1, &|i| (300 - i, 7 - i as i32));
        fill(&mut places, 2, &|i| (400 + i, i32::from(i == 63)));
        fill(&mut places, 3, &|i| (500 + i, -(i as i32)));
        assert_eq!(places.is_run[..4], [true, false, false, true]);
        agree(&places, &pos);
        // Some are shifted, some go, and other rows come into their places.
        pos[110..].iter_mut().for_each(|p| *p += 5);
        agree(&places, &pos);
        pos[500] = -1;
        pos[130] = -1;
        places.free_all(&pos);
        assert_eq!(places.is_run[..4], [false; 4]);
        agree(&places, &pos);
        places.put_coded(600, 30, 9);
        places.put_coded(500, 3 * TILE, 0);
        pos[500] = 3;
        assert_eq!(places.is_run[..4], [false, false, false, true]);
        agree(&places, &pos);
        let moves: Vec<_> = (0..TILE).map(|row| Change::Move { from: 3 * TILE + row, to: 5 * TILE + row }).collect();
        places.carry_out(&moves, &[], true);
        assert_eq!(places.is_run[3..6], [false, false, true]);
        agree(&places, &pos);
    }
}
