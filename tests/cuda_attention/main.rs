//! The device's attention, on the host shim: against f64, and against what the CPU makes of the same arenas and plans.

mod calls;
#[path = "../common/mod.rs"]
mod common;
mod file;
#[path = "../common/programs.rs"]
mod programs;
mod runner;
#[path = "../common/shim.rs"]
mod shim;
mod timing;

use calls::{Calls, Look, Sight};
use common::{ropes, Input, Random, Stream};
use file::Strides;
use spectral_kv::config::{Config, LayerShape, Scoring};
use spectral_kv::cuda::layer::SkvLayer;
use spectral_kv::layout::{basis, Heads, BANDS};
use spectral_kv::rope::{Pairing, RopeParams};
use std::collections::BTreeSet;

const CELLS: u32 = 1100;

/// Two KV heads of so many query heads each.
fn shape(group: u32, d_k: u32, d_v: u32) -> LayerShape {
    LayerShape { n_head: 2 * group, n_head_kv: 2, d_k, d_v }
}

fn config() -> Config {
    Config { n_cells: CELLS, n_seqs: 2, window: 16, bits: 3.0, ..Config::default() }
}

fn plain(d: usize) -> RopeParams {
    RopeParams::plain(Pairing::Halves, d, 10000.0)
}

/// Everything at once that a step may ask for.
fn all_asked(n_head: u32) -> Look {
    Look { softcap: 5.0, sinks: (0..n_head).map(|i| 0.7 * i as f32 - 1.0).collect(), sight: Sight::Some, blind: Some(1), ..Look::default() }
}

fn shift(s: &mut Stream, seq: u32, from: i32, by: i32) {
    for cell in s.cells_of(seq) {
        let row = s.rows[cell as usize].as_mut().unwrap();
        row.pos += if row.pos >= from { by } else { 0 };
    }
}

#[test]
fn head_sizes_gqa_ratios_and_rotations() {
    let mut calls = Calls::new("heads");
    let shapes =
        [(1, 64, 64), (2, 80, 80), (4, 96, 64), (7, 128, 128), (8, 64, 80), (1, 256, 256), (2, 20, 36), (3, 34, 18), (1, 2, 6), (16, 128, 96)];
    for (i, (group, d_k, d_v)) in shapes.into_iter().enumerate() {
        let mut s = Stream::new(&config(), &[shape(group, d_k, d_v)], |d| ropes(d).swap_remove(i % 7));
        calls.next(&mut s, 1, 3, &Look::default());
        s.append(2, 0, 700, 100).unwrap();
        calls.next(&mut s, 3, 1, &Look { strides: Strides::Gaps, ..Look::default() });
        calls.next(&mut s, 4, 3, &Look { softcap: if i % 2 == 0 { 5.0 } else { 0.0 }, ..all_asked(2 * group) });
    }
    calls.check();
}

#[test]
fn every_rotation() {
    let mut calls = Calls::new("ropes");
    for i in 0..7 {
        let mut s = Stream::new(&config(), &[shape(2, 32, 16)], |d| ropes(d).swap_remove(i));
        s.append(1, 0, 660, 110).unwrap();
        // Far from where all rows were stored: tiles have frames that the queries are turned into by large angles.
        shift(&mut s, 0, 0, 70_000 * i as i32);
        calls.next(&mut s, 2, 2, &Look::default());
    }
    calls.check();
}

#[test]
fn numbers_of_query_tokens() {
    let mut calls = Calls::new("tokens");
    for group in [1, 4] {
        let mut s = Stream::new(&config(), &[shape(group, 64, 32)], plain);
        s.append(1, 0, 600, 100).unwrap();
        for (i, n) in [1, 2, 3, 5, 8, 9, 16, 17, 64].into_iter().enumerate() {
            let strides = [Strides::Packed, Strides::Gaps, Strides::HeadsOuter][i % 3];
            calls.next(&mut s, 2 + i as u64, n, &Look { strides, sight: if n == 9 { Sight::All } else { Sight::Causal }, ..Look::default() });
        }
    }
    calls.check();
}

#[test]
fn rows_that_wait() {
    let mut calls = Calls::new("waiting");
    for (bits, ratio) in [(8, 2.0), (6, 8.0)] {
        let mut s = Stream::new(&Config { n_cells: 4096, n_seqs: 1, window: 32, ratio, ..Config::default() }, &[shape(2, 64, 48)], plain);
        assert_eq!(s.table.geometry().waiting_bits, bits);
        s.append(1, 0, 300, 100).unwrap();
        assert!(s.waiting() > 200);
        calls.next(&mut s, 2, 2, &Look::default());
        // Some of the waiting rows are coded, others still wait.
        while !s.table.is_fitted() {
            s.append(3 + s.live().len() as u64, 0, 1, 1).unwrap();
        }
        s.append(3, 0, 1, 1).unwrap();
        assert!(s.waiting() > 0);
        calls.next(&mut s, 4, 5, &all_asked(4));
    }
    calls.check();
}

