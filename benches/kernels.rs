//! Times of the library's parts on one thread: every kernel at each instruction-set level, and decode attention over a whole cache.
//!
//! The cache chooses its kernels once in a process: `SPECTRAL_KV_CPU_LEVEL=avx2 cargo bench -- attend` measures a lower level.
//! Against llama.cpp's own cache, see `spectral-kv bench`.

#[path = "../tests/common/mod.rs"]
mod common;

use common::{input, Random};
use criterion::{criterion_group, criterion_main, BenchmarkId, Criterion, Throughput};
use half::f16;
use spectral_kv::cache::{Cache, Mask, Rows};
use spectral_kv::codec::{encode_tile, Basis, TileWork};
use spectral_kv::config::{Config, LayerShape, Scoring};
use spectral_kv::layout::{Fine, TileForm, Widths, ANCHOR_GRID, BANDS, KEY_CUT, TILE};
use spectral_kv::rope::{Pairing, RopeParams};
use spectral_kv::simd::lanes::LANES;
use spectral_kv::simd::{self, Kernels, Level, Lines, MatMut, MatRef, Pass, Products, Projection, BATCH};
use std::hint::black_box;

const D: usize = 128;
const HEADS: usize = 32;
const KV_HEADS: usize = 8;
const ROWS: usize = 4096;
const FRAME_TILES: usize = ANCHOR_GRID as usize / TILE;

fn draw(n: usize, seed: u64) -> Vec<f32> {
    let mut random = Random::new(seed);
    (0..n).map(|_| random.normal()).collect()
}

fn levels() -> impl Iterator<Item = &'static Kernels> {
    Level::ALL.into_iter().filter_map(simd::at)
}

/// Widths of 128 coefficients: what ratio 8 gives a flat spectrum, and each width by itself.
fn widths() -> Vec<(String, Widths)> {
    let mut all = vec![
        ("ratio 8".to_string(), Widths { counts: [0, 0, 0, 0, 0, 70, 58] }),
        ("2.3 bits".to_string(), Widths { counts: [0, 0, 8, 16, 24, 36, 28] }),
    ];
    for (i, bits) in Widths::BITS.into_iter().enumerate() {
        all.push((format!("{bits} bits"), Widths { counts: std::array::from_fn(|j| if i == j { D } else { 0 }) }));
    }
    all
}

/// Coding the 64 rows of a tile of one head, K and V, two of them finer.
fn encode(c: &mut Criterion) {
    let matrix: Vec<f32> = draw(D * D, 1).iter().map(|x| x / (D as f32).sqrt()).collect();
    let rows = draw(TILE * D, 2);
    let mut group = c.benchmark_group("encode a tile");
    group.throughput(Throughput::Elements(TILE as u64));
    for (name, widths) in widths() {
        let basis = Basis { d: D, widths: [widths; BANDS], mean: vec![0.0; D], encode: matrix.clone(), decode: matrix.clone(), weight: vec![1.0; D] };
        let form = TileForm::new(widths, widths, D, D, Fine::Residuals);
        let (mut tile, mut work) = (vec![0; form.bytes()], TileWork::default());
        for kernels in levels() {
            group.bench_function(BenchmarkId::new(kernels.level.name(), &name), |b| {
                b.iter(|| encode_tile(kernels, (&basis, &basis), &form, black_box(&rows), &rows, &[7, 40], &mut tile, &mut work));
            });
        }
    }
}

/// Scores and values of [`BATCH`] tiles, for the 4 queries of a GQA group.
fn tiles(c: &mut Criterion) {
    const QUERIES: usize = 4;
    const LENGTH: usize = BATCH * TILE;
    let (gains, p) = ([[0.9; TILE]; BATCH], draw(QUERIES * LENGTH, 3).iter().map(|x| x.abs()).collect::<Vec<_>>());
    for (name, widths) in widths() {
        let tiles: Vec<Vec<u8>> = (0..BATCH).map(|t| (0..widths.bytes()).map(|i| (i * 37 + t * 11) as u8 % 127).collect()).collect();
        let tiles: Vec<&[u8]> = tiles.iter().map(Vec::as_slice).collect();
        for kernels in levels() {
            let mut s = Products::default();
            (s.n, s.frames, s.scale) = (QUERIES, 1, 0.1);
            (s.means, s.largest) = (vec![0.0; QUERIES], vec![[0.0; LANES]; QUERIES]);
            for (part, widths) in s.parts.iter_mut().zip(widths.parts(KEY_CUT)) {
                (part.widths, part.stride) = (widths, widths.rank().next_multiple_of(LANES));
                part.z.resize((QUERIES * part.stride + 64) * 4);
                part.z.floats_mut()[..QUERIES * part.stride].copy_from_slice(&draw(QUERIES * part.stride, 4));
            }
            let some: Vec<usize> = (0..2).filter(|part| s.parts[*part].widths.rank() > 0).collect();
            let (mut scores, mut sums) = (Lines::default(), Lines::default());
            scores.resize(QUERIES * LENGTH * 4);
            sums.resize(D * QUERIES * LANES * 4);
            let id = || BenchmarkId::new(kernels.level.name(), &name);
            c.benchmark_group("tile scores").throughput(Throughput::Elements(LENGTH as u64)).bench_function(id(), |b| {
                b.iter(|| {
                    some.iter().for_each(|part| (kernels.prepare)(&mut s, *part));
                    // As many as share a frame.
                    for (t, tiles) in black_box(&tiles).chunks(FRAME_TILES).enumerate() {
                        let mut at = 0;
                        for (done, part) in some.iter().enumerate() {
                            let codes: [&[u8]; FRAME_TILES] = std::array::from_fn(|i| &tiles[i][at..]);
                            at += s.parts[*part].widths.bytes();
                            let pass = Pass { part: *part, add: done > 0, finish: done + 1 == some.len() };
                            (kernels.tile_scores)(&mut s, pass, &codes, &gains, &mut scores.floats_mut()[t * FRAME_TILES * TILE..], LENGTH);
                        }
                    }
                });
            });
            c.benchmark_group("tile values").throughput(Throughput::Elements(LENGTH as u64)).bench_function(id(), |b| {
                b.iter(|| (kernels.tile_values)(widths, black_box(&tiles), &p, LENGTH, QUERIES, sums.floats_mut(), &mut s));
            });
        }
    }
}

