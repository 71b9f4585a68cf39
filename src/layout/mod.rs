//! What bytes mean: the numbers and formats that codec, kernels and cache read alike.
//!
//! A tile's bytes ([`tile`]), those of a row taken out of one ([`row`]), how many coefficients have which width ([`Widths`]), which values codes and gain
//! bytes stand for ([`quant`], [`gain`]), a stored [`basis`], where all of these lie in a stream's arena and how large it is ([`geometry`]), and the numbers
//! that everything counts with. The floor above [`crate::config`] and [`crate::error`], which are all of this crate that it may know: not who computes
//! with these bytes.

pub mod basis;
pub mod gain;
pub mod geometry;
pub mod quant;
pub mod row;
pub mod tile;
pub mod widths;

pub use tile::{Fine, Part, Side, TileForm, FINE_ROWS, KEY_CUT, NO_ROW, PARTS, VALUE_CUT};
pub use widths::Widths;

use crate::config::LayerShape;
use crate::error::{Error, Result};
use half::f16;
use std::borrow::Cow;

/// Rows of a tile.
pub const TILE: usize = 64;
/// Positions that share an anchor: tiles of one such stretch lie in one frame, and attention projects its queries once for all of them.
pub const ANCHOR_GRID: i32 = 256;
/// Most query tokens of one decode attention call.
pub const MAX_QUERIES: usize = 64;
/// Pieces into which one attention call is cut at least, whatever the number of threads; see [`Heads::chunks`].
pub const UNITS: usize = 32;
/// Query tokens kept for a fit.
pub const QUERY_SLOTS: usize = 64;
/// Recent query tokens that a stream keeps, to see which rows draw attention.
pub const RECENT_QUERIES: usize = 16;
/// Bands of tiles, finest rate first.
pub const BANDS: usize = 3;

/// The position whose frame a key lies in, given the middle position of the rows around it.
pub fn anchor(pos: i32) -> i32 {
    pos.div_euclid(ANCHOR_GRID) * ANCHOR_GRID + ANCHOR_GRID / 2
}

/// Numbers of stored bases, which are little-endian wherever they were stored.
pub(crate) fn stored_f16s(bytes: &[u8]) -> Result<Cow<'_, [f16]>> {
    if cfg!(target_endian = "little") {
        return Ok(Cow::Borrowed(f16s(bytes)?));
    }
    Ok(Cow::Owned(bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]])).collect()))
}

/// Bytes seen as f16.
pub(crate) fn f16s(bytes: &[u8]) -> Result<&[f16]> {
    if bytes.is_empty() {
        return Ok(&[]);
    }
    bytemuck::try_cast_slice(bytes).map_err(|e| Error::Data(format!("an f16 row is not aligned: {e}")))
}

/// Bytes seen as mutable f16.
pub(crate) fn f16s_mut(bytes: &mut [u8]) -> Result<&mut [f16]> {
    bytemuck::try_cast_slice_mut(bytes).map_err(|e| Error::Data(format!("an f16 row is not aligned: {e}")))
}

/// [`LayerShape`], to count with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub n_head: usize,
    /// KV heads.
    pub n_head_kv: usize,
    /// Elements of a key head.
    pub d_k: usize,
    /// Elements of a value head.
    pub d_v: usize,
}

impl Heads {
    /// Those of a shape.
    pub fn of(s: &LayerShape) -> Self {
        Heads { n_head: s.n_head as usize, n_head_kv: s.n_head_kv as usize, d_k: s.d_k as usize, d_v: s.d_v as usize }
    }
    /// Query heads per KV head.
    pub fn group(&self) -> usize {
        self.n_head / self.n_head_kv
    }
    /// Elements of one row of one KV head, K and V.
    pub fn elements(&self) -> usize {
        self.d_k + self.d_v
    }
    /// Chunks into which the rows of one KV head are split in one attention call.
    pub fn chunks(&self) -> usize {
        UNITS.div_ceil(self.n_head_kv).max(2)
    }
    /// f16 bytes of one row of one KV head, K and V.
    pub fn row_bytes(&self) -> usize {
        2 * self.elements()
    }
}
