//! A matrix that queries are projected with, in the form in which a level multiplies fastest, and the way of levels that do it in f32.
//!
//! Must not know what a projection is for.

use super::dense::{self, MatMut, MatRef};
use super::lanes::{Lanes, LANES};
use super::memory::Lines;

/// A square matrix whose rows others are multiplied with: the result has a column for each.
#[derive(Debug, Default)]
pub struct Projection {
    /// Elements of a row.
    pub(super) d: usize,
    /// Columns of the result with those that fill its last vector.
    pub(super) stride: usize,
    /// The matrix, transposed: of floats, or of pairs of words.
    pub(super) columns: Lines,
    /// Whether it consists of words: one level's form is nothing to another.
    pub(super) is_words: bool,
    /// What a unit of each column stands for, if so.
    pub(super) units: Lines,
    pub(super) work: Lines,
}

impl Projection {
    /// Floats from a row of a result to the next.
    pub fn stride(&self) -> usize {
        self.stride
    }
    /// Make it one of `d` rows.
    pub(super) fn set(&mut self, d: usize, is_words: bool) {
        (self.d, self.stride, self.is_words) = (d, d.next_multiple_of(LANES), is_words);
    }
}

/// See [`super::Kernels::hold`].
///
/// # Safety
/// The features of `V` are there.
#[inline(always)]
pub unsafe fn hold<V: Lanes>(matrix: &[f32], d: usize, to: &mut Projection) {
    to.set(d, false);
    to.columns.resize(d * to.stride * 4);
    // SAFETY: features are the caller's.
    unsafe { dense::transpose::<V>(MatRef::new(matrix, d), MatMut::new(to.columns.floats_mut(), to.stride), d, d) }
}

/// See [`super::Kernels::project`].
///
/// # Safety
/// The features of `V` are there.
#[inline(always)]
pub unsafe fn project<V: Lanes>(by: &Projection, rows: &[f32], n: usize, columns: usize, out: &mut [f32], _: &mut Lines) {
    assert!(!by.is_words);
    out[..n * by.stride].fill(0.0);
    let (matrix, out) = (MatRef::new(by.columns.floats(), by.stride), MatMut::new(out, by.stride));
    // SAFETY: features are the caller's.
    unsafe { dense::multiply::<V>(MatRef::new(rows, by.d), matrix, out, n, by.d, columns) }
}
