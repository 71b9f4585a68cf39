//! Attention calls of streams, what is right about each, and the comparison. A call is captured before its step is carried out; many are then carried out by one
//! process. Knows nothing of how kernels work, but for how exact they are.

use crate::common::{rel_rms, rotate_heads, rows_of, widen, Input, Random, Reference, Stream, Tokens};
use crate::file::{Parts, Strides};
use crate::runner;
use half::f16;
use spectral_kv::cache::{self, Layer, Mask, Plan, Rows};
use spectral_kv::config::Scoring;
use std::path::{Path, PathBuf};

/// Coefficients of queries and weights of values are rounded to f16, by 2^-11 at most: for many of them, in no common direction, sums are off by a fraction of that.
/// It is relative to the mean norm of the values, and grows with what scores differ by: a few large ones decide, and they are off the more the larger they are.
const BOUND: f64 = 1.0 / 4096.0;
/// The same where no rows are coded: there, all is f32, or split in two so that it is nearly so.
const EXACT_BOUND: f64 = BOUND / 64.0;
/// A folder that calls are written to, with what is right, for a device elsewhere (`tests/gpu`); they are not carried out here then.
const FOLDER: &str = "SPECTRAL_KV_GPU_CALLS";

/// The folder that calls are written to, if they are.
pub fn folder() -> Option<PathBuf> {
    let folder = PathBuf::from(std::env::var_os(FOLDER)?);
    std::fs::create_dir_all(&folder).unwrap();
    Some(folder)
}

/// What a step's tokens see.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub enum Sight {
    /// Rows of their sequence up to their position.
    #[default]
    Causal,
    /// Some of those, and some scores get something added.
    Some,
    /// There is no mask.
    All,
}

/// How a step looks at its rows.
#[derive(Debug, Clone, Default)]
pub struct Look {
    /// Factor on scores; that of the head size unless it is named.
    pub scale: Option<f32>,
    pub softcap: f32,
    pub sinks: Vec<f32>,
    pub sight: Sight,
    /// A token that sees nothing at all.
    pub blind: Option<usize>,
    /// Cells that the mask covers; all unless they are named.
    pub n_kv: Option<usize>,
    pub strides: Strides,
    /// Multiprocessors of the device: how many splits there are follows from it.
    pub multiprocessors: Option<u32>,
    /// Splits in place of those.
    pub splits: Option<u32>,
}

/// One call, and what is right.
struct Call {
    name: String,
    file: Vec<u8>,
    d_v: usize,
    /// Over the rows that the cache rebuilds, and over those that the model gave, in f64; what the CPU makes of it.
    rebuilt: Vec<f64>,
    original: Vec<f64>,
    cpu: Vec<f64>,
    /// For each query head: how far a device may be off the CPU, relative to the output, and off the rows that the cache rebuilds.
    bounds: Vec<f64>,
    allowed: Vec<f64>,
}

/// Calls to be carried out together.
pub struct Calls {
    name: &'static str,
    calls: Vec<Call>,
}

impl Calls {
    pub fn new(name: &'static str) -> Self {
        Calls { name, calls: Vec::new() }
    }

    /// One step of tokens at `places`: its attention is captured, then it is stored.
    pub fn step(&mut self, s: &mut Stream, seed: u64, cells: &[u32], places: &[(i32, u32)], look: &Look) {
        let t = s.tokens(seed, cells, places);
        s.enter(&t);
        let ints = s.plan(cells).unwrap();
        for layer in 0..s.layers.len() {
            self.capture(s, layer, &Asked::new(&t.inputs[layer], &ints, places, cells.len()), look);
        }
        carry_out(s, &ints, &t);
    }

    /// The next `n` tokens of sequence 0 in the first free cells.
    pub fn next(&mut self, s: &mut Stream, seed: u64, n: usize, look: &Look) {
        let (cells, first) = (s.free()[..n].to_vec(), s.next_pos(0));
        let places: Vec<_> = (0..n as i32).map(|i| (first + i, 0)).collect();
        self.step(s, seed, &cells, &places, look);
    }

