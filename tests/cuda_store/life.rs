//! A stream that lives on the CPU, each of whose steps the device carries out as well if it can, from the arena as it was before; and what must be alike.

use crate::common::{rel_rms, rotate_heads, rows_of, widen, Random, Stream, Tokens};
use crate::compare::{compare, written, Tally};
use crate::runner::{self, StepFile};
use spectral_kv::cache::plan::Change;
use spectral_kv::cache::{Location, Plan, Rows, Step};
use spectral_kv::config::{Config, LayerShape};
use spectral_kv::layout::geometry::Kind;
use spectral_kv::rope::RopeParams;
use std::collections::BTreeSet;
use std::path::Path;

/// Floats of a row of the residual stream.
const RESIDUAL: usize = 45;

/// What a device has done, by kinds of tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Did {
    Seal(Kind),
    Recode(Kind, Kind),
    Move(Kind),
    Record,
    Recent,
}

/// See the module.
pub struct Life {
    pub s: Stream,
    name: String,
    program: &'static Path,
    pub did: BTreeSet<Did>,
    pub tally: Tally,
    /// Steps that the device carried out, and that were the host's.
    pub steps: [usize; 2],
    /// Largest quotients of errors, of rows and of attention.
    worst: [f64; 2],
}

impl Life {
    pub fn new(name: impl Into<String>, config: &Config, shapes: &[LayerShape], rope: impl Fn(usize) -> RopeParams) -> Self {
        let mut s = Stream::new(config, shapes, rope);
        // What nobody wrote nobody must read, nor change.
        s.arena_mut().iter_mut().enumerate().for_each(|(i, byte)| *byte = (i * 167 + i / 251) as u8 | 1);
        Life { s, name: name.into(), program: runner::sanitized(), did: BTreeSet::new(), tally: Tally::default(), steps: [0; 2], worst: [0.0; 2] }
    }

    /// With an eye on races from now on, instead of on memory.
    pub fn watch_races(&mut self) {
        self.program = runner::watched();
    }

    /// One whole step.
    pub fn step(&mut self, seed: u64, cells: &[u32], places: &[(i32, u32)]) {
        let t = self.s.tokens(seed, cells, places);
        self.s.enter(&t);
        let ints = self.s.plan(cells).unwrap();
        let plan = Plan::parse(&ints).unwrap();
        let residual = residual(seed, cells.len());
        let device = plan.is_for_devices().then(|| self.on_device_with(&ints, &t, (cells.len(), &residual, seed)));
        self.carry_out(&plan, &t, &residual);
        let Some(device) = device else {
            self.steps[1] += 1;
            return;
        };
        self.steps[0] += 1;
        self.note(&plan);
        let g = self.s.table.geometry().clone();
        self.tally.add(&compare(&g, &plan, self.s.arena(), &device));
        self.compare_rows(&plan, &device);
        if seed.is_multiple_of(8) {
            self.compare_attention(seed, &device);
        }
    }

    /// The arena after a plan, which is told of rows of so many tokens.
    pub fn on_device(&self, ints: &[i32], t: &Tokens, n: usize) -> Vec<u8> {
        self.on_device_with(ints, t, (n, &[], 0))
    }

    /// Carry out a plan without tokens that no table has made, and compare all bytes.
    pub fn change(&mut self, ints: &[i32]) {
        let t = self.s.tokens(0, &[], &[]);
        let plan = Plan::parse(ints).unwrap();
        plan.check(self.s.table.geometry()).unwrap();
        let device = self.on_device(ints, &t, 0);
        for layer in 0..self.s.layers.len() {
            self.store(layer, &plan, &Step::new(Rows::empty(), Rows::empty(), Rows::empty()));
        }
        self.note(&plan);
        let g = self.s.table.geometry().clone();
        self.tally.add(&compare(&g, &plan, self.s.arena(), &device));
    }

    fn on_device_with(&self, ints: &[i32], t: &Tokens, (n, residual, turn): (usize, &[f32], u64)) -> Vec<u8> {
        let mut file = StepFile::new(self.s.arena(), ints, self.s.layers.len());
        self.s.layers.iter().zip(&t.inputs).for_each(|(l, input)| file.layer(l, input, n, residual, turn));
        file.run(self.program)
    }

    /// Append `n` tokens of one sequence in the first free cells, `step` at a time.
    pub fn append(&mut self, seed: u64, seq: u32, n: usize, step: usize) {
        for at in (0..n).step_by(step) {
            let m = step.min(n - at);
            let (cells, first) = (self.s.free()[..m].to_vec(), self.s.next_pos(seq));
            let places: Vec<_> = (0..m as i32).map(|i| (first + i, seq)).collect();
            self.step(seed * 1009 + at as u64, &cells, &places);
        }
    }

    fn carry_out(&mut self, plan: &Plan, t: &Tokens, residual: &[f32]) {
        for (i, input) in t.inputs.iter().enumerate() {
            let [q, k, v] = rows_of(&self.s.layers[i], input, t.cells.len());
            let rows = |n| Rows::new(residual, n, RESIDUAL, RESIDUAL, 1, RESIDUAL).unwrap();
            let given = (!residual.is_empty()).then(|| (rows(t.cells.len()), RESIDUAL));
            self.store(i, plan, &Step { residual: given, ..Step::new(q, k, v) });
        }
        self.s.table.commit().unwrap();
        self.s.age();
    }

