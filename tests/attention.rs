//! Attention and reconstruction against f64, over head shapes, rotations, lengths and masks: every head must be right.

mod common;

use common::{input, rel_rms, ropes, rotate_f64, widen, Random, Reference};
use half::f16;
use spectral_kv::cache::{Cache, Mask, Rows};
use spectral_kv::config::{Config, LayerShape, Scoring};
use spectral_kv::rope::{Pairing, Rope, RopeParams, Turn};

struct Case {
    shape: LayerShape,
    rope: RopeParams,
    config: Config,
    scoring: Scoring,
}

fn case(n_head: u32, n_head_kv: u32, d_k: u32, d_v: u32, rope: RopeParams, bits: f32) -> Case {
    Case {
        shape: LayerShape { n_head, n_head_kv, d_k, d_v },
        rope,
        config: Config { n_cells: 1100, window: 16, bits, ..Config::default() },
        scoring: Scoring { scale: 1.0 / (d_k as f32).sqrt(), softcap: 0.0 },
    }
}

/// Store `n` rows in pieces of `step`.
fn filled(c: &Case, n: usize, step: usize) -> (Cache, common::Input, Vec<i32>) {
    let s = c.shape;
    let (h, kv, dk, dv) = (s.n_head as usize, s.n_head_kv as usize, s.d_k as usize, s.d_v as usize);
    let positions: Vec<i32> = (0..n as i32).collect();
    let x = input(5, &positions, h, kv, dk, dv, &c.rope);
    let mut cache = Cache::new(&c.config, s, &c.rope, c.scoring, &[]).unwrap();
    for at in (0..n).step_by(step.max(1)) {
        let m = step.min(n - at);
        let part = |x: &[f32], heads: usize, d: usize| x[at * heads * d..(at + m) * heads * d].to_vec();
        let (q, k, v) = (part(&x.q, h, dk), part(&x.k, kv, dk), part(&x.v, kv, dv));
        let rows = |data, heads: usize, d: usize| Rows::new(data, m, heads * d, d, heads, d).unwrap();
        cache.append(&positions[at..at + m], &rows(&q, h, dk), &rows(&k, kv, dk), &rows(&v, kv, dv)).unwrap();
    }
    (cache, x, positions)
}

/// Attention of `n_q` random queries, compared with f64 attention over the rows that `get` rebuilds.
fn check(c: &Case, cache: &mut Cache, n_q: usize, seed: u64, masked: bool, sinks: Option<&[f32]>) {
    let s = c.shape;
    let (h, kv, dk, dv) = (s.n_head as usize, s.n_head_kv as usize, s.d_k as usize, s.d_v as usize);
    let n = cache.len();
    let (mut k, mut v) = (vec![f16::ZERO; n * kv * dk], vec![f16::ZERO; n * kv * dv]);
    cache.get(0, n, &mut k, &mut v).unwrap();
    let positions: Vec<i32> = (0..n_q as i32).map(|i| n as i32 + i).collect();
    let q = input(seed, &positions, h, kv, dk, dv, &c.rope).q;
    let mut r = Random::new(seed);
    let mask: Vec<f32> = (0..n_q * n).map(|i| if masked && (r.below(3) == 0 || i % n % 7 == i / n) { f32::NEG_INFINITY } else { 0.0 }).collect();
    let mut out = vec![f32::NAN; n_q * h * dv];
    let rows = Rows::new(&q, n_q, h * dk, dk, h, dk).unwrap();
    let m = if masked { Mask::F32 { values: &mask, stride: n, n_kv: n } } else { Mask::All };
    cache.attend(&rows, m, sinks.unwrap_or(&[]), &mut out).unwrap();
    let (k, v) = (widen(&k), widen(&v));
    let (scale, softcap) = (f64::from(c.scoring.scale), f64::from(c.scoring.softcap));
    let reference = Reference { n_head: h, n_head_kv: kv, d_k: dk, d_v: dv, k: &k, v: &v, scale, softcap, sinks };
    let want = reference.attend(&q, n_q, |t, r| f64::from(mask[t * n + r]));
    // Head by head: one wrong head must not hide among right ones. The reference sees rows rounded to f16, attention
    // does not: half a unit.
    for head in 0..n_q * h {
        let range = head * dv..(head + 1) * dv;
        let error = rel_rms(out[range.clone()].iter().map(|x| f64::from(*x)), want[range].iter().copied());
        assert!(error < 2f64.powi(-12), "{:?} {:?} {n} rows, {n_q} queries, head {}: {error}", s, c.rope.pairing, head % h);
    }
}

