//! Scalar quantisers, their packed form and the gain byte.
//!
//! A coefficient of unit variance is coded with 0, 2, 4 or 8 bits: Lloyd-Max for N(0,1) at 2 and 4 bits (Max 1960, table I),
//! uniform at 8. A tile stores each coefficient for its 64 rows together, in planes that unpack with shifts and masks:
//! 2 bits: byte `k` of 16 holds rows `k, k+16, k+32, k+48`, lowest bits first; 4 bits: byte `k` of 32 holds rows `k, k+32`;
//! 8 bits: byte `k` holds row `k` as a signed number. Must not know about bases, heads or cells.

use crate::config::TILE;

/// Bit widths a coefficient can have, ascending.
pub const WIDTHS: [u32; 4] = [0, 2, 4, 8];
/// Mean squared error of each width for N(0,1).
pub const DISTORTION: [f64; 4] = [1.0, 0.117_482, 0.009_497, 6.0e-5];

const LEVELS_2: [f32; 4] = [-1.5104, -0.4528, 0.4528, 1.5104];
const LEVELS_4: [f32; 16] = [
    -2.7326, -2.0690, -1.6181, -1.2562, -0.9424, -0.6568, -0.3881, -0.1284, 0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326,
];
const STEP_8: f32 = 4.5 / 127.0;

/// Bytes of one coefficient of a tile at `width` bits.
pub const fn coefficient_bytes(width: u32) -> usize {
    TILE * width as usize / 8
}

fn nearest(levels: &[f32], x: f32) -> u8 {
    levels.windows(2).take_while(|w| x >= 0.5 * (w[0] + w[1])).count() as u8
}

/// Code of a unit-variance value.
pub fn code(width: u32, x: f32) -> u8 {
    match width {
        2 => nearest(&LEVELS_2, x),
        4 => nearest(&LEVELS_4, x),
        8 => ((x / STEP_8).round().clamp(-127.0, 127.0) as i8) as u8,
        _ => 0,
    }
}

/// Value a code stands for.
pub fn level(width: u32, code: u8) -> f32 {
    match width {
        2 => LEVELS_2[(code & 3) as usize],
        4 => LEVELS_4[(code & 15) as usize],
        8 => f32::from(code as i8) * STEP_8,
        _ => 0.0,
    }
}

/// Write the code of `row` into a packed coefficient.
pub fn put(width: u32, packed: &mut [u8], row: usize, code: u8) {
    match width {
        2 => {
            let (byte, shift) = (row % 16, row / 16 * 2);
            packed[byte] = packed[byte] & !(3 << shift) | (code & 3) << shift;
        }
        4 => {
            let (byte, shift) = (row % 32, row / 32 * 4);
            packed[byte] = packed[byte] & !(15 << shift) | (code & 15) << shift;
        }
        8 => packed[row] = code,
        _ => {}
    }
}

/// Read the code of `row` from a packed coefficient.
pub fn get(width: u32, packed: &[u8], row: usize) -> u8 {
    match width {
        2 => packed[row % 16] >> (row / 16 * 2) & 3,
        4 => packed[row % 32] >> (row / 32 * 4) & 15,
        8 => packed[row],
        _ => 0,
    }
}

/// All 64 values of a packed coefficient.
#[inline(always)]
pub fn unpack(width: u32, packed: &[u8], out: &mut [f32; TILE]) {
    match width {
        2 => {
            // The four levels are odd in (code - 1.5): a cubic through them needs no table.
            const U: f32 = 0.5;
            const B: f32 = (LEVELS_2[3] - 3.0 * LEVELS_2[2]) / (3.0 * U * (9.0 * U * U - U * U));
            const A: f32 = LEVELS_2[2] / U - B * U * U;
            for plane in 0..4 {
                for k in 0..16 {
                    let u = f32::from(packed[k] >> (2 * plane) & 3) - 1.5;
                    out[plane * 16 + k] = u * (A + B * u * u);
                }
            }
        }
        4 => {
            for k in 0..32 {
                out[k] = LEVELS_4[(packed[k] & 15) as usize];
                out[k + 32] = LEVELS_4[(packed[k] >> 4) as usize];
            }
        }
        8 => {
            for k in 0..64 {
                out[k] = f32::from(packed[k] as i8) * STEP_8;
            }
        }
        _ => out.fill(0.0),
    }
}

const GAIN_OCTAVES: f32 = 14.0;
const GAIN_LOWEST: f32 = -8.0;

/// Code of a non-negative gain: 0 for a gain too small to matter, else its logarithm in steps of 14/254 octave (3.9 %).
pub fn gain_code(gain: f32) -> u8 {
    if !(gain >= 0.5 * GAIN_LOWEST.exp2()) {
        return 0;
    }
    1 + ((gain.log2() - GAIN_LOWEST) * (254.0 / GAIN_OCTAVES)).round().clamp(0.0, 254.0) as u8
}

/// Gain a code stands for.
pub fn gain(code: u8) -> f32 {
    if code == 0 {
        0.0
    } else {
        (f32::from(code - 1) * (GAIN_OCTAVES / 254.0) + GAIN_LOWEST).exp2()
    }
}

/// All 256 gains.
pub fn gains() -> &'static [f32; 256] {
    static TABLE: std::sync::OnceLock<[f32; 256]> = std::sync::OnceLock::new();
    TABLE.get_or_init(|| std::array::from_fn(|code| gain(code as u8)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pack_and_unpack_agree_for_every_code_and_row() {
        for width in [2, 4, 8] {
            let mut packed = vec![0xa5; coefficient_bytes(width)];
            let mut want = [0u8; TILE];
            for pass in 0..3u32 {
                for row in 0..TILE {
                    want[row] = ((row as u32 * 37 + pass * 11) % (1 << width)) as u8;
                    if width == 8 && want[row] == 128 {
                        want[row] = 1;
                    }
                    put(width, &mut packed, row, want[row]);
                }
            }
            let mut values = [0.0; TILE];
            unpack(width, &packed, &mut values);
            for row in 0..TILE {
                assert_eq!(get(width, &packed, row), want[row]);
                assert!((values[row] - level(width, want[row])).abs() < 1e-6, "{width} {row}");
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
            let tolerance = if width == 8 { 0.8 } else { 0.01 };
            assert!((error / DISTORTION[i] - 1.0).abs() < tolerance, "{width}: {error} {}", DISTORTION[i]);
        }
    }

    #[test]
    fn gains_survive_within_half_a_step() {
        for i in 0..1000 {
            let g = (-7.9f32 + 13.8 * i as f32 / 1000.0).exp2();
            assert!((gain(gain_code(g)) / g - 1.0).abs() < 0.0195, "{g}");
        }
        assert_eq!(gain(gain_code(0.0)), 0.0);
        assert_eq!(gain(gain_code(f32::NAN)), 0.0);
        assert!(gain(gain_code(1e30)) > 60.0);
    }
}
