//! What two distributions of the next token, or two attention outputs, differ by.
//!
//! Owns the arithmetic of all measures. Must not know where logits come from.

use anyhow::{bail, Result};
use serde::{Deserialize, Serialize};

/// The most likely token; the first of equals.
pub fn argmax(logits: &[f32]) -> usize {
    let mut best = 0;
    for (i, x) in logits.iter().enumerate() {
        if *x > logits[best] {
            best = i;
        }
    }
    best
}

/// Natural logarithms of the softmax.
pub fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let largest = logits.iter().fold(f32::NEG_INFINITY, |a, x| a.max(*x));
    let shifted = |x: &f32| f64::from(*x) - f64::from(largest);
    let norm = logits.iter().map(|x| shifted(x).exp()).sum::<f64>().ln();
    logits.iter().map(|x| shifted(x) - norm).collect()
}

/// Kullback-Leibler divergence of `q` from `p`, both given as logarithms, in nats. What has no probability in `p` adds nothing.
pub fn kl(p: &[f64], q: &[f64]) -> f64 {
    p.iter().zip(q).filter(|(p, _)| p.exp() > 0.0).map(|(p, q)| p.exp() * (p - q)).sum()
}

/// Judged positions of a text, in order.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Positions {
    /// KL divergence from the reference.
    pub kl: Vec<f64>,
    /// 1 where both prefer the same token.
    pub same: Vec<u8>,
    /// How much less likely the text's next token is than in the reference, in nats; the last position may have none.
    pub nll: Vec<f64>,
}

impl Positions {
    /// The reference beside itself.
    pub fn same(n: usize) -> Self {
        Self { kl: vec![0.0; n], same: vec![1; n], nll: vec![0.0; n] }
    }

    /// Judges one position more.
    pub fn push(&mut self, reference: &[f32], got: &[f32], next: Option<i32>) -> Result<()> {
        let (p, q) = (log_softmax(reference), log_softmax(got));
        let divergence = kl(&p, &q);
        if !divergence.is_finite() {
            bail!("position {} of the judged ones has logits without a distribution (KL divergence {divergence})", self.kl.len());
        }
        self.kl.push(divergence);
        self.same.push(u8::from(argmax(reference) == argmax(got)));
        if let Some(next) = next {
            self.nll.push(p[next as usize] - q[next as usize]);
        }
        Ok(())
    }
}

/// The mean; 0 of nothing.
pub fn mean(x: impl IntoIterator<Item = f64>) -> f64 {
    let (mut sum, mut n) = (0.0, 0);
    for x in x {
        sum += x;
        n += 1;
    }
    if n == 0 {
        0.0
    } else {
        sum / f64::from(n)
    }
}

/// The value that a share of all lies below, with linear interpolation between neighbours; 0 of nothing.
pub fn quantile(x: &[f64], share: f64) -> f64 {
    let mut sorted = x.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = share * sorted.len().saturating_sub(1) as f64;
    let (low, high) = (at.floor() as usize, at.ceil() as usize);
    match (sorted.get(low), sorted.get(high)) {
        (Some(a), Some(b)) => a + (b - a) * (at - low as f64),
        _ => 0.0,
    }
}

/// Square root of the squared error over the squared reference, summed over what is added.
#[derive(Clone, Copy, Default)]
pub struct RelativeError {
    error: f64,
    power: f64,
}

impl RelativeError {
    /// Adds a vector.
    pub fn add(&mut self, reference: &[f32], got: &[f32]) {
        for (r, g) in reference.iter().zip(got) {
            self.error += (f64::from(*g) - f64::from(*r)).powi(2);
            self.power += f64::from(*r).powi(2);
        }
    }

    /// The error of all that was added; 0 where there is nothing.
    pub fn value(&self) -> f64 {
        if self.power == 0.0 {
            0.0
        } else {
            (self.error / self.power).sqrt()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kl_of_two_coins() {
        // P = (3/4, 1/4), Q = (1/2, 1/2): ln 2 - H(P) = 3/4 ln 3/2 + 1/4 ln 1/2.
        let p = log_softmax(&[3f32.ln(), 0.0]);
        let q = log_softmax(&[-2.0, -2.0]);
        assert!((p[0] - 0.75f64.ln()).abs() < 1e-7 && (q[1] - 0.5f64.ln()).abs() < 1e-15);
        assert!((kl(&p, &q) - (0.75 * 1.5f64.ln() + 0.25 * 0.5f64.ln())).abs() < 1e-7);
        assert_eq!(kl(&p, &p), 0.0);
        // A token that cannot come adds nothing.
        let p = log_softmax(&[0.0, f32::NEG_INFINITY]);
        assert_eq!(kl(&p, &log_softmax(&[0.0, 0.0])), 2f64.ln());
    }

    #[test]
    fn quantiles_and_means_by_hand() {
        let x = [4.0, 1.0, 3.0, 2.0];
        assert_eq!([0.0, 0.5, 0.9, 1.0].map(|s| quantile(&x, s)), [1.0, 2.5, 3.7, 4.0]);
        assert_eq!(quantile(&[], 0.5), 0.0);
        assert_eq!(quantile(&[5.0], 0.99), 5.0);
        assert_eq!((mean(x), mean([])), (2.5, 0.0));
    }

    #[test]
    fn positions_by_hand() {
        let mut p = Positions::default();
        p.push(&[1.0, 0.0], &[0.0, 1.0], Some(0)).unwrap();
        p.push(&[1.0, 0.0], &[1.0, 0.0], None).unwrap();
        // ln s(1) - ln s(-1) = 1 for the logistic function s; the divergence is tanh(1/2).
        assert!((p.nll[0] - 1.0).abs() < 1e-15 && (p.kl[0] - 0.5f64.tanh()).abs() < 1e-15);
        assert_eq!((p.kl[1], p.same.as_slice(), p.nll.len()), (0.0, &[0, 1][..], 1));
        assert!(p.push(&[1.0, 0.0], &[f32::NAN, 0.0], None).is_err());
    }

    #[test]
    fn relative_error_by_hand() {
        let mut e = RelativeError::default();
        assert_eq!(e.value(), 0.0);
        e.add(&[3.0, 0.0], &[3.0, 3.0]);
        e.add(&[0.0, 4.0], &[0.0, 0.0]);
        assert_eq!(e.value(), 1.0);
        assert_eq!(argmax(&[1.0, 2.0, 2.0]), 1);
    }
}
