//! Scalar quantisers and their packed form.
//!
//! A coefficient of unit variance is coded with one of [`WIDTHS`]: Lloyd-Max for N(0,1) up to 5 bits (Max 1960). Real coefficients
//! have heavier tails, which at fine rates is where the error comes from: the 6-bit levels are Lloyd-Max for a Gaussian of which
//! a 20th has twice the deviation, the 8-bit ones a cubic that reaches 8 deviations, where the Gaussian's own reach 4.5. Other sets of widths and
//! trellis-coded quantisation are compared in `docs/measurements.md`.
//!
//! A tile stores each coefficient for its 64 rows together, in planes that unpack with shifts and masks. A code is cut into a
//! plane of its low 4 bits, then its next 2, then 1, as its width has them (8 bits: one plane). Plane of 4 bits: byte `k` of 32 holds rows
//! `k, k+32`; of 2: byte `k` of 16 holds `k, k+16, k+32, k+48`; of 1: byte `k` of 8 holds `8k .. 8k+7`, a mask register's order; lowest bits first.
//! Must not know about tiles as a whole.

use super::TILE;

/// Bit widths a coefficient can have, ascending.
pub const WIDTHS: [u32; 8] = [0, 1, 2, 3, 4, 5, 6, 8];
/// Mean squared error of each width for N(0,1).
pub const DISTORTION: [f64; 8] = [1.0, 0.363_380, 0.117_482, 0.034_551, 0.009_509, 0.002_522, 0.000_813, 0.000_094];

/// Mean squared error of a width for N(0,1).
pub fn distortion(width: u32) -> f64 {
    WIDTHS.iter().position(|w| *w == width).map_or(1.0, |i| DISTORTION[i])
}

/// Positive halves of the levels of 1 to 5 bits, ascending, in units of [`STEP`]: whole numbers that fit a byte, so that integer kernels compute
/// with exactly these levels. Rounding them costs under 0.03 % of the distortion, 0.7 % at 5 bits.
pub const HALF_1: [i8; 1] = [118];
/// See [`HALF_1`].
pub const HALF_2: [i8; 2] = [36, 120];
/// See [`HALF_1`].
pub const HALF_3: [i8; 4] = [14, 43, 76, 122];
/// See [`HALF_1`].
pub const HALF_4: [i8; 8] = [6, 18, 30, 43, 57, 73, 93, 123];
/// See [`HALF_1`].
pub const HALF_5: [i8; 16] = [2, 7, 12, 17, 22, 27, 32, 38, 44, 50, 57, 65, 74, 84, 98, 118];
const HALF_6: [f32; 32] = [
    0.03607, 0.10849, 0.18102, 0.25389, 0.32755, 0.40186, 0.47734, 0.55389, 0.63184, 0.71089, 0.79216, 0.87619, 0.96267, 1.05263, 1.14611, 1.24371,
    1.34641, 1.45513, 1.57074, 1.69461, 1.82868, 1.97680, 2.14280, 2.33183, 2.55468, 2.82264, 3.14861, 3.54490, 4.02779, 4.61255, 5.37981, 6.53752,
];

/// Value of a unit of the levels of 0 to 5 bits.
pub const STEP: [f32; 6] = [0.0, 0.006_761_695, 0.012_586_833, 0.017_638_935, 0.022_160_638, 0.027_564_222];

const fn mirror_bytes<const H: usize, const N: usize>(half: [i8; H]) -> [i8; N] {
    let mut out = [0; N];
    let mut i = 0;
    while i < H {
        out[H + i] = half[i];
        out[H - 1 - i] = -half[i];
        i += 1;
    }
    out
}

/// Levels of 1 to 5 bits in units of [`STEP`], by code.
pub static UNITS_1: [i8; 2] = mirror_bytes(HALF_1);
/// See [`UNITS_1`].
pub static UNITS_2: [i8; 4] = mirror_bytes(HALF_2);
/// See [`UNITS_1`].
pub static UNITS_3: [i8; 8] = mirror_bytes(HALF_3);
/// See [`UNITS_1`].
pub static UNITS_4: [i8; 16] = mirror_bytes(HALF_4);
/// See [`UNITS_1`].
pub static UNITS_5: [i8; 32] = mirror_bytes(HALF_5);

const fn scaled<const N: usize>(units: &[i8; N], step: f32) -> [f32; N] {
    let mut out = [0.0; N];
    let mut i = 0;
    while i < N {
        out[i] = units[i] as f32 * step;
        i += 1;
    }
    out
}

const fn mirror<const H: usize, const N: usize>(half: [f32; H]) -> [f32; N] {
    let mut out = [0.0; N];
    let mut i = 0;
    while i < H {
        out[H + i] = half[i];
        out[H - 1 - i] = -half[i];
        i += 1;
    }
    out
}

