//! The results as numbers: medians, their quotients, and what follows from speeds at several depths.
//!
//! Owns the JSON's form. Must not know how a speed was measured, nor how results are shown.

use std::collections::BTreeMap;

use serde::Serialize;

use super::host::Host;
use super::parts::{Parts, Sums};
use super::runs::{Cache, Case, Sample};
use super::{value_name, What};

/// The speeds of one cache in one row.
#[derive(Serialize)]
pub struct Timing {
    pub(super) cache: String,
    /// Flash attention, on or off.
    pub(super) fa: &'static str,
    samples_ts: Vec<f64>,
    pub(super) median_ts: f64,
    /// Of the whole process, model included; the largest of all calls.
    pub(super) peak_bytes: Option<u64>,
    /// Of a decoded token, of the spectral cache.
    pub(super) parts: Option<Parts>,
    #[serde(skip)]
    sums: Option<Sums>,
    #[serde(skip)]
    pub(super) is_spectral: bool,
}

impl Timing {
    /// Without any sample yet.
    pub fn new(cache: &Cache) -> Self {
        Self {
            cache: cache.name().into(),
            fa: cache.fa(),
            samples_ts: vec![],
            median_ts: 0.0,
            peak_bytes: None,
            parts: None,
            sums: None,
            is_spectral: matches!(cache, Cache::Spectral),
        }
    }

    /// Takes what another call has told.
    pub fn add(&mut self, sample: Sample) {
        self.samples_ts.extend(sample.speeds);
        self.median_ts = median(&self.samples_ts);
        self.peak_bytes = self.peak_bytes.max(sample.peak);
        self.sums = sample.sums.map(|sums| sums.and(&self.sums.unwrap_or_default())).or(self.sums);
        self.parts = self.sums.map(|sums| Parts::new(&self.samples_ts, &sums));
    }

    /// How far the samples are apart, as a share of their median.
    pub(super) fn spread(&self) -> f64 {
        let of = |f: fn(f64, f64) -> f64| self.samples_ts.iter().copied().fold(self.median_ts, f);
        (of(f64::max) - of(f64::min)) / self.median_ts
    }
}

fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0
}

/// One row of a table.
#[derive(Serialize)]
pub struct Row {
    pub(super) what: String,
    pub(super) depth: u32,
    tokens: u32,
    sequences: u32,
    pub(super) timings: Vec<Timing>,
    /// Flash attention with which each stock type was faster.
    pub(super) best_fa: BTreeMap<String, &'static str>,
    /// Speed of the spectral cache / speed of each stock type, as it was faster.
    pub(super) ratios: BTreeMap<String, f64>,
    #[serde(skip)]
    pub(super) name: String,
}

impl Row {
    /// Of the caches that took turns.
    pub fn new(case: &Case, timings: Vec<Timing>) -> Self {
        let mut row = Self {
            what: value_name(&case.what),
            depth: case.depth,
            tokens: case.tokens,
            sequences: case.sequences,
            timings,
            best_fa: BTreeMap::new(),
            ratios: BTreeMap::new(),
            name: case.to_string(),
        };
        let best: Vec<&Timing> = row.best().collect();
        let spectral = best.iter().find(|t| t.is_spectral).map(|t| t.median_ts);
        let stock = || best.iter().filter(|t| !t.is_spectral);
        let best_fa = stock().map(|t| (t.cache.clone(), t.fa)).collect();
        let ratios = stock().filter_map(|t| Some((t.cache.clone(), spectral? / t.median_ts))).collect();
        (row.best_fa, row.ratios) = (best_fa, ratios);
        row
    }

    /// Each cache as it was faster, in the order in which they were measured; of equal ones the first.
    pub(super) fn best(&self) -> impl Iterator<Item = &Timing> {
        let is_best = |i: usize, t: &Timing| {
            let mut others = self.timings.iter().enumerate().filter(|(_, o)| o.cache == t.cache);
            others.all(|(j, o)| o.median_ts < t.median_ts || o.median_ts == t.median_ts && j >= i)
        };
        self.timings.iter().enumerate().filter(move |(i, t)| is_best(*i, t)).map(|(_, t)| t)
    }

