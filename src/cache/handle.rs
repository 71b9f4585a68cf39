//! A cache of one layer and one sequence that owns its memory, for callers that have no tensors to lend.
//!
//! Cells are numbered in the order of appending. Must not know about C.

use super::{plan, Call, Cells, Findings, Geometry, Layer, Mask, Plan, Rows, SizeReport, Stats, Step, Table};
use crate::config::{Config, LayerShape, Scoring};
use crate::error::{argument, Error, Result};
use crate::layout::MAX_QUERIES;
use crate::rope::RopeParams;
use half::f16;
use std::sync::Arc;

/// See the module.
pub struct Cache {
    layer: Layer,
    table: Table,
    /// 64-byte units, so that rows are aligned.
    arena: Vec<[u64; 8]>,
    positions: Vec<i32>,
    sequences: Vec<i32>,
    used: usize,
    plan: Vec<i32>,
    projection: Vec<f32>,
}

impl Cache {
    /// A cache of `shape`; `config.n_streams` and `config.n_seqs` must be 1. `projection` holds rows of the layer's output
    /// projection (`n_head * d_v` each) for weighting values, or nothing.
    pub fn new(config: &Config, shape: LayerShape, rope: &RopeParams, scoring: Scoring, projection: &[f32]) -> Result<Self> {
        if config.n_streams != 1 || config.n_seqs != 1 {
            return Err(Error::Config("a cache that owns its memory holds one sequence".into()));
        }
        if config.calibrated {
            return Err(Error::Config("a cache that owns its memory fits its bases itself".into()));
        }
        let geometry = Arc::new(Geometry::new(config, &[shape])?);
        let row = (shape.n_head * shape.d_v) as usize;
        if !projection.len().is_multiple_of(row) || !projection.iter().all(|x| x.is_finite()) {
            return argument(format!("the output projection must be finite rows of {row} floats"));
        }
        let findings = Arc::new(Findings::default());
        let mut layer = Layer::new(geometry.clone(), findings.clone(), 0)?;
        layer.set_rope(rope)?;
        layer.set_scoring(scoring)?;
        let bytes = geometry.arena_bytes;
        let mut arena = Vec::new();
        arena.try_reserve_exact(bytes.div_ceil(64)).map_err(|_| Error::Full(format!("{bytes} bytes of memory are not to be had")))?;
        arena.resize(bytes.div_ceil(64), [0; 8]);
        let cells = config.n_cells as usize;
        Ok(Cache {
            layer,
            table: Table::new(geometry, findings),
            arena,
            positions: vec![-1; cells],
            sequences: vec![-1; cells],
            used: 0,
            plan: Vec::new(),
            projection: projection.to_vec(),
        })
    }

    /// The layer: shapes and counters.
    pub fn layer(&self) -> &Layer {
        &self.layer
    }
    /// Rows stored.
    pub fn len(&self) -> usize {
        self.used
    }
    /// True without rows.
    pub fn is_empty(&self) -> bool {
        self.used == 0
    }
    /// Positions of all stored rows.
    pub fn positions(&self) -> &[i32] {
        &self.positions[..self.used]
    }
    /// What the layer has done.
    pub fn stats(&self) -> Stats {
        self.layer.counters.read()
    }
    /// Bytes held, against f16.
    pub fn report(&self) -> SizeReport {
        self.table.geometry().report()
    }

    fn make_plan(&mut self, new: &[u32]) -> Result<usize> {
        self.plan.resize(plan::capacity(self.table.geometry(), new.len()), 0);
        self.table.plan(Cells { pos: &self.positions, seq: &self.sequences }, new, &mut self.plan)
    }

    /// Store rows: keys as the model gives them (roped) with their positions, ascending. On error nothing has changed.
    pub fn append(&mut self, positions: &[i32], q: &Rows, k: &Rows, v: &Rows) -> Result<()> {
        let n = positions.len();
        if [q, k, v].iter().any(|r| r.len() != n) {
            return argument(format!("{n} positions for {} queries, {} keys and {} values", q.len(), k.len(), v.len()));
        }
        let before = self.used.checked_sub(1).map_or(-1, |i| self.positions[i]);
        let ascending = positions.windows(2).all(|w| w[0] < w[1]);
        if !ascending || positions.first().is_some_and(|p| *p <= before) {
            return argument("positions must not be negative and must ascend");
        }
        if n > self.positions.len() - self.used {
            return Err(Error::Full(format!("{n} rows more than the {} of {} cells in use leave room for", self.used, self.positions.len())));
        }
        if n == 0 {
            return Ok(());
        }
        let g = self.layer.shape();
        let finite = |rows: &Rows, heads: usize, d: usize| (0..n).all(|i| (0..heads).all(|h| rows.is_finite(i, h, d)));
        if !(finite(k, g.n_head_kv, g.d_k) && finite(v, g.n_head_kv, g.d_v) && finite(q, g.n_head, g.d_k)) {
            return Err(Error::NotFinite("a query, key or value among the rows to append".into()));
        }
        let most = self.table.geometry().config.n_tokens as usize;
        for from in (0..n).step_by(most) {
            let rows = from..(from + most).min(n);
            let [q, k, v] = [q, k, v].map(|x| x.part(rows.clone()));
            self.append_step(&positions[rows], &q, &k, &v)?;
        }
        Ok(())
    }

