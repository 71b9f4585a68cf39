//! Quantising a tile: the 64 rows of a coefficient together and without branches, in Rust that vectorises at every level.
//!
//! Levels are symmetric, so a magnitude is compared with the boundaries between the positive ones. Chooses the codes that
//! [`quant::code`] would, up to rounding. Must not know about bases.

use super::quant::{self, cubic, A_8, B_8, LEVELS_1, LEVELS_2, LEVELS_3, LEVELS_4, LEVELS_5, LEVELS_6};
use super::Widths;
use crate::config::TILE;

/// Boundaries between the `B + 1` positive levels.
const fn boundaries<const N: usize, const B: usize>(levels: &[f32; N]) -> [f32; B] {
    let mut out = [0.0; B];
    let mut i = 0;
    while i < B {
        out[i] = 0.5 * (levels[N / 2 + i] + levels[N / 2 + i + 1]);
        i += 1;
    }
    out
}

static BOUNDS_2: [f32; 1] = boundaries(&LEVELS_2);
static BOUNDS_3: [f32; 3] = boundaries(&LEVELS_3);
static BOUNDS_4: [f32; 7] = boundaries(&LEVELS_4);
static BOUNDS_5: [f32; 15] = boundaries(&LEVELS_5);
static BOUNDS_6: [f32; 31] = boundaries(&LEVELS_6);

/// Positive levels of 1 to 6 bits and the boundaries between them, ascending.
#[inline(always)]
fn positive(width: u32) -> (&'static [f32], &'static [f32]) {
    match width {
        1 => (&LEVELS_1[1..], &[]),
        2 => (&LEVELS_2[2..], &BOUNDS_2),
        3 => (&LEVELS_3[4..], &BOUNDS_3),
        4 => (&LEVELS_4[8..], &BOUNDS_4),
        5 => (&LEVELS_5[16..], &BOUNDS_5),
        _ => (&LEVELS_6[32..], &BOUNDS_6),
    }
}

/// The 8-bit code nearest to a magnitude, by halving the interval.
#[inline(always)]
fn nearest_8(magnitude: f32) -> f32 {
    let mut code = 0.0f32;
    for step in [64.0, 32.0, 16.0, 8.0, 4.0, 2.0, 1.0] {
        // Half-way between the cubics of two whole numbers around `h`.
        let h = code + (step - 0.5);
        let bound = h * ((A_8 + 0.75 * B_8) + B_8 * (h * h));
        code = if magnitude >= bound { code + step } else { code };
    }
    code
}

/// The level nearest to `x`.
#[inline(always)]
fn level<const WIDTH: u32>(x: f32) -> f32 {
    let magnitude = x.abs();
    let level = if WIDTH == 8 {
        cubic(nearest_8(magnitude))
    } else {
        let (levels, bounds) = positive(WIDTH);
        let mut level = levels[0];
        for (bound, next) in bounds.iter().zip(&levels[1..]) {
            level = if magnitude >= *bound { *next } else { level };
        }
        level
    };
    if x >= 0.0 {
        level
    } else {
        -level
    }
}

/// The code of that level.
#[inline(always)]
fn code<const WIDTH: u32>(x: f32) -> u8 {
    let magnitude = x.abs();
    if WIDTH == 8 {
        let c = nearest_8(magnitude);
        // Adding 1.5 * 2^23 rounds to a whole number, whose low bits are then those of the sum.
        return ((if x >= 0.0 { c } else { -c }) + 12_582_912.0).to_bits() as u8;
    }
    let (levels, bounds) = positive(WIDTH);
    let mut above = 0;
    for bound in bounds {
        above += i32::from(magnitude >= *bound);
    }
    let half = levels.len() as i32;
    (if x >= 0.0 { half + above } else { half - 1 - above }) as u8
}

/// Sums for a least-squares gain of the rows: `zo += weight * z * o`, `oo += weight * o * o`, `o` the level of `z * inverse`.
#[inline(always)]
fn add_run<const WIDTH: u32>(z: &[[f32; TILE]], weights: &[f32], inverse: &[f32; TILE], zo: &mut [f32; TILE], oo: &mut [f32; TILE]) {
    for (z, weight) in z.iter().zip(weights) {
        for row in 0..TILE {
            let o = level::<WIDTH>(z[row] * inverse[row]);
            zo[row] += weight * z[row] * o;
            oo[row] += weight * o * o;
        }
    }
}

/// Bytes of a plane of 1 bit: that bit of every code, `shift` bits up in it.
#[inline(always)]
fn pack_bits(codes: &[u8; TILE], shift: u32, out: &mut [u8]) {
    for (codes, out) in codes.as_chunks::<8>().0.iter().zip(out) {
        let bits = u64::from_le_bytes(*codes) >> shift & 0x0101_0101_0101_0101;
        // Every bit meets the power that puts it into the topmost byte.
        *out = (bits.wrapping_mul(0x0102_0408_1020_4080) >> 56) as u8;
    }
}

/// Write the codes of a coefficient in planes, see [`quant`].
#[inline(always)]
fn pack<const WIDTH: u32>(codes: &[u8; TILE], out: &mut [u8]) {
    if WIDTH == 8 {
        out.copy_from_slice(codes);
        return;
    }
    let (mut at, mut shift) = (0, 0);
    if WIDTH & 4 != 0 {
        for k in 0..TILE / 2 {
            out[k] = codes[k] & 15 | codes[k + 32] << 4;
        }
        (at, shift) = (TILE / 2, 4);
    }
    if WIDTH & 2 != 0 {
        for k in 0..TILE / 4 {
            let two = |i: usize| codes[k + i * 16] >> shift & 3;
            out[at + k] = two(0) | two(1) << 2 | two(2) << 4 | two(3) << 6;
        }
        (at, shift) = (at + TILE / 4, shift + 2);
    }
    if WIDTH & 1 != 0 {
        pack_bits(codes, shift, &mut out[at..at + TILE / 8]);
    }
}

