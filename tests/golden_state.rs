//! Saved states against files that were written once (`tests/data/*.skvstate`): what is on disks stays readable, and is written the same, byte by byte.
//!
//! Rows are made of whole numbers and kernels are those without intrinsics, so that rows which wait for a fit are coded alike everywhere. Bases are not:
//! an eigenvector has no sign of its own, and how its last bits are rounded is up to the CPU. So a state with bases is read and written again.
//! `UPDATE_GOLDEN=1 cargo test --release --test golden_state` makes the files anew.

use half::f16;
use spectral_kv::cache::{plan, Call, Cells, Findings, Geometry, Layer, Mask, Plan, Rows, Step, Table};
use spectral_kv::config::{Config, LayerShape, Scoring};
use spectral_kv::layout::Heads;
use spectral_kv::rope::RopeParams;
use spectral_kv::state::{self, Saving};
use std::path::PathBuf;
use std::sync::{Arc, Once};

const CELLS: usize = 1024;
const SHAPES: [LayerShape; 2] = [LayerShape { n_head: 2, n_head_kv: 1, d_k: 16, d_v: 16 }, LayerShape { n_head: 2, n_head_kv: 2, d_k: 16, d_v: 8 }];

/// Name, rows, the error that they may have once they are coded, and what one query gives: the sum of its outputs in both layers.
const STATES: [(&str, usize, f64, f64); 3] = [("exact", 20, 0.0, 3.0907), ("waiting", 300, 0.01, 3.49176), ("fitted", 900, 0.06, 3.30991)];

/// A number of the row of a token, of this layer and kind: a whole number of 9 bits times a power of two, which f16 holds.
fn number(kind: u32, layer: u32, token: u32, i: u32) -> f32 {
    let x = (token.wrapping_mul(0x9e37_79b1) ^ (kind * 7919 + layer * 104_729 + i * 31)).wrapping_mul(0x85eb_ca6b);
    let x = (x ^ x >> 15).wrapping_mul(0xc2b2_ae35);
    ((x >> 16) % 511) as f32 / 256.0 - 255.0 / 256.0 + if kind == 2 && i.is_multiple_of(5) { 0.5 } else { 0.0 }
}

/// Rows of tokens: each element half as large as the one 4 before it.
fn rows(kind: u32, layer: u32, tokens: std::ops::Range<usize>, heads: usize, d: usize) -> Vec<f32> {
    let one = |t: usize| (0..heads * d).map(move |i| number(kind, layer, t as u32, i as u32) * 2f32.powi(-((i % d / 4) as i32)));
    tokens.flat_map(one).collect()
}

struct Stream {
    layers: Vec<Layer>,
    table: Table,
    arena: Vec<[u64; 8]>,
    pos: Vec<i32>,
    seq: Vec<i32>,
}

impl Stream {
    fn new() -> Self {
        static LEVEL: Once = Once::new();
        LEVEL.call_once(|| std::env::set_var("SPECTRAL_KV_CPU_LEVEL", "portable"));
        let config = Config { n_cells: CELLS as u32, n_tokens: 64, window: 32, bits: 8.0, ..Config::default() };
        let (geometry, findings) = (Arc::new(Geometry::new(&config, &SHAPES).unwrap()), Arc::new(Findings::default()));
        let layer = |i| {
            let mut l = Layer::new(geometry.clone(), findings.clone(), i).unwrap();
            l.set_rope(&RopeParams::none()).unwrap();
            l
        };
        Stream {
            layers: (0..SHAPES.len()).map(layer).collect(),
            arena: vec![[0; 8]; geometry.arena_bytes.div_ceil(64)],
            table: Table::new(geometry, findings),
            pos: vec![-1; CELLS],
            seq: vec![-1; CELLS],
        }
    }

    fn plan(&mut self, new: &[u32]) -> Vec<i32> {
        let mut ints = vec![0; plan::capacity(self.table.geometry(), new.len())];
        let used = self.table.plan(Cells { pos: &self.pos, seq: &self.seq }, new, &mut ints).unwrap();
        ints.truncate(used);
        ints
    }

    fn occupy(&mut self, cells: std::ops::Range<usize>) -> Vec<u32> {
        for cell in cells.clone() {
            (self.pos[cell], self.seq[cell]) = (cell as i32, 0);
        }
        cells.map(|c| c as u32).collect()
    }

    fn append(&mut self, tokens: std::ops::Range<usize>) {
        let new = self.occupy(tokens.clone());
        let (ints, n) = (self.plan(&new), new.len());
        let plan = Plan::parse(&ints).unwrap();
        let mut arena: &mut [u8] = bytemuck::cast_slice_mut(&mut self.arena);
        for (i, l) in self.layers.iter().enumerate() {
            let g = *l.shape();
            let data = |kind, heads, d| rows(kind, i as u32, tokens.clone(), heads, d);
            let (q, k, v) = (data(0, g.n_head, g.d_k), data(1, g.n_head_kv, g.d_k), data(2, g.n_head_kv, g.d_v));
            let dense = |x, heads: usize, d: usize| Rows::new(x, n, heads * d, d, heads, d).unwrap();
            let step = Step::new(dense(&q, g.n_head, g.d_k), dense(&k, g.n_head_kv, g.d_k), dense(&v, g.n_head_kv, g.d_v));
            assert!(!plan.fit || plan.shared, "the heads of all layers were looked at before the fit");
            (0..g.n_head_kv).for_each(|head| l.append_head(head, &mut arena, &plan, &step).unwrap());
        }
        self.table.commit().unwrap();
    }