    /// Store the rows of one step, which were checked.
    fn append_step(&mut self, positions: &[i32], q: &Rows, k: &Rows, v: &Rows) -> Result<()> {
        let cells = self.used..self.used + positions.len();
        self.positions[cells.clone()].copy_from_slice(positions);
        self.sequences[cells.clone()].fill(0);
        let new: Vec<u32> = cells.clone().map(|c| c as u32).collect();
        let result = self.store(&new, q, k, v);
        if result.is_err() {
            self.positions[cells.clone()].fill(-1);
            self.sequences[cells].fill(-1);
            return result;
        }
        self.used += positions.len();
        self.table.commit()
    }

    fn store(&mut self, new: &[u32], q: &Rows, k: &Rows, v: &Rows) -> Result<()> {
        let used = self.make_plan(new)?;
        let plan = Plan::parse(&self.plan[..used])?;
        let mut arena: &mut [u8] = bytemuck::cast_slice_mut(&mut self.arena);
        let step = Step { projection: &self.projection, ..Step::new(*q, *k, *v) };
        if plan.fit && !plan.shared {
            return self.layer.append_fit(arena, &plan, &step);
        }
        (0..self.layer.shape().n_head_kv).try_for_each(|head| self.layer.append_head(head, &mut arena, &plan, &step))
    }

    /// Rebuild rows `first..first + n` as roped f16: `k_out[row][head][d_k]`, `v_out[row][head][d_v]`.
    pub fn get(&mut self, first: usize, n: usize, k_out: &mut [f16], v_out: &mut [f16]) -> Result<()> {
        if n > self.used || first > self.used - n {
            return argument(format!("rows {first} to {} of {}", first.saturating_add(n), self.used));
        }
        let used = self.make_plan(&[])?;
        let plan = Plan::parse(&self.plan[..used])?;
        let arena: &[u8] = bytemuck::cast_slice(&self.arena);
        self.layer.reconstruct(arena, &plan, &Rows::empty(), &Rows::empty(), first..first + n, k_out, v_out)
    }

    /// Attention of 1 to 64 query tokens over all stored rows: `out[token][query head][d_v]`.
    pub fn attend(&mut self, q: &Rows, mask: Mask, sinks: &[f32], out: &mut [f32]) -> Result<()> {
        let (g, n) = (*self.layer.shape(), q.len());
        if n == 0 || n > MAX_QUERIES {
            return argument(format!("{n} query tokens; 1 to {MAX_QUERIES} are possible"));
        }
        if out.len() < n * g.n_head * g.d_v {
            return Err(Error::Buffer { need: n * g.n_head * g.d_v, have: out.len() });
        }
        let used = self.make_plan(&[])?;
        let plan = Plan::parse(&self.plan[..used])?;
        let arena: &[u8] = bytemuck::cast_slice(&self.arena);
        let mut partials = vec![0.0; self.layer.partial_floats(n)];
        let none = Rows::empty();
        let call = Call { arena, plan: &plan, q, k: &none, v: &none, scoring: self.layer.scoring, mask };
        self.layer.attend(0..self.layer.units(), &call, &mut partials)?;
        self.layer.combine(n, &partials, sinks, 0..n * g.n_head, out)
    }

    /// Drop all rows behind the first `n`. The table sees it when it compares cells in the next step; what the dropped rows asked of others is
    /// forgotten at once.
    pub fn truncate(&mut self, n: usize) -> Result<()> {
        if n > self.used {
            return argument(format!("{n} rows to keep of {}", self.used));
        }
        if n < self.used {
            self.table.forget_queries(self.positions[n]);
        }
        self.positions[n..self.used].fill(-1);
        self.sequences[n..self.used].fill(-1);
        self.used = n;
        Ok(())
    }

    /// Forget every row and the basis. What comes next is stored as in a new cache.
    pub fn reset(&mut self) {
        self.table.reset();
        self.positions.fill(-1);
        self.sequences.fill(-1);
        self.used = 0;
    }
}
