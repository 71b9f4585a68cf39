//! The results as text.
//!
//! Owns the tables and their words. Must not compute anything but units.

use std::fmt::{self, Display, Formatter};

use super::host::Host;
use super::report::{Row, Subject, Summary, Timing};
use super::What;
use crate::text::{columns, number, or_dash, percent};

const MIB: f64 = 1024.0 * 1024.0;

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|n| n.to_string()).collect()
}

impl Subject {
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

    fn head(&self, unit: &str) -> Vec<String> {
        let stock = self.stock().into_iter().map(|t| format!("stock {t}"));
        [vec![unit.to_string()], stock.collect(), vec!["spectral".into()]].concat()
    }

    /// Something of each cache, in the order of the head.
    fn cells(&self, r: &Row, of: impl Fn(&Timing) -> Option<String>) -> Vec<String> {
        let cells = self.stock().into_iter().chain(["spectral"]).map(|c| or_dash(r.of(c).and_then(&of)));
        [vec![r.name.clone()], cells.collect()].concat()
    }

    fn speeds(&self) -> String {
        let stock = self.stock();
        let head = [self.head("tokens/s"), stock.iter().map(|t| format!("/ {t}")).collect()].concat();
        let row = |r: &Row| {
            // Which of both is the faster one is told where there was a choice.
            let had_choice = |t: &Timing| r.timings.iter().filter(|o| o.cache == t.cache).count() > 1;
            let speed = |t: &Timing| number(t.median_ts) + &if had_choice(t) { format!(" fa {}", t.fa) } else { String::new() };
            let ratios = stock.iter().map(|c| or_dash(r.ratios.get(*c).copied().map(number)));
            [self.cells(r, |t| Some(speed(t))), ratios.collect()].concat()
        };
        columns(&[vec![head], self.rows.iter().map(row).collect()].concat())
    }

    /// Of prefill: there a process holds most.
    fn memory(&self) -> Option<String> {
        let rows: Vec<_> = self.rows.iter().filter(|r| r.is(What::Prefill)).collect();
        let is_known = rows.iter().any(|r| r.timings.iter().any(|t| t.peak_bytes.is_some()));
        let row = |r: &&Row| self.cells(r, |t| Some(format!("{:.0}", t.peak_bytes? as f64 / MIB)));
        is_known.then(|| columns(&[vec![self.head("most MiB, with the model")], rows.iter().map(row).collect()].concat()))
    }

    /// Of decoding with the spectral cache.
    fn parts(&self) -> Option<String> {
        let row = |r: &Row| {
            let p = r.timings.iter().find_map(|t| t.parts)?;
            let ms = [p.token_ms, p.attention_ms, p.storing_ms, p.host_ms, p.rest_ms].map(number);
            Some([vec![r.name.clone()], ms.to_vec()].concat())
        };
        let rows: Vec<_> = self.rows.iter().filter_map(row).collect();
        let head = names(&["spectral, ms/token, means", "whole", "attention", "storing", "host", "rest"]);
        (!rows.is_empty()).then(|| columns(&[vec![head], rows].concat()))
    }

    /// What decoding at depth 0 tells of deeper rows.
    fn outside(&self, f: &mut Formatter) -> fmt::Result {
        for same_depth in self.outside_attention.chunk_by(|a, b| a.depth == b.depth) {
            let depth = same_depth[0].depth;
            let shares: Vec<_> = same_depth.iter().map(|o| format!("{} {}", o.cache, percent(o.share))).collect();
            writeln!(f, "outside attention at {depth} (time per token at depth 0 / at {depth}): {}", shares.join(", "))?;
            let ms = |o: &super::report::Outside| {
                let ratio = o.attention_ratio.map_or(String::new(), |r| format!(" ({} times the spectral one's)", number(r)));
                format!("{} {} ms{ratio}", o.cache, number(o.attention_ms))
            };
            let ms: Vec<_> = same_depth.iter().map(ms).collect();
            writeln!(f, "attention alone at {depth} (time per token, less that at depth 0): {}", ms.join(", "))?;
        }
        Ok(())
    }
}

fn host_table(host: &[Host]) -> String {
    let head = names(&["host, ns/step", "plan", "commit", "slowest plan", "slowest commit", "KiB of plan"]);
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
            writeln!(f, "{apart}; ratios are spectral / stock with the faster of -fa on and off, where both were measured")?;
        }
        for m in &self.models {
            writeln!(f, "\n{}: {}\n\n{}", m.name, m.description, m.speeds())?;
            for table in [m.parts(), m.memory()].into_iter().flatten() {
                writeln!(f, "{table}")?;
            }
            m.outside(f)?;
        }
        if !self.host.is_empty() {
            writeln!(f, "\n{}", host_table(&self.host))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::{row, rows_of};
    use super::super::runs::Cache;
    use super::*;

    #[test]
    fn a_table_has_speeds_and_ratios() {
        let subject = Subject::new("m".into(), String::new(), vec![row(0, &[100.0, 80.0, 90.0], &[60.0]), row(512, &[30.0], &[40.0, 50.0])]);
        assert_eq!(
            subject.speeds(),
            "tokens/s       stock f16  spectral  / f16\ndecode at 0         90.0      60.0  0.667\ndecode at 512       30.0      45.0   1.50\n"
        );
    }

    #[test]
    fn the_faster_baseline_is_shown_and_named() {
        let stock = |fa| Cache::Stock { kind: "f16".into(), fa };
        let subject =
            Subject::new("m".into(), String::new(), vec![rows_of(8, &[(stock(true), &[20.0]), (stock(false), &[25.0]), (Cache::Spectral, &[50.0])])]);
        assert_eq!(subject.speeds(), "tokens/s       stock f16  spectral  / f16\ndecode at 8  25.0 fa off      50.0   2.00\n");
    }
}
