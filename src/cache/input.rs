//! What a step brings to a layer: rows of its tokens. Must not know what becomes of them.

use crate::error::{Error, Result};
use half::f16;

/// Rows of queries, keys or values of one ubatch, f32, with strides in floats.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    data: &'a [f32],
    n: usize,
    row_stride: usize,
    head_stride: usize,
}

impl<'a> Rows<'a> {
    /// `n` rows of `heads` heads of `d` elements. Checks that all of it lies in `data`.
    pub fn new(data: &'a [f32], n: usize, row_stride: usize, head_stride: usize, heads: usize, d: usize) -> Result<Self> {
        let need = if n == 0 { 0 } else { (n - 1) * row_stride + (heads - 1) * head_stride + d };
        if data.len() < need {
            return Err(Error::Buffer { need, have: data.len() });
        }
        Ok(Rows { data, n, row_stride, head_stride })
    }
    /// No rows.
    pub fn empty() -> Self {
        Rows { data: &[], n: 0, row_stride: 0, head_stride: 0 }
    }
    /// Number of rows.
    pub fn len(&self) -> usize {
        self.n
    }
    /// Some of the rows.
    pub fn part(&self, rows: std::ops::Range<usize>) -> Self {
        Rows { data: &self.data[(rows.start * self.row_stride).min(self.data.len())..], n: rows.len(), ..*self }
    }
    /// True without rows.
    pub fn is_empty(&self) -> bool {
        self.n == 0
    }
    /// True when one head of a row is finite, in f16 as well.
    pub fn is_finite(&self, row: usize, head: usize, d: usize) -> bool {
        const LARGEST: f32 = f16::MAX.to_f32_const();
        // No early end: a loop that may stop is not made of vectors.
        self.head(row, head, d).iter().fold(true, |finite, x| finite & (x.abs() <= LARGEST))
    }
    pub(super) fn head(&self, row: usize, head: usize, d: usize) -> &'a [f32] {
        &self.data[row * self.row_stride + head * self.head_stride..][..d]
    }
}

/// What a step brings to the layer that stores it.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    /// Queries, roped: they are part of a fit's sample, and tell which rows draw attention.
    pub q: Rows<'a>,
    /// Keys, roped.
    pub k: Rows<'a>,
    /// Values.
    pub v: Rows<'a>,
    /// The residual stream that the attention's output is added to, a row of so many floats for each token. Without it all tokens and layers
    /// count alike.
    pub residual: Option<(Rows<'a>, usize)>,
    /// Rows of the output projection, `n_head * d_v` each; empty for identity. Looked at where heads are.
    pub projection: &'a [f32],
}

impl<'a> Step<'a> {
    /// Rows alone.
    pub fn new(q: Rows<'a>, k: Rows<'a>, v: Rows<'a>) -> Self {
        Step { q, k, v, residual: None, projection: &[] }
    }

    /// Squared norm of the residual stream at a token.
    pub(super) fn residual_power(&self, token: usize) -> f32 {
        self.residual.map_or(0.0, |(rows, n)| rows.head(token, 0, n).iter().map(|x| x * x).sum())
    }
}
