//! The table and the layers under what llama.cpp does to a stream: whatever happens, every live cell has its own row, and the
//! row is the one that went in.

mod common;

use common::{ModelRow, Random, Stream};
use proptest::prelude::*;
use spectral_kv::cache::plan::Change;
use spectral_kv::cache::{plan, Cells, Geometry, Plan, Table};
use spectral_kv::codec::calibration::Calibration;
use spectral_kv::config::{Config, LayerShape};
use spectral_kv::error::Error;
use spectral_kv::rope::{Pairing, RopeParams};
use std::sync::{Arc, OnceLock};

/// With codes of nearly 8 bits a coded row is off by less than this.
const NEAR: f64 = 0.05;
/// The same when a tile holds rows on both sides of a gap in the positions: they are far from the frame their basis was fitted in.
const NEAR_A_GAP: f64 = 0.15;

fn config(n_cells: u32) -> Config {
    Config { n_cells, n_seqs: 4, n_tokens: n_cells, window: 16, bits: 10.0, ..Config::default() }
}

fn stream_of(config: &Config) -> Stream {
    // Two layers of different heads: what is right in one must not be so by chance.
    let shapes = [LayerShape { n_head: 4, n_head_kv: 2, d_k: 32, d_v: 16 }, LayerShape { n_head: 2, n_head_kv: 1, d_k: 16, d_v: 32 }];
    let mut s = Stream::new(config, &shapes, |d| RopeParams::plain(Pairing::Halves, d, 10000.0));
    if config.calibrated {
        s.calibrate(calibration());
    }
    s
}

fn calibration() -> &'static Calibration {
    static CALIBRATION: OnceLock<Calibration> = OnceLock::new();
    CALIBRATION.get_or_init(|| stream().calibration())
}

fn stream() -> Stream {
    stream_of(&config(1100))
}

/// The table (with the same empty plan pending) and every row.
fn snapshot(s: &mut Stream) -> (String, Vec<u16>) {
    s.plan(&[]).unwrap();
    (format!("{:?}", s.table), s.bits(&s.live()))
}

/// What llama.cpp does to a stream. Numbers are cut to what there is when the operation comes.
#[derive(Debug, Clone)]
enum Op {
    /// Tokens of the sequences of a bit set, in turn, in the first free cells or in scattered ones.
    Append {
        seqs: u32,
        n: usize,
        scattered: bool,
    },
    /// Steps of a token each.
    Decode {
        seq: u32,
        steps: usize,
    },
    RemoveRange {
        seq: u32,
        from: usize,
        n: usize,
    },
    RemoveTail {
        seq: u32,
        keep: usize,
    },
    RemoveSequence {
        seq: u32,
    },
    /// Remove `n` rows and shift what follows down, as a context shift does.
    ShiftDown {
        seq: u32,
        from: usize,
        n: usize,
    },
    ShiftUp {
        seq: u32,
        from: usize,
        by: i32,
    },
    Copy {
        from: u32,
        to: u32,
    },
    /// Reuse cells in the step that removes their rows.
    Replace {
        seq: u32,
        n: usize,
    },
    DroppedPlan {
        n: usize,
    },
    Abort {
        seq: u32,
        n: usize,
        done: usize,
    },
    Clear,
}

fn op() -> impl Strategy<Value = Op> {
    let seq = || 0u32..4;
    let n = || prop_oneof![1usize..8, 30usize..140, 1usize..=600];
    prop_oneof![
        8 => (1u32..16, n(), any::<bool>()).prop_map(|(seqs, n, scattered)| Op::Append { seqs, n, scattered }),
        4 => (seq(), n(), any::<bool>()).prop_map(|(seq, n, scattered)| Op::Append { seqs: 1 << seq, n, scattered }),
        2 => (seq(), 1usize..80).prop_map(|(seq, steps)| Op::Decode { seq, steps }),
        2 => (seq(), 0usize..900, n()).prop_map(|(seq, from, n)| Op::RemoveRange { seq, from, n }),
        1 => (seq(), 0usize..900).prop_map(|(seq, keep)| Op::RemoveTail { seq, keep }),
        1 => seq().prop_map(|seq| Op::RemoveSequence { seq }),
        2 => (seq(), 0usize..300, n()).prop_map(|(seq, from, n)| Op::ShiftDown { seq, from, n }),
        1 => (seq(), 0usize..900, 1i32..100_000).prop_map(|(seq, from, by)| Op::ShiftUp { seq, from, by }),
        1 => (seq(), seq()).prop_map(|(from, to)| Op::Copy { from, to }),
        1 => (seq(), 1usize..100).prop_map(|(seq, n)| Op::Replace { seq, n }),
        1 => n().prop_map(|n| Op::DroppedPlan { n }),
        1 => (seq(), n(), 0usize..=2).prop_map(|(seq, n, done)| Op::Abort { seq, n, done }),
        1 => Just(Op::Clear),
    ]
}