/// The other kernels, on what one tile or one projection gives them to do.
fn dense(c: &mut Criterion) {
    let (a, b, x) = (draw(4 * D, 5), draw(D * D, 6), draw(TILE * D, 7));
    let halves: Vec<f16> = x.iter().map(|x| f16::from_f32(*x)).collect();
    let omega: Vec<f64> = (0..D / 2).map(|i| 500_000f64.powf(-(i as f64) / 64.0)).collect();
    let mut group = c.benchmark_group("dense");
    for k in levels() {
        let id = |name: &str| BenchmarkId::new(k.level.name(), name);
        let (mut out, mut y, mut cos, mut sin) = (vec![0.0; 4 * D], vec![0.0; TILE * D], vec![0.0; D / 2], vec![0.0; D / 2]);
        group.bench_function(id("multiply 4x128x128"), |t| {
            t.iter(|| (k.multiply)(MatRef::new(black_box(&a), D), MatRef::new(&b, D), MatMut::new(&mut out, D), 4, D, D));
        });
        group.bench_function(id("dots 4x128x128"), |t| {
            t.iter(|| (k.dots)(MatRef::new(black_box(&a), D), MatRef::new(&b, D), MatMut::new(&mut out, D), 4, D, D));
        });
        let (mut by, mut work, mut projected) = (Projection::default(), Lines::default(), vec![0.0; 16 * D]);
        group.bench_function(id("hold 128x128"), |t| t.iter(|| (k.hold)(black_box(&b), D, &mut by)));
        group.bench_function(id("project 16x128x128"), |t| {
            t.iter(|| (k.project)(&by, black_box(&x[..16 * D]), 16, D, &mut projected, &mut work));
        });
        group.bench_function(id("exp of 4 x 64 scores"), |t| {
            t.iter(|| {
                y[..4 * TILE].copy_from_slice(&x[..4 * TILE]);
                (k.exp_sum)(black_box(&mut y[..4 * TILE]), 3.0)
            });
        });
        group.bench_function(id("widen 64 rows"), |t| t.iter(|| (k.widen)(black_box(&halves), 0.5, &mut y)));
        group.bench_function(id("turn"), |t| t.iter(|| (k.turn)(black_box(&omega), 12_345.0, &mut cos, &mut sin)));
    }
}

fn scoring() -> Scoring {
    Scoring { scale: (D as f32).sqrt().recip(), softcap: 0.0 }
}

fn rows_of(x: &[f32], heads: usize) -> Rows<'_> {
    Rows::new(x, x.len() / (heads * D), heads * D, D, heads, D).expect("whole rows")
}

/// One layer with all rows behind the window coded.
fn filled() -> Cache {
    let rope = RopeParams::plain(Pairing::Adjacent, D, 500_000.0);
    let config = Config { n_cells: ROWS as u32, ..Config::default() };
    let shape = LayerShape { n_head: HEADS as u32, n_head_kv: KV_HEADS as u32, d_k: D as u32, d_v: D as u32 };
    let mut cache = Cache::new(&config, shape, &rope, scoring(), &[]).expect("a possible cache");
    for at in (0..ROWS).step_by(TILE) {
        let positions: Vec<i32> = (at..at + TILE).map(|p| p as i32).collect();
        let x = input(at as u64, &positions, HEADS, KV_HEADS, D, D, &rope);
        cache.append(&positions, &rows_of(&x.q, HEADS), &rows_of(&x.k, KV_HEADS), &rows_of(&x.v, KV_HEADS)).expect("room for all rows");
    }
    cache
}

/// Steps of 1 and 8 query tokens over [`ROWS`] rows.
fn attend(c: &mut Criterion) {
    // Filled only if one of the measurements is asked for.
    let mut cache = None;
    let mut random = Random::new(2);
    let queries: Vec<f32> = (0..8 * HEADS * D).map(|_| random.normal()).collect();
    let mut out = vec![0.0; queries.len()];
    let mut group = c.benchmark_group("attend to 4096 rows");
    group.throughput(Throughput::Elements(ROWS as u64)).sample_size(20);
    for n in [1, 8] {
        group.bench_with_input(BenchmarkId::from_parameter(n), &n, |b, n| {
            let cache = cache.get_or_insert_with(filled);
            let q = rows_of(&queries[..n * HEADS * D], HEADS);
            b.iter(|| cache.attend(black_box(&q), Mask::All, &[], &mut out).expect("rows and queries of the same shape"));
        });
    }
}

criterion_group!(benches, encode, tiles, dense, attend);
criterion_main!(benches);
