//! The codec of one head: a mean, a weighted Karhunen-Loeve basis, quantised coefficients and gains per row.
//!
//! `x ~ mean + sum_j gain * level(code_j) * decode_j`. Bases and bit widths come from [`fit`]; rows are coded in tiles of 64.
//! Keys arrive in their tile's frame. Must not know about sequences, positions or cells.

mod basis;
pub mod bits;
pub mod calibration;
pub mod fit;
mod measure;
mod tile;

pub use basis::{Basis, BASIS_HEADER_BYTES};
pub use tile::{
    decode_rows, decode_taken, encode_row, encode_tile, fine_rows, put_row, recode_tile, take_row, Coded, CodedMut, Fine, Part, Side, TileForm,
    TileWork, FINE_ROWS, KEY_CUT, NO_ROW, PARTS, VALUE_CUT,
};

use crate::config::ANCHOR_GRID;
use crate::error::{Error, Result};
use half::f16;

/// The position whose frame a key lies in, given the middle position of the rows around it.
pub fn anchor(pos: i32) -> i32 {
    pos.div_euclid(ANCHOR_GRID) * ANCHOR_GRID + ANCHOR_GRID / 2
}

/// Bytes of an arena seen as f16.
pub(crate) fn f16s(bytes: &[u8]) -> Result<&[f16]> {
    if bytes.is_empty() {
        return Ok(&[]);
    }
    bytemuck::try_cast_slice(bytes).map_err(|e| Error::Data(format!("an f16 row is not aligned: {e}")))
}

/// Bytes of an arena seen as mutable f16.
pub(crate) fn f16s_mut(bytes: &mut [u8]) -> Result<&mut [f16]> {
    bytemuck::try_cast_slice_mut(bytes).map_err(|e| Error::Data(format!("an f16 row is not aligned: {e}")))
}
