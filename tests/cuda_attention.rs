//! The device's attention, on the host shim: against f64, and against what the CPU makes of the same arenas and plans.

mod common;

use common::{rel_rms, rows_of, widen, Random, Reference, Stream};
use half::f16;
use spectral_kv::cache::{Call, Layer, Mask, Plan};
use spectral_kv::config::{Config, LayerShape, Scoring};
use spectral_kv::cuda::launch::Launch;
use spectral_kv::cuda::layer::SkvLayer;
use spectral_kv::rope::{Pairing, Rope, RopeParams};
use std::path::PathBuf;
use std::process::Command;

const CELLS: u32 = 1100;

/// How a step looks at its rows.
#[derive(Default, Clone)]
struct Look {
    softcap: f32,
    sinks: Vec<f32>,
    /// Some rows are hidden, and some scores get something added.
    masked: bool,
    /// A token that sees nothing at all.
    blind: Option<usize>,
    /// Multiprocessors of the device: how many splits there are follows from it.
    multiprocessors: Option<u32>,
}

fn shape(group: u32, d_k: u32, d_v: u32) -> LayerShape {
    LayerShape { n_head: 2 * group, n_head_kv: 2, d_k, d_v }
}

fn config() -> Config {
    Config { n_cells: CELLS, n_seqs: 2, window: 16, bits: 3.0, ..Config::default() }
}

fn plain(d: usize) -> RopeParams {
    RopeParams::plain(Pairing::Halves, d, 10000.0)
}

fn shim() -> PathBuf {
    PathBuf::from("/tmp/w/attend_shim")
}

/// A call as `tests/cuda/attend.cpp` reads it.
struct CallFile(Vec<u8>);

impl CallFile {
    fn number(&mut self, x: usize) {
        self.0.extend_from_slice(&(x as i64).to_le_bytes());
    }
    fn buffer<T: bytemuck::NoUninit>(&mut self, x: &[T]) {
        let bytes: &[u8] = bytemuck::cast_slice(x);
        self.number(bytes.len());
        self.0.extend_from_slice(bytes);
    }
}

