//! Quantising a tile: the 64 rows of a coefficient together and without branches, in Rust that vectorises at every level.
//!
//! Levels are symmetric, so a magnitude is compared with the boundaries between the positive ones. Chooses the codes that
//! [`quant::code`] would, up to rounding. Must not know about bases.

use super::lanes::LANES;
use crate::layout::gain::{gain_code, gains};
use crate::layout::quant::{self, cubic, A_8, B_8, LEVELS_1, LEVELS_2, LEVELS_3, LEVELS_4, LEVELS_5, LEVELS_6};
use crate::layout::widths::with_width;
use crate::layout::{Widths, TILE};

/// The least root mean square of a row's coefficients: none is divided by less.
const LEAST_SCALE: f32 = 1e-6;
/// Least width at which codes make up for what the byte cannot say of a gain: they are chosen for the gain as it is stored. Coarse codes would only
/// change at random, which moves scores more than the byte does (`docs/measurements.md`).
const FINE_WIDTH: u32 = 6;
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

/// Sums for an unbiased gain of the rows: `zz += weight * z * z`, `zo += weight * z * o`, `o` the level of `z * inverse`.
#[inline(always)]
fn add_run<const WIDTH: u32>(z: &[[f32; TILE]], weights: &[f32], inverse: &[f32; TILE], zz: &mut [f32; TILE], zo: &mut [f32; TILE]) {
    for (z, weight) in z.iter().zip(weights) {
        for row in 0..TILE {
            let o = level::<WIDTH>(z[row] * inverse[row]);
            zz[row] += weight * z[row] * z[row];
            zo[row] += weight * z[row] * o;
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
/// Coefficients are divided by their common magnitude and quantised, and the gain makes the product of the row with its coded form that with
/// itself: errors of many rows then average out under broad attention, where a least-squares gain, which shrinks every row, leaves a bias. Then they
/// are quantised for good, see [`FINE_WIDTH`].
#[inline(always)]
pub fn quantise(widths: Widths, weights: &[f32], z: &[[f32; TILE]], gains: &mut [u8], codes: &mut [u8]) {
    let mut power = [0.0f32; TILE];
    for z in z {
        for (power, z) in power.iter_mut().zip(z) {
            *power += z * z;
        }
    }
    let scales = power.map(|power| (power / z.len().max(1) as f32).sqrt().max(LEAST_SCALE));
    let mut inverse = scales.map(f32::recip);
    let mut exact = inverse;
    let (mut zz, mut zo) = ([0.0f32; TILE], [0.0f32; TILE]);
    for run in widths.runs() {
        let (z, weights) = (&z[run.range()], &weights[run.range()]);
        with_width!(run.bits, WIDTH => add_run::<WIDTH>(z, weights, &inverse, &mut zz, &mut zo));
    }
    for row in 0..TILE {
        (gains[row], inverse[row], exact[row]) = gain_and_inverses(scales[row], zz[row], zo[row]);
    }
    for run in widths.runs() {
        let (z, codes) = (&z[run.range()], &mut codes[run.bytes()]);
        with_width!(run.bits, WIDTH => code_run::<WIDTH>(z, if WIDTH >= FINE_WIDTH { &exact } else { &inverse }, codes));
    }
}

/// Gain and codes of a part of the coefficients of one row: what [`super::Kernels::quantise`] finds for 64 rows. `put` gets number and code of each.
pub fn code_row(widths: Widths, weights: &[f32], z: &[f32], mut put: impl FnMut(usize, u8)) -> u8 {
    let scale = (z.iter().map(|z| z * z).sum::<f32>() / z.len().max(1) as f32).sqrt().max(LEAST_SCALE);
    let (mut zz, mut zo) = (0.0f32, 0.0f32);
    for ((j, z), weight) in z.iter().enumerate().zip(weights) {
        let width = widths.place(j).0;
        zz += weight * z * z;
        zo += weight * z * quant::level(width, quant::code(width, z * scale.recip()));
    }
    let (stored, inverse, exact) = gain_and_inverses(scale, zz, zo);
    for (j, z) in z.iter().enumerate() {
        let width = widths.place(j).0;
        put(j, quant::code(width, z * if width >= FINE_WIDTH { exact } else { inverse }));
    }
    stored
}

/// Code of the gain that makes the product of a row with its coded form (`zo`) that with itself (`zz`), and what coefficients are multiplied by
/// before they are coded: in general, and from [`FINE_WIDTH`] bits on.
#[inline(always)]
fn gain_and_inverses(scale: f32, zz: f32, zo: f32) -> (u8, f32, f32) {
    let unbiased = if zo > 0.0 { zz / zo } else { 0.0 };
    let stored = gain_code(unbiased);
    let (gain, inverse) = (gains().values[usize::from(stored)], scale.recip());
    (stored, inverse, if gain > 0.0 { (scale * gain / unbiased).recip() } else { inverse })
}

/// Steps tried for a residual, in its root mean squares: what it consists of is not always Gaussian.
const FINE_STEPS: [f32; 6] = [0.7, 0.85, 1.0, 1.2, 1.5, 2.0];

/// See [`super::Kernels::quantise_fine`]. The step is the best of some by least squares: beside the row itself its bias is nothing.
#[inline(always)]
pub fn quantise_fine(x: &[f32], nibbles: &mut [u8]) -> f32 {
    let (half, scale) = (x.len().div_ceil(2), (squares(x) / x.len().max(1) as f32).sqrt());
    let (mut best, mut inverse, mut step) = (0.0, 0.0, 0.0);
    for factor in FINE_STEPS {
        let up = (scale * factor).recip();
        let (xo, oo) = fine_sums(x, up);
        // What this step leaves is less by that.
        let gain = xo * xo / oo;
        if gain > best {
            (best, inverse, step) = (gain, up, xo / oo);
        }
    }
    for (byte, x) in nibbles.iter_mut().zip(&x[..half]) {
        *byte = code::<4>(x * inverse);
    }
    for (byte, x) in nibbles.iter_mut().zip(&x[half..]) {
        *byte |= code::<4>(x * inverse) << 4;
    }
    step
}

/// The sum of squares.
#[inline(always)]
fn squares(x: &[f32]) -> f32 {
    let (lanes, rest) = x.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for x in lanes {
        sums.iter_mut().zip(x).for_each(|(sum, x)| *sum += x * x);
    }
    sums.iter().sum::<f32>() + rest.iter().map(|x| x * x).sum::<f32>()
}

/// Sums of `x * o` and `o * o`, `o` the level of 4 bits of `x * up`.
#[inline(always)]
fn fine_sums(x: &[f32], up: f32) -> (f32, f32) {
    let (lanes, rest) = x.as_chunks::<LANES>();
    let (mut xo, mut oo) = ([0.0; LANES], [0.0; LANES]);
    for x in lanes {
        for i in 0..LANES {
            let o = level::<4>(x[i] * up);
            xo[i] += x[i] * o;
            oo[i] += o * o;
        }
    }
    for x in rest {
        let o = level::<4>(x * up);
        xo[0] += x * o;
        oo[0] += o * o;
    }
    (xo.iter().sum(), oo.iter().sum())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::gain::gain;
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
                let own: Vec<f32> = z.iter().map(|z| z[row]).collect();
                let gain = code_row(widths, &weights, &own, |j, want| {
                    let (width, at) = widths.place(j);
                    assert_eq!(quant::get(width, &codes[at..], row), want, "{:?} row {row}, {width} bits, {}", kernels.level, own[j]);
                });
                assert_eq!(gains[row], gain, "{:?} row {row}", kernels.level);
            }
        }
    }

    /// Gaussian enough: sums of four.
    fn noise(n: usize, seed: u32) -> Vec<f32> {
        let mut s = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
        let mut next = || {
            s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (s >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(|_| (next() + next() + next() + next()) * 0.866).collect()
    }

    #[test]
    fn products_of_rows_with_their_coded_forms_are_right_in_the_mean() {
        for (counts, rows) in
            [([0, 0, 0, 0, 12, 30, 20], 40), ([0, 0, 4, 30, 0, 0, 0], 10), ([0, 0, 0, 0, 0, 0, 8], 200), ([6, 5, 4, 0, 0, 0, 0], 10)]
        {
            let widths = Widths { counts };
            let n = widths.rank();
            let weights: Vec<f32> = (0..n).map(|j| 0.9f32.powi(j as i32)).collect();
            let (mut sum, mut count) = (0.0f64, 0.0f64);
            for seed in 0..rows {
                // Rows differ in size, up to a hundred times.
                let sizes: [f32; TILE] = std::array::from_fn(|row| (0.07 * (row as f32 - 32.0)).exp());
                let z: Vec<[f32; TILE]> =
                    noise(n * TILE, seed).as_chunks::<TILE>().0.iter().map(|z| std::array::from_fn(|i| z[i] * sizes[i])).collect();
                let (mut gains, mut codes) = ([0; TILE], vec![0; widths.bytes()]);
                (crate::simd::kernels().quantise)(widths, &weights, &z, &mut gains, &mut codes);
                for row in 0..TILE {
                    let (mut zz, mut zo) = (0.0, 0.0);
                    for j in 0..n {
                        let (width, at) = widths.place(j);
                        let o = gain(gains[row]) * quant::level(width, quant::get(width, &codes[at..], row));
                        zz += f64::from(weights[j] * z[j][row] * z[j][row]);
                        zo += f64::from(weights[j] * z[j][row] * o);
                    }
                    (sum, count) = (sum + zo / zz, count + 1.0);
                }
            }
            assert!((sum / count - 1.0).abs() < 0.002, "{counts:?}: {}", sum / count);
        }
    }

    #[test]
    fn residuals_come_back_with_the_error_of_four_bits() {
        for kernels in Level::ALL.into_iter().filter_map(at) {
            for n in [2, 32, 80, 250, 256] {
                for size in [1e-4f32, 1.0, 300.0] {
                    let x: Vec<f32> = noise(n, n as u32).iter().map(|x| x * size).collect();
                    let (mut nibbles, mut out) = (vec![0xa5; n / 2], vec![f32::NAN; n]);
                    let step = (kernels.quantise_fine)(&x, &mut nibbles);
                    (kernels.unpack_fine)(&nibbles, step, &mut out);
                    let error: f32 = x.iter().zip(&out).map(|(x, o)| (x - o).powi(2)).sum();
                    assert!(error < 0.015 * squares(&x), "{:?} {n} {size}: {}", kernels.level, error / squares(&x));
                    for (i, out) in out.iter().enumerate() {
                        let nibble = if i < n / 2 { nibbles[i] & 15 } else { nibbles[i - n / 2] >> 4 };
                        assert!((out - step * quant::level(4, nibble)).abs() <= 1e-6 * out.abs());
                    }
                }
                let (mut nibbles, mut out) = (vec![0xa5; n / 2], vec![f32::NAN; n]);
                let step = (kernels.quantise_fine)(&vec![0.0; n], &mut nibbles);
                (kernels.unpack_fine)(&nibbles, step, &mut out);
                assert!(out.iter().all(|x| *x == 0.0));
            }
        }
    }
}