    /// A cache as it was faster.
    pub(super) fn of(&self, cache: &str) -> Option<&Timing> {
        self.best().find(|t| t.cache == cache)
    }

    /// Milliseconds of a token.
    fn ms(&self, cache: &str) -> Option<f64> {
        self.of(cache).map(|t| 1e3 / t.median_ts)
    }

    pub(super) fn is(&self, what: What) -> bool {
        self.what == value_name(&what)
    }
}

/// What of a decoded token's time does not grow with the context, and what does.
#[derive(Serialize)]
pub struct Outside {
    pub(super) depth: u32,
    pub(super) cache: String,
    /// Time at depth 0 / time at this depth.
    pub(super) share: f64,
    /// Time at this depth less time at depth 0: attention, nearly.
    pub(super) attention_ms: f64,
    /// The same of this cache / that of the spectral one. None of the spectral one itself, nor where the noise is larger than a difference.
    pub(super) attention_ratio: Option<f64>,
}

/// A speed of decoding.
pub struct Point<'a> {
    /// Name of the cache.
    pub cache: &'a str,
    /// It is the spectral one.
    pub is_spectral: bool,
    /// Tokens before.
    pub depth: u32,
    /// Tokens per second.
    pub speed: f64,
}

/// One model.
#[derive(Serialize)]
pub struct Subject {
    pub(super) name: String,
    pub(super) description: String,
    pub(super) rows: Vec<Row>,
    /// Where decoding was measured at depth 0 and at another.
    pub(super) outside_attention: Vec<Outside>,
}

impl Subject {
    /// Of its rows.
    pub fn new(name: String, description: String, rows: Vec<Row>) -> Self {
        let outside_attention = outside(&rows);
        Self { name, description, rows, outside_attention }
    }

    /// What a user calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Each cache as it was faster, at each depth.
    pub fn decoded(&self) -> impl Iterator<Item = Point<'_>> {
        let point = |r: &Row, t: &'_ Timing| (r.depth, t.median_ts);
        let rows = self.rows.iter().filter(|r| r.is(What::Decode));
        rows.flat_map(move |r| r.best().map(move |t| (t, point(r, t)))).map(|(t, (depth, speed))| Point {
            cache: &t.cache,
            is_spectral: t.is_spectral,
            depth,
            speed,
        })
    }
}

fn outside(rows: &[Row]) -> Vec<Outside> {
    let decoded = || rows.iter().filter(|r| r.is(What::Decode));
    let Some(short) = decoded().find(|r| r.depth == 0) else { return vec![] };
    let grown = |r: &Row, cache: &str| Some(r.ms(cache)? - short.ms(cache)?);
    let of = |r: &Row, t: &Timing| {
        let attention_ms = grown(r, &t.cache)?;
        let spectral = r.timings.iter().find(|t| t.is_spectral).and_then(|t| grown(r, &t.cache));
        let ratio = spectral.filter(|s| *s > 0.0 && attention_ms > 0.0 && !t.is_spectral).map(|s| attention_ms / s);
        let share = short.ms(&t.cache)? / r.ms(&t.cache)?;
        Some(Outside { depth: r.depth, cache: t.cache.clone(), share, attention_ms, attention_ratio: ratio })
    };
    decoded().filter(|r| r.depth > 0).flat_map(|r| r.best().filter_map(move |t| of(r, t))).collect()
}

/// Everything.
#[derive(Serialize)]
pub struct Summary {
    /// Of this package.
    pub version: &'static str,
    /// The pinned commit.
    pub llama_cpp: String,
    /// Its name.
    pub cpu: String,
    /// Of llama.cpp.
    pub threads: u32,
    /// Instruction-set level that was asked for.
    pub level: Option<String>,
    /// Of the spectral cache.
    pub kv_spectral: f64,
    /// In a round.
    pub repetitions: u32,
    /// Of all repetitions.
    pub rounds: u32,
    /// By model.
    pub models: Vec<Subject>,
    /// Of the library alone, by cells.
    pub host: Vec<Host>,
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn stock(kind: &str, fa: bool) -> Cache {
        Cache::Stock { kind: kind.into(), fa }
    }

