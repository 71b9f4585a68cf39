//! The bytes of a tile: 64 rows of one head, keys and values.
//!
//! The coefficients of a row, widest first, are divided into a wide and a narrow part with a gain of its own each: with one gain for all, a row with
//! a huge coefficient would drown the others. A few rows are *fine*: what coding leaves of all their coefficients is there in 4 bits more.
//!
//! In this order: gains of the parts that there are (a byte a row each), K wide, K narrow, V wide, V narrow; codes of K, of V; the numbers of the fine
//! rows, plus one; for each of them the residual of K, then of V: a step in f16 and a nibble a coefficient. Must not know how codes are found, nor
//! where tiles lie.

use super::{Widths, TILE};
use half::f16;
use std::ops::Range;

/// Parts of the coefficients of a row.
pub const PARTS: usize = 2;
/// Rows of a tile that may be fine.
pub const FINE_ROWS: usize = 2;
/// The number of a fine row that there is not.
pub const NO_ROW: u8 = 255;
/// Least width of the wide part of keys.
pub const KEY_CUT: u32 = 4;
/// Least width of the wide part of values.
pub const VALUE_CUT: u32 = 3;
/// Bytes of a residual's step.
const STEP_BYTES: usize = 2;

/// The row that a fine slot belongs to: a tile of zeros has none.
fn marked(mark: u8) -> Option<usize> {
    usize::from(mark).checked_sub(1).filter(|row| *row < TILE)
}

/// What a tile keeps of its fine rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fine {
    /// Their residuals.
    Residuals,
    /// Which they are, and no more: rows of 8 bits that wait for a fit need no residual, but shall be fine when they are coded again.
    Marks,
}

/// A part of the coefficients, and where a tile has it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Part {
    /// Its coefficients.
    pub widths: Widths,
    /// The number of its first coefficient.
    pub first: usize,
    gains: usize,
    codes: usize,
}

impl Part {
    /// Coefficients.
    pub fn rank(&self) -> usize {
        self.widths.rank()
    }
    /// A gain of every row. Not to be asked of a part without coefficients.
    pub fn gains<'a>(&self, tile: &'a [u8]) -> &'a [u8] {
        &tile[self.gains..self.gains + TILE]
    }
    /// Its codes.
    pub fn codes<'a>(&self, tile: &'a [u8]) -> &'a [u8] {
        &tile[self.codes..self.codes + self.widths.bytes()]
    }
    /// Both, to be written.
    pub fn split_mut<'a>(&self, tile: &'a mut [u8]) -> (&'a mut [u8], &'a mut [u8]) {
        // Gains lie before all codes.
        let (front, codes) = tile.split_at_mut(self.codes);
        (&mut front[self.gains..self.gains + TILE], &mut codes[..self.widths.bytes()])
    }
    /// The numbers of its coefficients.
    pub fn range(&self) -> Range<usize> {
        self.first..self.first + self.rank()
    }
}

/// Keys or values of a tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Side {
    /// Elements of a row.
    pub d: usize,
    /// All coefficients.
    pub widths: Widths,
    /// Their parts, each possibly without any.
    pub parts: [Part; PARTS],
    /// The first byte of its part of a residual.
    residual: usize,
}

impl Side {
    /// The parts that have coefficients.
    pub fn some_parts(&self) -> impl Iterator<Item = (usize, &Part)> {
        self.parts.iter().enumerate().filter(|(_, p)| p.rank() > 0)
    }
    /// Bytes of a residual of `d` coefficients.
    const fn residual_bytes(d: usize) -> usize {
        STEP_BYTES + d.div_ceil(2)
    }
    /// Bits of the codes of a row.
    pub fn bits(&self) -> usize {
        self.widths.bytes() * 8 / TILE
    }
}

/// What the bytes of a tile mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TileForm {
    /// Keys.
    pub k: Side,
    /// Values.
    pub v: Side,
    /// What it keeps of fine rows.
    pub fine: Fine,
    /// The first byte of the numbers of the fine rows.
    fine_at: usize,
}

impl TileForm {
    /// Tiles of these widths.
    pub fn new(k: Widths, v: Widths, d_k: usize, d_v: usize, fine: Fine) -> Self {
        let (k_parts, v_parts) = (k.parts(KEY_CUT), v.parts(VALUE_CUT));
        let n_gains = k_parts.iter().chain(&v_parts).filter(|w| w.rank() > 0).count();
        let (mut gains, mut codes) = (0, n_gains * TILE);
        let mut side = |widths: Widths, parts: [Widths; PARTS], d: usize, residual: usize| {
            let mut first = 0;
            let parts = parts.map(|widths| {
                let part = Part { widths, first, gains, codes };
                first += widths.rank();
                gains += if widths.rank() > 0 { TILE } else { 0 };
                codes += widths.bytes();
                part
            });
            Side { d, widths, parts, residual }
        };
        let (k, v) = (side(k, k_parts, d_k, 0), side(v, v_parts, d_v, Side::residual_bytes(d_k)));
        TileForm { k, v, fine, fine_at: codes }
    }

