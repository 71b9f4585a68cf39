//! Shared by the integration tests: random rows with a spectrum, a slow f64 rotary embedding and a slow f64 attention, and a
//! stream driven as llama.cpp does, beside a plain model of its contents.

#![allow(dead_code, reason = "each test file uses its part")]

use half::f16;
use spectral_kv::cache::{plan, Call, Cells, Findings, Geometry, Layer, Location, Mask, Plan, Rows, Step, Table};
use spectral_kv::codec::calibration::{CalibratedLayer, Calibration, LayerModel, Text};
use spectral_kv::config::{Config, LayerShape, Scoring};
use spectral_kv::error::Result;
use spectral_kv::layout::{Heads, BANDS};
use spectral_kv::rope::{Pairing, RopeParams};
use spectral_kv::state::{self, Saving};
use std::sync::Arc;

/// A small deterministic generator (xorshift64*), normal numbers by the sum of twelve uniforms.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    pub fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    pub fn normal(&mut self) -> f32 {
        ((0..12).map(|_| self.uniform()).sum::<f64>() - 6.0) as f32
    }
}

/// Rotation written anew from the definition, in f64: the reference for the library's ropes.
pub fn rotate_f64(p: &RopeParams, position: f64, head: &mut [f64]) {
    if p.pairing == Pairing::None {
        return;
    }
    let n = p.n_dims as f64;
    for i in 0..p.n_dims / 2 {
        let mut theta = position * f64::from(p.freq_base).powf(-2.0 * i as f64 / n);
        if let Some(f) = p.freq_factors.get(i) {
            theta /= f64::from(*f);
        }
        let extrapolated = theta;
        theta *= f64::from(p.freq_scale);
        if p.ext_factor != 0.0 {
            let at = |beta: f32| n * (f64::from(p.n_ctx_orig) / (f64::from(beta) * std::f64::consts::TAU)).ln() / (2.0 * f64::from(p.freq_base).ln());
            let (low, high) = (at(p.beta_fast).floor().max(0.0), at(p.beta_slow).ceil().min(n - 1.0));
            let y = (i as f64 - low) / (high - low).max(0.001);
            let mix = (1.0 - y.clamp(0.0, 1.0)) * f64::from(p.ext_factor);
            theta = theta * (1.0 - mix) + extrapolated * mix;
        }
        let (a, b) = match p.pairing {
            Pairing::Adjacent => (p.offset + 2 * i, p.offset + 2 * i + 1),
            _ => (p.offset + i, p.offset + i + p.n_dims / 2),
        };
        let (s, c) = theta.sin_cos();
        (head[a], head[b]) = (head[a] * c - head[b] * s, head[b] * c + head[a] * s);
    }
}

/// Rotations of every kind, of heads of `d` elements.
pub fn ropes(d: usize) -> Vec<RopeParams> {
    let plain = |p| RopeParams::plain(p, d, 10000.0);
    let half = d / 4 * 2;
    vec![
        plain(Pairing::Adjacent),
        plain(Pairing::Halves),
        RopeParams::none(),
        RopeParams { n_dims: half, ..plain(Pairing::Halves) },
        RopeParams { n_dims: half, offset: d - half, ..plain(Pairing::Adjacent) },
        RopeParams { freq_scale: 0.25, ext_factor: 1.0, n_ctx_orig: 512, ..plain(Pairing::Halves) },
        RopeParams { freq_factors: (0..d / 2).map(|i| 1.0 + i as f32 / 8.0).collect(), ..plain(Pairing::Adjacent) },
    ]
}

/// Rows of one layer as a model would give them.
pub struct Input {
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
}