    /// A row of stock f16 with flash attention and of the spectral cache, from their samples.
    pub fn row(depth: u32, f16: &[f64], spectral: &[f64]) -> Row {
        rows_of(depth, &[(stock("f16", true), f16), (Cache::Spectral, spectral)])
    }

    pub fn rows_of(depth: u32, samples: &[(Cache, &[f64])]) -> Row {
        let timing = |(cache, speeds): &(Cache, &[f64])| {
            let mut t = Timing::new(cache);
            speeds.iter().zip(1..).for_each(|(s, i)| t.add(Sample { speeds: vec![*s], peak: Some(i << 20), sums: None }));
            t
        };
        Row::new(&Case { what: What::Decode, depth, tokens: 4, sequences: 1 }, samples.iter().map(timing).collect())
    }

    #[test]
    fn one_outlier_does_not_move_a_median() {
        assert_eq!(median(&[9.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[7.0]), 7.0);
    }

    #[test]
    fn ratios_are_made_with_the_faster_baseline() {
        for (on, off, fa, ratio) in [(30.0, 20.0, "on", 2.0), (20.0, 30.0, "off", 2.0), (30.0, 30.0, "on", 2.0)] {
            let row = rows_of(8, &[(stock("f16", true), &[on]), (Cache::Spectral, &[60.0]), (stock("f16", false), &[off])]);
            assert_eq!((row.best_fa["f16"], row.ratios["f16"]), (fa, ratio));
            assert_eq!((row.timings.len(), row.best().count()), (3, 2), "the slower one is kept, and counts nowhere");
        }
    }

    #[test]
    fn ratios_and_shares_are_quotients_of_medians() {
        let subject = Subject::new("m".into(), String::new(), vec![row(0, &[100.0, 80.0, 90.0], &[60.0]), row(512, &[30.0], &[40.0, 50.0])]);
        assert_eq!(subject.rows[0].ratios["f16"], 60.0 / 90.0);
        assert_eq!(subject.rows[1].ratios["f16"], 1.5);
        let near = |a: f64, b: f64| assert!((a / b - 1.0).abs() < 1e-12, "{a} {b}");
        let [f16, spectral] = &subject.outside_attention[..] else { panic!("two caches") };
        assert_eq!((f16.depth, &*f16.cache, spectral.depth, &*spectral.cache), (512, "f16", 512, "spectral"));
        near(f16.share, 30.0 / 90.0);
        near(spectral.share, 45.0 / 60.0);
        near(f16.attention_ms, 1e3 / 30.0 - 1e3 / 90.0);
        near(f16.attention_ratio.unwrap(), (1.0 / 30.0 - 1.0 / 90.0) / (1.0 / 45.0 - 1.0 / 60.0));
        assert_eq!(spectral.attention_ratio, None);
        let noise = Subject::new("m".into(), String::new(), vec![row(0, &[90.0], &[60.0]), row(1, &[91.0], &[50.0])]);
        assert_eq!(noise.outside_attention[0].attention_ratio, None);
    }

    #[test]
    fn calls_add_up() {
        let row = row(4, &[1.0, 3.0, 2.0], &[1.0]);
        assert_eq!((row.timings[0].peak_bytes, row.timings[0].median_ts, row.timings[0].parts), (Some(3 << 20), 2.0, None));
        let mut t = Timing::new(&Cache::Spectral);
        let log = |ns: u64| format!("{{\"n_tokens\":1,\"ns_attend\":{ns},\"ns_encode\":0,\"ns_host\":{ns}}}");
        for ns in [1_000_000, 3_000_000] {
            t.add(Sample { speeds: vec![100.0], peak: None, sums: Some(Sums::read(&log(ns), 1).unwrap()) });
        }
        let parts = t.parts.unwrap();
        assert_eq!((parts.attention_ms, parts.host_ms, parts.token_ms, parts.rest_ms), (2.0, 2.0, 10.0, 6.0));
    }
}
