//! Views of an arena: which bytes are what. The layout is described in [`super::geometry`].
//!
//! An arena of zeros is valid and empty, so that a caller may allocate it as it likes. It holds no pointers; a copy of its
//! bytes is a copy of its contents. Must not know about threads: it hands out slices.

use super::geometry::{Geometry, HeadRanges};
use crate::codec::{f16s, f16s_mut, Basis, Fine, TileForm};
use crate::config::{Heads, BANDS, QUERY_SLOTS};
use crate::error::{Error, Result};
use half::f16;
use std::ops::Range;

/// Stands in a head's record when it has bases: of this layout, and no other.
const MAGIC: u32 = 0x534b_5604;
/// Words of a record: number of the last plan, the magic number, where the head's pieces of tiles begin in each band's blocks, [`promise`].
const OFFSETS: usize = 2;
const PROMISE: usize = OFFSETS + BANDS;

/// The bytes of an arena that one head may look at and change: its own ranges and its own pieces of tiles.
pub trait Bytes {
    /// Some of them.
    fn get(&self, range: Range<usize>) -> &[u8];
    /// Some of them, to change.
    fn get_mut(&mut self, range: Range<usize>) -> &mut [u8];
}

impl Bytes for &mut [u8] {
    fn get(&self, range: Range<usize>) -> &[u8] {
        &self[range]
    }
    fn get_mut(&mut self, range: Range<usize>) -> &mut [u8] {
        &mut self[range]
    }
}

fn word(bytes: &[u8], i: usize) -> u32 {
    u32::from_le_bytes(bytes[4 * i..4 * i + 4].try_into().expect("invariant: four bytes"))
}

fn put_word(bytes: &mut [u8], i: usize, x: u32) {
    bytes[4 * i..4 * i + 4].copy_from_slice(&x.to_le_bytes());
}

/// Number of the last plan a head has carried out.
pub fn epoch(record: &[u8]) -> i32 {
    word(record, 0) as i32
}

/// Set [`epoch`].
pub fn set_epoch(record: &mut [u8], epoch: i32) {
    put_word(record, 0, epoch as u32);
}

/// Note in a record that there are bases, and where the head's pieces begin in blocks.
pub fn set_pieces(record: &mut [u8], offsets: [usize; BANDS]) {
    put_word(record, 1, MAGIC);
    offsets.iter().enumerate().for_each(|(band, at)| put_word(record, OFFSETS + band, *at as u32));
}

/// The relative error with which the newest values would have been coded when the bases were fitted; 0 when there were none.
pub fn promise(record: &[u8]) -> f32 {
    f32::from_bits(word(record, PROMISE))
}

/// Set [`promise`].
pub fn set_promise(record: &mut [u8], error: f32) {
    put_word(record, PROMISE, error.to_bits());
}

/// Where a head's pieces of the tiles lie, and how those of each band are coded.
#[derive(Debug, Clone)]
pub struct Pieces {
    /// First byte of the first piece, bytes to the next, and form; by band.
    bands: [(usize, usize, TileForm); BANDS],
    /// The same of waiting rows, whose pieces lie the other way round.
    waiting: (usize, usize, TileForm),
    /// Tiles of the bands end here, numbered.
    ends: [usize; BANDS],
}

impl Pieces {
    /// Those of a head. `bases` is empty when there are none yet: then only rows that wait are coded.
    pub fn new(g: &Geometry, layer: usize, head: usize, record: &[u8], bases: &[u8]) -> Result<Self> {
        let (at, form) = g.waiting_piece(layer, head);
        let waiting = (if g.waiting > 0 { g.waiting_offset(0) + at } else { 0 }, g.waiting_block(), form);
        let mut bands = std::array::from_fn(|_| waiting.clone());
        if !bases.is_empty() {
            if word(record, 1) != MAGIC {
                return Err(Error::Data("the arena has no bases, or is of another version".into()));
            }
            let h = &g.layers[layer];
            let (k, v) = (Basis::widths_of(bases), Basis::widths_of(&bases[Basis::bytes_of(h.d_k)..]));
            for band in 0..BANDS {
                if k[band].rank() > h.d_k || v[band].rank() > h.d_v {
                    return Err(Error::Data(format!("head {head} has more coefficients than elements")));
                }
                let (form, offset) = (TileForm::new(k[band], v[band], h.d_k, h.d_v, Fine::Residuals), word(record, OFFSETS + band) as usize);
                if offset + form.bytes() > g.block_bytes[band] {
                    return Err(Error::Data(format!("the pieces of head {head} are longer than a tile")));
                }
                bands[band] = (g.band_offset(band) + offset, g.block_bytes[band], form);
            }
        }
        Ok(Pieces { bands, waiting, ends: std::array::from_fn(|band| g.band(band).end) })
    }

    /// Band of a tile, and the bytes of its piece.
    pub fn place(&self, tile: usize) -> (usize, Range<usize>) {
        let Some(band) = self.ends.iter().position(|end| tile < *end) else {
            let (first, stride, form) = &self.waiting;
            let at = first - (tile - self.ends[BANDS - 1]) * stride;
            return (BANDS, at..at + form.bytes());
        };
        let first = if band == 0 { 0 } else { self.ends[band - 1] };
        let (at, stride, form) = &self.bands[band];
        let at = at + (tile - first) * stride;
        (band, at..at + form.bytes())
    }

