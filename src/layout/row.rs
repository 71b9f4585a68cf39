//! A coded row by itself, as it is moved to another tile and saved.
//!
//! In this order: whether it is fine, a byte; a gain for each part that there is; codes, in whole bits one after another; the residual, if it is fine.
//! Must not know what a row is decoded to.

use super::{quant, TileForm};

/// Codes of few bits one after another, lowest bits first.
pub struct Bits<B> {
    bytes: B,
    at: usize,
}

impl Bits<&mut [u8]> {
    /// The bits were zero.
    fn put(&mut self, width: u32, code: u8) {
        let wide = (u16::from(code) & ((1 << width) - 1)) << (self.at % 8);
        let [low, high] = wide.to_le_bytes();
        self.bytes[self.at / 8] |= low;
        if high != 0 {
            self.bytes[self.at / 8 + 1] |= high;
        }
        self.at += width as usize;
    }
}

impl Bits<&[u8]> {
    /// The next code, of `width` bits.
    pub fn get(&mut self, width: u32) -> u8 {
        let byte = |i: usize| self.bytes.get(i).copied().unwrap_or(0);
        let wide = u16::from_le_bytes([byte(self.at / 8), byte(self.at / 8 + 1)]) >> (self.at % 8);
        self.at += width as usize;
        (wide & ((1 << width) - 1)) as u8
    }
}

/// What [`TileForm::take_row`] gave, in parts.
pub struct Taken<'a> {
    /// It was fine.
    pub is_fine: bool,
    /// A gain for each part that there is, of keys and then of values.
    pub gains: &'a [u8],
    /// Codes of these parts, one after another.
    pub codes: Bits<&'a [u8]>,
    /// Nothing, or what a fine row has.
    pub residual: &'a [u8],
}

impl<'a> Taken<'a> {
    /// Those of a row of this form.
    pub fn of(form: &TileForm, taken: &'a [u8]) -> Self {
        let (gains, rest) = taken[1..].split_at(form.parts().count());
        let (bytes, residual) = rest.split_at(form.code_bytes());
        Taken { is_fine: taken[0] == 1, gains, codes: Bits { bytes, at: 0 }, residual }
    }
}

impl TileForm {
    fn code_bytes(&self) -> usize {
        (self.k.bits() + self.v.bits()).div_ceil(8)
    }

    /// Bytes of a row as [`TileForm::take_row`] gives it, the first of which is `flag`; `None` when none begins so.
    pub fn taken_bytes(&self, flag: u8) -> Option<usize> {
        let plain = 1 + self.parts().count() + self.code_bytes();
        match flag {
            0 => Some(plain),
            1 => Some(plain + self.residual_bytes()),
            _ => None,
        }
    }

    /// All that a tile holds of a row.
    pub fn take_row(&self, tile: &[u8], row: usize) -> Vec<u8> {
        let slot = self.slots(tile).find(|(_, fine)| *fine == row).map(|(slot, _)| slot);
        let mut out = vec![u8::from(slot.is_some())];
        self.parts().for_each(|part| out.push(part.gains(tile)[row]));
        let at = out.len();
        out.resize(at + self.code_bytes(), 0);
        let mut bits = Bits { bytes: &mut out[at..], at: 0 };
        for part in self.parts() {
            let codes = part.codes(tile);
            for (width, at) in (0..part.rank()).map(|j| part.widths.place(j)) {
                bits.put(width, quant::get(width, &codes[at..], row));
            }
        }
        out.extend(slot.into_iter().flat_map(|slot| &tile[self.residual(slot)]));
        out
    }

    /// Write what [`TileForm::take_row`] gave for a row of the same form to row `row`. It stays fine if that row was or a fine slot is free.
    pub fn put_row(&self, tile: &mut [u8], row: usize, taken: &[u8]) {
        let Taken { is_fine, gains, mut codes, residual } = Taken::of(self, taken);
        for (part, gain) in self.parts().zip(gains) {
            let (gains, packed) = part.split_mut(tile);
            gains[row] = *gain;
            for (width, at) in (0..part.rank()).map(|j| part.widths.place(j)) {
                quant::put(width, &mut packed[at..], row, codes.get(width));
            }
        }
        self.unmark(tile, row);
        if let Some(slot) = is_fine.then(|| self.mark_one(tile, row)).flatten() {
            tile[self.residual(slot)].copy_from_slice(residual);
        }
    }
}
