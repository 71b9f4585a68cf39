//! What kernels for tiles of codes are given, and keep between calls: projected queries, and memory to work in.
//!
//! Must not know which instruction set computes with it.

use super::lanes::LANES;
use super::memory::{Ahead, Lines};
use crate::layout::{Widths, PARTS};

/// Most tiles of one [`super::Kernels::tile_values`] call.
pub const BATCH: usize = 16;

/// Queries projected to the coefficients of a part of the tiles of one band, for one or more frames.
#[derive(Debug, Default)]
pub struct Projected {
    /// Widths of the part.
    pub widths: Widths,
    /// Projected queries, [`Products::n`] for each frame, a coefficient per float, `stride` apart.
    pub z: Lines,
    /// See `z`. There is room for 64 floats behind the last query.
    pub stride: usize,
    /// Step of each coefficient's levels, and of which widths.
    pub(super) steps: (Widths, Lines),
    pub(super) digits: Lines,
    pub(super) offsets: Vec<i32>,
    pub(super) scales: Vec<f32>,
}

/// Projected queries made ready for the tiles of one band, and memory to work in.
#[derive(Debug, Default)]
pub struct Products {
    /// By part of the coefficients: each has a gain per row of its own.
    pub parts: [Projected; PARTS],
    /// Queries.
    pub n: usize,
    /// Frames that they are projected for.
    pub frames: usize,
    /// The frame of the next tile.
    pub frame: usize,
    /// Per frame and query: its product with the mean key.
    pub means: Vec<f32>,
    /// Factor on all scores.
    pub scale: f32,
    /// Per query: the largest score so far, in lanes.
    pub largest: Vec<[f32; LANES]>,
    /// What will be read after these tiles.
    pub ahead: Ahead,
    /// Sums of wide coefficients, 64 for each query.
    pub(super) sums: Lines,
    pub(super) unpacked: Lines,
    pub(super) values: Lines,
}

/// What one call of [`super::Kernels::tile_scores`] does: scores are made part by part.
#[derive(Debug, Clone, Copy)]
pub struct Pass {
    /// The part whose sums are made.
    pub part: usize,
    /// Add to what was left, instead of beginning anew.
    pub add: bool,
    /// Make scores of the sums: nothing will be added any more.
    pub finish: bool,
}
