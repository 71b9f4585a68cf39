//! Where everything lies in a stream's arena. The layout is described in [`super`]. Must not know how sizes came about.

use super::{align, query_bytes, waiting_form, Geometry, RECORD_BYTES};
use crate::layout::basis;
use crate::layout::{Heads, TileForm, BANDS, QUERY_SLOTS, RECENT_QUERIES};
use std::ops::Range;

/// Which bytes of an arena belong to one KV head, but for its pieces of tiles.
#[derive(Debug, Clone)]
pub struct HeadRanges {
    /// See [`RECORD_BYTES`].
    pub record: Range<usize>,
    /// Bases of K and V, stored.
    pub bases: Range<usize>,
    /// Of waiting rows: mean and scale of K, scale of V, f32.
    pub plain: Range<usize>,
    /// Recent queries, see [`crate::cache::arena::put_query`].
    pub recent: Range<usize>,
    /// Exact rows, f16.
    pub exact: Range<usize>,
    /// Queries for a fit, then the squared norms of the residual stream at their tokens, f32. At the end of the pool.
    pub queries: Range<usize>,
    /// Record of the fit before the last one, and what of its bases decodes, as long as there are tiles in them. At the end of the pool.
    pub former: Range<usize>,
}

impl HeadRanges {
    /// The record that belongs to the former bases.
    pub fn former_record(&self) -> Range<usize> {
        self.former.start..self.former.start + self.record.len()
    }
    /// What decodes of the former bases of K and V, stored.
    pub fn former_bases(&self) -> Range<usize> {
        self.former_record().end..self.former.end
    }
}

/// Bytes of a record and of what bases need to decode.
fn former_bytes(h: &Heads) -> usize {
    RECORD_BYTES + basis::decoder_bytes_of(h.d_k) + basis::decoder_bytes_of(h.d_v)
}

impl Geometry {
    /// Lay out heads and pool.
    pub(super) fn place(&mut self) {
        let mut at = 0;
        self.offsets.clear();
        for h in &self.layers {
            self.offsets.push(at);
            at += h.n_head_kv * self.parts(h).into_iter().sum::<usize>();
        }
        let tiles: usize = self.band_tiles.iter().zip(self.block_bytes).map(|(n, bytes)| n * bytes).sum();
        self.pool = at..at + align(tiles, 64);
        self.arena_bytes = align(self.pool.end, 256);
    }

    /// Bytes of the parts of a head, in the order of [`HeadRanges`].
    fn parts(&self, h: &Heads) -> [usize; 5] {
        let exact = align(self.exact * h.row_bytes(), 64);
        if self.tiles == 0 {
            return [RECORD_BYTES, 0, 0, 0, exact];
        }
        let bases = basis::bytes_of(h.d_k) + basis::bytes_of(h.d_v);
        [RECORD_BYTES, bases, align(4 * (2 * h.d_k + h.d_v), 64), query_bytes(h, RECENT_QUERIES), exact]
    }

    /// Where a head's bytes are.
    pub fn head(&self, layer: usize, head: usize) -> HeadRanges {
        let h = &self.layers[layer];
        let parts = self.parts(h);
        let mut at = self.offsets[layer] + head * parts.iter().sum::<usize>();
        let mut next = |bytes: usize| {
            at += bytes;
            at - bytes..at
        };
        let [record, bases, plain, recent, exact] = parts.map(&mut next);
        let before: usize = self.layers[..layer].iter().map(|h| h.n_head_kv * self.head_query_bytes(h)).sum();
        let from = self.queries_offset() + before + head * self.head_query_bytes(h);
        let before: usize = self.layers[..layer].iter().map(|h| h.n_head_kv * former_bytes(h)).sum();
        let former = self.former_offset() + before + head * former_bytes(h);
        HeadRanges { record, bases, plain, recent, exact, queries: from..from + self.head_query_bytes(h), former: former..former + former_bytes(h) }
    }

    /// Where former bases begin.
    fn former_offset(&self) -> usize {
        let all: usize = self.layers.iter().map(|h| h.n_head_kv * former_bytes(h)).sum();
        self.pool.end.saturating_sub(all) / 64 * 64
    }

    /// How many of the first tiles of waiting rows lie where former bases are to go: rows that wait for a fit that is not the first have others.
    pub fn waiting_in_former(&self) -> usize {
        self.queries_offset().saturating_sub(self.former_offset()).div_ceil(self.waiting_block().max(1))
    }

    /// Where queries for a fit begin.
    fn queries_offset(&self) -> usize {
        // Norms in f32 are read from there.
        (self.pool.end - self.queries_bytes()) / 64 * 64
    }

    /// Where a band's tiles begin.
    pub fn band_offset(&self, band: usize) -> usize {
        self.pool.start + (0..band).map(|b| self.band_tiles[b] * self.block_bytes[b]).sum::<usize>()
    }

    /// Where a tile of waiting rows begins: the first of them ends where the queries begin, and each begins where the one before it ends. What
    /// lies before all that are in use may be filled meanwhile.
    pub fn waiting_offset(&self, tile: usize) -> usize {
        self.queries_offset() - (tile + 1) * self.waiting_block()
    }

    /// Where a head's piece begins in each tile of waiting rows, and how those are coded.
    pub fn waiting_piece(&self, layer: usize, head: usize) -> (usize, TileForm) {
        let h = &self.layers[layer];
        let before: usize = self.layers[..layer].iter().map(|h| h.n_head_kv * self.waiting_piece_bytes(h)).sum();
        (before + head * self.waiting_piece_bytes(h), waiting_form(h, self.waiting_bits))
    }

    fn waiting_piece_bytes(&self, h: &Heads) -> usize {
        waiting_form(h, self.waiting_bits).bytes()
    }

    /// Tiles from the first on that may be filled while the first `waiting` tiles of waiting rows are in use.
    pub fn tiles_beside(&self, waiting: usize) -> usize {
        let end = self.queries_offset().saturating_sub(waiting * self.waiting_block());
        (0..BANDS).map(|b| end.saturating_sub(self.band_offset(b)).checked_div(self.block_bytes[b]).unwrap_or(0).min(self.band_tiles[b])).sum()
    }

    /// The same, while the first `waited` tiles of waiting rows are in use, and former bases perhaps.
    pub fn tiles_beside_all(&self, waited: usize, former: bool) -> usize {
        self.tiles_beside(if former { waited.max(self.waiting_in_former()) } else { waited })
    }

    pub(super) fn queries_bytes(&self) -> usize {
        self.layers.iter().map(|h| h.n_head_kv * self.head_query_bytes(h)).sum()
    }

    fn head_query_bytes(&self, h: &Heads) -> usize {
        if self.keeps_queries() {
            query_bytes(h, QUERY_SLOTS) + QUERY_SLOTS * 4
        } else {
            0
        }
    }

    /// Bytes of a tile of waiting rows, all heads.
    pub fn waiting_block(&self) -> usize {
        self.layers.iter().map(|h| h.n_head_kv * self.waiting_piece_bytes(h)).sum()
    }
}