#[test]
fn tiles_in_former_bases_amid_another_fit() {
    let mut calls = Calls::new("former");
    let config = Config { n_cells: 3600, n_seqs: 1, n_tokens: 64, window: 64, bits: 4.0, ..Config::default() };
    let mut s = Stream::new(&config, &[shape(4, 32, 16)], plain);
    s.begin_another_fit();
    let all = s.former();
    for (seed, part) in [(1, 1), (2, 2), (3, 4)] {
        while s.former() > all / part {
            s.append(20 + s.live().len() as u64, 0, 1, 1).unwrap();
        }
        assert!(s.former() > 0);
        // A block goes from bases to others.
        calls.next(&mut s, seed, seed as usize, &Look { splits: Some(1), ..Look::default() });
    }
    calls.check();
}

/// Tiles with holes, shared by two sequences of which one was shifted in part.
fn apart(shape: LayerShape) -> Stream {
    let mut s = Stream::new(&config(), &[shape], plain);
    for round in 0..8 {
        let (cells, first) = (s.free()[..100].to_vec(), [s.next_pos(0), s.next_pos(1)]);
        let places: Vec<_> = (0..100).map(|i| (first[i % 2] + i as i32 / 2, i as u32 % 2)).collect();
        s.step(round, &cells, &places).unwrap();
    }
    let gone: Vec<u32> = s.cells_of(0).into_iter().enumerate().filter(|(i, _)| i % 9 == 3 || (140..180).contains(i)).map(|(_, c)| c).collect();
    s.remove(0, &gone);
    shift(&mut s, 1, 200, 1500);
    shift(&mut s, 0, 180, -40);
    s
}

#[test]
fn rows_that_went_apart() {
    let mut calls = Calls::new("apart");
    for group in [2, 4] {
        let mut s = apart(shape(group, 64, 64));
        calls.next(&mut s, 20, 3, &Look::default());
        let (cells, first) = (s.free()[..5].to_vec(), [s.next_pos(0), s.next_pos(1)]);
        let places: Vec<_> = (0..5).map(|i| (first[i % 2] + i as i32 / 2, i as u32 % 2)).collect();
        calls.step(&mut s, 21, &cells, &places, &all_asked(2 * group));
        // Every row has a turn of its own.
        for cell in s.live() {
            let row = s.rows[cell as usize].as_mut().unwrap();
            row.pos += 3 * (cell as i32 % 61);
        }
        calls.ask(&mut s, 22, 1, &Look { sight: Sight::All, ..Look::default() });
    }
    calls.check();
}

#[test]
fn exact_rows_and_calibrated_caches() {
    let mut calls = Calls::new("exact");
    let mut s = Stream::new(&Config { window: CELLS, n_seqs: 1, ..config() }, &[shape(3, 80, 40)], plain);
    assert_eq!(s.table.geometry().tiles, 0);
    s.append(1, 0, 500, 250).unwrap();
    shift(&mut s, 0, 300, 77);
    calls.next(&mut s, 2, 2, &Look::default());
    calls.next(&mut s, 3, 64, &all_asked(6));

    let mut s = Stream::new(&Config { calibrated: true, ..config() }, &[shape(2, 64, 64)], plain);
    let calibration = s.calibration();
    s.calibrate(&calibration);
    s.append(4, 0, 150, 50).unwrap();
    calls.next(&mut s, 5, 1, &Look::default());
    calls.check();
}

#[test]
fn lengths_around_the_borders_of_tiles_and_splits() {
    let mut calls = Calls::new("lengths");
    for (i, n) in [0, 1, 63, 64, 65, 127, 128, 129, 553, 554, 555, 660, 661, 1000].into_iter().enumerate() {
        let mut s = Stream::new(&config(), &[shape(2, 32, 32)], plain);
        s.append(3, 0, n, 50).unwrap();
        let look = Look { multiprocessors: Some([1, 3, 132][i % 3]), ..Look::default() };
        calls.ask(&mut s, 4, 1, &look);
        calls.next(&mut s, 5, 1, &Look { multiprocessors: Some([132, 1, 3][i % 3]), ..look });
    }
    // More splits than there are rows to share.
    let mut s = Stream::new(&config(), &[shape(2, 32, 32)], plain);
    s.append(7, 0, 600, 50).unwrap();
    calls.next(&mut s, 8, 2, &Look { splits: Some(40), ..Look::default() });
    // Nothing at all, but sinks.
    let mut s = Stream::new(&config(), &[shape(2, 32, 32)], plain);
    calls.ask(&mut s, 6, 2, &Look { sinks: vec![0.5; 4], sight: Sight::All, ..Look::default() });
    calls.check();
}