/// `n` tokens at `positions`: every KV head has a mean and a decaying spectrum, keys and queries are roped.
pub fn input(seed: u64, positions: &[i32], n_head: usize, n_head_kv: usize, d_k: usize, d_v: usize, rope: &RopeParams) -> Input {
    let mut mix = Random::new(77);
    let mut draw = Random::new(seed);
    let mean_k: Vec<f32> = (0..n_head_kv * d_k).map(|_| mix.normal()).collect();
    let mean_v: Vec<f32> = (0..n_head_kv * d_v).map(|_| mix.normal() * 0.3).collect();
    let spectrum = |i: usize| 1.5 * (-(i as f32) / 12.0).exp() + 0.05;
    let mut out = Input { q: vec![], k: vec![], v: vec![] };
    for pos in positions {
        for h in 0..n_head {
            let mut x: Vec<f64> = (0..d_k).map(|i| f64::from(draw.normal() * 0.7 + mean_k[h * n_head_kv / n_head * d_k + i] * 0.3)).collect();
            rotate_f64(rope, f64::from(*pos), &mut x);
            out.q.extend(x.iter().map(|x| *x as f32));
        }
        for h in 0..n_head_kv {
            let mut x: Vec<f64> = (0..d_k).map(|i| f64::from(mean_k[h * d_k + i] + draw.normal() * spectrum(i))).collect();
            rotate_f64(rope, f64::from(*pos), &mut x);
            out.k.extend(x.iter().map(|x| *x as f32));
            out.v.extend((0..d_v).map(|i| mean_v[h * d_v + i] + draw.normal() * spectrum(i)));
        }
    }
    out
}

/// Everything an attention call needs, for the reference.
pub struct Reference<'a> {
    pub n_head: usize,
    pub n_head_kv: usize,
    pub d_k: usize,
    pub d_v: usize,
    pub k: &'a [f64],
    pub v: &'a [f64],
    pub scale: f64,
    pub softcap: f64,
    pub sinks: Option<&'a [f32]>,
}

impl Reference<'_> {
    /// Softmax attention in f64, no cleverness. `mask(token, row)` is added to the score.
    pub fn attend(&self, q: &[f32], n: usize, mask: impl Fn(usize, usize) -> f64) -> Vec<f64> {
        let rows = self.k.len() / (self.n_head_kv * self.d_k);
        let mut out = vec![0.0; n * self.n_head * self.d_v];
        for t in 0..n {
            for h in 0..self.n_head {
                let kv = h * self.n_head_kv / self.n_head;
                let scores: Vec<f64> = (0..rows)
                    .map(|r| {
                        let dot: f64 = (0..self.d_k)
                            .map(|i| f64::from(q[(t * self.n_head + h) * self.d_k + i]) * self.k[(r * self.n_head_kv + kv) * self.d_k + i])
                            .sum();
                        let s = dot * self.scale;
                        (if self.softcap > 0.0 { self.softcap * (s / self.softcap).tanh() } else { s }) + mask(t, r)
                    })
                    .collect();
                let sink = self.sinks.map(|s| f64::from(s[h]));
                let largest = scores.iter().copied().chain(sink).fold(f64::NEG_INFINITY, f64::max);
                if largest == f64::NEG_INFINITY {
                    continue;
                }
                let p: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
                let sum = p.iter().sum::<f64>() + sink.map_or(0.0, |s| (s - largest).exp());
                for (r, p) in p.iter().enumerate() {
                    for i in 0..self.d_v {
                        out[(t * self.n_head + h) * self.d_v + i] += p / sum * self.v[(r * self.n_head_kv + kv) * self.d_v + i];
                    }
                }
            }
        }
        out
    }
}

pub fn widen(x: &[f16]) -> Vec<f64> {
    x.iter().map(|x| x.to_f64()).collect()
}

/// Relative root mean square difference.
pub fn rel_rms(a: impl IntoIterator<Item = f64>, b: impl IntoIterator<Item = f64>) -> f64 {
    let (mut d, mut n) = (0.0, 1e-300);
    for (a, b) in a.into_iter().zip(b) {
        d += (a - b) * (a - b);
        n += b * b;
    }
    (d / n).sqrt()
}