#[test]
fn every_head_is_right_over_gqa_ratios_and_head_sizes() {
    for (i, (group, d)) in [(1, 64), (2, 80), (4, 96), (7, 128), (8, 64), (1, 256)].into_iter().enumerate() {
        for rope in ropes(d as usize).into_iter().skip(i % 2).step_by(2) {
            let c = case(2 * group, 2, d, d, rope, 3.0);
            let (mut cache, ..) = filled(&c, 700, 100);
            assert!(cache.stats().fits == 1 && cache.stats().sealed_prefill > 500);
            check(&c, &mut cache, 1, 11, false, None);
            check(&c, &mut cache, 5, 12, true, None);
        }
    }
}

#[test]
fn every_rotation_is_right() {
    for rope in ropes(64) {
        let c = case(4, 2, 64, 32, rope, 4.0);
        let (mut cache, ..) = filled(&c, 650, 130);
        check(&c, &mut cache, 3, 3, true, None);
    }
}

#[test]
fn every_length_around_tiles_and_the_fit_is_right() {
    let c = case(4, 2, 64, 64, RopeParams::plain(Pairing::Halves, 64, 10000.0), 3.0);
    // 0 and 1 rows, a tile, the fit at 550 + 4 sinks, and the tile edges behind it.
    for n in [1, 63, 64, 65, 553, 554, 555, 597, 659, 660, 661, 724, 1100] {
        let (mut cache, ..) = filled(&c, n, 1);
        check(&c, &mut cache, 1, n as u64, false, None);
        check(&c, &mut cache, 64, n as u64, true, None);
    }
    let mut empty = Cache::new(&c.config, c.shape, &c.rope, c.scoring, &[]).unwrap();
    let q = vec![1.0; 4 * 64];
    let mut out = vec![f32::NAN; 4 * 64];
    empty.attend(&Rows::new(&q, 1, 256, 64, 4, 64).unwrap(), Mask::All, &[], &mut out).unwrap();
    assert!(out.iter().all(|x| *x == 0.0), "no rows give zeros");
}

#[test]
fn soft_cap_sinks_and_hidden_rows_have_ggml_semantics() {
    let mut c = case(4, 1, 64, 64, RopeParams::plain(Pairing::Adjacent, 64, 500000.0), 3.0);
    c.scoring.softcap = 5.0;
    let (mut cache, ..) = filled(&c, 700, 64);
    let sinks = [0.5, -2.0, 3.0, f32::NEG_INFINITY];
    check(&c, &mut cache, 4, 9, true, Some(&sinks));
    let q = vec![0.3; 4 * 64];
    let mut out = vec![f32::NAN; 4 * 64];
    let hidden = vec![f32::NEG_INFINITY; 700];
    let mask = Mask::F32 { values: &hidden, stride: 700, n_kv: 700 };
    cache.attend(&Rows::new(&q, 1, 256, 64, 4, 64).unwrap(), mask, &[], &mut out).unwrap();
    assert!(out.iter().all(|x| *x == 0.0), "a query that sees nothing gives zeros");
}