    /// Queries of `n` tokens behind those of sequence 0 that bring no rows.
    pub fn ask(&mut self, s: &mut Stream, seed: u64, n: usize, look: &Look) {
        let places: Vec<_> = (0..n as i32).map(|i| (s.next_pos(0) + i, 0)).collect();
        let (t, ints) = (s.tokens(seed, &vec![0; n], &places), s.plan(&[]).unwrap());
        for layer in 0..s.layers.len() {
            self.capture(s, layer, &Asked::new(&t.inputs[layer], &ints, &places, 0), look);
        }
    }

    fn capture(&mut self, s: &Stream, layer: usize, asked: &Asked, look: &Look) {
        let (l, n) = (&s.layers[layer], asked.places.len());
        let (g, n_kv) = (*l.shape(), look.n_kv.unwrap_or(s.rows.len()));
        let scoring = Scoring { scale: look.scale.unwrap_or(1.0 / (g.d_k as f32).sqrt()), softcap: look.softcap };
        let mask = Masked::new(s, asked, look, n_kv);
        let cpu = on_cpu(s, l, asked, (scoring, look), &mask);
        let seen = |t: usize, cell: usize| mask.at(s, t, cell);
        let bound = if asked.plan.tiles().len() > 0 { BOUND } else { EXACT_BOUND };
        let truth = |(k, v): &(Vec<f64>, Vec<f64>)| Truth::new(l, (scoring, look, bound), &asked.input.q, [k, v], &seen);
        let (rebuilt, original) = (truth(&rebuilt_rows(s, l, asked)), truth(&original_rows(s, layer)));
        let allowed = allowed(&rebuilt, &cpu, g.d_v);
        let parts = Parts {
            layer: l,
            scoring,
            n,
            multiprocessors: look.multiprocessors.unwrap_or(3),
            splits: look.splits,
            arena: s.arena(),
            plan: asked.ints,
            input: asked.input,
            n_own: asked.n_own,
            strides: look.strides,
            mask: (mask.values(), mask.stride, n_kv),
            sinks: &look.sinks,
            want: &rebuilt.out,
            bounds: &allowed,
            bytes_to_read: 0,
        };
        self.calls.push(Call {
            name: format!("{} {}: {g:?}, {n} tokens, {} tiles, {look:?}", self.name, self.calls.len(), asked.plan.tiles().len()),
            file: parts.to_bytes(),
            d_v: g.d_v,
            rebuilt: rebuilt.out,
            original: original.out,
            cpu,
            bounds: rebuilt.bounds,
            allowed,
        });
    }

    /// Carry all of them out and compare, every head of every token by itself: one wrong head must not hide among right ones.
    pub fn check(self) {
        if let Some(folder) = folder() {
            return self.write(&folder);
        }
        let outputs = self.run_on(runner::sanitized());
        for (call, got) in self.calls.iter().zip(&outputs) {
            call.compare(&wide(got));
        }
    }

    /// The same with an eye on races in shared memory.
    pub fn check_races(self) {
        if folder().is_none() {
            self.run_on(runner::watched());
        }
    }

    fn run_on(&self, program: &Path) -> Vec<Vec<f32>> {
        runner::run(program, self.name, &self.calls.iter().map(|c| &c.file[..]).collect::<Vec<_>>())
    }

    fn write(&self, folder: &Path) {
        for (i, call) in self.calls.iter().enumerate() {
            std::fs::write(folder.join(format!("{}.{i}.call", self.name)), &call.file).unwrap();
        }
    }
}

impl Call {
    fn compare(&self, got: &[f64]) {
        assert_eq!(got.len(), self.cpu.len());
        let mut worst = [0.0f64; 4];
        for (i, bound) in self.bounds.iter().enumerate() {
            let part = |x: &[f64]| x[i * self.d_v..(i + 1) * self.d_v].to_vec();
            if part(&self.rebuilt).iter().all(|x| *x == 0.0) {
                assert!(part(got).iter().all(|x| *x == 0.0), "{}, head {i}: what sees nothing gives zeros", self.name);
                continue;
            }
            let off = |x: &[f64], of: &[f64]| rel_rms(part(x), part(of));
            let (apart, error, cpu) = (off(got, &self.cpu), off(got, &self.rebuilt), off(&self.cpu, &self.rebuilt));
            let (lost, cpu_lost) = (off(got, &self.original), off(&self.cpu, &self.original));
            assert!(
                apart < *bound && error < self.allowed[i] && lost < 2.0 * cpu_lost + bound,
                "{}, head {i}: {apart} off the CPU, {error} off the rebuilt rows (CPU {cpu}), {lost} off the original (CPU {cpu_lost}), bound {bound}",
                self.name
            );
            for (worst, x) in worst.iter_mut().zip([apart / bound, error, cpu, lost / cpu_lost]) {
                *worst = worst.max(x);
            }
        }
        println!(
            "{}: {:.2} of the bound, {:.1e} off the rebuilt rows (CPU {:.1e}), {:.2} of the CPU's loss",
            self.name, worst[0], worst[1], worst[2], worst[3]
        );
    }
}

