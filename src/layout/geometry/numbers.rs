//! Numbers of tiles, bands and heads, as plans and tables use them. Must not know about bytes.

use super::{Geometry, Kind, FORMER};
use crate::layout::BANDS;
use std::ops::Range;

impl Geometry {
    /// KV heads of all layers, which are counted one layer after another.
    pub fn n_heads(&self) -> usize {
        self.layers.iter().map(|l| l.n_head_kv).sum()
    }

    /// The first KV head of a layer, counted over all layers.
    pub fn first_head(&self, layer: usize) -> usize {
        self.layers[..layer].iter().map(|l| l.n_head_kv).sum()
    }

    /// Whether queries are kept for a fit.
    pub fn keeps_queries(&self) -> bool {
        self.tiles > 0 && !self.config.calibrated
    }

    /// Tiles of a band; [`BANDS`] stands for those of waiting rows.
    pub fn band(&self, band: usize) -> Range<usize> {
        let first = self.band_tiles[..band].iter().sum();
        first..first + self.band_tiles.get(band).unwrap_or(&self.waiting)
    }

    /// Band of a tile.
    pub fn band_of(&self, tile: usize) -> usize {
        (0..BANDS).find(|b| tile < self.band(*b).end).unwrap_or(BANDS)
    }

    /// How a tile is coded that has this number in a plan.
    pub fn kind_of(&self, number: usize) -> Kind {
        number.checked_sub(self.former(0)).map_or_else(|| self.band_of(number), |tile| FORMER + self.band_of(tile))
    }

    /// The number under which a plan speaks of a tile that is coded in the former bases.
    pub fn former(&self, tile: usize) -> usize {
        self.tiles + self.waiting + tile
    }

    /// The tile of a number, be it coded in the former bases or not.
    pub fn tile_of(&self, number: usize) -> usize {
        number.checked_sub(self.tiles + self.waiting).unwrap_or(number)
    }
}
