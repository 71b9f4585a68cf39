//! The bytes of a stored basis of one head, K or V.
//!
//! In this order: how many coefficients each band has of each width, u16, and whether there is a mean; the mean; per coefficient a decode scale, encode
//! scale and weight, f32; both matrices in f16 in this order, rows divided by their scale. What decodes comes first, so that it can be kept alone. Must
//! not know what a basis is for.

use super::{Widths, BANDS};

/// Bytes in front of a stored basis: its widths, and whether it has a mean.
pub const HEADER_BYTES: usize = 48;
/// Where the header says that.
pub const HAS_MEAN: usize = 2 * BANDS * Widths::BITS.len();
const _: () = assert!(HAS_MEAN < HEADER_BYTES);

/// Bytes of the stored basis of heads of `d` elements.
pub const fn bytes_of(d: usize) -> usize {
    (HEADER_BYTES + 16 * d + 4 * d * d).next_multiple_of(64)
}

/// How many of these, from the first on, are enough to decode.
pub const fn decoder_bytes_of(d: usize) -> usize {
    (HEADER_BYTES + 16 * d + 2 * d * d).next_multiple_of(64)
}

/// Widths of a stored basis.
pub fn widths_of(bytes: &[u8]) -> [Widths; BANDS] {
    let count = |i: usize| usize::from(u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]));
    std::array::from_fn(|band| Widths { counts: std::array::from_fn(|i| count(band * Widths::BITS.len() + i)) })
}