/// Free cells for `n` tokens, as many as there are, and their places: the sequences of a bit set in turn.
fn fresh_tokens(s: &Stream, r: &mut Random, seqs: u32, n: usize, scattered: bool) -> (Vec<u32>, Vec<(i32, u32)>) {
    let (mut cells, n) = (s.free(), n.min(s.table.geometry().config.n_tokens as usize));
    if scattered {
        for i in (1..cells.len()).rev() {
            cells.swap(i, r.below(i + 1));
        }
    }
    cells.truncate(n);
    let seqs: Vec<u32> = (0..4).filter(|i| seqs >> i & 1 == 1).collect();
    let mut next: Vec<i32> = (0..4).map(|i| s.next_pos(i)).collect();
    let place = |i: usize| {
        let seq = seqs[i % seqs.len()];
        next[seq as usize] += 1;
        (next[seq as usize] - 1, seq)
    };
    let places = (0..cells.len()).map(place).collect();
    (cells, places)
}

fn position(s: &Stream, cell: u32) -> i32 {
    s.rows[cell as usize].as_ref().unwrap().pos
}

/// Shift the rows of `cells`. Rows that several sequences hold would collide with those that only one of them holds.
fn shift(s: &mut Stream, cells: &[u32], by: i32) {
    let mut rows: Vec<_> = cells.iter().map(|c| s.rows[*c as usize].clone().unwrap()).collect();
    if rows.iter().all(|r| r.seqs.is_power_of_two()) {
        rows.iter_mut().for_each(|r| r.pos += by);
        cells.iter().zip(rows).for_each(|(c, r)| s.rows[*c as usize] = Some(r));
    }
}

fn apply(s: &mut Stream, r: &mut Random, op: &Op) {
    let cut = |cells: Vec<u32>, from: usize, n: usize| {
        let from = from.min(cells.len());
        (cells[from..(from + n).min(cells.len())].to_vec(), cells[(from + n).min(cells.len())..].to_vec())
    };
    match *op {
        Op::Append { seqs, n, scattered } => {
            let (cells, places) = fresh_tokens(s, r, seqs, n, scattered);
            s.step(r.next() >> 16, &cells, &places).unwrap();
        }
        Op::Decode { seq, steps } => {
            let steps = steps.min(s.free().len());
            s.append(r.next() >> 16, seq, steps, 1).unwrap();
        }
        Op::RemoveRange { seq, from, n } => {
            let (gone, _) = cut(s.cells_of(seq), from, n);
            s.remove(seq, &gone);
        }
        Op::RemoveTail { seq, keep } => {
            let (_, gone) = cut(s.cells_of(seq), 0, keep);
            s.remove(seq, &gone);
        }
        Op::RemoveSequence { seq } => s.remove(seq, &s.cells_of(seq)),
        Op::ShiftDown { seq, from, n } => {
            let (gone, rest) = cut(s.cells_of(seq), from, n);
            if let (Some(first), Some(next)) = (gone.first(), rest.first()) {
                let by = position(s, *first) - position(s, *next);
                s.remove(seq, &gone);
                shift(s, &rest, by);
            }
        }
        Op::ShiftUp { seq, from, by } => {
            let (_, rest) = cut(s.cells_of(seq), 0, from);
            // Positions stay where f32 angles of the model's rope would still mean something.
            if s.next_pos(seq) < 1_000_000 {
                shift(s, &rest, by);
            }
        }
        Op::Copy { from, to } => {
            if s.cells_of(to).is_empty() {
                for c in s.cells_of(from) {
                    s.rows[c as usize].as_mut().unwrap().seqs |= 1 << to;
                }
            }
        }
        Op::Replace { seq, n } => {
            let cells = s.cells_of(seq);
            let n = n.min(s.table.geometry().config.n_tokens as usize);
            let tail = cells[cells.len().saturating_sub(n)..].to_vec();
            s.remove(seq, &tail);
            let cells: Vec<u32> = tail.into_iter().filter(|c| s.rows[*c as usize].is_none()).collect();
            let first = s.next_pos(seq);
            let places: Vec<_> = (0..cells.len() as i32).map(|i| (first + i, seq)).collect();
            s.step(r.next() >> 16, &cells, &places).unwrap();
        }
        Op::DroppedPlan { n } => {
            let before = snapshot(s);
            let (cells, places) = fresh_tokens(s, r, 15, n, true);
            let t = s.tokens(1, &cells, &places);
            s.enter(&t);
            s.plan(&cells).unwrap();
            cells.iter().for_each(|c| s.rows[*c as usize] = None);
            assert!(snapshot(s) == before, "a plan that was dropped changed something");
        }
        Op::Abort { seq, n, done } => {
            let (cells, places) = fresh_tokens(s, r, 1 << seq, n, false);
            // A fit that is replayed on a handful of rows has a test of its own.
            let calibrated = s.table.geometry().config.calibrated;
            if !calibrated && !s.table.is_fitted() && s.live().len() + cells.len() >= s.table.geometry().fit_rows {
                return;
            }
            s.abort(r.next() >> 16, &cells, &places, done).unwrap();
        }
        Op::Clear => (0..4).for_each(|seq| s.remove(seq, &s.cells_of(seq))),
    }
}

