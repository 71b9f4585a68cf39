//! What the library does between the graphs of decode steps: planning them and taking over what they did. No graph runs, and llama.cpp has no part in it.
//!
//! Owns the table that is measured. Must not know how times are shown, nor what a plan consists of.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{ensure, Result};
use serde::Serialize;
use spectral_kv::cache::{plan, Cells, Findings, Geometry, Table};
use spectral_kv::config::{Config, LayerShape};

/// Tokens of a step while the table is filled.
const FILLING: u32 = 512;
/// A table knows its layers by the size of their rows only: those of the made models.
const SHAPE: LayerShape = LayerShape { n_head: 32, n_head_kv: 8, d_k: 128, d_v: 128 };
const LAYERS: usize = 4;

/// Times of a step of one token, in nanoseconds.
#[derive(Serialize)]
pub struct Host {
    /// Cells of the table, nearly all of them in use.
    pub cells: u32,
    /// Measured steps.
    pub steps: usize,
    /// Of planning: looking at what became of the cells, deciding where rows go, writing that down. Median, and the slowest step: one that fills a tile,
    /// or whose memory another process had.
    pub ns_plan: u64,
    /// See `ns_plan`.
    pub ns_plan_most: u64,
    /// Of the commit, median.
    pub ns_commit: u64,
    /// See `ns_plan_most`.
    pub ns_commit_most: u64,
    /// Bytes of the last plan, which the caller copies to where the graph finds it.
    pub plan_bytes: usize,
}

/// A table and what a caller keeps for it.
struct Stream {
    table: Table,
    pos: Vec<i32>,
    seq: Vec<i32>,
    used: u32,
    plan: Vec<i32>,
}

impl Stream {
    fn new(cells: u32) -> Result<Self> {
        // With bases at hand nothing waits for a fit, which would take layers.
        let config = Config { n_cells: cells, n_tokens: FILLING, calibrated: true, ..Config::default() };
        let geometry = Arc::new(Geometry::new(&config, &[SHAPE; LAYERS])?);
        let plan = vec![0; plan::capacity(&geometry, FILLING as usize)];
        let table = Table::new(geometry, Arc::new(Findings::default()));
        Ok(Self { table, pos: vec![-1; cells as usize], seq: vec![-1; cells as usize], used: 0, plan })
    }

    /// Appends `n` rows of one sequence; gives the times of plan and commit, and the plan's length.
    fn step(&mut self, n: u32) -> Result<(Duration, Duration, usize)> {
        let new: Vec<u32> = (self.used..self.used + n).collect();
        for cell in &new {
            (self.pos[*cell as usize], self.seq[*cell as usize]) = (*cell as i32, 0);
        }
        self.used += n;
        let start = Instant::now();
        let ints = self.table.plan(Cells { pos: &self.pos, seq: &self.seq }, &new, &mut self.plan)?;
        let planned = start.elapsed();
        let start = Instant::now();
        self.table.commit()?;
        Ok((planned, start.elapsed(), ints))
    }
}

/// The median, the higher one of two, and the largest.
fn middle_and_most(mut times: Vec<u64>) -> (u64, u64) {
    times.sort_unstable();
    (times[times.len() / 2], times[times.len() - 1])
}

/// Fills a table up to its last `steps` cells, and measures decoding into those.
pub fn measure(cells: u32, steps: u32) -> Result<Host> {
    ensure!(steps > 0 && cells > steps, "{steps} steps do not fit into {cells} cells");
    let mut stream = Stream::new(cells)?;
    while stream.used < cells - steps {
        stream.step(FILLING.min(cells - steps - stream.used))?;
    }
    let (mut plans, mut commits, mut plan_bytes) = (vec![], vec![], 0);
    for _ in 0..steps {
        let (planned, committed, ints) = stream.step(1)?;
        plans.push(planned.as_nanos() as u64);
        commits.push(committed.as_nanos() as u64);
        plan_bytes = ints * size_of::<i32>();
    }
    let ((ns_plan, ns_plan_most), (ns_commit, ns_commit_most)) = (middle_and_most(plans), middle_and_most(commits));
    Ok(Host { cells, steps: steps as usize, ns_plan, ns_plan_most, ns_commit, ns_commit_most, plan_bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nearly_full_table_is_measured() {
        let host = measure(4096, 100).unwrap();
        assert_eq!((host.cells, host.steps), (4096, 100));
        assert!(host.ns_plan > 0 && host.ns_plan <= host.ns_plan_most && host.ns_commit <= host.ns_commit_most);
        // Cell and turn of each coded row.
        assert!((8 * 3800..12 * 4096).contains(&host.plan_bytes), "{}", host.plan_bytes);
        assert!(measure(100, 100).is_err());
    }

    #[test]
    fn an_outlier_moves_the_largest_only() {
        assert_eq!(middle_and_most(vec![9, 1, 2]), (2, 9));
        assert_eq!(middle_and_most(vec![7]), (7, 7));
    }
}
