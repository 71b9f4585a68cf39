//! Round trips through ggml's block types: what a row is after it has been stored as q8_0 or q4_0.
//!
//! As `quantize_row_q8_0_ref` and `quantize_row_q4_0_ref` do it: the step is computed in f32, the codes
//! with it, and only then it is rounded to f16.

use half::f16;

/// Elements of a block, for both types.
pub const BLOCK: usize = 32;

fn inverse(d: f32) -> f32 {
    if d == 0.0 {
        0.0
    } else {
        1.0 / d
    }
}

/// 8 bits each, and a step for 32 elements.
pub fn q8_0(row: &mut [f32]) {
    for block in row.chunks_mut(BLOCK) {
        let d = block.iter().fold(0.0f32, |a, x| a.max(x.abs())) / 127.0;
        let (id, stored) = (inverse(d), f16::from_f32(d).to_f32());
        block.iter_mut().for_each(|x| *x = (*x * id).round() * stored);
    }
}

/// 4 bits each, and a step for 32 elements; the element of largest magnitude gets the code 0, which is -8 steps.
pub fn q4_0(row: &mut [f32]) {
    for block in row.chunks_mut(BLOCK) {
        let mut extreme = 0.0f32;
        for x in block.iter() {
            if x.abs() > extreme.abs() {
                extreme = *x;
            }
        }
        let d = extreme / -8.0;
        let (id, stored) = (inverse(d), f16::from_f32(d).to_f32());
        for x in block.iter_mut() {
            let code = ((*x * id + 8.5) as i32).min(15);
            *x = (code - 8) as f32 * stored;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 0, 1, .. 31 with alternating signs: the largest magnitude is at the end, and negative.
    fn ramp() -> Vec<f32> {
        (0..32).map(|i| if i % 2 == 0 { i as f32 } else { -(i as f32) }).collect()
    }

    #[test]
    fn q8_0_of_a_known_block() {
        let mut row = ramp();
        q8_0(&mut row);
        // d = 31/127 = 0.24409449, as f16 0.24414063; codes round(i * 127/31).
        let d = 0.244_140_63f32;
        let codes = [
            0, -4, 8, -12, 16, -20, 25, -29, 33, -37, 41, -45, 49, -53, 57, -61, 66, -70, 74, -78, 82, -86, 90, -94, 98, -102, 107, -111, 115, -119,
            123, -127,
        ];
        let want: Vec<f32> = codes.iter().map(|c| *c as f32 * d).collect();
        assert_eq!(row, want);
    }

    #[test]
    fn q4_0_of_a_known_block() {
        let mut row = ramp();
        q4_0(&mut row);
        // d = -31/-8 = 3.875, exact in f16; codes floor(x/d + 8.5), at most 15.
        let codes = [8, 8, 9, 7, 9, 7, 10, 6, 10, 6, 11, 5, 11, 5, 12, 4, 12, 4, 13, 3, 13, 3, 14, 2, 14, 2, 15, 1, 15, 1, 15, 0];
        let want: Vec<f32> = codes.iter().map(|c| (*c - 8) as f32 * 3.875).collect();
        assert_eq!(row, want);
    }

    #[test]
    fn zeros_stay_zeros() {
        for quantise in [q8_0, q4_0] {
            let mut row = vec![0.0; 64];
            quantise(&mut row);
            assert_eq!(row, vec![0.0; 64]);
        }
    }
}
