//! Decode attention and rebuilding of every level, against f64.

use super::prefill::{Rebuilder, RowBlock};
use super::*;
use crate::codec::{decode_tile, encode_tile, TileWork};
use crate::layout::{anchor, Fine, TileForm, Widths, BANDS};
use crate::rope::{Pairing, RopeParams, Turn};
use crate::simd::{at, plain, Ahead, Level};

fn noise(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| (0..4).map(|k| ((i * 7919 + seed * 104_729 + k * 31_337) as f64 * 0.618_034).fract() as f32 - 0.5).sum::<f32>() * 1.7).collect()
}

fn deviation(j: usize) -> f32 {
    1.5 * 0.97f32.powi(j as i32)
}

/// A basis of unit vectors for rows whose elements have deviation `deviation(j)`.
fn basis(d: usize, widths: Widths, mean: Vec<f32>) -> Basis {
    let unit = |scale: &dyn Fn(usize) -> f32| (0..d * d).map(|i| if i / d == i % d { scale(i / d) } else { 0.0 }).collect::<Vec<_>>();
    let weight = (0..d).map(|j| (deviation(j) / deviation(0)).powi(2)).collect();
    Basis { d, widths: [widths; BANDS], mean, encode: unit(&|j| 1.0 / deviation(j)), decode: unit(&deviation), weight }
}

const TILES: usize = 5;

/// Tiles of rows, as given and as coded, and queries in two tokens. The last tile waits for a fit: its bases are others.
struct Rows {
    d: usize,
    keys: Vec<f32>,
    values: Vec<f32>,
    queries: Vec<f32>,
    tiles: Vec<Vec<u8>>,
    bases: [(Basis, Basis); 2],
    forms: [TileForm; 2],
    rope: Rope,
}

fn rows(d: usize, k: Widths, v: Widths) -> Rows {
    let rope = Rope::new(&RopeParams::plain(Pairing::Halves, d, 10000.0), d).unwrap();
    let (mean, scale): (Vec<f32>, Vec<f32>) = (noise(d, 3), (0..d).map(deviation).collect());
    let fitted = (basis(d, k, mean.clone()), basis(d, v, vec![]));
    let bases = [fitted, (Basis::diagonal(&mean, &scale, 8), Basis::diagonal(&[], &scale, 8))];
    let eight = bases[1].0.widths[0];
    let forms = [TileForm::new(k, v, d, d, Fine::Residuals), TileForm::new(eight, eight, d, d, Fine::Marks)];
    let draw = |seed: usize, mean: &[f32]| -> Vec<f32> {
        let add = |i: usize| mean.get(i % d).copied().unwrap_or(0.0);
        noise(TILES * TILE * d, seed).iter().enumerate().map(|(i, x)| x * deviation(i % d) + add(i)).collect()
    };
    let (framed, values) = (draw(5, &mean), draw(6, &[]));
    let (kernels, mut tiles, mut work) = (at(Level::Portable).unwrap(), vec![], TileWork::default());
    for (t, (k, v)) in framed.chunks_exact(TILE * d).zip(values.chunks_exact(TILE * d)).enumerate() {
        let (form, b) = (&forms[t / 4], &bases[t / 4]);
        let mut tile = vec![0xa5; form.bytes()];
        // Tile 1 has no fine rows, tile 2 one.
        let fine = &[17, 63][..[2, 0, 1, 2, 2][t]];
        encode_tile(kernels, (&b.0, &b.1), form, k, v, fine, &mut tile, &mut work);
        tiles.push(tile);
    }
    let mut r = Rows { d, keys: framed, values, queries: noise(6 * d, 9), tiles, bases, forms, rope };
    r.turn();
    r
}