    /// Bytes of a tile: whole words of 8 bytes, so that the codes of neighbouring tiles begin at such.
    pub fn bytes(&self) -> usize {
        (self.fine_at + FINE_ROWS * (1 + self.residual_bytes())).next_multiple_of(8)
    }

    /// The parts that have coefficients, of keys and then of values.
    pub fn parts(&self) -> impl Iterator<Item = &Part> {
        self.k.some_parts().chain(self.v.some_parts()).map(|(_, part)| part)
    }

    /// Bytes of the residual of a fine row.
    pub fn residual_bytes(&self) -> usize {
        match self.fine {
            Fine::Residuals => Side::residual_bytes(self.k.d) + Side::residual_bytes(self.v.d),
            Fine::Marks => 0,
        }
    }

    /// Where the residual of a fine slot lies.
    pub fn residual(&self, slot: usize) -> Range<usize> {
        let (first, n) = (self.fine_at + FINE_ROWS, self.residual_bytes());
        first + slot * n..first + (slot + 1) * n
    }

    /// Number and row of each fine slot in use.
    pub fn slots<'a>(&self, tile: &'a [u8]) -> impl Iterator<Item = (usize, usize)> + 'a {
        let marks = &tile[self.fine_at..self.fine_at + FINE_ROWS];
        marks.iter().enumerate().filter_map(|(slot, mark)| marked(*mark).map(|row| (slot, row)))
    }

    /// The residuals that a tile has: row, step, a nibble per coefficient.
    pub fn residuals<'a>(&self, side: &Side, tile: &'a [u8]) -> impl Iterator<Item = (usize, f32, &'a [u8])> {
        let (form, at, n) = (*self, side.residual, Side::residual_bytes(side.d));
        let slots = self.slots(tile).filter(move |_| form.fine == Fine::Residuals);
        slots.map(move |(slot, row)| {
            let (step, nibbles) = read_residual(&tile[form.residual(slot)][at..at + n]);
            (row, step, nibbles)
        })
    }

    /// Step and nibbles of a side's part of a residual.
    pub fn of_residual<'a>(&self, side: &Side, residual: &'a [u8]) -> (f32, &'a [u8]) {
        read_residual(&residual[side.residual..][..Side::residual_bytes(side.d)])
    }

    /// Write a side's part of the residual of slot `slot`: `find` gets the nibbles and gives the step.
    pub fn put_residual(&self, side: &Side, slot: usize, tile: &mut [u8], find: impl FnOnce(&mut [u8]) -> f32) {
        let at = self.residual(slot).start + side.residual;
        let (step, nibbles) = tile[at..at + Side::residual_bytes(side.d)].split_at_mut(STEP_BYTES);
        // A residual out of f16's range stands in a row that nothing can be made of.
        let found = find(nibbles).min(f16::MAX.to_f32());
        step.copy_from_slice(&f16::from_f32(found).to_le_bytes());
    }

    /// The fine rows of a tile; [`NO_ROW`] where there are fewer.
    pub fn fine_rows(&self, tile: &[u8]) -> [u8; FINE_ROWS] {
        let mut rows = [NO_ROW; FINE_ROWS];
        self.slots(tile).zip(&mut rows).for_each(|((_, row), out)| *out = row as u8);
        rows
    }

    /// Make these the fine rows, with residuals of nothing.
    pub fn mark(&self, tile: &mut [u8], rows: &[u8]) {
        let (marks, residuals) = tile[self.fine_at..].split_at_mut(FINE_ROWS);
        residuals.fill(0);
        marks.fill(0);
        marks.iter_mut().zip(rows.iter().filter(|row| usize::from(**row) < TILE)).for_each(|(mark, row)| *mark = row + 1);
    }

    /// Let a row be fine, too, if a slot is free; gives the slot.
    pub fn mark_one(&self, tile: &mut [u8], row: usize) -> Option<usize> {
        let marks = &mut tile[self.fine_at..][..FINE_ROWS];
        let slot = marks.iter().position(|mark| marked(*mark).is_none())?;
        marks[slot] = row as u8 + 1;
        Some(slot)
    }

    /// Let a row be fine no longer.
    pub fn unmark(&self, tile: &mut [u8], row: usize) {
        tile[self.fine_at..][..FINE_ROWS].iter_mut().filter(|mark| marked(**mark) == Some(row)).for_each(|mark| *mark = 0);
    }
}

fn read_residual(bytes: &[u8]) -> (f32, &[u8]) {
    let (step, nibbles) = bytes.split_at(STEP_BYTES);
    (f16::from_le_bytes([step[0], step[1]]).to_f32(), nibbles)
}
