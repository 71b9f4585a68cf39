//! Attention of a few queries over some rows of one KV head: scores, online softmax, values.
//!
//! Rows come in two kinds: exact ones, up to 64 at a time, and tiles of codes, up to [`BATCH`] at a time, whose keys are never rebuilt: a query is
//! rotated into the frame of the tiles and projected into the basis once for all neighbouring tiles with the same frame, then a row's score is a sum
//! over its codes; values are summed as coefficients and leave the basis once, in [`Accumulator::leave`]. Fine rows are looked at once more, with
//! what coding left of them. Softmax state is f32 with the running maximum of Milakov and Gimelshein (2018); partial results of different rows merge
//! exactly. Semantics are those of `ggml_flash_attn_ext`. Must not know about cells, arenas or plans.

mod decode;
pub mod prefill;
mod scores;
#[cfg(test)]
mod tests;
mod values;

pub use crate::simd::BATCH;
pub use decode::Accumulator;

use crate::codec::Basis;
use crate::config::Scoring;
use crate::error::Result;
use crate::layout::TILE;
use crate::rope::Rope;
use crate::simd::{self, Kernels, Lines, MatMut, MatRef, Projection};
use std::cell::OnceCell;

/// Floats of one query in a partial result: maximum, sum, then the unnormalised output.
pub const fn partial_floats(d_v: usize) -> usize {
    d_v + 2
}

/// What a token sees of some rows: `-inf` hides, other values are added.
#[derive(Debug, Clone, Copy)]
pub enum Visible<'a> {
    /// Everything, with nothing added.
    All,
    /// `mask[token * TILE + row]`.
    Some(&'a [f32]),
}

/// How stored keys rotate to where they are now.
#[derive(Debug, Clone, Copy)]
pub enum Turns<'a> {
    /// All rows alike.
    One(i32),
    /// Each row by its own.
    Each(&'a [i32; TILE]),
}

/// One coded tile.
pub struct Tile<'a> {
    /// Gains and codes.
    pub bytes: &'a [u8],
    /// Rotation of its keys.
    pub turns: Turns<'a>,
    /// What is seen of it.
    pub visible: Visible<'a>,
}

impl Tile<'_> {
    fn one_turn(&self) -> Option<i32> {
        match self.turns {
            Turns::One(turn) => Some(turn),
            Turns::Each(_) => None,
        }
    }
}

/// What stays the same for all blocks of a call.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// Kernels of the level.
    pub kernels: &'static Kernels,
    /// How products become scores.
    pub scoring: Scoring,
    /// Rotation of the layer.
    pub rope: &'a Rope,
}

/// The bases of one KV head, in the forms that attention needs.
#[derive(Debug, Default)]
pub struct HeadBases {
    /// Keys.
    pub k: Basis,
    /// Values.
    pub v: Basis,
    /// The keys' decode matrix: it takes a query to its coefficients.
    projection: Projection,
    /// The same transposed, where rows are rebuilt.
    transposed: OnceCell<Lines>,
    /// What coefficients of residuals, of keys and of values, are to be multiplied by.
    finer: [Vec<f32>; 2],
}

impl HeadBases {
    /// Read what is `stored` of a head's bases of K and V.
    pub fn load(&mut self, (k, v): (&[u8], &[u8]), d_k: usize, d_v: usize) -> Result<()> {
        self.k.load(k, d_k, false)?;
        self.v.load(v, d_v, false)?;
        self.prepare(simd::kernels());
        Ok(())
    }

    /// Bases that are not stored, for these kernels.
    pub fn of(kernels: &Kernels, k: Basis, v: Basis) -> Self {
        let mut bases = HeadBases { k, v, ..HeadBases::default() };
        bases.prepare(kernels);
        bases
    }

    /// The keys' decode matrix, transposed.
    fn transposed(&self, kernels: &Kernels) -> MatRef<'_> {
        let d = self.k.d;
        let columns = self.transposed.get_or_init(|| {
            let mut columns = Lines::default();
            columns.resize(d * d * 4);
            (kernels.transpose)(MatRef::new(&self.k.decode, d), MatMut::new(columns.floats_mut(), d), d, d);
            columns
        });
        MatRef::new(columns.floats(), d)
    }

    fn prepare(&mut self, kernels: &Kernels) {
        self.transposed.take();
        (kernels.hold)(&self.k.decode, self.k.d, &mut self.projection);
        for (finer, basis) in self.finer.iter_mut().zip([&self.k, &self.v]) {
            finer.clear();
            finer.extend(basis.weight.iter().map(|w| w.sqrt().recip()));
        }
    }
}

/// The partial result of a query that saw no row.
pub fn no_rows(partial: &mut [f32]) {
    partial.fill(0.0);
    partial[0] = f32::NEG_INFINITY;
}

/// Merge partial results of one query, and an attention sink's logit, into its output. No visible row gives zeros.
pub fn merge<'a>(partials: impl Iterator<Item = &'a [f32]> + Clone, sink: Option<f32>, out: &mut [f32]) {
    let largest = partials.clone().map(|p| p[0]).fold(sink.unwrap_or(f32::NEG_INFINITY), f32::max);
    out.fill(0.0);
    if largest == f32::NEG_INFINITY {
        return;
    }
    let mut sum = sink.map_or(0.0, |s| (s - largest).exp());
    for p in partials.filter(|p| p[0] != f32::NEG_INFINITY) {
        let w = (p[0] - largest).exp();
        sum += w * p[1];
        out.iter_mut().zip(&p[2..]).for_each(|(o, x)| *o += w * x);
    }
    if sum > 0.0 {
        out.iter_mut().for_each(|o| *o /= sum);
    }
}