    fn store(&mut self, layer: usize, plan: &Plan, step: &Step) {
        let (l, mut arena) = self.s.layer_and_arena(layer);
        if plan.fit && !plan.shared {
            return l.append_fit(arena, plan, step).unwrap();
        }
        (0..l.shape().n_head_kv).for_each(|head| l.append_head(head, &mut arena, plan, step).unwrap());
    }

    fn note(&mut self, plan: &Plan) {
        let g = self.s.table.geometry();
        let did = |change| match change {
            Change::Seal { tile, .. } => Did::Seal(g.kind_of(tile)),
            Change::Recode { from, to } => Did::Recode(g.kind_of(from), g.kind_of(to)),
            Change::Move { to, .. } => Did::Move(g.kind_of(to / 64)),
        };
        self.did.extend(plan.changes().map(did));
        self.did.extend((plan.records().len() > 0).then_some(Did::Record));
        self.did.extend((plan.recents().len() > 0).then_some(Did::Recent));
    }

    /// Look at something with an arena in the place of the stream's.
    fn with<T>(&mut self, arena: &[u8], look: impl FnOnce(&Stream) -> T) -> T {
        let own = self.s.arena().to_vec();
        self.s.arena_mut()[..arena.len()].copy_from_slice(arena);
        let found = look(&self.s);
        self.s.arena_mut().copy_from_slice(&own);
        found
    }

    /// Rows of the tiles that were written, against those that the model gave: keys and values of each layer.
    fn compare_rows(&mut self, plan: &Plan, device: &[u8]) {
        let tiles = written(plan);
        let is_written = |cell: &u32| matches!(self.s.table.locate(*cell as usize), Some((Location::Coded(tile, _), _)) if tiles.contains(&tile));
        let cells: Vec<u32> = self.s.live().into_iter().filter(is_written).collect();
        if cells.is_empty() {
            return;
        }
        let errors = |s: &Stream| (0..s.layers.len()).flat_map(|layer| errors(s, layer, &cells)).collect::<Vec<f64>>();
        let (cpu, device) = (errors(&self.s), self.with(device, errors));
        for (i, (cpu, device)) in cpu.iter().zip(device).enumerate() {
            self.worst[0] = self.worst[0].max(device / cpu);
            assert!(
                device <= 1.02 * cpu + 1e-9,
                "{}: layer {}, {}: errors of {cpu} on the CPU, {device} on the device",
                self.name,
                i / 2,
                ["keys", "values"][i % 2]
            );
        }
    }

    /// Attention over the rows as they are coded, against that over those that the model gave.
    fn compare_attention(&mut self, seed: u64, device: &[u8]) {
        for layer in 0..self.s.layers.len() {
            let pos = self.s.next_pos(0);
            let [k, v] = original(&self.s, layer);
            let look = |s: &Stream| {
                let (got, want) = s.attend_beside(layer, seed, 0, (pos, 3), (&k, &v));
                rel_rms(got.into_iter().map(f64::from), want)
            };
            let (cpu, device) = (look(&self.s), self.with(device, look));
            self.worst[1] = self.worst[1].max(device / cpu.max(1e-9));
            assert!(device <= 1.02 * cpu + 1e-5, "{}: attention of layer {layer} is off by {cpu} on the CPU, {device} on the device", self.name);
        }
    }

    /// What there was must have been all of this, and hardly anything is other.
    pub fn end(self, did: &[Did]) {
        let t = &self.tally;
        println!(
            "{}: {:?} steps, {t:?}, errors at most {:.4} and {:.4} times the CPU's, {:?}",
            self.name, self.steps, self.worst[0], self.worst[1], self.did
        );
        assert!(did.iter().all(|d| self.did.contains(d)), "{}: {:?}", self.name, self.did);
        assert!(100 * t.other_codes <= t.codes && 50 * t.other_gains <= t.gains && 25 * t.other_nibbles <= t.nibbles, "{}: {t:?}", self.name);
    }
}

/// Rows of the residual stream; every fifth step has none.
fn residual(seed: u64, n: usize) -> Vec<f32> {
    let mut r = Random::new(seed ^ 0x5eed);
    (0..if seed.is_multiple_of(5) { 0 } else { n * RESIDUAL }).map(|_| r.normal()).collect()
}

/// Keys and values of all cells as the model gave them, zeros where there is none.
fn original(s: &Stream, layer: usize) -> [Vec<f64>; 2] {
    let (g, mut all) = (s.layers[layer].shape(), [Vec::new(), Vec::new()]);
    for row in &s.rows {
        let none = || (vec![0.0; g.n_head_kv * g.d_k], vec![0.0; g.n_head_kv * g.d_v]);
        let (mut key, value) = row.as_ref().map_or_else(none, |row| row.layers[layer].clone());
        rotate_heads(&s.ropes[layer], row.as_ref().map_or(0, |row| row.pos), &mut key, g.d_k);
        all.iter_mut().zip([key, value]).for_each(|(all, x)| all.extend(x.into_iter().map(f64::from)));
    }
    all
}

/// Relative errors of keys and of values of some cells.
fn errors(s: &Stream, layer: usize, cells: &[u32]) -> [f64; 2] {
    let (k, v) = s.rebuild(layer);
    let of = |x: &[f64]| -> Vec<f64> {
        let n = x.len() / s.rows.len();
        cells.iter().flat_map(|c| x[*c as usize * n..(*c as usize + 1) * n].to_vec()).collect()
    };
    let [want_k, want_v] = original(s, layer);
    [(widen(&k), want_k), (widen(&v), want_v)].map(|(got, want)| rel_rms(of(&got), of(&want)))
}
