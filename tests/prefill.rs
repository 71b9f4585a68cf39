//! Attention of long steps against f64, against decode attention of the same rows, and in different shares: to the bit.

mod common;

use common::{rel_rms, rows_of, widen, Random, Reference, Stream};
use half::f16;
use spectral_kv::cache::{Call, Mask, Plan, Rows};
use spectral_kv::config::{Config, LayerShape, Scoring};
use spectral_kv::rope::{Pairing, RopeParams};

const CELLS: u32 = 1100;

/// How a step looks at its rows.
#[derive(Default)]
struct Look {
    softcap: f32,
    sinks: Vec<f32>,
    /// Some rows are hidden, and some scores get something added.
    masked: bool,
    /// A token that sees nothing at all.
    blind: Option<usize>,
}

fn shape(group: u32, d_k: u32, d_v: u32) -> LayerShape {
    LayerShape { n_head: 2 * group, n_head_kv: 2, d_k, d_v }
}

fn config() -> Config {
    Config { n_cells: CELLS, n_seqs: 2, window: 16, bits: 3.0, ..Config::default() }
}

fn stream(shape: LayerShape, rope: impl Fn(usize) -> RopeParams) -> Stream {
    Stream::new(&config(), &[shape], rope)
}

fn plain(d: usize) -> RopeParams {
    RopeParams::plain(Pairing::Halves, d, 10000.0)
}

/// One step of tokens at `places`: its attention is checked in every way, then it is stored.
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

    let row = g.n_head * g.d_v;
    let prefill = |shares: usize| {
        let (pieces, mut out) = (l.prefill_pieces(n), vec![f32::NAN; n * row]);
        for i in 0..shares {
            let put = |at: usize, x: &[f32]| out[at * g.d_v..(at + 1) * g.d_v].copy_from_slice(x);
            l.prefill(pieces * i / shares..pieces * (i + 1) / shares, &call, &look.sinks, put).unwrap();
        }
        out
    };
    let before = l.counters.read().reconstructed;
    let got = prefill(1);
    let coded = (0..n_kv).filter(|c| !cells.contains(&(*c as u32)) && matches!(s.table.locate(*c), Some((at, _)) if s.band(at).is_some())).count();
    assert_eq!(l.counters.read().reconstructed - before, coded as u64, "a coded row is rebuilt once");
    for shares in [2, 3, 7] {
        assert!(prefill(shares).iter().map(|x| x.to_bits()).eq(got.iter().map(|x| x.to_bits())), "{n} tokens in {shares} shares");
    }

    let mut decoded = vec![f32::NAN; n * row];
    for at in (0..n).step_by(64) {
        let m = 64.min(n - at);
        let rows = Rows::new(&t.inputs[0].q[at * g.n_head * g.d_k..], m, g.n_head * g.d_k, g.d_k, g.n_head, g.d_k).unwrap();
        let some = Call { q: &rows, mask: Mask::F16 { values: &mask[at * n_kv..], stride: n_kv, n_kv }, ..call };
        let mut partials = vec![f32::NAN; l.partial_floats(m)];
        l.attend(0..l.units(), &some, &mut partials).unwrap();
        l.combine(m, &partials, &look.sinks, 0..m * g.n_head, &mut decoded[at * row..(at + m) * row]).unwrap();
    }

    let (nk, nv) = (g.n_head_kv * g.d_k, g.n_head_kv * g.d_v);
    let (mut dense_k, mut dense_v) = (vec![f16::ZERO; n_kv * nk], vec![f16::ZERO; n_kv * nv]);
    l.reconstruct(arena, &plan, &k, &v, 0..n_kv, &mut dense_k, &mut dense_v).unwrap();
    let (dense_k, dense_v) = (widen(&dense_k), widen(&dense_v));
    let sinks = (!look.sinks.is_empty()).then_some(&look.sinks[..]);
    let (scale, softcap) = (f64::from(scoring.scale), f64::from(scoring.softcap));
    let reference = Reference { n_head: g.n_head, n_head_kv: g.n_head_kv, d_k: g.d_k, d_v: g.d_v, k: &dense_k, v: &dense_v, scale, softcap, sinks };
    let want = reference.attend(&t.inputs[0].q, n, |t, r| mask[t * n_kv + r].to_f64());

    // Head by head: one wrong head must not hide among right ones.
    let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
    let (got, decoded) = (wide(&got), wide(&decoded));
    for i in 0..n * g.n_head {
        let part = |x: &[f64]| x[i * g.d_v..(i + 1) * g.d_v].to_vec();
        let (token, head) = (i / g.n_head, i % g.n_head);
        if look.blind == Some(token) {
            assert!(part(&got).iter().all(|x| *x == 0.0), "a query that sees nothing gives zeros");
            continue;
        }
        let (error, other) = (rel_rms(part(&got), part(&want)), rel_rms(part(&decoded), part(&want)));
        let apart = rel_rms(part(&got), part(&decoded));
        // The reference sees rows rounded to f16; decode, like prefill, does not.
        assert!(
            error < 2f64.powi(-12) && error < 1.1 * other + 2e-5 && apart < 4e-5,
            "token {token} of {n}, head {head}: {error}, decode {other}, apart {apart}"
        );
    }

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
    let shapes = [shape(1, 64, 64), shape(2, 80, 80), shape(4, 64, 32), shape(7, 128, 128), shape(8, 64, 64), shape(1, 256, 256), shape(4, 96, 96)];
    for (i, shape) in shapes.into_iter().enumerate() {
        for rope in [ropes[i % 5], ropes[(i + 2) % 5]] {
            let mut s = stream(shape, rope);
            s.append(1, 0, 650, 130).unwrap();
            next(&mut s, 2, 100, &Look { masked: i % 2 == 0, ..Look::default() });
        }
    }
}