#[test]
fn rebuilt_rows_are_the_rows_that_went_in() {
    for (bits, worst) in [(8.0, 0.014), (4.0, 0.075), (2.0, 0.26)] {
        let rope = RopeParams::plain(Pairing::Halves, 64, 10000.0);
        let c = case(4, 2, 64, 64, rope, bits);
        let (mut cache, x, _) = filled(&c, 1000, 50);
        let (mut k, mut v) = (vec![f16::ZERO; 1000 * 128], vec![f16::ZERO; 1000 * 128]);
        cache.get(0, 1000, &mut k, &mut v).unwrap();
        for (got, want, name) in [(&k, &x.k, "keys"), (&v, &x.v, "values")] {
            let error = rel_rms(widen(got), want.iter().map(|x| f64::from(*x)));
            assert!(error < worst, "{bits} bits, {name}: {error}");
            // The window and the sinks are exact.
            let exact = |r: std::ops::Range<usize>| {
                got[r.start * 128..r.end * 128].iter().zip(&want[r.start * 128..r.end * 128]).all(|(a, b)| *a == f16::from_f32(*b))
            };
            assert!(exact(0..4) && exact(984..1000), "{bits} bits, {name}: exact rows");
        }
    }
}

#[test]
fn storing_in_pieces_stores_the_same_rows() {
    let c = case(2, 2, 64, 64, RopeParams::plain(Pairing::Halves, 64, 10000.0), 3.0);
    let rebuilt = |step: usize| {
        let (mut cache, ..) = filled(&c, 900, step);
        let (mut k, mut v) = (vec![f16::ZERO; 900 * 128], vec![f16::ZERO; 900 * 128]);
        cache.get(0, 900, &mut k, &mut v).unwrap();
        (widen(&k), widen(&v))
    };
    let (k1, v1) = rebuilt(1);
    for step in [3, 64, 900] {
        // The fit sees other rows when it comes later, so codes differ; rows agree as far as both agree with the input.
        let (k, v) = rebuilt(step);
        assert!(rel_rms(k, k1.iter().copied()) < 0.15 && rel_rms(v, v1.iter().copied()) < 0.12, "{step}");
    }
    assert!(rebuilt(64) == rebuilt(64), "the same rows give the same codes");
}

#[test]
fn adversarial_magnitudes_stay_finite() {
    let c = case(2, 1, 64, 64, RopeParams::plain(Pairing::Halves, 64, 10000.0), 2.0);
    let mut cache = Cache::new(&c.config, c.shape, &c.rope, c.scoring, &[]).unwrap();
    let n = 800;
    let positions: Vec<i32> = (0..n).collect();
    let mut r = Random::new(4);
    let value = |i: usize, r: &mut Random| match i / 64 % 5 {
        0 => 0.0,
        1 => 6.0e4 * (r.uniform() as f32 - 0.5),
        2 => 1e-30,
        3 => 7.0,
        _ => r.normal(),
    };
    let k: Vec<f32> = (0..n as usize * 64).map(|i| value(i, &mut r)).collect();
    let v: Vec<f32> = (0..n as usize * 64).map(|i| value(i + 64, &mut r)).collect();
    let q: Vec<f32> = (0..n as usize * 128).map(|i| value(i, &mut r)).collect();
    let rows = |x, heads: usize| Rows::new(x, n as usize, heads * 64, 64, heads, 64).unwrap();
    cache.append(&positions, &rows(&q, 2), &rows(&k, 1), &rows(&v, 1)).unwrap();
    let mut out = vec![f32::NAN; 128];
    cache.attend(&Rows::new(&q[..128], 1, 128, 64, 2, 64).unwrap(), Mask::All, &[], &mut out).unwrap();
    assert!(out.iter().all(|x| x.is_finite()));
}

