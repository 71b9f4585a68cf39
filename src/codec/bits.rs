//! Distribution of a layer's bit budget over the coefficients of its heads, K and V together.
//!
//! Greedy by marginal gain per bit on the measured distortion of the quantiser; optimal for convex distortion curves
//! (Shoham and Gersho 1988). Must not know what a coefficient is.

use crate::layout::quant::{DISTORTION, WIDTHS};
use std::cmp::Ordering;
use std::collections::BinaryHeap;

#[derive(PartialEq)]
struct Step {
    gain: f64,
    item: usize,
    rung: usize,
}

impl Eq for Step {}
impl PartialOrd for Step {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Step {
    fn cmp(&self, other: &Self) -> Ordering {
        // Lowest item first among equals, so that the result does not depend on the heap.
        self.gain.total_cmp(&other.gain).then(other.item.cmp(&self.item))
    }
}

/// Width of every coefficient, given its weighted variance and the bits there are for one row of all of them.
pub fn allocate(weighted_variance: &[f64], budget: usize) -> Vec<u32> {
    let mut widths = vec![0; weighted_variance.len()];
    let mut left = budget;
    let step = |item: usize, rung: usize| Step {
        gain: weighted_variance[item] * (DISTORTION[rung] - DISTORTION[rung + 1]) / f64::from(WIDTHS[rung + 1] - WIDTHS[rung]),
        item,
        rung,
    };
    let mut heap: BinaryHeap<Step> = (0..weighted_variance.len()).map(|i| step(i, 0)).collect();
    while let Some(s) = heap.pop() {
        let cost = (WIDTHS[s.rung + 1] - WIDTHS[s.rung]) as usize;
        if cost <= left {
            left -= cost;
            widths[s.item] = WIDTHS[s.rung + 1];
            if s.rung + 2 < WIDTHS.len() {
                heap.push(step(s.item, s.rung + 1));
            }
        }
    }
    widths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_is_kept_and_goes_where_variance_is() {
        let variance: Vec<f64> = (0..64).map(|i| 0.8f64.powi(i)).collect();
        for budget in [0, 1, 2, 63, 128, 256, 10_000] {
            let w = allocate(&variance, budget);
            assert!(w.iter().sum::<u32>() as usize <= budget);
            assert!(w.windows(2).all(|p| p[0] >= p[1]), "{w:?}");
        }
        assert!(allocate(&variance, 10_000).iter().all(|w| *w == 8));
        assert!(allocate(&[], 100).is_empty());
    }

    #[test]
    fn greedy_is_as_good_as_exhaustive_search() {
        let variance = [3.0, 1.0, 0.4, 0.05];
        let cost = |w: &[usize]| -> f64 { w.iter().zip(&variance).map(|(i, v)| DISTORTION[*i] * v).sum() };
        for budget in [2usize, 4, 6, 8, 12] {
            let greedy: Vec<usize> = allocate(&variance, budget).iter().map(|w| WIDTHS.iter().position(|x| x == w).unwrap()).collect();
            let mut best = f64::MAX;
            let n = WIDTHS.len();
            for code in 0..n.pow(4) {
                let w = [code % n, code / n % n, code / n / n % n, code / n / n / n];
                if w.iter().map(|i| WIDTHS[*i] as usize).sum::<usize>() <= budget {
                    best = best.min(cost(&w));
                }
            }
            assert!(cost(&greedy) <= best * 1.25, "{budget}: {} {best}", cost(&greedy));
        }
    }
}
