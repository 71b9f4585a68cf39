//! Codes to levels in Rust that vectorises.
//!
//! Must not know what becomes of the levels.

#![expect(clippy::needless_range_loop, reason = "two halves of a tile are written together")]

use crate::layout::quant::{cubic, HALF_1, HALF_2, HALF_3, HALF_4, HALF_5, LEVELS_6, STEP};
use crate::layout::TILE;

/// Codes of up to `2 * H` levels, in place, become the levels: `half` has the positive ones, the others are these with their signs changed.
/// Sums of steps between levels, because comparisons of bytes are vectors on every target and table lookups are not.
#[inline(always)]
fn to_levels<const H: usize>(half: [i8; H], codes: &mut [i8; TILE]) {
    for x in codes {
        let above = *x - H as i8;
        // All ones for the lower half, where -1 is the first level from the middle, as 0 is in the upper.
        let sign = above >> 7;
        let place = above ^ sign;
        let mut level = half[0];
        for i in 1..H {
            level += if place >= i as i8 { half[i] - half[i - 1] } else { 0 };
        }
        *x = (level ^ sign) - sign;
    }
}

/// The 64 levels of a packed coefficient of 1 to 5 bits, in units of [`STEP`].
#[inline(always)]
pub fn unpack_units(width: u32, packed: &[u8]) -> [i8; TILE] {
    let (mut codes, mut rest) = ([0i8; TILE], packed);
    if width & 4 != 0 {
        let (nibbles, later) = rest.split_at(TILE / 2);
        for k in 0..TILE / 2 {
            codes[k] = (nibbles[k] & 15) as i8;
            codes[k + TILE / 2] = (nibbles[k] >> 4) as i8;
        }
        rest = later;
    }
    if width & 2 != 0 {
        let (pairs, later) = rest.split_at(TILE / 4);
        for (group, codes) in codes.chunks_exact_mut(TILE / 4).enumerate() {
            for (code, byte) in codes.iter_mut().zip(pairs) {
                *code = (byte >> (2 * group) & 3) as i8;
            }
        }
        rest = later;
    }
    if width & 1 != 0 {
        // Each byte of the plane is copied to those of its eight rows, which keep a bit each.
        const COPIES: u64 = 0x0101_0101_0101_0101;
        const BITS: u64 = 0x8040_2010_0804_0201;
        let mut set = [0; TILE];
        for (set, byte) in set.chunks_exact_mut(8).zip(rest) {
            set.copy_from_slice(&((u64::from(*byte) * COPIES) & BITS).to_le_bytes());
        }
        for (code, set) in codes.iter_mut().zip(set) {
            *code |= i8::from(set != 0) << (width & 6);
        }
    }
    match width {
        1 => to_levels(HALF_1, &mut codes),
        2 => to_levels(HALF_2, &mut codes),
        3 => to_levels(HALF_3, &mut codes),
        4 => to_levels(HALF_4, &mut codes),
        _ => to_levels(HALF_5, &mut codes),
    }
    codes
}

/// All 64 values of a packed coefficient.
#[inline(always)]
pub fn unpack(width: u32, packed: &[u8], out: &mut [f32; TILE]) {
    match width {
        6 => {
            for k in 0..32 {
                let high = |row: usize| packed[32 + row % 16] >> (row / 16 * 2) & 3;
                out[k] = LEVELS_6[(packed[k] & 15 | high(k) << 4) as usize];
                out[k + 32] = LEVELS_6[(packed[k] >> 4 | high(k + 32) << 4) as usize];
            }
        }
        8 => {
            for k in 0..64 {
                out[k] = cubic(f32::from(packed[k] as i8));
            }
        }
        _ => {
            let units = unpack_units(width, packed);
            for k in 0..64 {
                out[k] = f32::from(units[k]) * STEP[width as usize];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::quant::{coefficient_bytes, level, put, WIDTHS};

    #[test]
    fn values_are_the_levels_of_codes() {
        for width in WIDTHS.into_iter().skip(1) {
            for pass in 0..3u32 {
                let mut packed = vec![0xa5; coefficient_bytes(width)];
                let codes: [u8; TILE] = std::array::from_fn(|row| match ((row as u32 * 37 + pass * 11) % (1 << width)) as u8 {
                    128 if width == 8 => 1,
                    code => code,
                });
                codes.iter().enumerate().for_each(|(row, code)| put(width, &mut packed, row, *code));
                let mut values = [0.0; TILE];
                unpack(width, &packed, &mut values);
                for row in 0..TILE {
                    assert!((values[row] - level(width, codes[row])).abs() < 1e-6, "{width} {row}");
                }
            }
        }
    }
}
