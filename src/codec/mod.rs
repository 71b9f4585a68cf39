//! The codec of one head: a mean, a weighted Karhunen-Loeve basis, quantised coefficients and gains per row.
//!
//! `x ~ mean + sum_j gain * level(code_j) * decode_j`. Bases and bit widths come from [`fit`]; rows are coded in tiles of 64.
//! Keys arrive in their tile's frame. What bytes mean is in [`crate::layout`]. Must not know about sequences, positions or cells.

mod basis;
pub mod bits;
pub mod calibration;
pub mod fit;
mod measure;
mod tile;

pub use basis::Basis;
pub(crate) use tile::coefficients;
pub use tile::{decode_row, decode_tile, encode_row, encode_tile, recode_tile, Coded, CodedMut, TileWork};