#[inline(always)]
fn code_run<const WIDTH: u32>(z: &[[f32; TILE]], inverse: &[f32; TILE], packed: &mut [u8]) {
    let mut codes = [0; TILE];
    for (z, packed) in z.iter().zip(packed.chunks_exact_mut(quant::coefficient_bytes(WIDTH))) {
        for row in 0..TILE {
            codes[row] = code::<WIDTH>(z[row] * inverse[row]);
        }
        pack::<WIDTH>(&codes, packed);
    }
}

/// Gains and codes of the rows of a tile with coefficients `z`, whose errors count by `weights`.
///
/// Coefficients are divided by their common magnitude and quantised, the gain is chosen by weighted least squares, and the
/// coefficients are quantised again for the gain as it is stored: what a byte cannot say of the gain would move all scores of the
/// row together, and at fine rates be the larger part of the error.
#[inline(always)]
pub fn quantise(widths: Widths, weights: &[f32], z: &[[f32; TILE]], gains: &mut [u8], codes: &mut [u8]) {
    let mut power = [0.0f32; TILE];
    for z in z {
        for (power, z) in power.iter_mut().zip(z) {
            *power += z * z;
        }
    }
    let scales = power.map(|power| (power / z.len().max(1) as f32).sqrt().max(1e-6));
    let mut inverse = scales.map(f32::recip);
    let (mut zo, mut oo) = ([0.0f32; TILE], [0.0f32; TILE]);
    let mut from = 0;
    for (n, bits) in widths.counts.into_iter().zip(Widths::BITS) {
        let (z, weights) = (&z[from..from + n], &weights[from..from + n]);
        match bits {
            8 => add_run::<8>(z, weights, &inverse, &mut zo, &mut oo),
            6 => add_run::<6>(z, weights, &inverse, &mut zo, &mut oo),
            5 => add_run::<5>(z, weights, &inverse, &mut zo, &mut oo),
            4 => add_run::<4>(z, weights, &inverse, &mut zo, &mut oo),
            3 => add_run::<3>(z, weights, &inverse, &mut zo, &mut oo),
            2 => add_run::<2>(z, weights, &inverse, &mut zo, &mut oo),
            _ => add_run::<1>(z, weights, &inverse, &mut zo, &mut oo),
        }
        from += n;
    }
    for row in 0..TILE {
        gains[row] = quant::gain_code(if oo[row] > 0.0 { zo[row] / oo[row] } else { 0.0 });
        let gain = quant::gains()[usize::from(gains[row])];
        inverse[row] = if gain > 0.0 { gain.recip() } else { inverse[row] };
    }
    let (mut from, mut codes) = (0, codes);
    for (n, bits) in widths.counts.into_iter().zip(Widths::BITS) {
        let (run, later) = codes.split_at_mut(n * quant::coefficient_bytes(bits));
        let z = &z[from..from + n];
        match bits {
            8 => code_run::<8>(z, &inverse, run),
            6 => code_run::<6>(z, &inverse, run),
            5 => code_run::<5>(z, &inverse, run),
            4 => code_run::<4>(z, &inverse, run),
            3 => code_run::<3>(z, &inverse, run),
            2 => code_run::<2>(z, &inverse, run),
            _ => code_run::<1>(z, &inverse, run),
        }
        (from, codes) = (from + n, later);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{at, Level};

    #[test]
    fn a_tile_gets_the_codes_and_gains_that_its_rows_get_one_by_one() {
        let widths = Widths { counts: [3, 3, 3, 3, 3, 3, 3] };
        let n = widths.rank();
        let mut z: Vec<[f32; TILE]> = (0..n).map(|j| std::array::from_fn(|i| ((i * 7919 + j * 104_729 + 13) as f32).sin() * 2.5)).collect();
        // A row of nothing, one of a size without a gain, one that overflows every level but in one coefficient.
        z.iter_mut().for_each(|z| (z[5], z[6], z[7]) = (0.0, 1e-9, -1e-3));
        z[4][7] = 1e4;
        let weights: Vec<f32> = (0..n).map(|j| 1.0 / (1 + j) as f32).collect();
        for kernels in Level::ALL.into_iter().filter_map(at) {
            let (mut gains, mut codes) = ([0xa5; TILE], vec![0xa5; widths.bytes()]);
            (kernels.quantise)(widths, &weights, &z, &mut gains, &mut codes);
            for row in 0..TILE {
                let nearest = |j: usize, inverse: f32| quant::code(widths.place(j).0, z[j][row] * inverse);
                let scale = (z.iter().map(|z| z[row] * z[row]).sum::<f32>() / n as f32).sqrt().max(1e-6);
                let (mut zo, mut oo) = (0.0f32, 0.0f32);
                for j in 0..n {
                    let o = quant::level(widths.place(j).0, nearest(j, scale.recip()));
                    zo += weights[j] * z[j][row] * o;
                    oo += weights[j] * o * o;
                }
                assert_eq!(gains[row], quant::gain_code(zo / oo), "{:?} row {row}", kernels.level);
                let gain = quant::gain(gains[row]);
                let inverse = if gain > 0.0 { gain.recip() } else { scale.recip() };
                for (j, z) in z.iter().enumerate().take(n) {
                    let (width, at) = widths.place(j);
                    assert_eq!(quant::get(width, &codes[at..], row), nearest(j, inverse), "{:?} row {row}, {width} bits, {}", kernels.level, z[row]);
                }
            }
        }
    }
}
