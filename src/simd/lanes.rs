//! A vector of floats, so that a kernel is written once and compiled for each instruction-set level.
//!
//! Functions are `unsafe` because an implementation may need CPU features: call them only from a function compiled for these.
//! Pointers need no alignment. Must not know about codes or attention.

use half::f16;

/// Lanes of every accumulator that kernels leave in memory, whatever a level's own width is.
pub const LANES: usize = 16;

/// Taylor coefficients of exp, highest degree first.
pub const EXP: [f32; 7] = [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
/// Arguments of exp outside of these give no normal numbers.
pub const EXP_RANGE: [f32; 2] = [-87.0, 88.0];
/// Adding 1.5 * 2^23 rounds to a whole number, which then stands in the low bits.
pub const ROUND: f32 = 12_582_912.0;

/// Some floats in a register.
pub trait Lanes: Copy {
    /// How many.
    const N: usize;
    /// How many of these wide a block of [`super::dense::multiply`] is: as many as there are registers for.
    const COLUMNS: usize;
    /// # Safety
    /// The level's features are there.
    unsafe fn splat(x: f32) -> Self;
    /// # Safety
    /// As [`Lanes::splat`]; `N` floats are readable.
    unsafe fn load(p: *const f32) -> Self;
    /// Widens f16.
    ///
    /// # Safety
    /// As [`Lanes::splat`]; `N` halves are readable.
    unsafe fn load_half(p: *const f16) -> Self;
    /// `table[index]` for each of `N` bytes.
    ///
    /// # Safety
    /// As [`Lanes::splat`]; `N` bytes are readable.
    unsafe fn lookup(table: &[f32; 256], index: *const u8) -> Self;
    /// `table[nibble]` for the low and the high nibbles of `N` bytes.
    ///
    /// # Safety
    /// As [`Lanes::splat`]; `N` bytes are readable.
    unsafe fn nibbles(table: &[f32; 16], p: *const u8) -> [Self; 2];
    /// # Safety
    /// As [`Lanes::splat`]; `N` floats are writable.
    unsafe fn store(self, p: *mut f32);
    /// `self + a * b`.
    ///
    /// # Safety
    /// As [`Lanes::splat`].
    unsafe fn add_product(self, a: Self, b: Self) -> Self;
    /// `self * x`.
    ///
    /// # Safety
    /// As [`Lanes::splat`].
    unsafe fn times(self, x: Self) -> Self;
    /// exp by 2^n * 2^f with a degree-6 polynomial for 2^f on [-1/2, 1/2] (Taylor, relative error under 2e-7); 0 for minus infinity. Under -87 the
    /// result is not a normal number, so what is given is unimportant.
    ///
    /// # Safety
    /// As [`Lanes::splat`].
    unsafe fn exp(self) -> Self;
    /// Transpose `N` rows of `N` floats. Arguments: the first row and the distance to the next, the same of the result.
    ///
    /// # Safety
    /// As [`Lanes::splat`]; the rows are readable, and those of the result writable.
    unsafe fn transpose(from: *const f32, stride: usize, to: *mut f32, to_stride: usize);
    /// Sums over the lanes of four vectors.
    ///
    /// # Safety
    /// As [`Lanes::splat`].
    unsafe fn sums(v: [Self; 4]) -> [f32; 4];
}
