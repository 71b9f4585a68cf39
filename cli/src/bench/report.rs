//! The results: medians, their quotients, and how they are shown.
//!
//! Owns the JSON's form and the table. Must not know how a speed was measured.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};

use serde::Serialize;

use super::host::Host;
use super::runs::{Cache, Case};
use super::{value_name, What};
use crate::text::{columns, number, or_dash, percent};

/// The speeds of one cache in one row.
#[derive(Serialize)]
pub struct Timing {
    cache: String,
    samples_ts: Vec<f64>,
    median_ts: f64,
    #[serde(skip)]
    is_spectral: bool,
}

impl Timing {
    /// Of all repetitions.
    pub fn new(cache: &Cache, samples: Vec<f64>) -> Self {
        Self { cache: cache.name().into(), median_ts: median(&samples), samples_ts: samples, is_spectral: matches!(cache, Cache::Spectral) }
    }

    /// How far the samples are apart, as a share of their median.
    fn spread(&self) -> f64 {
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
    what: String,
    depth: u32,
    tokens: u32,
    sequences: u32,
    timings: Vec<Timing>,
    /// Speed of the spectral cache / speed of each stock type.
    ratios: BTreeMap<String, f64>,
    #[serde(skip)]
    name: String,
}

impl Row {
    /// Of the caches that took turns.
    pub fn new(case: &Case, timings: Vec<Timing>) -> Self {
        let spectral = timings.iter().find(|t| t.is_spectral).map(|t| t.median_ts);
        let stock = timings.iter().filter(|t| !t.is_spectral);
        let ratios = stock.filter_map(|t| Some((t.cache.clone(), spectral? / t.median_ts))).collect();
        Self {
            what: value_name(&case.what),
            depth: case.depth,
            tokens: case.tokens,
            sequences: case.sequences,
            timings,
            ratios,
            name: case.to_string(),
        }
    }

    fn speed(&self, cache: &str) -> Option<f64> {
        self.timings.iter().find(|t| t.cache == cache).map(|t| t.median_ts)
    }
}

/// The share of a decoded token's time that does not grow with the context.
#[derive(Serialize)]
struct Outside {
    depth: u32,
    cache: String,
    share: f64,
}

/// One model.
#[derive(Serialize)]
pub struct Subject {
    name: String,
    description: String,
    rows: Vec<Row>,
    /// Time per token at depth 0 / time per token at a depth, where decoding was measured at both.
    outside_attention: Vec<Outside>,
}

impl Subject {
    /// Of its rows.
    pub fn new(name: String, description: String, rows: Vec<Row>) -> Self {
        let outside_attention = outside(&rows);
        Self { name, description, rows, outside_attention }
    }

    /// Names of the stock types, in the order of their first appearance.
    fn stock(&self) -> Vec<&str> {
        let mut names: Vec<&str> = vec![];
        for t in self.rows.iter().flat_map(|r| &r.timings).filter(|t| !t.is_spectral) {
            if !names.contains(&t.cache.as_str()) {
                names.push(&t.cache);
            }
        }
        names
    }

    fn table(&self) -> String {
        let stock = self.stock();
        let mut head = vec!["tokens/s".to_string()];
        head.extend(stock.iter().map(|t| format!("stock {t}")));
        head.push("spectral".into());
        head.extend(stock.iter().map(|t| format!("/ {t}")));
        let row = |r: &Row| {
            let mut cells = vec![r.name.clone()];
            cells.extend(stock.iter().chain(&["spectral"]).map(|c| or_dash(r.speed(c).map(number))));
            cells.extend(stock.iter().map(|c| or_dash(r.ratios.get(*c).copied().map(number))));
            cells
        };
        columns(&[vec![head], self.rows.iter().map(row).collect()].concat())
    }
}

fn outside(rows: &[Row]) -> Vec<Outside> {
    let decoded = || rows.iter().filter(|r| r.what == value_name(&What::Decode));
    let Some(short) = decoded().find(|r| r.depth == 0) else { return vec![] };
    let deep = decoded().filter(|r| r.depth > 0);
    let share = |r: &Row, t: &Timing| Some(Outside { depth: r.depth, cache: t.cache.clone(), share: t.median_ts / short.speed(&t.cache)? });
    deep.flat_map(|r| r.timings.iter().filter_map(move |t| share(r, t))).collect()
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

fn host_table(host: &[Host]) -> String {
    let head = ["host, ns/step", "plan", "commit", "slowest plan", "slowest commit", "KiB of plan"].map(String::from).to_vec();
    let row = |h: &Host| {
        let times = [h.ns_plan, h.ns_commit, h.ns_plan_most, h.ns_commit_most].map(|ns| ns.to_string());
        [vec![format!("{} cells", h.cells)], times.to_vec(), vec![(h.plan_bytes / 1024).to_string()]].concat()
    };
    columns(&[vec![head], host.iter().map(row).collect()].concat())
}

impl Display for Summary {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        let level = self.level.as_ref().map_or(String::new(), |l| format!(", at level {l}"));
        writeln!(f, "{}, {} threads, llama.cpp {}, --kv-spectral {}{level}", self.cpu, self.threads, self.llama_cpp, self.kv_spectral)?;
        let timings = || self.models.iter().flat_map(|m| &m.rows).flat_map(|r| &r.timings);
        let apart = match self.repetitions * self.rounds {
            1 => "single samples".into(),
            n => format!("medians of {n} samples, up to {} apart", percent(timings().map(Timing::spread).fold(0.0, f64::max))),
        };
        if !self.models.is_empty() {
            writeln!(f, "{apart}; ratios are spectral / stock")?;
        }
        for m in &self.models {
            writeln!(f, "\n{}: {}\n\n{}", m.name, m.description, m.table())?;
            for same_depth in m.outside_attention.chunk_by(|a, b| a.depth == b.depth) {
                let shares: Vec<_> = same_depth.iter().map(|o| format!("{} {}", o.cache, percent(o.share))).collect();
                let depth = same_depth[0].depth;
                writeln!(f, "outside attention at {depth} (time per token at depth 0 / at {depth}): {}", shares.join(", "))?;
            }
        }
        if !self.host.is_empty() {
            writeln!(f, "\n{}", host_table(&self.host))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(depth: u32, stock: &[f64], spectral: &[f64]) -> Row {
        let timings = vec![Timing::new(&Cache::Stock("f16".into()), stock.to_vec()), Timing::new(&Cache::Spectral, spectral.to_vec())];
        Row::new(&Case { what: What::Decode, depth, tokens: 4, sequences: 1 }, timings)
    }

    #[test]
    fn one_outlier_does_not_move_a_median() {
        assert_eq!(median(&[9.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[7.0]), 7.0);
    }

    #[test]
    fn ratios_and_shares_are_quotients_of_medians() {
        let subject = Subject::new("m".into(), String::new(), vec![row(0, &[100.0, 80.0, 90.0], &[60.0]), row(512, &[30.0], &[40.0, 50.0])]);
        assert_eq!(subject.rows[0].ratios["f16"], 60.0 / 90.0);
        assert_eq!(subject.rows[1].ratios["f16"], 1.5);
        let shares: Vec<_> = subject.outside_attention.iter().map(|o| (o.depth, o.cache.as_str(), o.share)).collect();
        assert_eq!(shares, [(512, "f16", 30.0 / 90.0), (512, "spectral", 45.0 / 60.0)]);
        assert_eq!(
            subject.table(),
            "tokens/s       stock f16  spectral  / f16\ndecode at 0         90.0      60.0  0.667\ndecode at 512       30.0      45.0   1.50\n"
        );
    }
}