/// Levels by code.
pub static LEVELS_1: [f32; 2] = scaled(&UNITS_1, STEP[1]);
/// See [`LEVELS_1`].
pub static LEVELS_2: [f32; 4] = scaled(&UNITS_2, STEP[2]);
/// See [`LEVELS_1`].
pub static LEVELS_3: [f32; 8] = scaled(&UNITS_3, STEP[3]);
/// See [`LEVELS_1`].
pub static LEVELS_4: [f32; 16] = scaled(&UNITS_4, STEP[4]);
/// See [`LEVELS_1`].
pub static LEVELS_5: [f32; 32] = scaled(&UNITS_5, STEP[5]);
/// See [`LEVELS_1`].
pub static LEVELS_6: [f32; 64] = mirror(HALF_6);
/// Level of an 8-bit code `c`: `c * (A_8 + B_8 * c * c)`.
pub const A_8: f32 = 0.025;
/// See [`A_8`].
pub const B_8: f32 = (8.0 - A_8 * 127.0) / (127.0 * 127.0 * 127.0);
/// Levels of the 8-bit codes -127 to 127.
static LEVELS_8: [f32; 255] = {
    let mut out = [0.0; 255];
    let mut i = 0;
    while i < 255 {
        out[i] = cubic(i as f32 - 127.0);
        i += 1;
    }
    out
};

/// Level of an 8-bit code, for code and level as numbers.
#[inline(always)]
pub const fn cubic(c: f32) -> f32 {
    c * (A_8 + B_8 * c * c)
}

fn levels(width: u32) -> &'static [f32] {
    match width {
        1 => &LEVELS_1,
        2 => &LEVELS_2,
        3 => &LEVELS_3,
        4 => &LEVELS_4,
        5 => &LEVELS_5,
        6 => &LEVELS_6,
        8 => &LEVELS_8,
        _ => &[],
    }
}

/// Bytes of one coefficient of a tile at `width` bits.
pub const fn coefficient_bytes(width: u32) -> usize {
    TILE * width as usize / 8
}

/// Code of a unit-variance value.
pub fn code(width: u32, x: f32) -> u8 {
    match width {
        0 => 0,
        _ => {
            let l = levels(width);
            let above = l.partition_point(|level| *level < x).clamp(1, l.len() - 1);
            let nearest = (if x >= 0.5 * (l[above - 1] + l[above]) { above } else { above - 1 }) as u8;
            if width == 8 {
                nearest.wrapping_sub(127)
            } else {
                nearest
            }
        }
    }
}

/// Value a code stands for.
pub fn level(width: u32, code: u8) -> f32 {
    match width {
        0 => 0.0,
        8 => cubic(f32::from(code as i8)),
        _ => levels(width)[code as usize & ((1 << width) - 1)],
    }
}

/// The planes of a width: bits of the plane, its first byte, and how far its bits are shifted in the code.
fn planes(width: u32) -> impl Iterator<Item = (u32, usize, u32)> {
    let whole = if width == 8 { &[8][..] } else { &[4, 2, 1][..] };
    let mut shift = 0;
    whole.iter().filter(move |bits| width & **bits != 0).map(move |bits| {
        let at = coefficient_bytes(shift);
        shift += bits;
        (*bits, at, shift - bits)
    })
}

/// Byte within a plane, and shift in it, of a row.
fn spot(bits: u32, row: usize) -> (usize, usize) {
    let bytes = coefficient_bytes(bits);
    match bits {
        1 => (row / 8, row % 8),
        _ => (row % bytes, row / bytes * bits as usize),
    }
}

/// Write the code of `row` into a packed coefficient.
pub fn put(width: u32, packed: &mut [u8], row: usize, code: u8) {
    for (bits, at, shift) in planes(width) {
        let ((byte, up), mask) = (spot(bits, row), ((1u32 << bits) - 1) as u8);
        packed[at + byte] = packed[at + byte] & !(mask << up) | (code >> shift & mask) << up;
    }
}

/// Read the code of `row` from a packed coefficient.
pub fn get(width: u32, packed: &[u8], row: usize) -> u8 {
    planes(width).fold(0, |code, (bits, at, shift)| {
        let ((byte, up), mask) = (spot(bits, row), ((1u32 << bits) - 1) as u8);
        code | (packed[at + byte] >> up & mask) << shift
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_keeps_its_code() {
        for width in WIDTHS.into_iter().skip(1) {
            let mut packed = vec![0xa5; coefficient_bytes(width)];
            let mut want = [0u8; TILE];
            for pass in 0..3u32 {
                for (row, want) in want.iter_mut().enumerate() {
                    *want = ((row as u32 * 37 + pass * 11) % (1 << width)) as u8;
                    if width == 8 && *want == 128 {
                        *want = 1;
                    }
                    put(width, &mut packed, row, *want);
                }
            }
            for (row, want) in want.into_iter().enumerate() {
                assert_eq!(get(width, &packed, row), want, "{width} {row}");
            }
        }
    }

    #[test]
    fn distortion_of_a_gaussian_is_what_the_allocation_believes() {
        // Mean squared error by numeric integration over N(0,1).
        for (i, width) in WIDTHS.into_iter().enumerate() {
            let (mut error, steps) = (0.0f64, 200_000);
            for k in 0..steps {
                let x = -9.0 + 18.0 * (f64::from(k) + 0.5) / f64::from(steps);
                let d = x - f64::from(level(width, code(width, x as f32)));
                error += d * d * (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt() * 18.0 / f64::from(steps);
            }
            let tolerance = 0.01;
            assert!((error / DISTORTION[i] - 1.0).abs() < tolerance, "{width}: {error} {}", DISTORTION[i]);
        }
    }
}
