//! Calibrations: the file and its damages, and streams that code from the first rows on.

mod common;

use common::{Random, Stream};
use spectral_kv::cache::{Geometry, Location};
use spectral_kv::codec::calibration::Calibration;
use spectral_kv::config::{Config, LayerShape};
use spectral_kv::error::Error;
use spectral_kv::rope::{Pairing, RopeParams};
use std::sync::OnceLock;

/// At 8 bits a coded row is off by less than this.
const NEAR: f64 = 0.05;
const SHAPES: [LayerShape; 2] = [LayerShape { n_head: 4, n_head_kv: 2, d_k: 32, d_v: 16 }, LayerShape { n_head: 2, n_head_kv: 1, d_k: 16, d_v: 32 }];

fn config() -> Config {
    Config { n_cells: 1400, n_seqs: 4, n_tokens: 1400, window: 16, bits: 10.0, calibrated: true, ..Config::default() }
}

fn bare() -> Stream {
    Stream::new(&config(), &SHAPES, |d| RopeParams::plain(Pairing::Halves, d, 10000.0))
}

fn calibration() -> &'static Calibration {
    static CALIBRATION: OnceLock<Calibration> = OnceLock::new();
    CALIBRATION.get_or_init(|| bare().calibration())
}

fn stream() -> Stream {
    let mut s = bare();
    s.calibrate(calibration());
    s
}

fn coded(s: &Stream) -> usize {
    s.live().iter().filter(|c| matches!(s.table.locate(**c as usize), Some((Location::Coded(..), _)))).count()
}

#[test]
fn a_file_comes_back_as_it_was() {
    let bytes = calibration().to_bytes();
    let read = Calibration::from_bytes(&bytes).unwrap();
    assert!(read.to_bytes() == bytes);
    assert_eq!((read.model_hash, read.layers.len()), (7, 2));
    let gap = Calibration { layers: vec![None, read.layers[1].clone()], ..read.clone() };
    assert!(Calibration::from_bytes(&gap.to_bytes()).unwrap() == gap);
    // What a file loses is as little as what a stored basis loses.
    let mut s = bare();
    s.calibrate(&read);
    s.append(1, 0, 100, 100).unwrap();
    s.check(NEAR);
}

fn refused(bytes: &[u8], what: &str) {
    let e = Calibration::from_bytes(bytes).expect_err(what);
    assert!(matches!(e, Error::Data(_)), "{what}: {e}");
}

#[test]
fn what_is_truncated_corrupted_or_foreign_is_refused() {
    let good = calibration().to_bytes();
    let mut r = Random::new(5);
    let sealed = |mut body: Vec<u8>| {
        body.truncate(body.len() - 4);
        body.extend(crc32fast::hash(&body).to_le_bytes());
        body
    };
    for i in 0..1000 {
        let mut bad = good.clone();
        match i % 4 {
            0 => bad.truncate(r.below(good.len())),
            1 => bad[r.below(good.len())] ^= 1 << r.below(8),
            2 => bad.extend((0..1 + r.below(9)).map(|_| 0u8)),
            _ => {
                let at = r.below(good.len() - 8);
                bad[at..at + 8].copy_from_slice(&r.next().to_le_bytes());
            }
        }
        if bad != good {
            refused(&bad, "damaged");
        }
        // With a right checksum nothing may be believed either: any answer but a panic.
        if bad.len() > 4 {
            let _ = Calibration::from_bytes(&sealed(bad));
        }
    }
    for n in 0..40 {
        refused(&good[..n], "no more than a head");
    }
    let with = |at: usize, bytes: &[u8]| {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        sealed(bad)
    };
    refused(&with(8, &9u32.to_le_bytes()), "another version");
    refused(&with(20, &3u32.to_le_bytes()), "a layer more than there are");
    refused(&with(28, &3u32.to_le_bytes()), "KV heads that do not divide the query heads");
    // The first mean of the first head follows the head counts and the rope.
    let l = calibration().layers[0].as_ref().unwrap();
    let mean = 28 + 20 + l.rope.len();
    let first = l.heads[0].k.mean[0];
    assert_eq!(good[mean..mean + 4], first.to_le_bytes());
    refused(&with(mean, &f32::NAN.to_le_bytes()), "NaN");
    refused(&with(mean + 4 * 32, &0f64.to_le_bytes()), "variances that rise");
    // Its errors follow the transforms of K, 32 elements and a mean, and V.
    let transform = |d: usize| 8 * d + 2 * (4 * d + 2 * d * d);
    let errors = mean + 4 * 32 + transform(32) + transform(16);
    assert_eq!(good[errors..errors + 8], l.heads[0].errors[0].to_le_bytes());
    refused(&with(errors + 8, &(-1e-3f64).to_le_bytes()), "an error below zero");
}

