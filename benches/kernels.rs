//! Times of the library's parts on one thread: coding a tile at each instruction-set level, and decode attention over a whole cache.
//!
//! The cache chooses its kernels once in a process: `SPECTRAL_KV_CPU_LEVEL=avx2 cargo bench -- attend` measures a lower level.
//! Against llama.cpp's own cache, see `spectral-kv bench`.

#[path = "../tests/common/mod.rs"]
mod common;

use common::{input, Random};
use criterion::{criterion_group, criterion_main, BenchmarkId, Criterion, Throughput};
use spectral_kv::attention::Scoring;
use spectral_kv::cache::{Cache, Mask, Rows};
use spectral_kv::codec::{encode_row, Basis};
use spectral_kv::config::{Config, LayerShape, BANDS, TILE};
use spectral_kv::rope::{Pairing, RopeParams};
use spectral_kv::simd::{self, Level, Widths};
use std::hint::black_box;

const D: usize = 128;
const HEADS: usize = 32;
const KV_HEADS: usize = 8;
const ROWS: usize = 4096;

/// A tile of one head, at about 2 bits per element.
fn encode(c: &mut Criterion) {
    let widths = Widths { counts: [4, 0, 0, 24, 0, 64, 0] };
    let rank = widths.rank();
    let mut random = Random::new(1);
    let mut draw = |n: usize, scale: f32| -> Vec<f32> { (0..n).map(|_| scale * random.normal()).collect() };
    let matrix = draw(rank * D, (D as f32).sqrt().recip());
    let basis = Basis { d: D, widths: [widths; BANDS], mean: vec![0.0; D], encode: matrix.clone(), decode: matrix, weight: vec![1.0; rank] };
    let rows = draw(TILE * D, 1.0);
    let (mut gains, mut codes, mut scratch) = (vec![0; TILE], vec![0; widths.bytes()], vec![]);
    let mut group = c.benchmark_group("encode a tile");
    group.throughput(Throughput::Elements(TILE as u64));
    for level in [Level::Portable, Level::Avx2, Level::Avx512] {
        let Some(kernels) = simd::at(level) else { continue };
        group.bench_function(format!("{level:?}"), |b| {
            b.iter(|| {
                for (i, row) in rows.chunks_exact(D).enumerate() {
                    encode_row(kernels, &basis, 0, black_box(row), i, &mut gains, &mut codes, &mut scratch);
                }
                black_box(&codes);
            });
        });
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
            b.iter(|| cache.attend(black_box(&q), scoring(), Mask::All, &[], &mut out).expect("rows and queries of the same shape"));
        });
    }
}

criterion_group!(benches, encode, attend);
criterion_main!(benches);