impl Rows {
    /// Keys leave their frames.
    fn turn(&mut self) {
        let mut turn = Turn::default();
        for (row, key) in self.keys.chunks_exact_mut(self.d).enumerate() {
            self.rope.turn(i64::from(anchor(row as i32)), &mut turn);
            self.rope.rotate(&turn, key);
        }
    }
    /// What is coded, instead of what was given.
    fn decoded(&self) -> Rows {
        let (n, mut work) = (TILE * self.d, TileWork::default());
        let Rows { d, queries, tiles, bases, forms, rope, .. } = rows(self.d, self.forms[0].k.widths, self.forms[0].v.widths);
        let mut r = Rows { d, keys: vec![0.0; TILES * n], values: vec![0.0; TILES * n], queries, tiles, bases, forms, rope };
        for t in 0..TILES {
            let (b, out_k, out_v) = (&r.bases[t / 4], &mut r.keys[t * n..(t + 1) * n], &mut r.values[t * n..(t + 1) * n]);
            decode_tile(plain(), (&b.0, &b.1), &r.forms[t / 4], &r.tiles[t], u64::MAX, out_k, out_v, &mut work);
        }
        r.turn();
        r
    }
}

/// The outputs of one level's kernels.
fn attend(r: &Rows, kernels: &'static Kernels, softcap: f32) -> Vec<f32> {
    let d = r.d;
    let c = Context { kernels, scoring: Scoring { scale: 0.2, softcap }, rope: &r.rope };
    let bases = r.bases.clone().map(|(k, v)| HeadBases::of(kernels, k, v));
    let mut a = Accumulator::default();
    a.begin(d, d, 3, r.queries.chunks_exact(d));
    let turns = |t: usize| anchor((t * TILE) as i32);
    let tile = |t: usize| Tile { bytes: &r.tiles[t], turns: Turns::One(turns(t)), visible: Visible::All };
    a.tile_batch(c, &bases[0], &r.forms[0], &[tile(0), tile(1), tile(2)], Ahead::default());
    // A tile is scored as one whose rows went apart, and partly hidden from the second token.
    let each = [turns(3); TILE];
    let mask: Vec<f32> = (0..2 * TILE).map(|i| if i >= TILE + 7 { f32::NEG_INFINITY } else { 0.0 }).collect();
    let apart = Tile { bytes: &r.tiles[3], turns: Turns::Each(&each), visible: Visible::Some(&mask) };
    a.tile_batch(c, &bases[0], &r.forms[0], &[apart], Ahead::default());
    a.leave(kernels, &bases[0]);
    a.tile_batch(c, &bases[1], &r.forms[1], &[tile(4)], Ahead::default());
    a.leave(kernels, &bases[1]);
    let mut partials = vec![0.0; 6 * partial_floats(d)];
    a.finish(&mut partials);
    let mut out = vec![0.0; 6 * d];
    partials.chunks_exact(partial_floats(d)).zip(out.chunks_exact_mut(d)).for_each(|(p, out)| merge(std::iter::once(p), None, out));
    out
}

/// The same in f64, over rows.
fn reference(r: &Rows, softcap: f64) -> Vec<f64> {
    let d = r.d;
    let mut out = Vec::new();
    for (i, q) in r.queries.chunks_exact(d).enumerate() {
        let seen: Vec<usize> = (0..TILES * TILE).filter(|row| i < 3 || *row < 3 * TILE + 7 || *row >= 4 * TILE).collect();
        let score = |row: usize| -> f64 {
            let s = 0.2 * (0..d).map(|j| f64::from(q[j]) * f64::from(r.keys[row * d + j])).sum::<f64>();
            if softcap > 0.0 {
                softcap * (s / softcap).tanh()
            } else {
                s
            }
        };
        let scores: Vec<f64> = seen.iter().map(|row| score(*row)).collect();
        let largest = scores.iter().copied().fold(f64::MIN, f64::max);
        let p: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
        let sum: f64 = p.iter().sum();
        out.extend((0..d).map(|j| p.iter().zip(&seen).map(|(p, row)| p / sum * f64::from(r.values[row * d + j])).sum::<f64>()));
    }
    out
}