/// What a call is about.
struct Asked<'a> {
    input: &'a Input,
    ints: &'a [i32],
    plan: Plan<'a>,
    places: &'a [(i32, u32)],
    /// How many of the tokens bring rows.
    n_own: usize,
}

impl<'a> Asked<'a> {
    fn new(input: &'a Input, ints: &'a [i32], places: &'a [(i32, u32)], n_own: usize) -> Self {
        Asked { input, ints, plan: Plan::parse(ints).unwrap(), places, n_own }
    }

    fn rows(&self, l: &Layer) -> [Rows<'a>; 3] {
        let [q, k, v] = rows_of(l, self.input, self.places.len());
        if self.n_own > 0 {
            [q, k, v]
        } else {
            [q, Rows::empty(), Rows::empty()]
        }
    }
}

/// The mask of a call.
struct Masked {
    values: Option<Vec<f16>>,
    stride: usize,
    n_kv: usize,
}

impl Masked {
    fn new(s: &Stream, asked: &Asked, look: &Look, n_kv: usize) -> Self {
        if look.sight == Sight::All {
            return Masked { values: None, stride: 0, n_kv: s.rows.len() };
        }
        // Between the rows of a mask that is longer than what it covers, nothing must be looked at.
        let stride = n_kv + if look.n_kv.is_some() { 3 } else { 0 };
        let (mut r, mut values) = (Random::new(n_kv as u64), vec![f16::NAN; asked.places.len() * stride]);
        for (t, (pos, seq)) in asked.places.iter().enumerate() {
            for (cell, value) in values[t * stride..t * stride + n_kv].iter_mut().enumerate() {
                let shown = s.rows[cell].as_ref().is_some_and(|r| r.seqs >> seq & 1 == 1 && r.pos <= *pos);
                let kept = look.sight == Sight::Causal || cell % 3 == 0 || r.below(4) > 0;
                *value = match shown && kept && look.blind != Some(t) {
                    false => f16::NEG_INFINITY,
                    true if look.sight == Sight::Some && r.below(5) == 0 => f16::from_f32(-0.75),
                    true => f16::ZERO,
                };
            }
        }
        Masked { values: Some(values), stride, n_kv }
    }

    fn values(&self) -> &[f16] {
        self.values.as_deref().unwrap_or_default()
    }

    /// What is added to a score.
    fn at(&self, s: &Stream, t: usize, cell: usize) -> f64 {
        match &self.values {
            _ if s.rows[cell].is_none() || cell >= self.n_kv => f64::NEG_INFINITY,
            Some(values) => values[t * self.stride + cell].to_f64(),
            None => 0.0,
        }
    }
}

/// What the CPU makes of a call.
fn on_cpu(s: &Stream, l: &Layer, asked: &Asked, (scoring, look): (Scoring, &Look), mask: &Masked) -> Vec<f64> {
    let (n, [q, k, v]) = (asked.places.len(), asked.rows(l));
    let (mut partials, mut out) = (vec![f32::NAN; l.partial_floats(n)], vec![f32::NAN; n * l.shape().n_head * l.shape().d_v]);
    let values = Mask::F16 { values: mask.values(), stride: mask.stride, n_kv: mask.n_kv };
    let mask = if mask.values.is_some() { values } else { Mask::All };
    l.attend(0..l.units(), &cache::Call { arena: s.arena(), plan: &asked.plan, q: &q, k: &k, v: &v, scoring, mask }, &mut partials).unwrap();
    l.combine(n, &partials, &look.sinks, 0..n * l.shape().n_head, &mut out).unwrap();
    wide(&out)
}

/// Attention in f64.
struct Truth {
    out: Vec<f64>,
    /// What a device's error may be, for each query head.
    bounds: Vec<f64>,
}