#[test]
fn layers_and_heads_lie_where_the_geometry_has_them() {
    let mut calls = Calls::new("layers");
    let shapes = [(6, 3, 64, 32), (4, 4, 32, 64), (5, 1, 20, 10)].map(|(n_head, n_head_kv, d_k, d_v)| LayerShape { n_head, n_head_kv, d_k, d_v });
    let mut s = Stream::new(&config(), &shapes, plain);
    s.append(1, 0, 300, 100).unwrap();
    calls.next(&mut s, 2, 2, &Look::default());
    s.append(3, 0, 500, 100).unwrap();
    calls.next(&mut s, 4, 2, &Look { strides: Strides::HeadsOuter, ..Look::default() });
    calls.check();
}

#[test]
fn masks_sinks_and_soft_caps() {
    let mut calls = Calls::new("looks");
    let mut s = Stream::new(&config(), &[shape(2, 64, 64)], plain);
    s.append(5, 0, 700, 100).unwrap();
    let sinks = vec![0.5, -2.0, 3.0, f32::NEG_INFINITY];
    calls.next(&mut s, 6, 3, &Look { softcap: 5.0, sinks: sinks.clone(), sight: Sight::Some, ..Look::default() });
    calls.next(&mut s, 7, 3, &Look { sinks, blind: Some(2), ..Look::default() });
    calls.next(&mut s, 8, 4, &Look { softcap: 2.0, blind: Some(0), ..Look::default() });
    // Cells behind the mask are hidden, though there are rows.
    for n_kv in [1, 300, 703] {
        calls.ask(&mut s, 9, 3, &Look { n_kv: Some(n_kv), ..Look::default() });
    }
    calls.ask(&mut s, 10, 3, &Look { sight: Sight::All, softcap: 3.0, ..Look::default() });
    // A sink that draws all of it.
    calls.ask(&mut s, 11, 1, &Look { sinks: vec![80.0; 4], ..Look::default() });
    calls.check();
}

/// Where a stream's bases say how many coefficients there are of each width: of keys and values of each head of its layer.
fn widths_at(s: &Stream) -> Vec<[usize; 2]> {
    let l = &s.layers[0];
    let constants = SkvLayer::new(l.geometry(), l.index(), l.rope(), Scoring { scale: 1.0, softcap: 0.0 });
    let bases = |head: usize| (constants.head_first + head as i64 * constants.head_stride + constants.bases) as usize;
    (0..l.shape().n_head_kv).map(|head| [bases(head), bases(head) + basis::bytes_of(l.shape().d_k)]).collect()
}

/// Bytes of the widths of a stored basis.
const WIDTHS: usize = 2 * 7 * BANDS;

#[test]
fn widths_of_every_kind() {
    let mut calls = Calls::new("widths");
    let mut used = BTreeSet::new();
    for bits in [0.5, 1.0, 2.0, 3.0, 4.5, 6.0, 10.0] {
        let mut s = Stream::new(&Config { bits, ..config() }, &[shape(2, 64, 64)], plain);
        s.append(1, 0, 900, 100).unwrap();
        for (side, at) in widths_at(&s).into_iter().flat_map(|sides| sides.into_iter().enumerate()) {
            let counts = s.arena()[at..at + WIDTHS].chunks_exact(2).map(|n| n != [0, 0]);
            used.extend(counts.enumerate().filter(|(_, there)| *there).map(|(i, _)| (side, i % 7)));
        }
        let bands: BTreeSet<_> = s.live().iter().filter_map(|c| s.table.locate(*c as usize).and_then(|(at, _)| s.band(at))).collect();
        assert!((0..BANDS).all(|band| bands.contains(&band)), "{bands:?}");
        calls.next(&mut s, 2, 1, &Look::default());
        calls.next(&mut s, 3, 5, &Look::default());
    }
    assert_eq!(used.len(), 14, "{used:?}");
    calls.check();
}

#[test]
fn keys_or_values_without_any_coefficient() {
    let mut calls = Calls::new("none");
    for (keys, values) in [(true, false), (false, true), (true, true)] {
        let mut s = Stream::new(&Config { calibrated: true, ..config() }, &[shape(2, 64, 32)], plain);
        let calibration = s.calibration();
        s.calibrate(&calibration);
        // Bases are there, but no tile yet. A fit leaves some coefficients to both.
        s.append(1, 0, 1, 1).unwrap();
        for [key, value] in widths_at(&s) {
            for at in [key].into_iter().filter(|_| keys).chain([value].into_iter().filter(|_| values)) {
                let counts = &mut s.arena_mut()[at..at + WIDTHS];
                assert!(counts.iter().any(|n| *n > 0));
                counts.fill(0);
            }
        }
        s.append(2, 0, 600, 100).unwrap();
        calls.next(&mut s, 3, 2, &Look::default());
    }
    calls.check();
}

