//! The byte that a row's gain is stored in.
//!
//! Must not know what the gain is of.

/// Largest exponent of a gain, either way.
const GAIN_OCTAVES: f32 = 16.0;
/// How much finer the steps near a gain of 1 are.
const GAIN_BEND: f32 = 5.0;

/// Code of a non-negative gain: 0 for one too small to matter, else its logarithm on a scale bent by sinh: steps of 0.6 % near
/// 1, where almost all gains are, wider ones out to 2^16 and 2^-16, for rows unlike all that the bases were fitted to. An error in a gain moves all
/// scores of a row together, so that even steps over as many octaves would be too coarse (`docs/measurements.md`).
pub fn gain_code(gain: f32) -> u8 {
    least_gains().partition_point(|least| *least <= gain) as u8
}

/// The least gain of every code from 1 on: half-way to the one before, on the bent scale.
pub fn least_gains() -> &'static [f32; 255] {
    static LEAST: std::sync::OnceLock<[f32; 255]> = std::sync::OnceLock::new();
    LEAST.get_or_init(|| std::array::from_fn(|i| if i == 0 { (-GAIN_OCTAVES - 1.0).exp2() } else { unbent(i as f32 + 0.5) }))
}

fn unbent(code: f32) -> f32 {
    let bent = (code - 128.0) / 127.0;
    (GAIN_OCTAVES * (GAIN_BEND * bent).sinh() / GAIN_BEND.sinh()).exp2()
}

/// Gain a code stands for.
pub fn gain(code: u8) -> f32 {
    if code == 0 {
        0.0
    } else {
        unbent(f32::from(code))
    }
}

/// All 256 gains.
pub struct Gains {
    /// By code.
    pub values: [f32; 256],
    /// The bytes of each, the lowest first, for who looks up bytes faster than floats.
    pub bytes: [[u8; 256]; 4],
}

/// All 256 gains.
pub fn gains() -> &'static Gains {
    static TABLE: std::sync::OnceLock<Gains> = std::sync::OnceLock::new();
    TABLE.get_or_init(|| {
        let values = std::array::from_fn(|code| gain(code as u8));
        Gains { values, bytes: std::array::from_fn(|byte| values.map(|value| value.to_le_bytes()[byte])) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gains_survive_finely_near_one_and_coarsely_far_away() {
        for i in 0..1000 {
            let exponent = -15.9f32 + 31.8 * i as f32 / 1000.0;
            let g = exponent.exp2();
            let worst = if exponent.abs() < 0.3 { 0.006 } else { 0.004 + 0.018 * exponent.abs() };
            assert!((gain(gain_code(g)) / g - 1.0).abs() < worst, "{g}");
        }
        assert_eq!(gain(gain_code(0.0)), 0.0);
        assert_eq!(gain(gain_code(f32::NAN)), 0.0);
        assert!(gain(gain_code(1e30)) > 65_000.0);
    }
}