#[test]
fn every_length_before_and_after_the_fit_is_right() {
    for before in [0, 1, 63, 64, 65, 500, 553, 554, 600] {
        let mut s = stream(shape(2, 64, 64), plain);
        s.append(3, 0, before, 50).unwrap();
        for (i, n) in [65, 128, 1, 64, 129].into_iter().enumerate() {
            next(&mut s, 10 + i as u64, n, &Look { masked: i == 3, ..Look::default() });
        }
    }
}

#[test]
fn soft_cap_sinks_and_hidden_rows_have_ggml_semantics() {
    let mut s = stream(shape(2, 64, 64), plain);
    s.append(5, 0, 700, 100).unwrap();
    let sinks = vec![0.5, -2.0, 3.0, f32::NEG_INFINITY];
    next(&mut s, 6, 70, &Look { softcap: 5.0, sinks: sinks.clone(), masked: true, blind: None });
    next(&mut s, 7, 80, &Look { softcap: 0.0, sinks, masked: true, blind: Some(66) });
    next(&mut s, 8, 80, &Look { softcap: 2.0, sinks: vec![], masked: false, blind: Some(3) });
}

#[test]
fn rows_that_were_removed_shifted_and_shared_are_right() {
    let mut s = stream(shape(4, 64, 64), plain);
    s.append(9, 0, 640, 80).unwrap();
    s.append(10, 1, 200, 40).unwrap();
    // A hole, everything behind it moves up: tiles with rows of two turns and dead rows. New tokens fill the hole's cells.
    let gone = s.cells_of(0)[150..190].to_vec();
    s.remove(0, &gone);
    for c in s.cells_of(0) {
        let row = s.rows[c as usize].as_mut().unwrap();
        row.pos -= if row.pos >= 190 { 40 } else { 0 };
    }
    next(&mut s, 11, 90, &Look::default());
    // Two sequences in one step, in turn.
    let (cells, first) = (s.free()[..140].to_vec(), [s.next_pos(0), s.next_pos(1)]);
    let places: Vec<_> = (0..140).map(|i| (first[i % 2] + i as i32 / 2, i as u32 % 2)).collect();
    step(&mut s, 12, &cells, &places, &Look { masked: true, ..Look::default() });
}

#[test]
fn what_cannot_be_computed_is_refused() {
    let mut s = stream(shape(2, 64, 64), plain);
    s.append(13, 0, 100, 100).unwrap();
    let ints = s.plan(&[]).unwrap();
    let (l, plan, none) = (&s.layers[0], Plan::parse(&ints).unwrap(), Rows::empty());
    let mut q = vec![0.5; 100 * 4 * 64];
    let run = |q: &[f32], pieces, sinks: &[f32], scale| {
        let q = Rows::new(q, 100, 256, 64, 4, 64).unwrap();
        let call = Call { arena: s.arena(), plan: &plan, q: &q, k: &none, v: &none, scoring: Scoring { scale, softcap: 0.0 }, mask: Mask::All };
        l.prefill(pieces, &call, sinks, |_, _| {}).map_err(|e| e.to_string())
    };
    let pieces = l.prefill_pieces(100);
    assert!(run(&q, 0..pieces, &[], 0.1).is_ok() && run(&q, 1..1, &[], 0.1).is_ok());
    assert!(run(&q, 0..pieces + 1, &[], 0.1).is_err());
    assert!(run(&q, 0..pieces, &[0.0; 3], 0.1).is_err());
    assert!(run(&q, 0..pieces, &[], f32::NAN).is_err());
    q[70 * 256 + 3 * 64] = f32::INFINITY;
    assert!(run(&q, 0..pieces, &[], 0.1).unwrap_err().contains("query of token 70, KV head 1"));
}
