//! One KV head of a layer, to read: its exact rows and its pieces of tiles, as plans name them. Must not know who reads them, nor why.

use super::arena::{AllBases, ExactRows, HeadBasis, Pieces};
use super::input::Rows;
use super::layer::Layer;
use super::plan::{Plan, Source, TileView};
use crate::error::Result;
use crate::layout::geometry::{HeadRanges, Kind};
use crate::layout::TileForm;
use crate::rope::Turn;

/// See the module.
pub(super) struct Head<'a> {
    /// Number among the layer's KV heads.
    pub index: usize,
    layer: &'a Layer,
    arena: &'a [u8],
    ranges: HeadRanges,
    rows: ExactRows<'a>,
    pieces: Pieces,
}

impl<'a> Head<'a> {
    pub(super) fn new(layer: &'a Layer, index: usize, arena: &'a [u8], plan: &Plan) -> Result<Self> {
        let ranges = layer.geometry.head(layer.index, index);
        let rows = ExactRows::new(layer.shape(), &arena[ranges.exact.clone()])?;
        let pieces = Pieces::new(&layer.geometry, layer.index, index, &arena, &ranges, (plan.fitted, plan.former))?;
        Ok(Head { index, layer, arena, ranges, rows, pieces })
    }

    /// Read the bases that a plan's tiles are coded in.
    pub(super) fn read_bases<B: HeadBasis>(&self, plan: &Plan, bases: &mut AllBases<B>) -> Result<()> {
        let (g, r) = (&self.layer.geometry, &self.ranges);
        let there = |numbers: std::ops::Range<usize>| plan.tiles().any(|t| numbers.contains(&t.tile));
        let part = |range: std::ops::Range<usize>, there: bool| if there { &self.arena[range] } else { &[] };
        let fitted = part(r.bases.clone(), there(0..g.tiles));
        let plain = part(r.plain.clone(), there(g.tiles..g.former(0)));
        bases.read(self.layer.shape(), [fitted, part(r.former_bases(), plan.former)], (plain, g.waiting_bits), false)
    }

    /// Key and value of a row as f32, the key rotated by `turn` to where it is now; rows of the step's tokens are in `own`, keys and values. `angles` is memory
    /// to work in.
    pub(super) fn exact_row(&self, (source, turn): (Source, i32), own: (&Rows, &Rows), angles: &mut Turn, key: &mut [f32], value: &mut [f32]) {
        self.layer.fetch(self.index, source, &self.rows, Some(own), key, value);
        if turn != 0 {
            self.layer.rope.turn(i64::from(turn), angles);
            self.layer.rope.rotate(angles, key);
        }
    }

    /// A row in a slot, as it is stored.
    pub(super) fn stored_row(&self, slot: usize) -> &'a [half::f16] {
        self.rows.row(slot)
    }

    /// How a tile is coded, and where the head's piece of it is.
    pub(super) fn piece(&self, t: &TileView) -> (Kind, std::ops::Range<usize>) {
        self.pieces.place(t.tile)
    }

    /// How tiles of a kind are coded.
    pub(super) fn form(&self, kind: Kind) -> &TileForm {
        self.pieces.form(kind)
    }
}