/// A row as a model gave it: what the cache has to give back, wherever the row was shifted to.
#[derive(Clone)]
pub struct ModelRow {
    pub pos: i32,
    /// Position it was stored at.
    pub born: i32,
    /// A bit for every sequence that holds it.
    pub seqs: u32,
    /// It never left its sequence's window (or is a sink), so it must come back bit for bit.
    pub exact: bool,
    /// Key before the rotary embedding and value, of each layer.
    pub layers: Arc<Vec<(Vec<f32>, Vec<f32>)>>,
}

impl ModelRow {
    /// The sequence whose window counts: the lowest.
    pub fn seq(&self) -> i32 {
        self.seqs.trailing_zeros() as i32
    }
}

/// The tokens of one ubatch.
pub struct Tokens {
    pub cells: Vec<u32>,
    rows: Vec<ModelRow>,
    /// Roped, per layer.
    pub inputs: Vec<Input>,
}

/// One stream as llama.cpp drives it, and beside it the plainest possible model of what it holds.
pub struct Stream {
    pub layers: Vec<Layer>,
    pub findings: Arc<Findings>,
    pub table: Table,
    pub rows: Vec<Option<ModelRow>>,
    /// 64-byte units, so that rows are aligned.
    arena: Vec<[u64; 8]>,
    pub ropes: Vec<RopeParams>,
    scoring: Scoring,
    /// Store the heads last to first, as other threads might.
    pub backwards: bool,
    /// The tokens to come hardly differ from each other.
    pub monotonous: bool,
    /// What becomes of rows, before any rotation, that shall not be like those of a usual model.
    pub alter: fn(&Heads, &mut Input),
}

impl Stream {
    pub fn new(config: &Config, shapes: &[LayerShape], rope: impl Fn(usize) -> RopeParams) -> Self {
        let (geometry, findings) = (Arc::new(Geometry::new(config, shapes).unwrap()), Arc::new(Findings::default()));
        let scoring = Scoring { scale: 0.25, softcap: 0.0 };
        let layer = |i: usize| {
            let mut l = Layer::new(geometry.clone(), findings.clone(), i).unwrap();
            l.set_rope(&rope(shapes[i].d_k as usize)).unwrap();
            l.set_scoring(scoring).unwrap();
            l
        };
        Stream {
            layers: (0..shapes.len()).map(layer).collect(),
            table: Table::new(geometry.clone(), findings.clone()),
            findings,
            rows: vec![None; config.n_cells as usize],
            arena: vec![[0; 8]; geometry.arena_bytes.div_ceil(64)],
            ropes: shapes.iter().map(|s| rope(s.d_k as usize)).collect(),
            scoring,
            backwards: false,
            monotonous: false,
            alter: |_, _| {},
        }
    }

    /// What two texts with the rows of this stream's model say about its layers.
    pub fn calibration(&self) -> Calibration {
        let layer = |i: usize| {
            let g = self.layers[i].shape();
            let positions: Vec<i32> = (0..700).collect();
            let text = |seed: u64| {
                let x = input(seed * 31 + i as u64, &positions, g.n_head, g.n_head_kv, g.d_k, g.d_v, &self.ropes[i]);
                let half = |x: &[f32]| x.iter().map(|x| f16::from_f32(*x)).collect::<Vec<_>>();
                Text { k: half(&x.k), v: half(&x.v), q_positions: positions.clone(), q: half(&x.q), residual: Vec::new() }
            };
            let [n_head, n_head_kv, d_k, d_v] = [g.n_head, g.n_head_kv, g.d_k, g.d_v].map(|x| x as u32);
            let shape = LayerShape { n_head, n_head_kv, d_k, d_v };
            let model = LayerModel { shape, rope: &self.ropes[i], scoring: self.scoring, projection: &[], distance: 4096 };
            Some(CalibratedLayer::new(&model, &[text(500), text(501)]).unwrap())
        };
        Calibration { model_hash: 7, layers: (0..self.layers.len()).map(layer).collect() }
    }

    /// Take the bases of all layers from a calibration.
    pub fn calibrate(&mut self, c: &Calibration) {
        self.layers.iter_mut().enumerate().for_each(|(i, l)| l.set_calibration(c, i).unwrap());
    }