#[test]
fn no_room_is_needed_for_waiting_rows() {
    let (fitted, calibrated) = (Config { n_cells: 32768, ..Config::default() }, Config { n_cells: 32768, calibrated: true, ..Config::default() });
    let [a, b] = [fitted, calibrated].map(|c| Geometry::new(&c, &[LayerShape { n_head: 4, n_head_kv: 2, d_k: 128, d_v: 128 }; 3]).unwrap());
    assert_eq!((b.waiting, b.fit_rows), (0, 1));
    assert!(b.report().code_bits >= a.report().code_bits && (8.0..8.05).contains(&b.report().ratio), "{:?}", b.report());
    // As few cells as need no fit are coded all the same.
    let small = Config { n_cells: 400, ..config() };
    assert!(Geometry::new(&small, &SHAPES).unwrap().tiles > 0);
}

#[test]
fn rows_are_coded_from_the_first_step_on() {
    let mut s = stream();
    s.append(1, 0, 100, 100).unwrap();
    assert!(s.table.is_fitted() && coded(&s) == 64, "{}", coded(&s));
    s.check(NEAR);
    s.append(2, 0, 40, 1).unwrap();
    s.append(3, 1, 300, 75).unwrap();
    s.check(NEAR);
    assert_eq!(s.layers[0].counters.read().fits, 1);
    // One token at a time as well.
    let mut s = stream();
    s.append(4, 2, 90, 1).unwrap();
    assert!(coded(&s) == 64);
    s.check(NEAR);
}

#[test]
fn a_cleared_stream_is_a_new_one() {
    let (mut s, mut new) = (stream(), stream());
    s.append(1, 0, 500, 100).unwrap();
    s.remove(0, &s.cells_of(0));
    for s in [&mut s, &mut new] {
        s.append(2, 1, 200, 64).unwrap();
    }
    s.check(NEAR);
    assert!(s.bits(&s.cells_of(1)) == new.bits(&new.cells_of(1)));
    assert_eq!(s.layers[0].counters.read().fits, 2);
}

#[test]
fn an_aborted_first_step_loses_only_its_tokens() {
    for done in 0..=2 {
        let (mut s, mut new) = (stream(), stream());
        let cells: Vec<u32> = (0..150).collect();
        let places: Vec<(i32, u32)> = (0..150).map(|i| (i, 0)).collect();
        s.abort(9, &cells, &places, done).unwrap();
        s.check(NEAR);
        assert!(s.live().is_empty());
        for s in [&mut s, &mut new] {
            s.append(1, 0, 300, 100).unwrap();
        }
        assert!(s.bits(&s.live()) == new.bits(&new.live()), "{done} layers had run");
        let (cells, places): (Vec<u32>, Vec<(i32, u32)>) = (300..400).map(|i| (i as u32, (i, 0))).unzip();
        s.abort(10, &cells, &places, done).unwrap();
        s.check(NEAR);
        assert_eq!(s.live().len(), 300);
    }
}

#[test]
fn states_go_from_one_calibrated_stream_to_another() {
    let mut s = stream();
    s.append(1, 0, 400, 100).unwrap();
    let cells = s.cells_of(0);
    let rows: Vec<_> = cells.iter().map(|c| s.rows[*c as usize].clone().unwrap()).collect();
    let state = s.save(&cells).unwrap();
    let mut other = stream();
    other.restore(&cells, &rows, &state).unwrap();
    other.check(NEAR);
    assert!(s.bits(&cells) == other.bits(&cells));
    for s in [&mut s, &mut other] {
        s.append(2, 0, 100, 10).unwrap();
        s.check(NEAR);
    }
    assert!(s.bits(&s.cells_of(0)) == other.bits(&other.cells_of(0)));
    // An empty stream has a state, too.
    let empty = stream().save(&[]).unwrap();
    stream().restore(&[], &[], &empty).unwrap();
}

#[test]
fn what_does_not_belong_together_is_refused() {
    let mut s = bare();
    let e = s.append(1, 0, 10, 10).unwrap_err();
    assert!(matches!(&e, Error::State(m) if m.contains("no calibration")), "{e}");
    let mut of = |layer: usize, model_layer: usize, c: &Calibration| s.layers[layer].set_calibration(c, model_layer).unwrap_err().to_string();
    assert!(of(0, 2, calibration()).contains("no layer 2"));
    assert!(of(0, 0, &Calibration { model_hash: 0, layers: vec![None] }).contains("no layer 0"));
    assert!(of(0, 1, calibration()).contains("other heads"));
    let mut other = Stream::new(&config(), &SHAPES, |d| RopeParams::plain(Pairing::Halves, d, 500_000.0));
    assert!(other.layers[0].set_calibration(calibration(), 0).unwrap_err().to_string().contains("RoPE"));
    let mut fitted = Stream::new(&Config { calibrated: false, ..config() }, &SHAPES, |d| RopeParams::plain(Pairing::Halves, d, 10000.0));
    assert!(matches!(fitted.layers[0].set_calibration(calibration(), 0), Err(Error::State(_))));
    // Another rope makes the bases wrong.
    let mut s = stream();
    s.layers[0].set_rope(&RopeParams::plain(Pairing::Halves, 32, 500_000.0)).unwrap();
    assert!(s.append(1, 0, 10, 10).is_err());
}