    fn save(&self, n: usize) -> Vec<u8> {
        let (layers, cells): (Vec<&Layer>, Vec<u32>) = (self.layers.iter().collect(), (0..n as u32).collect());
        let state = Saving::new(&self.table, &layers, bytemuck::cast_slice(&self.arena), &cells).unwrap();
        let mut bytes = vec![0; state.size()];
        state.write(&mut bytes).unwrap();
        bytes
    }

    fn restore(&mut self, n: usize, bytes: &[u8]) {
        let cells = self.occupy(0..n);
        let layers: Vec<&Layer> = self.layers.iter().collect();
        let arena = bytemuck::cast_slice_mut(&mut self.arena);
        state::read(&mut self.table, &layers, arena, Cells { pos: &self.pos, seq: &self.seq }, &cells, bytes).unwrap();
    }

    /// Keys and values of the first `n` cells in a layer.
    fn rebuild(&mut self, layer: usize, n: usize) -> (Vec<f16>, Vec<f16>) {
        let ints = self.plan(&[]);
        let (l, none) = (&self.layers[layer], Rows::empty());
        let Heads { n_head_kv, d_k, d_v, .. } = *l.shape();
        let (mut k, mut v) = (vec![f16::ZERO; n * n_head_kv * d_k], vec![f16::ZERO; n * n_head_kv * d_v]);
        l.reconstruct(bytemuck::cast_slice(&self.arena), &Plan::parse(&ints).unwrap(), &none, &none, 0..n, &mut k, &mut v).unwrap();
        (k, v)
    }

    /// Attention of the query of one token over everything.
    fn attend(&mut self, layer: usize, token: usize) -> Vec<f32> {
        let ints = self.plan(&[]);
        let (l, none) = (&self.layers[layer], Rows::empty());
        let g = *l.shape();
        let q = rows(0, layer as u32, token..token + 1, g.n_head, g.d_k);
        let q = Rows::new(&q, 1, g.n_head * g.d_k, g.d_k, g.n_head, g.d_k).unwrap();
        let (mut partials, mut out) = (vec![0.0; l.partial_floats(1)], vec![0.0; g.n_head * g.d_v]);
        let scoring = Scoring { scale: 1.0, softcap: 0.0 };
        let arena = bytemuck::cast_slice(&self.arena);
        let call = Call { arena, plan: &Plan::parse(&ints).unwrap(), q: &q, k: &none, v: &none, scoring, mask: Mask::All };
        l.attend(0..l.units(), &call, &mut partials).unwrap();
        l.combine(1, &partials, &[], 0..g.n_head, &mut out).unwrap();
        out
    }
}

fn file(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/data/{name}.skvstate"))
}

/// A stream of so many rows of which the last are exact, and nothing is going on.
fn made(n: usize) -> Stream {
    let mut s = Stream::new();
    (0..n).step_by(20).for_each(|at| s.append(at..(at + 20).min(n)));
    s
}

/// The state in a file, made anew if that is asked for.
fn golden(name: &str, n: usize) -> Vec<u8> {
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(file(name), made(n).save(n)).unwrap();
    }
    std::fs::read(file(name)).unwrap()
}

#[test]
fn states_are_read_as_they_were_written() {
    let mut sums = Vec::new();
    for (name, n, limit, _) in STATES {
        let mut s = Stream::new();
        s.restore(n, &golden(name, n));
        assert_eq!(s.table.is_fitted(), name == "fitted");
        let mut sum = 0.0;
        for layer in 0..SHAPES.len() {
            let g = *s.layers[layer].shape();
            let (k, v) = s.rebuild(layer, n);
            for (kind, got, heads, d) in [(1, &k, g.n_head_kv, g.d_k), (2, &v, g.n_head_kv, g.d_v)] {
                let want = rows(kind, layer as u32, 0..n, heads, d);
                let (mut error, mut size) = (0.0, 0.0);
                for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                    let (token, difference) = (i / (heads * d), f64::from(got.to_f32() - want));
                    assert!(!(token < 4 || token + 32 >= n) || difference == 0.0, "{name}: token {token} is exact");
                    (error, size) = (error + difference * difference, size + f64::from(want * want));
                }
                let error = (error / size).sqrt();
                println!("{name}, layer {layer}, kind {kind}: {error}");
                assert!(error <= limit, "{name}, layer {layer}: an error of {error}");
            }
            sum += s.attend(layer, 3).iter().map(|x| f64::from(*x)).sum::<f64>();
        }
        sums.push(sum);
    }
    assert!(sums.iter().zip(STATES).all(|(sum, (.., known))| (sum - known).abs() <= 1e-4 * known.abs()), "attention sums up to {sums:?}");
}

#[test]
fn states_are_written_as_they_were() {
    for (name, n, ..) in STATES {
        let golden = golden(name, n);
        let mut s = Stream::new();
        s.restore(n, &golden);
        assert!(s.save(n) == golden, "{name}: written again, it differs");
        let anew = made(n).save(n);
        assert_eq!(&anew[..24 + 5 * n], &golden[..24 + 5 * n], "{name}: header and cells");
        if name != "fitted" {
            assert!(anew == golden, "{name}: made anew, it differs");
        }
    }
}