#[test]
fn bad_rows_are_refused_and_lose_nothing() {
    let c = case(2, 1, 64, 64, RopeParams::plain(Pairing::Halves, 64, 10000.0), 3.0);
    let (mut cache, ..) = filled(&c, 700, 100);
    let before = {
        let (mut k, mut v) = (vec![f16::ZERO; 700 * 64], vec![f16::ZERO; 700 * 64]);
        cache.get(0, 700, &mut k, &mut v).unwrap();
        (k, v)
    };
    let (good, mut bad) = (vec![0.5f32; 128], vec![0.5f32; 64]);
    bad[9] = f32::NAN;
    let row = |x, heads: usize| Rows::new(x, 1, heads * 64, 64, heads, 64).unwrap();
    let (q, ok, nan) = (row(&good, 2), row(&good[..64], 1), row(&bad, 1));
    assert!(cache.append(&[700], &q, &nan, &ok).unwrap_err().to_string().contains("not finite"));
    assert!(cache.append(&[700], &q, &ok, &nan).is_err());
    assert!(cache.append(&[10], &q, &ok, &ok).is_err(), "a position that was there before");
    assert!(cache.append(&[-1], &q, &ok, &ok).is_err());
    assert!(cache.append(&[700, 701], &q, &ok, &ok).is_err());
    let many: Vec<i32> = (700..1101).collect();
    let zeros = vec![0.0; 401 * 128];
    let rows = |heads: usize| Rows::new(&zeros[..401 * heads * 64], 401, heads * 64, 64, heads, 64).unwrap();
    assert!(matches!(cache.append(&many, &rows(2), &rows(1), &rows(1)), Err(spectral_kv::error::Error::Full(_))));
    assert_eq!(cache.len(), 700);
    let (mut k, mut v) = (vec![f16::ZERO; 700 * 64], vec![f16::ZERO; 700 * 64]);
    cache.get(0, 700, &mut k, &mut v).unwrap();
    assert!((k, v) == before);
    assert!(cache.append(&[700], &q, &ok, &ok).is_ok());
}

#[test]
fn the_library_rotates_as_the_definition_says() {
    for d in [64usize, 80, 128] {
        for p in ropes(d) {
            let rope = Rope::new(&p, d).unwrap();
            for position in [-4097i64, -1, 0, 1, 131_071] {
                let x: Vec<f32> = (0..d).map(|i| (i as f32 * 0.37).cos()).collect();
                let (mut got, mut want) = (x.clone(), x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>());
                let mut turn = Turn::default();
                rope.turn(position, &mut turn);
                rope.rotate(&turn, &mut got);
                rotate_f64(&p, position as f64, &mut want);
                assert!(rel_rms(got.iter().map(|x| f64::from(*x)), want) < 1e-6, "{p:?} {position}");
            }
        }
    }
}

#[test]
fn a_reset_cache_is_a_new_cache() {
    let c = case(4, 2, 64, 64, RopeParams::plain(Pairing::Adjacent, 64, 10000.0), 2.0);
    let (mut fresh, ..) = filled(&c, 900, 75);
    let (mut used, ..) = filled(&case(4, 2, 64, 64, c.rope.clone(), 2.0), 1000, 33);
    used.reset();
    assert!(used.is_empty() && used.positions().is_empty());
    let positions: Vec<i32> = (0..900).collect();
    let x = input(5, &positions, 4, 2, 64, 64, &c.rope);
    for at in (0..900).step_by(75) {
        let rows = |x: &'static [f32], heads: usize| Rows::new(x, 75, heads * 64, 64, heads, 64).unwrap();
        let leak = |x: &[f32]| -> &'static [f32] { Box::leak(x.to_vec().into_boxed_slice()) };
        let (q, k, v) = (leak(&x.q[at * 256..(at + 75) * 256]), leak(&x.k[at * 128..(at + 75) * 128]), leak(&x.v[at * 128..(at + 75) * 128]));
        used.append(&positions[at..at + 75], &rows(q, 4), &rows(k, 2), &rows(v, 2)).unwrap();
    }
    let all = |c: &mut Cache| {
        let (mut k, mut v) = (vec![f16::ZERO; 900 * 128], vec![f16::ZERO; 900 * 128]);
        c.get(0, 900, &mut k, &mut v).unwrap();
        (k, v)
    };
    assert!(all(&mut fresh) == all(&mut used), "what was stored before must not show");
}
