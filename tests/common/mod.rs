//! Shared by the integration tests: random rows with a spectrum, a slow f64 rotary embedding and a slow f64 attention.

#![allow(dead_code, reason = "each test file uses its part")]

use half::f16;
use spectral_kv::rope::{Pairing, RopeParams};

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
