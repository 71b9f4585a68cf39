//! The Python prototype that this project succeeds: truncated singular value decomposition of blocks of 512 rows,
//! keys un-roped, coefficients in int8.
//!
//! Owns its ranks and its arithmetic. The basis vectors stay exact, in the prototype's favour.

use anyhow::{Context, Result};
use nalgebra::{DMatrix, SymmetricEigen};
use spectral_kv::rope::{Rope, Turn};

/// Rows of a block.
pub const ROWS: usize = 512;
/// Rank of un-roped keys.
pub const RANK_K: usize = 16;
/// Rank of values.
pub const RANK_V: usize = 32;

/// Coefficients `[row][rank]` and basis `[rank][d]` of the best approximation of that rank.
fn decompose(x: &DMatrix<f64>, rank: usize) -> Result<(DMatrix<f64>, DMatrix<f64>)> {
    // Right singular vectors are eigenvectors of `X^T X`.
    let found = SymmetricEigen::try_new(x.tr_mul(x), f64::EPSILON, 30 * x.ncols());
    let found = found.context("the singular values of a block did not converge")?;
    let mut order: Vec<usize> = (0..x.ncols()).collect();
    order.sort_by(|a, b| found.eigenvalues[*b].total_cmp(&found.eigenvalues[*a]));
    order.truncate(rank.min(x.nrows()));
    let vectors = found.eigenvectors.select_columns(&order);
    Ok((x * &vectors, vectors.transpose()))
}

/// One step for all coefficients of the block.
fn int8(x: &mut DMatrix<f64>) {
    let largest = x.amax();
    let step = if largest == 0.0 { 1.0 } else { largest / 127.0 };
    x.apply(|x| *x = (*x / step).round() * step);
}

/// One head of a block: `rows[i]` stands at position `first + i`, and is rotated by `rope` if there is one.
pub fn round_trip(rows: &mut [&mut [f32]], rank: usize, rope: Option<&Rope>, first: usize) -> Result<()> {
    let mut turn = Turn::default();
    let mut turned = |rows: &mut [&mut [f32]], sign: i64| {
        if let Some(rope) = rope {
            for (i, row) in rows.iter_mut().enumerate() {
                rope.turn(sign * (first + i) as i64, &mut turn);
                rope.rotate(&turn, row);
            }
        }
    };
    turned(rows, -1);
    let x = DMatrix::from_fn(rows.len(), rows[0].len(), |i, j| f64::from(rows[i][j]));
    let (mut coefficients, basis) = decompose(&x, rank)?;
    int8(&mut coefficients);
    let rebuilt = &coefficients * &basis;
    for (i, row) in rows.iter_mut().enumerate() {
        row.iter_mut().enumerate().for_each(|(j, x)| *x = rebuilt[(i, j)] as f32);
    }
    turned(rows, 1);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;
    use spectral_kv::rope::{Pairing, RopeParams};

    /// Rows of rank 3 in 16 dimensions.
    fn low_rank(n: usize) -> Vec<Vec<f32>> {
        let mut r = Random::new(5, 0);
        let basis: Vec<Vec<f64>> = (0..3).map(|_| (0..16).map(|_| r.unit() - 0.5).collect()).collect();
        let row = |r: &mut Random| {
            let c: Vec<f64> = (0..3).map(|_| r.unit() - 0.5).collect();
            (0..16).map(|j| (0..3).map(|k| c[k] * basis[k][j]).sum::<f64>() as f32).collect()
        };
        (0..n).map(|_| row(&mut r)).collect()
    }

    fn error(a: &[Vec<f32>], b: &[Vec<f32>]) -> f64 {
        let power = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>();
        let difference = &mut a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| a - b);
        (power(difference) / power(&mut b.iter().flatten().copied())).sqrt()
    }

    #[test]
    fn low_rank_is_exact_before_the_codes() {
        let rows = low_rank(100);
        let x = DMatrix::from_fn(100, 16, |i, j| f64::from(rows[i][j]));
        for (rank, exact) in [(2, false), (3, true), (16, true)] {
            let (c, b) = decompose(&x, rank).unwrap();
            let wrong = (&c * &b - &x).norm() / x.norm();
            assert_eq!(wrong < 1e-6, exact, "rank {rank}: {wrong}");
        }
    }

    #[test]
    fn keys_are_of_low_rank_without_their_rotation_only() {
        for pairing in [Pairing::Adjacent, Pairing::Halves] {
            let rope = Rope::new(&RopeParams::plain(pairing, 16, 10000.0), 16).unwrap();
            let mut roped = low_rank(200);
            for (i, row) in roped.iter_mut().enumerate() {
                // The formula of the paper, pair by pair.
                for pair in 0..8 {
                    let (a, b) = if pairing == Pairing::Adjacent { (2 * pair, 2 * pair + 1) } else { (pair, pair + 8) };
                    let (s, c) = ((1000 + i) as f64 * 10000f64.powf(-(pair as f64) / 8.0)).sin_cos();
                    let (x, y) = (f64::from(row[a]), f64::from(row[b]));
                    (row[a], row[b]) = ((x * c - y * s) as f32, (x * s + y * c) as f32);
                }
            }
            let coded = |rope: Option<&Rope>| {
                let mut rows = roped.clone();
                let mut views: Vec<&mut [f32]> = rows.iter_mut().map(Vec::as_mut_slice).collect();
                round_trip(&mut views, 3, rope, 1000).unwrap();
                error(&rows, &roped)
            };
            // Half an int8 step, uniformly distributed, is the whole error.
            assert!(coded(Some(&rope)) < 0.01, "{pairing:?}: {}", coded(Some(&rope)));
            assert!(coded(None) > 0.1, "{pairing:?}: {}", coded(None));
        }
    }
}