/// A fixed sequence of steps over the fit and into compaction; what it leaves behind, to compare.
fn script(s: &mut Stream) -> Vec<u16> {
    s.append(900, 0, 700, 130).unwrap();
    s.append(901, 2, 90, 1).unwrap();
    let gone: Vec<u32> = s.cells_of(0).into_iter().filter(|c| c % 3 != 0).collect();
    s.remove(0, &gone);
    s.append(902, 1, 600, 200).unwrap();
    let mut out = s.bits(&s.live());
    for layer in 0..2 {
        let next = s.next_pos(0);
        out.extend(s.attend(layer, 5, 0, next, 3).0.iter().flat_map(|x| [x.to_bits() as u16, (x.to_bits() >> 16) as u16]));
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_of_operations_keeps_every_row(ops in prop::collection::vec(op(), 1..40), seed in any::<u32>(), calibrated in any::<bool>()) {
        let stream = || stream_of(&Config { calibrated, ..config(1100) });
        let (mut s, mut r) = (stream(), Random::new(u64::from(seed)));
        for (i, op) in ops.iter().enumerate() {
            apply(&mut s, &mut r, op);
            if i % 3 == 2 {
                s.check(NEAR_A_GAP);
            }
        }
        s.check(NEAR_A_GAP);
        apply(&mut s, &mut r, &Op::Clear);
        s.check(NEAR_A_GAP);
        prop_assert!(script(&mut s) == script(&mut stream()), "what was there before shows");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, max_shrink_iters: 30, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_of_operations_amid_another_fit_keeps_every_row(ops in prop::collection::vec(op(), 1..25), seed in any::<u32>(), steps in 0usize..30) {
        let (mut s, mut r) = (amid_another_fit(4), Random::new(u64::from(seed)));
        s.append(77, 1, steps, 1).unwrap();
        for (i, op) in ops.iter().enumerate() {
            apply(&mut s, &mut r, op);
            if i % 6 == 5 {
                s.check(NEAR_A_GAP);
            }
        }
        s.check(NEAR_A_GAP);
    }
}

#[test]
fn sparse_tiles_are_compacted_bit_for_bit_but_for_rows_that_were_fine() {
    let mut s = stream_of(&Config { fine_rows: 0, ..config(1100) });
    s.append(1, 0, 1100, 100).unwrap();
    s.check(NEAR);
    let gone: Vec<u32> = s.cells_of(0).into_iter().enumerate().filter(|(i, _)| i % 4 != 1).map(|(_, c)| c).collect();
    s.remove(0, &gone);
    let kept = s.cells_of(0);
    let before = s.bits(&kept[..kept.len() - 50]);
    s.append(2, 0, gone.len(), 75).unwrap();
    let moved = s.layers[0].counters.read().moved;
    assert!(moved > 0 && s.layers[1].counters.read().moved == moved);
    // The last rows kept were exact and have been coded since.
    let (n, after) = (kept.len() - 50, s.bits(&kept[..kept.len() - 50]));
    let size = |layer: usize| s.layers[layer].shape().n_head_kv * s.layers[layer].shape().elements();
    assert_eq!(after.len(), n * (size(0) + size(1)));
    // Two in 64 may have to share what a tile has for two; all others are what they were.
    let changed = before.chunks(size(0) / 3).zip(after.chunks(size(0) / 3)).filter(|(a, b)| a != b).count();
    assert!(changed * 10 < before.len() / (size(0) / 3), "{changed} pieces of rows changed when they moved");
    s.check(NEAR);
}

#[test]
fn rows_lose_precision_as_they_age_and_only_then() {
    let mut s = stream_of(&Config { bits: 4.0, fine_rows: 128, n_seqs: 1, ..config(2000) });
    let g = s.table.geometry().clone();
    assert_eq!(g.band_tiles[..2], [2, 4]);
    let rates: Vec<f64> = (0..3).map(|b| g.bits(b)).collect();
    assert!(rates[0] > rates[1] && rates[1] > rates[2]);
    s.append(1, 0, 1400, 100).unwrap();
    // Tiles of the first band are the youngest, each older band the next older ones.
    let cells = s.cells_of(0);
    let band = |s: &Stream, cell: u32| s.table.locate(cell as usize).and_then(|(at, _)| s.band(at));
    let bands: Vec<_> = cells.iter().filter_map(|c| band(&s, *c)).collect();
    assert!(bands.windows(2).all(|w| w[0] >= w[1]), "{bands:?}");
    assert_eq!((0..3).map(|b| bands.iter().filter(|x| **x == b).count()).collect::<Vec<_>>()[..2], [128, 256]);
    let errors: Vec<f64> = (0..3).map(|b| s.error_of(&cells.iter().copied().filter(|c| band(&s, *c) == Some(b)).collect::<Vec<_>>())).collect();
    assert!(errors[0] < 0.7 * errors[1] && errors[1] < 0.8 * errors[2], "{errors:?}");
    let recoded = s.layers[0].counters.read().recoded;
    assert!(recoded > 0);
    // A removed tail makes room: the next rows find it, and nothing ages.
    let tail = cells[1200..].to_vec();
    s.remove(0, &tail);
    let before = s.bits(&cells[..1000]);
    s.append(2, 0, 100, 10).unwrap();
    assert_eq!(s.layers[0].counters.read().recoded, recoded);
    assert!(s.bits(&cells[..1000]) == before);
}

#[test]
fn a_decode_step_changes_one_tile_at_most() {
    // Nothing waits for a fit, and all changes are for the room of new rows.
    let mut s = stream_of(&Config { bits: 5.0, fine_rows: 128, n_seqs: 1, n_tokens: 100, calibrated: true, ..config(2000) });
    // A long step makes no room for rows to come.
    s.append(1, 0, 1200, 100).unwrap();
    s.append(2, 0, 30, 1).unwrap();
    let total = |s: &Stream| {
        let c = s.layers[0].counters.read();
        (c.sealed_decode + c.recoded) / 64
    };
    let (mut before, first) = (total(&s), s.layers[0].counters.read());
    for token in 0..400 {
        s.append(3 + token, 0, 1, 1).unwrap();
        assert!(total(&s) - before <= 1, "token {token}");
        before = total(&s);
    }
    let last = s.layers[0].counters.read();
    assert!(last.sealed_decode - first.sealed_decode >= 6 * 64 && last.recoded - first.recoded >= 12 * 64);
    s.check(0.3);
}

#[test]
fn a_full_context_always_finds_tiles() {
    // No slack: tiles hold exactly what window and sinks leave over.
    for (n_cells, fine_rows) in [(16 + 4 + 64 * 16, 0), (16 + 4 + 64 * 16, 64), (16 + 4 + 64 * 16 + 1, 200), (1100, u32::MAX)] {
        for (sequences, seed) in [(1, 1), (4, 2)] {
            let config = Config { fine_rows, ..config(n_cells) };
            let (mut s, mut r) = (stream_of(&config), Random::new(seed));
            for round in 0..300u64 {
                let seq = r.below(sequences) as u32;
                let n = s.free().len().min(1 + r.below(200));
                s.append(seed * 1000 + round, seq, n, 600).unwrap_or_else(|e| panic!("{n_cells} cells, {sequences} sequences, step {round}: {e}"));
                if s.free().is_empty() {
                    let gone: Vec<u32> = s.live().into_iter().filter(|_| r.below(5) == 0).collect();
                    (0..4).for_each(|seq| s.remove(seq, &gone));
                }
            }
            s.check(NEAR);
        }
    }
}

#[test]
fn a_context_is_filled_in_steps_of_any_length() {
    // The table alone: where rows go does not depend on what layers find.
    let small = [LayerShape { n_head: 4, n_head_kv: 2, d_k: 64, d_v: 64 }, LayerShape { n_head: 2, n_head_kv: 1, d_k: 128, d_v: 128 }];
    let many = [LayerShape { n_head: 9, n_head_kv: 3, d_k: 64, d_v: 64 }; 12];
    for shapes in [&small[..], &many[..]] {
        for (n_cells, ratio, n_tokens) in [(2048, 4.0, 512), (4096, 8.0, 512), (5000, 5.0, 512), (6000, 8.0, 512), (6000, 4.0, 64), (8192, 8.0, 2048)]
        {
            for length in [1, 7, 50, 64, 65, 130, 500, n_tokens as usize].into_iter().filter(|n| *n <= n_tokens as usize) {
                let config = Config { n_cells, ratio, n_tokens, ..Config::default() };
                let geometry = Arc::new(Geometry::new(&config, shapes).unwrap());
                let (mut table, n) = (Table::new(geometry.clone(), Arc::default()), n_cells as usize);
                let (mut pos, mut seq) = (vec![-1; n], vec![-1; n]);
                let mut out = vec![0; plan::capacity(&geometry, n_tokens as usize)];
                for from in (0..n).step_by(length) {
                    let new: Vec<u32> = (from..(from + length).min(n)).map(|cell| cell as u32).collect();
                    for cell in &new {
                        (pos[*cell as usize], seq[*cell as usize]) = (*cell as i32, 0);
                    }
                    let done = table.plan(Cells { pos: &pos, seq: &seq }, &new, &mut out).and_then(|_| table.commit());
                    done.unwrap_or_else(|e| {
                        panic!("{n_cells} cells, ratio {ratio}, {length} of {n_tokens} tokens, {} layers, at {from}: {e}", shapes.len())
                    });
                }
            }
        }
    }
}

#[test]
fn a_full_context_without_sinks_finds_tiles() {
    // Positions start behind the sinks, as they do when the head of a sequence was removed: all but the window is coded.
    let mut s = stream_of(&Config { n_seqs: 1, ..config(16 + 4 + 64 * 16) });
    s.step(1, &[0], &[(100, 0)]).unwrap();
    s.append(2, 0, 16 + 64 * 16 - 1, 200).unwrap();
    let coded = s.cells_of(0)[..60].to_vec();
    s.remove(0, &coded);
    s.append(3, 0, 64, 1).unwrap();
    assert!(s.free().is_empty());
    s.check(NEAR);
}

#[test]
fn six_bits_are_near_too() {
    let mut s = stream_of(&Config { bits: 7.5, ..config(1100) });
    s.append(1, 0, 1000, 100).unwrap();
    s.check(0.1);
}

#[test]
fn a_window_as_long_as_the_context_keeps_every_row_exact() {
    let mut s = stream_of(&Config { window: 1100, n_seqs: 1, ..config(1100) });
    assert_eq!(s.table.geometry().tiles, 0);
    for round in 0..3 {
        s.append(round, 0, s.free().len(), 300).unwrap();
        s.check(0.0);
        let gone: Vec<u32> = s.cells_of(0).into_iter().filter(|c| c % 2 == 0).collect();
        s.remove(0, &gone);
        shift(&mut s, &gone.iter().map(|c| c + 1).collect::<Vec<_>>(), 7);
    }
    assert!(!s.table.is_fitted());
}

#[test]
fn a_shift_turns_keys_without_touching_them() {
    let mut s = stream();
    s.append(1, 1, 800, 200).unwrap();
    let arena = s.arena().to_vec();
    let cells = s.cells_of(1);
    let before = s.bits(&cells);
    for by in [1000, -999, 50_000, -50_001] {
        shift(&mut s, &cells, by);
        s.check(NEAR);
    }
    assert!(s.bits(&cells) == before, "there and back again");
    assert!(s.arena() == arena);
}

/// Single tokens of sequence 0 until the bases are there; the heads looked at in each step.
fn study(s: &mut Stream) -> Vec<usize> {
    let mut looked = Vec::new();
    while !s.table.is_fitted() {
        let (cells, places) = (s.free()[..1].to_vec(), [(s.next_pos(0), 0)]);
        let t = s.tokens(looked.len() as u64, &cells, &places);
        s.enter(&t);
        let ints = s.plan(&cells).unwrap();
        let study = Plan::parse(&ints).unwrap().study;
        looked.push((study.to - study.from) as usize);
        (0..2).for_each(|layer| s.run(layer, &ints, &t).unwrap());
        s.table.commit().unwrap();
        s.age();
    }
    looked
}

#[test]
fn a_fit_is_spread_over_the_steps_before_it_and_no_head_is_looked_at_twice() {
    // Of the two threads, either may be the one that finds the last head.
    let filled = |backwards: bool| {
        let mut s = stream();
        s.backwards = backwards;
        s.append(1, 0, 400, 25).unwrap();
        let looked = study(&mut s);
        assert!(s.cells_of(0).len().abs_diff(s.table.geometry().fit_rows) <= 1, "{} {}", s.cells_of(0).len(), s.table.geometry().fit_rows);
        assert_eq!((looked.iter().sum::<usize>(), looked.iter().max()), (3, Some(&1)), "{looked:?}");
        s.check(NEAR);
        s.append(3, 0, 300, 7).unwrap();
        assert_eq!((s.waiting(), s.layers[0].counters.read().fits), (0, 1));
        s.check(NEAR);
        s.arena().to_vec()
    };
    assert!(filled(false) == filled(true));
}

#[test]
fn after_a_fit_short_steps_code_a_tile_of_what_waited_and_long_ones_all() {
    for (step, steps) in [(1, 7), (90, 1)] {
        let mut s = stream();
        s.append(1, 0, 400, 25).unwrap();
        while !s.table.is_fitted() {
            s.append(2, 0, step, step).unwrap();
        }
        let mut taken = 1;
        while s.waiting() > 0 {
            let before = s.waiting();
            s.append(3 + taken, 0, step, step).unwrap();
            assert_eq!(before - s.waiting(), 64);
            s.check(NEAR);
            taken += 1;
        }
        assert!(taken.abs_diff(steps) <= 1, "{taken} steps of {step}");
    }
}

#[test]
fn bases_that_no_longer_fit_what_comes_are_fitted_again() {
    for step in [1, 32, 64] {
        let mut s = stream_of(&Config { n_seqs: 1, n_tokens: 64, window: 64, bits: 3.0, fine_rows: 0, ..config(12000) });
        s.monotonous = true;
        s.append(1, 0, 2250, 50).unwrap();
        assert!(s.table.is_fitted() && s.layers[0].counters.read().fits == 1);
        s.monotonous = false;
        s.append(2, 0, 2400, step).unwrap();
        assert_eq!((s.layers[0].counters.read().fits, s.layers[1].counters.read().fits), (2, 2), "steps of {step}");
        s.append(3, 0, 300, step).unwrap();
        assert_eq!(s.former(), 0);
        let cells = s.cells_of(0);
        let errors = [&cells[4..2100], &cells[2250..2400], &cells[2600..]].map(|cells| s.error_of(cells));
        assert!(errors[0] < 0.1 && errors[2] < 0.5, "steps of {step}: {errors:?}");
    }
}

#[test]
fn few_rows_are_fitted_on_first_and_more_of_them_later() {
    for (step, least) in [(1, 18), (40, 2), (64, 2)] {
        let mut s = stream_of(&Config { n_seqs: 1, n_tokens: 64, window: 64, bits: 10.0, ..config(4000) });
        s.refit(step, |s| assert_eq!(s.former(), 0));
        let taken = s.refit(step, |s| s.check(NEAR));
        assert!(taken >= least && s.former() == 0, "{taken} steps of {step}");
        let n = s.free().len();
        (0..n).step_by(50).for_each(|at| s.append(4, 0, 50.min(n - at), 50).unwrap());
        s.check(NEAR);
    }
}

/// A stream of so many sequences whose tiles are being coded again in new bases.
fn amid_another_fit(n_seqs: u32) -> Stream {
    let mut s = stream_of(&Config { n_seqs, n_tokens: 64, window: 64, bits: 10.0, ..config(3000 + 600 * n_seqs) });
    s.begin_another_fit();
    assert!(s.former() > 10);
    s
}

#[test]
fn tiles_in_former_bases_are_looked_after_like_others() {
    let mut s = amid_another_fit(2);
    // A hole in each, and some without any row left.
    let cells = s.cells_of(0);
    let gone: Vec<u32> = cells.iter().copied().enumerate().filter(|(i, _)| i % 50 == 7 || (300..450).contains(i)).map(|(_, c)| c).collect();
    let former = s.former();
    s.remove(0, &gone);
    s.append(1, 1, 1, 1).unwrap();
    assert!((2..=3).contains(&(former - s.former())), "{former} {}", s.former());
    s.check(NEAR);
    // Two layers of a step that stops part-way: each does what it has not done.
    let (next, free) = (s.next_pos(0), s.free()[0]);
    for done in [0, 1, 2] {
        s.abort(2 + done as u64, &[free], &[(next, 0)], done).unwrap();
        s.check(NEAR);
    }
    // All go, and others come before the rest is coded again.
    let (rest, former) = (s.cells_of(0), s.former());
    assert!(former > 2);
    s.remove(0, &rest);
    s.append(9, 0, 600, 64).unwrap();
    assert_eq!(s.former(), 0);
    s.check(NEAR);
}

#[test]
fn a_state_saved_amid_another_fit_continues_elsewhere() {
    let s = amid_another_fit(2);
    let cells = s.cells_of(0);
    let (rows, bytes): (Vec<_>, _) = (cells.iter().map(|c| s.rows[*c as usize].clone().unwrap()).collect(), s.save(&cells).unwrap());
    let mut fresh = stream_of(&s.table.geometry().config);
    fresh.restore(&cells, &rows, &bytes).unwrap();
    assert_eq!(fresh.former(), 0);
    fresh.check(NEAR);
    // What it then saves holds the same rows once more.
    let mut third = stream_of(&s.table.geometry().config);
    third.restore(&cells, &rows, &fresh.save(&cells).unwrap()).unwrap();
    third.check(NEAR);
    fresh.append(1, 0, 400, 40).unwrap();
    fresh.check(NEAR);
    // Into a stream that is itself in the middle of one: what finds room there, or is refused and changes nothing.
    let mut other = amid_another_fit(2);
    let few = &cells[..200];
    let (rows, bytes): (Vec<_>, _) = (few.iter().map(|c| s.rows[*c as usize].clone().unwrap()).collect(), s.save(few).unwrap());
    let rows: Vec<ModelRow> = rows.into_iter().map(|r: ModelRow| ModelRow { seqs: 2, ..r }).collect();
    let places = other.free()[..few.len()].to_vec();
    if other.restore(&places, &rows, &bytes).is_ok() {
        assert_eq!(other.cells_of(1).len(), 200);
    }
    other.check(NEAR);
    other.append(1, 0, 500, 64).unwrap();
    assert_eq!(other.former(), 0);
    other.check(NEAR);
}

#[test]
fn rows_that_come_faster_than_they_can_wait_are_looked_at_and_coded_at_once() {
    for before in [0, 300] {
        let mut s = stream_of(&Config { n_cells: 3000, ..config(3000) });
        if before > 0 {
            s.append(1, 0, before, 100).unwrap();
        }
        s.append(2, 0, 2500, 2500).unwrap();
        assert!(s.table.is_fitted() && s.waiting() == 0 && s.layers[0].counters.read().fits == 1);
        s.check(NEAR);
        s.append(3, 0, 100, 50).unwrap();
        s.check(NEAR);
    }
}

/// The plan of a token of sequence 0, which is dropped.
fn next_plan(s: &mut Stream) -> Vec<i32> {
    let cell = s.free()[0];
    let t = s.tokens(1, &[cell], &[(s.next_pos(0), 0)]);
    s.enter(&t);
    let plan = s.plan(&[cell]).unwrap();
    s.rows[cell as usize] = None;
    plan
}

fn next_study(s: &mut Stream) -> plan::Study {
    Plan::parse(&next_plan(s)).unwrap().study
}

#[test]
fn a_study_is_not_known_to_a_copy_nor_to_what_comes_after_a_clear() {
    let mut s = stream();
    s.append(1, 0, 400, 25).unwrap();
    s.append(2, 0, s.table.geometry().fit_rows - 401, 1).unwrap();
    let known = next_study(&mut s);
    assert!(known.id > 0 && known.to >= 2);
    s.table = s.table.copied();
    let other = next_study(&mut s);
    assert!(other.id > 0 && other.id != known.id && other.from == 0);
    s.append(3, 0, 60, 1).unwrap();
    assert!(s.table.is_fitted());
    s.check(NEAR);
    s.remove(0, &s.cells_of(0));
    assert_eq!(next_study(&mut s).id, 0);
    assert!(script(&mut s) == script(&mut stream()));
}

#[test]
fn layers_are_told_of_a_study_that_is_given_up() {
    for clear in [|s: &mut Stream| s.remove(0, &s.cells_of(0)), |s: &mut Stream| (s.rows.fill(None), s.table.reset()).1] {
        let mut s = stream();
        s.append(1, 0, 400, 25).unwrap();
        s.append(2, 0, s.table.geometry().fit_rows - 402, 1).unwrap();
        let known = next_study(&mut s);
        assert!(known.id > 0);
        clear(&mut s);
        for _ in 0..2 {
            assert_eq!(next_study(&mut s), plan::Study { id: -known.id, from: 0, to: 0 });
        }
        s.append(3, 0, 1, 1).unwrap();
        assert_eq!(next_study(&mut s).id, 0);
    }
}

#[test]
fn layers_are_told_of_a_study_that_is_over() {
    let mut s = stream();
    s.append(1, 0, 400, 25).unwrap();
    s.append(2, 0, s.table.geometry().fit_rows - 402, 1).unwrap();
    let known = next_study(&mut s);
    s.append(3, 0, 60, 1).unwrap();
    assert!(s.table.is_fitted() && known.id > 0);
    assert!(s.findings.head(known.id, 0).0.is_none());
}

#[test]
fn a_study_survives_an_aborted_step_and_a_saved_state_goes_on_without() {
    for done in 0..=2 {
        let mut s = stream();
        s.append(1, 0, 400, 25).unwrap();
        for round in 0..30 {
            s.append(2 + round, 0, 2, 1).unwrap();
            let (cell, place) = (s.free()[0], (s.next_pos(0), 0));
            s.abort(100 + round, &[cell], &[place], done).unwrap();
        }
        assert!(!s.table.is_fitted());
        let cells = s.live();
        let saved = s.save(&cells).unwrap();
        let rows: Vec<_> = cells.iter().map(|c| s.rows[*c as usize].clone().unwrap()).collect();
        let mut other = stream();
        other.restore(&cells, &rows, &saved).unwrap();
        for s in [&mut s, &mut other] {
            s.append(200, 0, 100, 1).unwrap();
            assert!(s.table.is_fitted());
            s.check(NEAR);
        }
    }
}

#[test]
fn commit_needs_a_plan() {
    let mut s = stream();
    assert!(matches!(s.table.commit(), Err(Error::State(_))));
    assert!(matches!(s.table.commit_replayed(), Err(Error::State(_))));
    s.append(1, 0, 10, 10).unwrap();
    assert!(matches!(s.table.commit(), Err(Error::State(_))));
}

#[test]
fn bad_arguments_are_refused_and_change_nothing() {
    let mut s = stream();
    s.append(1, 0, 700, 100).unwrap();
    s.plan(&[]).unwrap();
    let before = format!("{:?}", s.table);
    let (pos, seq) = s.places();
    let mut out = vec![0; plan::capacity(s.table.geometry(), 3)];
    let changed = |x: &[i32], cell: usize, to: i32| {
        let mut x = x.to_vec();
        x[cell] = to;
        x
    };
    let n = pos.len() - 1;
    for (pos, seq, new) in [
        (pos.clone(), seq.clone(), vec![5, 6, 5]),
        (pos.clone(), seq.clone(), vec![5, 700]),
        (pos.clone(), seq.clone(), vec![1100]),
        (pos.clone(), seq.clone(), vec![u32::MAX]),
        (pos[..n].to_vec(), seq.clone(), vec![]),
        (pos.clone(), seq[..n].to_vec(), vec![]),
        (vec![], vec![], vec![]),
        (changed(&pos, 900, 3), seq.clone(), vec![]),
        (changed(&pos, 3, -1), seq.clone(), vec![]),
        (pos.clone(), changed(&seq, 3, -1), vec![]),
    ] {
        let result = s.table.plan(Cells { pos: &pos, seq: &seq }, &new, &mut out);
        assert!(matches!(result, Err(Error::Argument(_))), "{new:?}: {result:?}");
    }
    let short = plan::capacity(s.table.geometry(), 3) - 1;
    assert!(matches!(s.table.plan(Cells { pos: &pos, seq: &seq }, &[5, 6, 7], &mut out[..short]), Err(Error::Buffer { .. })));
    assert_eq!(format!("{:?}", s.table), before);
    s.check(NEAR);
}

#[test]
fn a_step_that_finds_no_slot_is_refused_and_loses_nothing() {
    // More sequences than the cache was made for: their windows have no slots.
    let mut s = stream_of(&Config { n_seqs: 1, ..config(1100) });
    s.append(1, 0, 900, 100).unwrap();
    let exact = s.table.geometry().exact as u32;
    let cells = s.free()[..exact as usize].to_vec();
    let places: Vec<_> = (0..exact).map(|i| (0, 1 + i % 8)).collect();
    assert!(matches!(s.step(2, &cells, &places), Err(Error::Full(_))));
    s.check(NEAR);
    s.append(3, 0, 200, 50).unwrap();
    s.check(NEAR);
}

/// An aborted step of `n` tokens after `before` rows, then a context full of further rows.
fn aborted(before: usize, n: usize) {
    for done in 0..=2 {
        let mut s = stream();
        if before > 0 {
            s.append(1, 0, before, 100).unwrap();
        }
        let cells = s.free()[..n].to_vec();
        let first = s.next_pos(0);
        let places: Vec<_> = (0..n as i32).map(|i| (first + i, 0)).collect();
        s.abort(2, &cells, &places, done).unwrap();
        s.check(NEAR);
        s.append(3, 0, s.free().len(), 90).unwrap();
        s.check(NEAR);
    }
}

#[test]
fn an_aborted_step_before_the_fit_loses_only_its_tokens() {
    aborted(300, 100);
}

#[test]
fn an_aborted_step_that_fits_loses_only_its_tokens() {
    aborted(500, 100);
}

#[test]
fn an_aborted_fit_with_few_rows_before_it_says_that_all_is_lost() {
    // A basis of 20 rows would be useless and the layers that ran have no waiting rows left: an error, and a table to begin again with.
    for done in 0..=2 {
        let mut s = stream();
        s.append(1, 0, 20, 20).unwrap();
        let cells = s.free()[..700].to_vec();
        let places: Vec<_> = (0..700).map(|i| (20 + i, 0)).collect();
        assert!(matches!(s.abort(2, &cells, &places, done), Err(Error::State(_))));
        assert!(!s.table.is_fitted() && (0..1100).all(|c| s.table.locate(c).is_none()));
        s.rows.iter_mut().for_each(|r| *r = None);
        s.append(3, 0, s.free().len(), 90).unwrap();
        s.check(NEAR);
    }
}

#[test]
fn an_aborted_first_step_leaves_an_empty_stream() {
    aborted(0, 600);
}

#[test]
fn an_aborted_step_after_the_fit_loses_only_its_tokens() {
    aborted(700, 1);
    aborted(700, 300);
}

#[test]
fn an_aborted_step_that_compacts_loses_only_its_tokens() {
    for done in 0..=2 {
        let mut s = stream();
        s.append(1, 0, 1100, 100).unwrap();
        let gone: Vec<u32> = s.cells_of(0).into_iter().filter(|c| c % 4 != 1).collect();
        s.remove(0, &gone);
        let first = s.next_pos(0);
        let places: Vec<_> = (0..400).map(|i| (first + i, 0)).collect();
        let cells = s.free()[..400].to_vec();
        s.abort(2, &cells, &places, done).unwrap();
        s.check(NEAR);
        s.append(3, 0, s.free().len(), 64).unwrap();
        s.check(NEAR);
    }
}

/// A plan that looks at heads, and one with something in every section but those that belong to it.
fn plans() -> [Vec<i32>; 2] {
    let mut s = stream();
    s.append(1, 0, 455, 65).unwrap();
    let cells = s.free()[..65].to_vec();
    let places: Vec<_> = (455..520).map(|i| (i, 0)).collect();
    let t = s.tokens(1, &cells, &places);
    s.enter(&t);
    let look = s.plan(&cells).unwrap();
    cells.iter().for_each(|c| s.rows[*c as usize] = None);
    s.append(2, 0, 645, 100).unwrap();
    let gone: Vec<u32> = s.cells_of(0).into_iter().filter(|c| c % 4 != 1).collect();
    s.remove(0, &gone);
    let cells = s.free()[..400].to_vec();
    let t = s.tokens(1, &cells, &(0..400).map(|i| (2000 + i, 0)).collect::<Vec<_>>());
    s.enter(&t);
    [look, s.plan(&cells).unwrap()]
}

/// Look at everything a plan holds; returns how much that is.
fn walk(p: &Plan) -> usize {
    p.tokens().count()
        + p.exact().count()
        + p.tiles().map(|t| (0..64).filter(|r| t.cell(*r).is_some() || t.turn(*r) != 0).count()).sum::<usize>()
        + p.changes()
            .map(|c| if let Change::Seal { filling, .. } = c { filling.rows().count() + filling.witnesses().count() } else { 1 })
            .sum::<usize>()
        + p.recents().count()
        + p.records().count()
        + p.fit_rows().count()
        + p.fit_queries().count()
}

#[test]
fn a_truncated_or_foreign_plan_is_refused() {
    let [look, moves] = plans();
    let parsed = [Plan::parse(&look).unwrap(), Plan::parse(&moves).unwrap()];
    assert!(
        parsed[0].study.from < parsed[0].study.to
            && parsed[0].fit_rows().len() > 500
            && parsed[0].fit_queries().len() > 50
            && parsed[0].recents().len() > 0
    );
    let has = |kind: fn(&Change<_>) -> bool| parsed[1].changes().any(|c| kind(&c));
    assert!(has(|c| matches!(c, Change::Move { .. })) && has(|c| matches!(c, Change::Recode { .. })));
    assert!(parsed[1].n_seals() > 0 && parsed[1].tiles().len() > 0);
    for ints in [&look, &moves] {
        for n in 0..ints.len() {
            assert!(matches!(Plan::parse(&ints[..n]), Err(Error::Data(_))), "{n} of {} ints", ints.len());
        }
        for (at, what) in [(0, "magic"), (1, "version")] {
            for to in [0, -1, ints[at] + 1] {
                let mut other = ints.clone();
                other[at] = to;
                assert!(matches!(Plan::parse(&other), Err(Error::Data(_))), "{what} {to}");
            }
        }
        for section in 4..12 {
            for to in [-1, i32::MIN, i32::MAX, 1 << 24] {
                let mut other = ints.clone();
                other[section] = to;
                assert!(matches!(Plan::parse(&other), Err(Error::Data(_))), "section {section}: {to}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_array_of_ints_makes_parsing_panic(
        (which, keep) in (0usize..2, 0.0f64..=1.0),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<bool>(), any::<i32>()), 0..20),
        noise in prop::collection::vec(any::<i32>(), 0..200),
    ) {
        static PLANS: std::sync::OnceLock<[Vec<i32>; 2]> = std::sync::OnceLock::new();
        let mut ints = PLANS.get_or_init(plans)[which].clone();
        ints.truncate((ints.len() as f64 * keep) as usize);
        for (at, header, to) in changes {
            // The header decides what the rest means: change it often, by little and by much.
            let n = if header { ints.len().min(16) } else { ints.len() };
            if n > 0 {
                ints[at.index(n)] = if to % 2 == 0 { to } else { to % 64 };
            }
        }
        if let Ok(p) = Plan::parse(&ints) {
            walk(&p);
        }
        prop_assert!(Plan::parse(&noise).is_err() || noise.len() >= 16);
    }
}