/// What the device gives for queries of up to 64 tokens.
#[expect(clippy::too_many_arguments, reason = "a call's parts")]
fn on_device(l: &Layer, rope: &Rope, scoring: Scoring, arena: &[u8], ints: &[i32], [q, k, v]: [&[f32]; 3], mask: (&[f16], usize), look: &Look) -> Vec<f32> {
    let h = *l.shape();
    let n = q.len() / (h.n_head * h.d_k);
    let launch = Launch::new(&h, l.geometry().tiles, n, look.multiprocessors.unwrap_or(3)).unwrap();
    let mut file = CallFile(Vec::new());
    let grid = launch.grid.map(|x| x as usize);
    [launch.columns, grid[0], grid[1], grid[2], launch.shared_bytes, launch.combine_blocks as usize, launch.workspace_floats, n * h.n_head * h.d_v]
        .map(|x| file.number(x));
    [h.n_head * h.d_k, h.d_k, h.n_head_kv * h.d_k, h.d_k, h.n_head_kv * h.d_v, h.d_v, mask.1, mask.1, n].map(|x| file.number(x));
    let constants = SkvLayer::new(l.geometry(), l.index(), rope, scoring);
    // SAFETY: plain numbers without padding, as the test of its size says.
    let bytes = unsafe { std::slice::from_raw_parts((&raw const constants).cast::<u8>(), size_of::<SkvLayer>()) };
    file.buffer(bytes);
    file.buffer(arena);
    file.buffer(ints);
    file.buffer(q);
    file.buffer(k);
    file.buffer(v);
    file.buffer(bytemuck::cast_slice::<f16, u16>(mask.0));
    file.buffer(&look.sinks);
    let name = format!("{}-{:?}", std::process::id(), std::thread::current().id());
    let paths = ["call", "out"].map(|kind| std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.{kind}")));
    std::fs::write(&paths[0], &file.0).unwrap();
    let out = Command::new(shim()).args(&paths).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let bytes = std::fs::read(&paths[1]).unwrap();
    paths.iter().for_each(|p| std::fs::remove_file(p).unwrap());
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// One step of tokens at `places`: its attention is compared, then it is stored.
fn step(s: &mut Stream, seed: u64, cells: &[u32], places: &[(i32, u32)], look: &Look) {
    let n = cells.len();
    let t = s.tokens(seed, cells, places);
    s.enter(&t);
    let ints = s.plan(cells).unwrap();
    let plan = Plan::parse(&ints).unwrap();
    let l = &s.layers[0];
    let (g, arena) = (*l.shape(), s.arena());
    let scoring = Scoring { scale: 1.0 / (g.d_k as f32).sqrt(), softcap: look.softcap };
    let [q, k, v] = rows_of(l, &t.inputs[0], n);

    let n_kv = s.rows.len();
    let mut r = Random::new(seed);
    let mut mask = vec![f16::NEG_INFINITY; n * n_kv];
    for (t, (pos, seq)) in places.iter().enumerate().filter(|(t, _)| look.blind != Some(*t)) {
        for (cell, mask) in mask[t * n_kv..(t + 1) * n_kv].iter_mut().enumerate() {
            let shown = s.rows[cell].as_ref().is_some_and(|r| r.seqs >> seq & 1 == 1 && r.pos <= *pos);
            let kept = !look.masked || cell % 3 == 0 || r.below(4) > 0;
            if shown && kept {
                *mask = if look.masked && r.below(5) == 0 { f16::from_f32(-0.75) } else { f16::ZERO };
            }
        }
    }
    let call = Call { arena, plan: &plan, q: &q, k: &k, v: &v, scoring, mask: Mask::F16 { values: &mask, stride: n_kv, n_kv } };
    let mut decoded = vec![f32::NAN; n * g.n_head * g.d_v];
    let mut partials = vec![f32::NAN; l.partial_floats(n)];
    l.attend(0..l.units(), &call, &mut partials).unwrap();
    l.combine(n, &partials, &look.sinks, 0..n * g.n_head, &mut decoded).unwrap();

    let rope = l.rope().clone();
    let x = &t.inputs[0];
    let got = on_device(l, &rope, scoring, arena, &ints, [&x.q, &x.k, &x.v], (&mask, n_kv), look);

    let (nk, nv) = (g.n_head_kv * g.d_k, g.n_head_kv * g.d_v);
    let (mut dense_k, mut dense_v) = (vec![f16::ZERO; n_kv * nk], vec![f16::ZERO; n_kv * nv]);
    l.reconstruct(arena, &plan, &k, &v, 0..n_kv, &mut dense_k, &mut dense_v).unwrap();
    let (dense_k, dense_v) = (widen(&dense_k), widen(&dense_v));
    let sinks = (!look.sinks.is_empty()).then_some(&look.sinks[..]);
    let (scale, softcap) = (f64::from(scoring.scale), f64::from(scoring.softcap));
    let reference = Reference { n_head: g.n_head, n_head_kv: g.n_head_kv, d_k: g.d_k, d_v: g.d_v, k: &dense_k, v: &dense_v, scale, softcap, sinks };
    let want = reference.attend(&x.q, n, |t, r| mask[t * n_kv + r].to_f64());
    let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
    let (got, decoded) = (wide(&got), wide(&decoded));
    let (mut worst, mut worst_cpu) = (0.0f64, 0.0f64);
    for i in 0..n * g.n_head {
        let part = |x: &[f64]| x[i * g.d_v..(i + 1) * g.d_v].to_vec();
        let (token, head) = (i / g.n_head, i % g.n_head);
        if look.blind == Some(token) {
            assert!(part(&got).iter().all(|x| *x == 0.0), "a query that sees nothing gives zeros");
            continue;
        }
        let (error, other) = (rel_rms(part(&got), part(&want)), rel_rms(part(&decoded), part(&want)));
        (worst, worst_cpu) = (worst.max(error), worst_cpu.max(other));
        assert!(error < 2f64.powi(-9), "token {token} of {n}, head {head}: {error}, CPU {other}");
    }
    println!("{:?} {n} tokens, {} tiles: {worst:.2e}, CPU {worst_cpu:.2e}", g, plan.tiles().len());

    s.run(0, &ints, &t).unwrap();
    s.table.commit().unwrap();
    s.age();
}

/// The next `n` tokens of sequence 0 in the first free cells.
fn next(s: &mut Stream, seed: u64, n: usize, look: &Look) {
    let (cells, first) = (s.free()[..n].to_vec(), s.next_pos(0));
    let places: Vec<_> = (0..n as i32).map(|i| (first + i, 0)).collect();
    step(s, seed, &cells, &places, look);
}

#[test]
fn every_head_is_right_over_gqa_ratios_head_sizes_and_rotations() {
    let ropes: [fn(usize) -> RopeParams; 5] = [
        |d| RopeParams::plain(Pairing::Adjacent, d, 10000.0),
        plain,
        |_| RopeParams::none(),
        |d| RopeParams { n_dims: d / 4 * 2, ..plain(d) },
        |d| RopeParams { n_dims: d / 4 * 2, offset: d - d / 4 * 2, ..RopeParams::plain(Pairing::Adjacent, d, 500_000.0) },
    ];
    for (i, (group, d_k, d_v)) in [(1, 64, 64), (2, 80, 80), (4, 96, 64), (7, 128, 128), (8, 64, 80), (1, 256, 256)].into_iter().enumerate() {
        let mut s = Stream::new(&config(), &[shape(group, d_k, d_v)], ropes[i % ropes.len()]);
        next(&mut s, 1, 3, &Look::default());
        s.append(2, 0, 700, 100).unwrap();
        next(&mut s, 3, 1, &Look::default());
        next(&mut s, 4, 5, &Look { masked: true, blind: Some(2), softcap: if i % 2 == 0 { 5.0 } else { 0.0 }, sinks: vec![0.3; 2 * group as usize], ..Look::default() });
    }
}
