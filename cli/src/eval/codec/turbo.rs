//! TurboQuant (arXiv 2504.19874) without its QJL stage: norm, Hadamard rotation, the Lloyd-Max quantiser for N(0,1),
//! and a norm that is corrected for what the quantiser takes away.
//!
//! Owns the codebook, which is computed here and not taken from the library, so that the baseline is independent of it.

use half::f16;

use super::hadamard;

/// Cells of the integration over `-RANGE..RANGE`.
const CELLS: usize = 1 << 15;
const RANGE: f64 = 7.0;
const ROUNDS: usize = 2000;

/// The quantiser of one bit width.
pub struct Turbo {
    levels: Vec<f32>,
    borders: Vec<f32>,
}

impl Turbo {
    /// Lloyd's iteration on the density itself.
    pub fn new(bits: u32) -> Self {
        let n = 1usize << bits;
        let width = 2.0 * RANGE / CELLS as f64;
        // Mass and first moment up to each cell border: a cell of the quantiser is a difference of two entries.
        let (mut mass, mut moment) = (vec![0.0; CELLS + 1], vec![0.0; CELLS + 1]);
        for i in 0..CELLS {
            let x = (i as f64 + 0.5) * width - RANGE;
            let p = (-x * x / 2.0).exp();
            mass[i + 1] = mass[i] + p;
            moment[i + 1] = moment[i] + p * x;
        }
        let at = |sums: &[f64], x: f64| {
            let i = ((x + RANGE) / width).clamp(0.0, CELLS as f64);
            let low = (i as usize).min(CELLS - 1);
            sums[low] + (i - low as f64) * (sums[low + 1] - sums[low])
        };
        let mut levels: Vec<f64> = (0..n).map(|i| (i as f64 + 0.5) / n as f64 * 6.0 - 3.0).collect();
        let mut borders = vec![];
        for _ in 0..ROUNDS {
            borders = levels.windows(2).map(|w| (w[0] + w[1]) / 2.0).collect();
            for (i, level) in levels.iter_mut().enumerate() {
                let low = if i == 0 { -RANGE } else { borders[i - 1] };
                let high = borders.get(i).copied().unwrap_or(RANGE);
                *level = (at(&moment, high) - at(&moment, low)) / (at(&mass, high) - at(&mass, low));
            }
        }
        let single = |x: Vec<f64>| x.into_iter().map(|x| x as f32).collect();
        Self { levels: single(levels), borders: single(borders) }
    }

    fn quantise(&self, x: f32) -> f32 {
        self.levels[self.borders.partition_point(|b| *b < x)]
    }

    /// One head of one row; rotated where its size allows it.
    pub fn round_trip(&self, head: &mut [f32]) {
        let norm = |x: &[f32]| x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let before = norm(head);
        if before == 0.0 {
            return;
        }
        let size = 1 << head.len().trailing_zeros();
        hadamard::rotate(head, size);
        let unit = ((head.len() as f64).sqrt() / before) as f32;
        head.iter_mut().for_each(|x| *x = self.quantise(*x * unit));
        // The stored norm is an f16.
        let gain = f64::from(f16::from_f64(before).to_f32()) / norm(head);
        head.iter_mut().for_each(|x| *x *= gain as f32);
        hadamard::rotate(head, size);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    fn gaussian(n: usize) -> Vec<f32> {
        let mut r = Random::new(3, 0);
        (0..n).map(|_| ((-2.0 * (1.0 - r.unit()).ln()).sqrt() * (std::f64::consts::TAU * r.unit()).cos()) as f32).collect()
    }

    /// Distortions of the Lloyd-Max quantisers for N(0,1), Max (1960).
    const THEORY: [(u32, f64); 4] = [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)];

    #[test]
    fn the_quantiser_has_the_distortion_of_theory() {
        let x = gaussian(1 << 19);
        for (bits, theory) in THEORY {
            let q = Turbo::new(bits);
            let error: f64 = x.iter().map(|x| f64::from(q.quantise(*x) - x).powi(2)).sum::<f64>() / x.len() as f64;
            assert!((error / theory - 1.0).abs() < 0.02, "{bits} bits: {error} {theory}");
        }
    }

    #[test]
    fn rows_have_the_distortion_of_theory() {
        // A centroid quantiser keeps 1-D of the power and is uncorrelated with its error: scaled back to the
        // full norm, the error is 2 - 2 sqrt(1-D).
        let rows = gaussian(1024 * 512);
        for (bits, d) in THEORY {
            let q = Turbo::new(bits);
            let (mut error, mut power) = (0.0, 0.0);
            for row in rows.chunks_exact(1024) {
                let mut x = row.to_vec();
                q.round_trip(&mut x);
                error += x.iter().zip(row).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
                power += row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
            }
            let theory = 2.0 - 2.0 * (1.0 - d).sqrt();
            assert!((error / power / theory - 1.0).abs() < 0.02, "{bits} bits: {} {theory}", error / power);
        }
    }

    #[test]
    fn norms_are_kept_and_zeros_stay() {
        let q = Turbo::new(2);
        let mut x = gaussian(128);
        let norm = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>().sqrt();
        let before = norm(&x);
        q.round_trip(&mut x);
        assert!((norm(&x) / before - 1.0).abs() < 1e-3);
        let mut zeros = vec![0.0; 128];
        q.round_trip(&mut zeros);
        assert_eq!(zeros, vec![0.0; 128]);
    }
}