impl Truth {
    fn new(l: &Layer, (scoring, look, bound): (Scoring, &Look, f64), q: &[f32], [k, v]: [&[f64]; 2], seen: &dyn Fn(usize, usize) -> f64) -> Self {
        let g = l.shape();
        let (n, rows) = (q.len() / (g.n_head * g.d_k), k.len() / (g.n_head_kv * g.d_k));
        // The norm of each value is one element more, so that its mean comes along.
        let normed: Vec<f64> = v.chunks_exact(g.d_v).flat_map(|v| v.iter().copied().chain([norm(v)])).collect();
        let sinks = (!look.sinks.is_empty()).then_some(&look.sinks[..]);
        let (scale, softcap) = (f64::from(scoring.scale), f64::from(scoring.softcap));
        let reference = Reference { n_head: g.n_head, n_head_kv: g.n_head_kv, d_k: g.d_k, d_v: g.d_v + 1, k, v: &normed, scale, softcap, sinks };
        let all = reference.attend(q, n, seen);
        let score = |t: usize, head: usize, row: usize| {
            let (q, k) = (&q[(t * g.n_head + head) * g.d_k..], &k[(row * g.n_head_kv + head / g.group()) * g.d_k..]);
            q.iter().zip(k).take(g.d_k).map(|(q, k)| f64::from(*q) * k).sum::<f64>() * scale
        };
        let bound_of = |(i, out): (usize, &[f64])| {
            let (t, head) = (i / g.n_head, i % g.n_head);
            let scores = (0..rows).filter(|row| seen(t, *row) > f64::NEG_INFINITY).map(|row| score(t, head, row));
            let (low, high) = scores.fold((0.0f64, 0.0f64), |(low, high), s| (low.min(s), high.max(s)));
            bound * (1.0 + (high - low) / 6.0) * out[g.d_v] / norm(&out[..g.d_v]).max(1e-300)
        };
        let bounds = all.chunks_exact(g.d_v + 1).enumerate().map(bound_of).collect();
        Truth { out: all.chunks_exact(g.d_v + 1).flat_map(|out| out[..g.d_v].to_vec()).collect(), bounds }
    }
}

/// How far each query head may be off what is right over the rebuilt rows. These are rounded to f16, so that the CPU is off, too.
fn allowed(rebuilt: &Truth, cpu: &[f64], d_v: usize) -> Vec<f64> {
    let off = |i: usize| rel_rms(cpu[i * d_v..(i + 1) * d_v].iter().copied(), rebuilt.out[i * d_v..(i + 1) * d_v].iter().copied());
    rebuilt.bounds.iter().enumerate().map(|(i, bound)| bound.max(1.5 * off(i))).collect()
}

fn norm(x: &[f64]) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>().sqrt()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

/// Keys and values of all cells as the cache gives them.
fn rebuilt_rows(s: &Stream, l: &Layer, asked: &Asked) -> (Vec<f64>, Vec<f64>) {
    let (g, n) = (l.shape(), s.rows.len());
    let (mut dense_k, mut dense_v) = (vec![f16::ZERO; n * g.n_head_kv * g.d_k], vec![f16::ZERO; n * g.n_head_kv * g.d_v]);
    let [_, k, v] = asked.rows(l);
    l.reconstruct(s.arena(), &asked.plan, &k, &v, 0..n, &mut dense_k, &mut dense_v).unwrap();
    (widen(&dense_k), widen(&dense_v))
}

/// The same as the model gave them.
fn original_rows(s: &Stream, layer: usize) -> (Vec<f64>, Vec<f64>) {
    let g = s.layers[layer].shape();
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    for row in &s.rows {
        let Some(row) = row else {
            keys.extend(vec![0.0; g.n_head_kv * g.d_k]);
            values.extend(vec![0.0; g.n_head_kv * g.d_v]);
            continue;
        };
        let (mut key, value) = row.layers[layer].clone();
        rotate_heads(&s.ropes[layer], row.pos, &mut key, g.d_k);
        keys.extend(wide(&key));
        values.extend(wide(&value));
    }
    (keys, values)
}

fn carry_out(s: &mut Stream, ints: &[i32], t: &Tokens) {
    (0..s.layers.len()).for_each(|layer| s.run(layer, ints, t).unwrap());
    s.table.commit().unwrap();
    s.age();
}