/// Multiply each row of some heads by a power of two of its own.
fn scale_rows(x: &mut [f32], d: usize, octaves: i32) {
    for row in x.chunks_exact_mut(d) {
        let by = (row[0].to_bits() % (2 * octaves as u32 + 1)) as i32 - octaves;
        row.iter_mut().for_each(|x| *x *= 2f32.powi(by) / 64.0);
    }
}

#[test]
fn adversarial_magnitudes() {
    let mut calls = Calls::new("magnitudes");
    type Alter = fn(&Heads, &mut Input);
    let usual: Alter = |_, _| {};
    let faint: Alter = |_, x| [&mut x.k, &mut x.v].into_iter().flatten().for_each(|x| *x /= 64.0);
    // What rows are like that bases are fitted to, and those that come later; the factor on scores.
    let cases: [(Alter, Alter, Option<f32>); 6] = [
        // Gains from one end of their range to the other.
        (faint, |g, x| scale_rows(&mut x.v, g.d_v, 16), None),
        (faint, |g, x| (scale_rows(&mut x.k, g.d_k, 16), scale_rows(&mut x.q, g.d_k, 3)).1, Some(1e-4)),
        // A mean a thousand times what keys differ by, as Qwen2.5 has.
        (usual, |g, x| x.k.iter_mut().enumerate().for_each(|(i, x)| *x += if i % g.d_k % 16 == 3 { 300.0 } else { 0.0 }), Some(0.02)),
        // Huge, and tiny.
        (usual, |_, x| (x.k.iter_mut().for_each(|x| *x *= 4000.0), x.v.iter_mut().for_each(|x| *x *= 6000.0)).1, Some(1.0 / 64000.0)),
        (usual, |_, x| (x.q.iter_mut().for_each(|x| *x *= 1e-6), x.v.iter_mut().for_each(|x| *x *= 1e-4)).1, Some(1e5)),
        // Scores that let one row draw nearly all.
        (usual, |_, x| x.q.iter_mut().for_each(|x| *x *= 12.0), None),
    ];
    for (before, alter, scale) in cases {
        let look = Look { scale, ..Look::default() };
        let mut s = Stream::new(&config(), &[shape(2, 64, 64)], plain);
        s.alter = before;
        s.append(1, 0, 700, 100).unwrap();
        s.alter = alter;
        s.append(2, 0, 200, 50).unwrap();
        calls.next(&mut s, 3, 2, &look);
        let mut s = Stream::new(&config(), &[shape(2, 64, 64)], plain);
        s.alter = alter;
        s.append(4, 0, 100, 50).unwrap();
        calls.next(&mut s, 5, 1, &look);
        s.append(6, 0, 800, 100).unwrap();
        calls.next(&mut s, 7, 2, &look);
    }
    calls.check();
}

fn make_sinks(x: &mut Input, stronger: f32) {
    x.k.iter_mut().for_each(|x| *x *= stronger);
    x.v.fill(0.0);
}

#[test]
fn sinks_that_draw_nearly_all_and_give_nothing() {
    let mut calls = Calls::new("sinks");
    let cases: [fn(&Heads, &mut Input); 4] =
        [|_, x| make_sinks(x, 4.0), |_, x| make_sinks(x, 6.0), |_, x| make_sinks(x, 8.0), |_, x| make_sinks(x, 10.0)];
    for alter in cases {
        let mut s = Stream::new(&config(), &[shape(2, 64, 64)], |_| RopeParams::none());
        s.alter = alter;
        s.append(1, 0, 4, 4).unwrap();
        s.alter = |_, _| {};
        s.append(2, 0, 700, 100).unwrap();
        calls.next(&mut s, 3, 2, &Look::default());
    }
    calls.check();
}

#[test]
fn nothing_races_in_shared_memory() {
    let mut calls = Calls::new("races");
    let mut s = apart(shape(3, 32, 20));
    calls.next(&mut s, 1, 3, &all_asked(6));
    let mut s = Stream::new(&config(), &[shape(1, 144, 16)], plain);
    s.append(1, 0, 600, 100).unwrap();
    calls.next(&mut s, 2, 1, &Look::default());
    let mut r = Random::new(1);
    s.append(r.next() >> 32, 0, 100, 100).unwrap();
    calls.next(&mut s, 3, 2, &Look { multiprocessors: Some(1), ..Look::default() });
    calls.check_races();
}