    pub fn arena(&self) -> &[u8] {
        bytemuck::cast_slice(&self.arena)
    }

    pub fn arena_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.arena)
    }

    /// A layer, and the arena that it changes.
    pub fn layer_and_arena(&mut self, layer: usize) -> (&Layer, &mut [u8]) {
        (&self.layers[layer], bytemuck::cast_slice_mut(&mut self.arena))
    }

    pub fn live(&self) -> Vec<u32> {
        (0..self.rows.len() as u32).filter(|c| self.rows[*c as usize].is_some()).collect()
    }

    pub fn free(&self) -> Vec<u32> {
        (0..self.rows.len() as u32).filter(|c| self.rows[*c as usize].is_none()).collect()
    }

    /// Cells of a sequence in the order of their positions.
    pub fn cells_of(&self, seq: u32) -> Vec<u32> {
        let mut cells = self.live();
        cells.retain(|c| self.rows[*c as usize].as_ref().is_some_and(|r| r.seqs >> seq & 1 == 1));
        cells.sort_by_key(|c| (self.rows[*c as usize].as_ref().unwrap().pos, *c));
        cells
    }

    /// The position after the last one of a sequence.
    pub fn next_pos(&self, seq: u32) -> i32 {
        self.cells_of(seq).last().map_or(0, |c| self.rows[*c as usize].as_ref().unwrap().pos + 1)
    }

    /// Take `seq` out of cells; those that no sequence holds any longer are empty.
    pub fn remove(&mut self, seq: u32, cells: &[u32]) {
        for c in cells {
            let row = &mut self.rows[*c as usize];
            if let Some(r) = row {
                r.seqs &= !(1 << seq);
                if r.seqs == 0 {
                    *row = None;
                }
            }
        }
    }

    /// What the caller of the table knows: position and lowest sequence of every cell.
    pub fn places(&self) -> (Vec<i32>, Vec<i32>) {
        self.rows.iter().map(|r| r.as_ref().map_or((-1, -1), |r| (r.pos, r.seq()))).unzip()
    }

    /// Random rows for `cells` at `places` (position, sequence). The same seed gives the same rows.
    pub fn tokens(&self, seed: u64, cells: &[u32], places: &[(i32, u32)]) -> Tokens {
        let positions: Vec<i32> = places.iter().map(|p| p.0).collect();
        let mut layers = vec![Vec::new(); cells.len()];
        let mut inputs = Vec::new();
        for (i, l) in self.layers.iter().enumerate() {
            let g = l.shape();
            let mut x = input(seed * 31 + i as u64, &positions, g.n_head, g.n_head_kv, g.d_k, g.d_v, &RopeParams::none());
            (self.alter)(g, &mut x);
            let (nk, nv) = (g.n_head_kv * g.d_k, g.n_head_kv * g.d_v);
            if self.monotonous {
                let one = input(4242, &[0], g.n_head, g.n_head_kv, g.d_k, g.d_v, &RopeParams::none());
                for (x, one) in [(&mut x.k, &one.k), (&mut x.v, &one.v)] {
                    x.iter_mut().zip(one.iter().cycle()).for_each(|(x, one)| *x = one + (*x - one) * 1e-4);
                }
            }
            for (t, row) in layers.iter_mut().enumerate() {
                row.push((x.k[t * nk..(t + 1) * nk].to_vec(), x.v[t * nv..(t + 1) * nv].to_vec()));
            }
            let rope = &self.ropes[i];
            for (t, pos) in positions.iter().enumerate() {
                rotate_heads(rope, *pos, &mut x.q[t * g.n_head * g.d_k..(t + 1) * g.n_head * g.d_k], g.d_k);
                rotate_heads(rope, *pos, &mut x.k[t * nk..(t + 1) * nk], g.d_k);
            }
            inputs.push(x);
        }
        let rows = layers.into_iter().zip(places).map(|(l, (pos, seq))| ModelRow {
            pos: *pos,
            born: *pos,
            seqs: 1 << seq,
            exact: true,
            layers: Arc::new(l),
        });
        Tokens { cells: cells.to_vec(), rows: rows.collect(), inputs }
    }

    /// Put tokens into their cells, as llama.cpp does before it builds the graph.
    pub fn enter(&mut self, t: &Tokens) {
        for (c, r) in t.cells.iter().zip(&t.rows) {
            self.rows[*c as usize] = Some(r.clone());
        }
    }

    pub fn plan(&mut self, new: &[u32]) -> Result<Vec<i32>> {
        let (pos, seq) = self.places();
        plan_on(&mut self.table, Cells { pos: &pos, seq: &seq }, new)
    }

    /// The table as it is after looking at the cells, and a plan to look at rows with: the stream's own table has nothing pending.
    fn look(&self) -> (Table, Vec<i32>) {
        let (mut table, (pos, seq)) = (self.table.clone(), self.places());
        let ints = plan_on(&mut table, Cells { pos: &pos, seq: &seq }, &[]).unwrap();
        (table, ints)
    }

    /// Carry out a plan on one layer.
    pub fn run(&mut self, layer: usize, ints: &[i32], t: &Tokens) -> Result<()> {
        let plan = Plan::parse(ints)?;
        let l = &self.layers[layer];
        let [q, k, v] = rows_of(l, &t.inputs[layer], t.cells.len());
        let step = Step::new(q, k, v);
        let mut arena: &mut [u8] = bytemuck::cast_slice_mut(&mut self.arena);
        if plan.fit && !plan.shared {
            return l.append_fit(arena, &plan, &step);
        }
        let heads = 0..l.shape().n_head_kv;
        let heads: Vec<usize> = if self.backwards { heads.rev().collect() } else { heads.collect() };
        heads.into_iter().try_for_each(|head| l.append_head(head, &mut arena, &plan, &step))
    }

    /// One whole step.
    pub fn step(&mut self, seed: u64, cells: &[u32], places: &[(i32, u32)]) -> Result<()> {
        let t = self.tokens(seed, cells, places);
        self.enter(&t);
        let plan = match self.plan(cells) {
            Ok(p) => p,
            Err(e) => {
                cells.iter().for_each(|c| self.rows[*c as usize] = None);
                return Err(e);
            }
        };
        for layer in 0..self.layers.len() {
            self.run(layer, &plan, &t)?;
        }
        self.table.commit()?;
        self.age();
        Ok(())
    }

    /// Append `n` tokens of one sequence in the first free cells, `step` at a time.
    pub fn append(&mut self, seed: u64, seq: u32, n: usize, step: usize) -> Result<()> {
        for at in (0..n).step_by(step) {
            let m = step.min(n - at);
            let cells = self.free()[..m].to_vec();
            let first = self.next_pos(seq);
            let places: Vec<_> = (0..m as i32).map(|i| (first + i, seq)).collect();
            self.step(seed * 1009 + at as u64, &cells, &places)?;
        }
        Ok(())
    }

    /// Steps of so many tokens until the next fit is over, `look` after each step from that fit on; gives how many these were.
    pub fn refit(&mut self, step: usize, mut look: impl FnMut(&mut Stream)) -> usize {
        let fits = |s: &Stream| s.layers[0].counters.read().fits;
        let (before, mut taken) = (fits(self), 0);
        for seed in 0..4000 {
            self.append(100 + seed, 0, step, step).unwrap();
            if fits(self) > before {
                look(self);
                taken += 1;
                if self.former() == 0 && self.waiting() == 0 {
                    return taken;
                }
            }
        }
        panic!("{before} fits, {} rows, {} wait, {} tiles in the former bases", self.live().len(), self.waiting(), self.former());
    }

    /// Steps until tiles are being coded again in new bases.
    pub fn begin_another_fit(&mut self) {
        self.refit(40, |_| {});
        while self.former() == 0 {
            self.append(5000 + self.live().len() as u64, 0, 1, 1).unwrap();
        }
    }

    /// A step is over: rows that are neither sinks nor in the window of their sequence need not be exact any more.
    pub fn age(&mut self) {
        let c = &self.table.geometry().config;
        let (window, sinks) = (c.window as usize, c.sinks as i32);
        for seq in 0..c.n_seqs as i32 {
            let mut cells: Vec<usize> = (0..self.rows.len()).filter(|i| self.rows[*i].as_ref().is_some_and(|r| r.seq() == seq)).collect();
            cells.sort_by_key(|i| (self.rows[*i].as_ref().unwrap().pos, *i));
            let outside = cells.len().saturating_sub(window);
            for i in &cells[..outside] {
                let r = self.rows[*i].as_mut().unwrap();
                r.exact &= r.pos < sinks;
            }
        }
    }

    /// The graph stops after `done` layers; every layer replays, the tokens are gone.
    pub fn abort(&mut self, seed: u64, cells: &[u32], places: &[(i32, u32)], done: usize) -> Result<()> {
        let t = self.tokens(seed, cells, places);
        self.enter(&t);
        let ints = self.plan(cells)?;
        (0..done).try_for_each(|layer| self.run(layer, &ints, &t))?;
        let plan = Plan::parse(&ints)?;
        for l in &self.layers {
            l.replay(bytemuck::cast_slice_mut(&mut self.arena), &plan)?;
        }
        self.table.commit_replayed()?;
        // The plan sealed as if the tokens were there.
        self.age();
        cells.iter().for_each(|c| self.rows[*c as usize] = None);
        Ok(())
    }

    /// Every cell's key and value in one layer, as the cache gives them.
    pub fn rebuild(&self, layer: usize) -> (Vec<f16>, Vec<f16>) {
        let (_, ints) = self.look();
        let (l, n) = (&self.layers[layer], self.rows.len());
        let (nk, nv) = (l.shape().n_head_kv * l.shape().d_k, l.shape().n_head_kv * l.shape().d_v);
        let (mut k, mut v) = (vec![f16::ZERO; n * nk], vec![f16::ZERO; n * nv]);
        let none = Rows::empty();
        l.reconstruct(self.arena(), &Plan::parse(&ints).unwrap(), &none, &none, 0..n, &mut k, &mut v).unwrap();
        (k, v)
    }

    /// [`Stream::rebuild`] of some cells, in their order, in all layers: bits to compare.
    pub fn bits(&self, cells: &[u32]) -> Vec<u16> {
        let mut out = Vec::new();
        for layer in 0..self.layers.len() {
            let (k, v) = self.rebuild(layer);
            let n = self.rows.len();
            for x in [k, v] {
                let row = x.len() / n;
                out.extend(cells.iter().flat_map(|c| x[*c as usize * row..(*c as usize + 1) * row].iter().map(|x| x.to_bits())));
            }
        }
        out
    }

    /// Band of a coded row; [`BANDS`] for one that waits.
    pub fn band(&self, at: Location) -> Option<usize> {
        match at {
            Location::Coded(tile, _) => Some(self.table.geometry().band_of(tile)),
            Location::Slot(_) => None,
        }
    }

    /// How many rows wait for a fit, or to be coded after it.
    pub fn waiting(&self) -> usize {
        self.live().iter().filter(|c| self.table.locate(**c as usize).and_then(|(at, _)| self.band(at)) == Some(BANDS)).count()
    }

    /// How many tiles are in the former bases.
    pub fn former(&self) -> usize {
        let g = self.table.geometry();
        (0..g.tiles).filter(|t| self.table.number(*t) != *t).count()
    }

    /// Relative error of the values of some cells, over all layers.
    pub fn error_of(&self, cells: &[u32]) -> f64 {
        let (mut got, mut want) = (Vec::new(), Vec::new());
        for layer in 0..self.layers.len() {
            let (_, v) = self.rebuild(layer);
            let nv = v.len() / self.rows.len();
            for c in cells {
                got.extend(widen(&v[*c as usize * nv..(*c as usize + 1) * nv]));
                want.extend(self.rows[*c as usize].as_ref().unwrap().layers[layer].1.iter().map(|x| f64::from(*x)));
            }
        }
        rel_rms(got, want)
    }

    /// Attention of `n` random queries at `pos` of `seq` over its rows, and the f64 reference over the rebuilt rows.
    pub fn attend(&self, layer: usize, seed: u64, seq: u32, pos: i32, n: usize) -> (Vec<f32>, Vec<f64>) {
        let (k, v) = self.rebuild(layer);
        self.attend_beside(layer, seed, seq, (pos, n), (&widen(&k), &widen(&v)))
    }

    /// The same, with the reference over other keys and values of all cells.
    pub fn attend_beside(&self, layer: usize, seed: u64, seq: u32, (pos, n): (i32, usize), (k, v): (&[f64], &[f64])) -> (Vec<f32>, Vec<f64>) {
        let (_, ints) = self.look();
        let plan = Plan::parse(&ints).unwrap();
        let l = &self.layers[layer];
        let g = l.shape();
        let rope = &self.ropes[layer];
        let mut q = input(seed, &vec![pos; n], g.n_head, g.n_head_kv, g.d_k, g.d_v, &RopeParams::none()).q;
        rotate_heads(rope, pos, &mut q, g.d_k);
        let cells = self.rows.len();
        let shows = |r: &Option<ModelRow>| r.as_ref().is_some_and(|r| r.seqs >> seq & 1 == 1 && r.pos <= pos);
        let mask: Vec<f32> = self.rows.iter().map(|r| if shows(r) { 0.0 } else { f32::NEG_INFINITY }).collect();
        let m = Mask::F32 { values: &mask, stride: 0, n_kv: cells };
        let (rows, none) = (Rows::new(&q, n, g.n_head * g.d_k, g.d_k, g.n_head, g.d_k).unwrap(), Rows::empty());
        let (mut partials, mut out) = (vec![f32::NAN; l.partial_floats(n)], vec![f32::NAN; n * g.n_head * g.d_v]);
        let call = Call { arena: self.arena(), plan: &plan, q: &rows, k: &none, v: &none, scoring: self.scoring, mask: m };
        l.attend(0..l.units(), &call, &mut partials).unwrap();
        l.combine(n, &partials, &[], 0..n * g.n_head, &mut out).unwrap();
        let scale = f64::from(self.scoring.scale);
        let reference = Reference { n_head: g.n_head, n_head_kv: g.n_head_kv, d_k: g.d_k, d_v: g.d_v, k, v, scale, softcap: 0.0, sinks: None };
        let want = reference.attend(&q, n, |_, r| f64::from(mask[r]));
        (out, want)
    }

    /// Everything that must hold between two steps. `limit` bounds the relative error of a coded key or value.
    pub fn check(&self, limit: f64) {
        let (table, _) = self.look();
        let mut taken = std::collections::HashSet::new();
        for (cell, row) in self.rows.iter().enumerate() {
            let at = table.locate(cell).map(|(at, _)| at);
            assert_eq!(at.is_some(), row.is_some(), "cell {cell} has a row, or the table thinks so");
            assert!(at.is_none_or(|at| taken.insert(format!("{at:?}"))), "two cells share {at:?}");
        }
        for layer in 0..self.layers.len() {
            let (k, v) = self.rebuild(layer);
            let rope = &self.ropes[layer];
            let (dk, nk, nv) = (self.layers[layer].shape().d_k, k.len() / self.rows.len(), v.len() / self.rows.len());
            for (cell, row) in self.rows.iter().enumerate() {
                let (k, v) = (&k[cell * nk..(cell + 1) * nk], &v[cell * nv..(cell + 1) * nv]);
                let Some(r) = row else {
                    assert!(k.iter().chain(v).all(|x| *x == f16::ZERO), "empty cell {cell} gives zeros");
                    continue;
                };
                let (mut key, value) = r.layers[layer].clone();
                rotate_heads(rope, r.pos, &mut key, dk);
                let same = |got: &[f16], want: &[f32]| got.iter().zip(want).all(|(a, b)| *a == f16::from_f32(*b));
                let near = |got: &[f16], want: &[f32]| rel_rms(widen(got), want.iter().map(|x| f64::from(*x)));
                let exact = r.exact;
                let place =
                    || format!("layer {layer}, cell {cell}, position {} (stored at {}), sequences {:b}, exact {exact}", r.pos, r.born, r.seqs);
                if exact {
                    assert!(same(v, &value), "value: {}", place());
                    assert!(r.pos != r.born || same(k, &key), "key: {}", place());
                }
                let limit = if exact { 2e-3 } else { limit };
                for (error, name) in [(near(k, &key), "key"), (near(v, &value), "value")] {
                    assert!(error < limit, "{name} is off by {error}: {}", place());
                }
            }
            for seq in 0..self.table.geometry().config.n_seqs {
                let (out, want) = self.attend(layer, 17 + u64::from(seq), seq, self.next_pos(seq), 2);
                let error = rel_rms(out.iter().map(|x| f64::from(*x)), want.iter().copied());
                // The reference sees keys rounded to f16, attention does not. Nothing to see gives zeros in both.
                assert!(
                    error < 3e-3 || want.iter().all(|x| *x == 0.0) && out.iter().all(|x| *x == 0.0),
                    "attention of layer {layer}, sequence {seq}: {error}"
                );
            }
        }
    }

    pub fn save(&self, cells: &[u32]) -> Result<Vec<u8>> {
        let state = Saving::new(&self.table, &self.layers.iter().collect::<Vec<_>>(), self.arena(), cells)?;
        // What was there before must not show through.
        let mut bytes = vec![0xa5; state.size() + 3];
        state.write(&mut bytes)?;
        assert_eq!(bytes.split_off(state.size()), [0xa5; 3]);
        Ok(bytes)
    }

    /// Restore a state of `rows` into `cells`; on error the cells are empty again.
    pub fn restore(&mut self, cells: &[u32], rows: &[ModelRow], bytes: &[u8]) -> Result<()> {
        for (c, r) in cells.iter().zip(rows) {
            self.rows[*c as usize] = Some(r.clone());
        }
        let (pos, seq) = self.places();
        let layers: Vec<_> = self.layers.iter().collect();
        let arena = bytemuck::cast_slice_mut(&mut self.arena);
        let result = state::read(&mut self.table, &layers, arena, Cells { pos: &pos, seq: &seq }, cells, bytes);
        if result.is_err() {
            cells.iter().for_each(|c| self.rows[*c as usize] = None);
        }
        result
    }
}

fn plan_on(table: &mut Table, cells: Cells, new: &[u32]) -> Result<Vec<i32>> {
    let mut out = vec![0; plan::capacity(table.geometry(), new.len())];
    let used = table.plan(cells, new, &mut out)?;
    out.truncate(used);
    Ok(out)
}

pub fn rotate_heads(rope: &RopeParams, pos: i32, x: &mut [f32], d: usize) {
    for head in x.chunks_exact_mut(d) {
        let mut wide: Vec<f64> = head.iter().map(|x| f64::from(*x)).collect();
        rotate_f64(rope, f64::from(pos), &mut wide);
        head.iter_mut().zip(wide).for_each(|(x, w)| *x = w as f32);
    }
}

pub fn rows_of<'a>(l: &Layer, x: &'a Input, n: usize) -> [Rows<'a>; 3] {
    let g = l.shape();
    let rows = |data, heads: usize, d: usize| Rows::new(data, n, heads * d, d, heads, d).unwrap();
    [rows(&x.q, g.n_head, g.d_k), rows(&x.k, g.n_head_kv, g.d_k), rows(&x.v, g.n_head_kv, g.d_v)]
}