    /// How the tiles of a band are coded.
    pub fn form(&self, band: usize) -> &TileForm {
        self.bands.get(band).map_or(&self.waiting.2, |b| &b.2)
    }
}

/// Exact rows of one head.
#[derive(Clone, Copy)]
pub struct ExactRows<'a> {
    rows: &'a [f16],
    row: usize,
}

impl<'a> ExactRows<'a> {
    /// `exact` is a head's range.
    pub fn new(h: &Heads, exact: &'a [u8]) -> Result<Self> {
        Ok(ExactRows { rows: f16s(exact)?, row: h.elements() })
    }
    /// Key and value of a slot, one after the other.
    pub fn row(&self, slot: usize) -> &'a [f16] {
        &self.rows[slot * self.row..(slot + 1) * self.row]
    }
}

/// Mutable [`ExactRows::row`].
pub fn exact_row_mut<'a>(h: &Heads, exact: &'a mut [u8], slot: usize) -> Result<&'a mut [f16]> {
    f16s_mut(&mut exact[slot * h.row_bytes()..(slot + 1) * h.row_bytes()])
}

/// Write a query of the group `group` to slot `slot` of `slots`: as whole numbers in proportion to its largest element. `kept` has the queries of a
/// KV head, all scales first.
pub fn put_query(kept: &mut [u8], (slots, group): (usize, usize), slot: usize, query: &[f32]) {
    let (scales, codes) = kept.split_at_mut(4 * slots * group);
    let (d, at) = (query.len() / group, slot * group);
    for ((x, scale), codes) in query.chunks_exact(d).zip(scales[4 * at..].chunks_exact_mut(4)).zip(codes[at * d..].chunks_exact_mut(d)) {
        let largest = x.iter().fold(f32::MIN_POSITIVE, |a, x| a.max(x.abs())) / 127.0;
        scale.copy_from_slice(&largest.to_le_bytes());
        codes.iter_mut().zip(x).for_each(|(code, x)| *code = (x / largest).round() as i8 as u8);
    }
}

/// What [`put_query`] wrote.
pub fn query(kept: &[u8], (slots, group): (usize, usize), slot: usize, out: &mut [f32]) {
    let (scales, codes) = kept.split_at(4 * slots * group);
    let (d, at) = (out.len() / group, slot * group);
    for ((out, scale), codes) in out.chunks_exact_mut(d).zip(scales[4 * at..].chunks_exact(4)).zip(codes[at * d..].chunks_exact(d)) {
        let scale = f32::from_le_bytes(scale.try_into().expect("invariant: four bytes"));
        out.iter_mut().zip(codes).for_each(|(out, code)| *out = scale * f32::from(*code as i8));
    }
}

/// The queries for a fit, and the squared norms of the residual stream behind them; `kept` is a head's range of queries.
pub fn queries_mut(kept: &mut [u8]) -> Result<(&mut [u8], &mut [f32])> {
    let (queries, norms) = kept.split_at_mut(kept.len() - 4 * QUERY_SLOTS);
    let norms = bytemuck::try_cast_slice_mut(norms).map_err(|e| Error::Data(format!("norms are not aligned: {e}")))?;
    Ok((queries, norms))
}

/// [`queries_mut`], to read.
pub fn queries(kept: &[u8]) -> Result<(&[u8], &[f32])> {
    let (queries, norms) = kept.split_at(kept.len() - 4 * QUERY_SLOTS);
    let norms = bytemuck::try_cast_slice(norms).map_err(|e| Error::Data(format!("norms are not aligned: {e}")))?;
    Ok((queries, norms))
}

/// What waiting rows are coded relative to, in so many bits: mean and scale of keys, scale of values. Zeros before the first tile of them.
pub fn plain(h: &Heads, bytes: &[u8], bits: u32) -> (Basis, Basis) {
    let float = |b: &[u8]| f32::from_le_bytes(b.try_into().expect("invariant: four bytes"));
    let all: Vec<f32> = bytes.chunks_exact(4).map(float).collect();
    let (mean, scales) = all.split_at(h.d_k);
    (Basis::diagonal(mean, &scales[..h.d_k], bits), Basis::diagonal(&[], &scales[h.d_k..h.d_k + h.d_v], bits))
}

/// Set [`plain`].
pub fn set_plain(bytes: &mut [u8], mean: &[f32], scale_k: &[f32], scale_v: &[f32]) {
    let all = mean.iter().chain(scale_k).chain(scale_v);
    bytes.chunks_exact_mut(4).zip(all).for_each(|(to, x)| to.copy_from_slice(&x.to_le_bytes()));
}

/// The ranges of all heads of a layer.
pub fn heads(g: &Geometry, layer: usize) -> Vec<HeadRanges> {
    (0..g.layers[layer].n_head_kv).map(|head| g.head(layer, head)).collect()
}
