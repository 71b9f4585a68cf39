//! What the time of a decoded token consists of: the counters that the cache logs, put beside the time that the tool took.
//!
//! Owns which lines of a log are decoded tokens, and the arithmetic. Must not know how a log comes about, nor how parts are shown.

use anyhow::{ensure, Context, Result};
use serde::{Deserialize, Serialize};

/// The counters after a graph, in nanoseconds; they only grow.
#[derive(Deserialize, Clone, Copy, Default)]
struct Line {
    n_tokens: u64,
    ns_attend: u64,
    ns_encode: u64,
    ns_host: u64,
}

/// Nanoseconds of some steps. Those of attention and storing are the wall time of the first thread alone, which has its share of the work like every
/// other: nothing is to be divided by threads, and waiting for slower ones is not in it.
#[derive(Clone, Copy, Default, Debug, PartialEq)]
pub struct Sums {
    steps: u64,
    attend: u64,
    encode: u64,
    host: u64,
}

impl Sums {
    /// Of the last `steps` graphs of one token in a log: before those of the measurement there is one to warm up.
    pub fn read(log: &str, steps: usize) -> Result<Self> {
        let mut before = Line::default();
        let mut decoded = vec![];
        for line in log.lines() {
            let after: Line = serde_json::from_str(line).with_context(|| format!("a line of the counters is not understood: {line}"))?;
            // Another context begins to count anew.
            if after.ns_host < before.ns_host {
                before = Line::default();
            }
            if after.n_tokens == 1 {
                let more = |of: fn(&Line) -> u64| of(&after).saturating_sub(of(&before));
                decoded.push(Sums { steps: 1, attend: more(|l| l.ns_attend), encode: more(|l| l.ns_encode), host: more(|l| l.ns_host) });
            }
            before = after;
        }
        ensure!(decoded.len() >= steps, "{} decoded tokens were counted instead of {steps}", decoded.len());
        Ok(decoded[decoded.len() - steps..].iter().fold(Sums::default(), |sum, s| sum.and(s)))
    }

    /// These steps and others.
    pub fn and(&self, other: &Self) -> Self {
        Self { steps: self.steps + other.steps, attend: self.attend + other.attend, encode: self.encode + other.encode, host: self.host + other.host }
    }
}

/// Milliseconds of a decoded token, means over all steps: tiles are filled in some of them only.
#[derive(Serialize, Clone, Copy, Debug, PartialEq)]
pub struct Parts {
    /// All of it.
    pub token_ms: f64,
    /// Attention, of the first thread.
    pub attention_ms: f64,
    /// Storing, of the first thread.
    pub storing_ms: f64,
    /// What library and glue do between graphs.
    pub host_ms: f64,
    /// What is left: the model, and the first thread's waiting for others.
    pub rest_ms: f64,
}

impl Parts {
    /// Of samples of the speed, in tokens per second, and the sums of all their steps.
    pub fn new(speeds: &[f64], sums: &Sums) -> Self {
        let token_ms = speeds.iter().map(|s| 1e3 / s).sum::<f64>() / speeds.len() as f64;
        let [attention_ms, storing_ms, host_ms] = [sums.attend, sums.encode, sums.host].map(|ns| ns as f64 / 1e6 / sums.steps as f64);
        Self { token_ms, attention_ms, storing_ms, host_ms, rest_ms: token_ms - attention_ms - storing_ms - host_ms }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(n: u64, attend: u64, encode: u64, host: u64) -> String {
        format!("{{\"n_tokens\":{n},\"path\":\"decode\",\"ns_encode\":{encode},\"ns_attend\":{attend},\"ns_host\":{host},\"ratio\":8.0}}\n")
    }

    #[test]
    fn the_last_single_tokens_count_and_their_own_time_only() {
        // A warm-up, a filled cache, a step of some tokens, a token, and the second repetition.
        let log = [
            line(1, 900, 90, 9),
            line(512, 5000, 500, 50),
            line(7, 5500, 550, 55),
            line(1, 5510, 552, 56),
            line(512, 9000, 900, 90),
            line(1, 9030, 904, 95),
        ];
        let sums = Sums::read(&log.concat(), 2).unwrap();
        assert_eq!(sums, Sums { steps: 2, attend: 40, encode: 6, host: 6 });
        let fresh = Sums::read(&[line(1, 900, 90, 9), line(1, 4, 3, 2)].concat(), 1).unwrap();
        assert_eq!(fresh, Sums { steps: 1, attend: 4, encode: 3, host: 2 }, "of another context");
        assert!(Sums::read(&log.concat(), 4).is_err());
        assert!(Sums::read("{\"n_tokens\":1}", 1).is_err());
    }

    #[test]
    fn parts_add_up_to_the_token() {
        let sums = Sums { steps: 4, attend: 12_000_000, encode: 4_000_000, host: 2_000_000 };
        // 10 ms and 6 ms.
        let parts = Parts::new(&[100.0, 1000.0 / 6.0], &sums.and(&Sums::default()));
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} {b}");
        near(parts.token_ms, 8.0);
        near(parts.attention_ms, 3.0);
        near(parts.storing_ms, 1.0);
        near(parts.host_ms, 0.5);
        near(parts.rest_ms, 3.5);
    }
}