fn rel_rms(got: &[f32], want: &[f64]) -> f64 {
    let (mut error, mut size) = (0.0, 0.0);
    for (g, w) in got.iter().zip(want) {
        error += (f64::from(*g) - w).powi(2);
        size += w * w;
    }
    (error / size).sqrt()
}

/// Head sizes and widths of K and V: among them none at all, and one part only.
const CASES: [(usize, [usize; 7], [usize; 7]); 6] = [
    (64, [0, 0, 0, 0, 0, 20, 44], [0, 0, 0, 0, 10, 20, 20]),
    (64, [20, 20, 24, 0, 0, 0, 0], [0, 0, 0, 0, 40, 0, 0]),
    (128, [0, 0, 8, 24, 30, 40, 26], [0, 2, 0, 0, 30, 60, 10]),
    (80, [2, 3, 5, 7, 11, 13, 17], [1, 2, 3, 4, 5, 6, 7]),
    (64, [0, 0, 0, 30, 0, 0, 0], [0; 7]),
    (64, [0; 7], [0, 0, 0, 10, 20, 20, 14]),
];

#[test]
fn every_level_is_as_near_to_f64_as_plain_f32_is() {
    for (d, k, v) in CASES {
        let r = rows(d, Widths { counts: k }, Widths { counts: v });
        let coded = r.decoded();
        for softcap in [0.0, 3.0] {
            let (want, near) = (reference(&r, f64::from(softcap)), reference(&coded, f64::from(softcap)));
            let plain = attend(&r, plain(), softcap);
            let plain_error = rel_rms(&plain, &want);
            assert!((1e-4..0.95).contains(&plain_error), "{d} {k:?} {v:?}: {plain_error}");
            let plain_f64: Vec<f64> = plain.iter().map(|x| f64::from(*x)).collect();
            for level in Level::ALL {
                let Some(kernels) = at(level) else {
                    println!("skipped: this CPU has no {level:?}");
                    continue;
                };
                let got = attend(&r, kernels, softcap);
                let (error, apart, of_coded) = (rel_rms(&got, &want), rel_rms(&got, &plain_f64), rel_rms(&got, &near));
                println!("{level:?} {d} {k:?}: {error:.3e}, plain {plain_error:.3e}, apart {apart:.3e}, of the coded rows {of_coded:.3e}");
                assert!(error <= 2.0 * plain_error, "{level:?} {d} {k:?}: {error} {plain_error}");
                // What levels differ by is rounding: 16 bits in whole numbers, 24 in f32.
                let rounding = level.rounding();
                assert!(apart <= rounding && of_coded <= rounding, "{level:?} {d} {k:?}: {apart} {of_coded}");
            }
        }
    }
}

#[test]
fn rebuilt_tiles_have_the_rows_that_were_coded() {
    for (d, k, v) in CASES {
        let r = rows(d, Widths { counts: k }, Widths { counts: v }).decoded();
        for kernels in Level::ALL.into_iter().filter_map(at) {
            let c = Context { kernels, scoring: Scoring { scale: 1.0, softcap: 0.0 }, rope: &r.rope };
            let bases = r.bases.clone().map(|(k, v)| HeadBases::of(kernels, k, v));
            let (mut rebuilder, mut out) = (Rebuilder::default(), RowBlock::default());
            for t in 0..TILES {
                let turn = anchor((t * TILE) as i32);
                let turns = if t == 3 { Turns::Each(&[turn; TILE]) } else { Turns::One(turn) };
                rebuilder.tile(c, &bases[t / 4], &r.forms[t / 4], &r.tiles[t], turns, &mut out);
                let (keys, values) = out.rows(d, d);
                for (got, want) in [(keys, &r.keys), (values, &r.values)] {
                    let want: Vec<f64> = want[t * TILE * d..(t + 1) * TILE * d].iter().map(|x| f64::from(*x)).collect();
                    // Without coefficients all values are zeros.
                    assert!(rel_rms(&got, &want) < 1e-5 || want.iter().all(|x| *x == 0.0), "{:?} {d} tile {t}", kernels.level);
                }
            }
        }
    }
}
