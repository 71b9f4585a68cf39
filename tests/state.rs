//! Saved states: what is read back continues as if nothing had happened, and what is damaged or foreign changes nothing.

mod common;

use common::{ModelRow, Random, Stream};
use spectral_kv::cache::Location;
use spectral_kv::config::{Config, LayerShape};
use spectral_kv::error::Error;
use spectral_kv::rope::{Pairing, RopeParams};
use spectral_kv::state::Saving;

/// At 8 bits a row coded once is off by less than this.
const NEAR: f64 = 0.05;
const SHAPES: [LayerShape; 2] = [LayerShape { n_head: 4, n_head_kv: 2, d_k: 32, d_v: 16 }, LayerShape { n_head: 2, n_head_kv: 1, d_k: 16, d_v: 32 }];

fn config() -> Config {
    Config { n_cells: 1400, n_seqs: 4, n_tokens: 1400, window: 16, bits: 10.0, ..Config::default() }
}

fn halves(d: usize) -> RopeParams {
    RopeParams::plain(Pairing::Halves, d, 10000.0)
}

fn stream() -> Stream {
    Stream::new(&config(), &SHAPES, halves)
}

/// A stream with `n` rows of sequence 0.
fn filled(seed: u64, n: usize) -> Stream {
    let mut s = stream();
    s.append(seed, 0, n, 100).unwrap();
    s
}

fn rows(s: &Stream, cells: &[u32]) -> Vec<ModelRow> {
    cells.iter().map(|c| s.rows[*c as usize].clone().unwrap()).collect()
}

/// The same rows as those of another sequence.
fn renamed(rows: &[ModelRow], seq: u32) -> Vec<ModelRow> {
    rows.iter().map(|r| ModelRow { seqs: 1 << seq, ..r.clone() }).collect()
}

/// Restore the state of `cells` of `from` into scattered cells of `to` as rows of `seq`; the cells it went to.
fn carry(from: &Stream, cells: &[u32], to: &mut Stream, seq: u32) -> Vec<u32> {
    let mut free = to.free();
    let mut r = Random::new(3);
    for i in (1..free.len()).rev() {
        free.swap(i, r.below(i + 1));
    }
    free.truncate(cells.len());
    to.restore(&free, &renamed(&rows(from, cells), seq), &from.save(cells).unwrap()).unwrap();
    free
}

/// What an error must not change: the table and every byte of the arena.
fn snapshot(s: &Stream) -> (String, Vec<u8>) {
    (format!("{:?}", s.table), s.arena().to_vec())
}

#[test]
fn an_empty_stream_continues_where_the_saved_one_stopped() {
    // Before the fit, right before it, right behind it, and far behind it.
    let fit = stream().table.geometry().fit_rows;
    for n in [1, 90, fit - 1, fit + 100, fit + 200, 1000] {
        for seq in [0, 3] {
            let mut a = filled(1, n);
            let saved = a.cells_of(0);
            assert_eq!(a.save(&saved).unwrap(), a.save(&saved).unwrap());
            let mut b = stream();
            let restored = carry(&a, &saved, &mut b, seq);
            assert!(a.bits(&saved) == b.bits(&restored), "{n} rows as sequence {seq}");
            assert!(a.table.is_fitted() == (n > fit) && b.table.is_fitted() == a.table.is_fitted());
            assert_eq!(b.save(&b.live()).unwrap().len(), a.save(&saved).unwrap().len());
            b.check(NEAR);
            // What a study has found is not in a state: both look again.
            a.table = a.table.copied();
            for step in 0..3 {
                a.append(7 + step, 0, 100, 50).unwrap();
                b.append(7 + step, seq, 100, 50).unwrap();
                let (x, y) = (a.cells_of(0), b.cells_of(seq));
                assert!(a.bits(&x) == b.bits(&y), "{n} rows as sequence {seq}, step {step} after them");
            }
            assert!(a.table.is_fitted() == b.table.is_fitted());
            b.check(NEAR);
        }
    }
}

#[test]
fn a_stream_of_several_sequences_comes_back_whole() {
    for n in [100, 400] {
        let mut a = stream();
        for seq in 0..3 {
            a.append(u64::from(seq), seq, n, 70).unwrap();
        }
        let cells = a.live();
        let mut b = stream();
        b.restore(&cells, &rows(&a, &cells), &a.save(&cells).unwrap()).unwrap();
        assert!(a.bits(&cells) == b.bits(&cells));
        for s in [&mut a, &mut b] {
            s.append(9, 1, 200, 40).unwrap();
            s.check(NEAR);
        }
        let cells = a.live();
        assert!(a.bits(&cells) == b.bits(&cells));
    }
}

#[test]
fn one_sequence_out_of_several_is_enough() {
    for n in [150, 400] {
        let mut a = stream();
        for seq in 0..3 {
            a.append(u64::from(seq), seq, n, 70).unwrap();
        }
        let saved = a.cells_of(1);
        for seq in [1, 2] {
            let mut b = stream();
            let restored = carry(&a, &saved, &mut b, seq);
            assert!(a.bits(&saved) == b.bits(&restored));
            b.check(NEAR);
            b.append(5, seq, 900, 150).unwrap();
            b.check(NEAR);
        }
    }
}

#[test]
fn shifted_rows_come_back_shifted() {
    for n in [300, 900] {
        let mut a = filled(1, n);
        let cells = a.cells_of(0);
        a.remove(0, &cells[..100]);
        let saved = cells[100..].to_vec();
        for c in &saved {
            a.rows[*c as usize].as_mut().unwrap().pos -= 57;
        }
        a.check(NEAR);
        let mut b = stream();
        let restored = carry(&a, &saved, &mut b, 0);
        assert!(a.bits(&saved) == b.bits(&restored));
        b.check(NEAR);
    }
}

#[test]
fn every_band_comes_back_as_it_was() {
    let narrow = Config { bits: 4.0, fine_rows: 128, n_seqs: 1, ..config() };
    let mut a = Stream::new(&narrow, &SHAPES, halves);
    a.append(1, 0, 1050, 100).unwrap();
    let cells = a.cells_of(0);
    let mut b = Stream::new(&narrow, &SHAPES, halves);
    b.restore(&cells, &rows(&a, &cells), &a.save(&cells).unwrap()).unwrap();
    assert!(a.bits(&cells) == b.bits(&cells));
    assert!(cells.iter().all(|c| a.table.locate(*c as usize).map(|x| a.band(x.0)) == b.table.locate(*c as usize).map(|x| b.band(x.0))));
    // Beside other rows the young bands are taken: what finds no room there is coarser, but still there.
    let mut c = Stream::new(&Config { n_cells: 2400, n_seqs: 2, ..narrow }, &SHAPES, halves);
    c.append(2, 1, 1100, 100).unwrap();
    let beside = c.bits(&c.live());
    let (others, free) = (c.live(), c.free()[..cells.len()].to_vec());
    let state = a.save(&cells).unwrap();
    c.restore(&free, &rows(&a, &cells), &state).unwrap();
    assert!(c.bits(&others) == beside);
    assert!(c.error_of(&free) < 0.22, "{}", c.error_of(&free));
    c.append(3, 0, 100, 50).unwrap();
}

#[test]
fn rows_in_the_same_bases_are_restored_bit_for_bit() {
    // One rate: rows must not age meanwhile.
    let mut s = Stream::new(&Config { fine_rows: 0, ..config() }, &SHAPES, halves);
    s.append(1, 0, 800, 100).unwrap();
    s.append(2, 1, 400, 100).unwrap();
    // The last rows of sequence 0 are exact yet and will be coded meanwhile.
    let (saved, others) = (s.cells_of(1), s.cells_of(0)[..700].to_vec());
    let state = s.save(&saved).unwrap();
    let (model, before, beside) = (rows(&s, &saved), s.bits(&saved), s.bits(&others));
    s.remove(1, &saved);
    // Other rows take the places in between.
    s.append(3, 0, 150, 50).unwrap();
    let cells = s.free()[..saved.len()].to_vec();
    s.restore(&cells, &renamed(&model, 2), &state).unwrap();
    assert!(s.bits(&others) == beside);
    // But for fine rows that come into tiles which have as many as they can.
    let after = s.bits(&cells);
    let changed = before.iter().zip(&after).filter(|(a, b)| a != b).count();
    assert!(changed * 16 < before.len(), "{changed} of {}", before.len());
    s.check(NEAR);
    s.append(4, 2, s.free().len(), 60).unwrap();
    s.check(NEAR);
}

#[test]
fn rows_beside_a_restored_state_do_not_change() {
    for n in [200, 500] {
        let mut s = filled(1, 800);
        let own = s.cells_of(0);
        let before = s.bits(&own);
        let other = filled(2, n);
        carry(&other, &other.cells_of(0), &mut s, 1);
        assert!(s.bits(&own) == before);
    }
}

#[test]
fn rows_in_other_bases_are_near() {
    let mut s = filled(1, 710);
    let mut other = filled(2, 710);
    other.remove(0, &other.cells_of(0)[..150]);
    let saved = other.cells_of(0);
    let restored = carry(&other, &saved, &mut s, 1);
    // Coded twice.
    s.check(2.0 * NEAR);
    s.remove(0, &s.cells_of(0));
    s.append(3, 1, 500, 50).unwrap();
    s.check(2.0 * NEAR);
    assert!(restored.iter().all(|c| s.rows[*c as usize].is_some()));
}

#[test]
fn an_unfitted_state_goes_into_a_fitted_stream() {
    // The second state is longer than all exact slots: what finds none is coded.
    for n in [60, 500] {
        let mut s = filled(1, 800);
        let other = filled(2, n);
        assert!(!other.table.is_fitted());
        let restored = carry(&other, &other.cells_of(0), &mut s, 1);
        // The library keeps sinks and the newest rows exact; the model learns that the others need not be.
        s.age();
        s.check(NEAR);
        assert_eq!(restored.iter().any(|c| matches!(s.table.locate(*c as usize).unwrap().0, Location::Coded(..))), n == 500);
        s.append(3, 1, s.free().len(), 64).unwrap();
        s.check(NEAR);
    }
}

#[test]
fn a_fitted_state_goes_into_an_unfitted_stream_with_rows() {
    let mut s = filled(1, 200);
    let own = s.cells_of(0);
    let before = s.bits(&own);
    let other = filled(2, 800);
    let saved = other.cells_of(0);
    let restored = carry(&other, &saved, &mut s, 1);
    assert!(s.table.is_fitted());
    assert!(s.bits(&own) == before && s.bits(&restored) == other.bits(&saved));
    s.check(NEAR);
    s.append(3, 0, s.free().len(), 64).unwrap();
    s.check(NEAR);
}

#[test]
fn a_state_that_finds_no_room_changes_no_row() {
    // More rows would wait for their first fit than there is room for.
    let mut s = filled(1, 440);
    let own = s.cells_of(0);
    let before = s.bits(&own);
    let other = filled(2, 440);
    assert!(!s.table.is_fitted() && !other.table.is_fitted());
    let saved = other.cells_of(0);
    let (cells, model) = (s.free()[..saved.len()].to_vec(), renamed(&rows(&other, &saved), 1));
    assert!(matches!(s.restore(&cells, &model, &other.save(&saved).unwrap()), Err(Error::Full(_))));
    assert!(s.bits(&own) == before);
    s.append(3, 0, s.free().len(), 100).unwrap();
    s.check(NEAR);
}

/// The state must be refused as bad data, and the stream be as it was.
fn refused(s: &mut Stream, cells: &[u32], model: &[ModelRow], bytes: &[u8], what: &str) {
    let before = snapshot(s);
    let result = s.restore(cells, model, bytes);
    assert!(matches!(result, Err(Error::Data(_))), "{what}: {result:?}");
    assert!(snapshot(s) == before, "{what} changed the stream");
}

#[test]
fn truncated_or_flipped_states_are_refused() {
    for n in [20, 720] {
        let source = filled(1, n);
        let saved = source.cells_of(0);
        let (bytes, model) = (source.save(&saved).unwrap(), rows(&source, &saved));
        let mut r = Random::new(8);
        for mut s in [stream(), filled(2, 10)] {
            let cells = s.free()[..saved.len()].to_vec();
            let lengths = (0..64).chain(bytes.len() - 64..bytes.len()).chain((0..20).map(|_| r.below(bytes.len()))).collect::<Vec<_>>();
            for len in lengths {
                refused(&mut s, &cells, &model, &bytes[..len], &format!("{len} of {} bytes", bytes.len()));
            }
            let bits = (0..8 * 40).chain((0..60).map(|_| r.below(8 * bytes.len()))).chain(8 * bytes.len() - 32..8 * bytes.len()).collect::<Vec<_>>();
            for bit in bits {
                let mut flipped = bytes.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                refused(&mut s, &cells, &model, &flipped, &format!("bit {bit} flipped"));
            }
            refused(&mut s, &cells, &model, &[&bytes[..], &[0]].concat(), "a byte more");
            refused(&mut s, &cells[1..], &model[1..], &bytes, "a cell less");
            s.restore(&cells, &renamed(&model, 1), &bytes).unwrap();
            s.check(NEAR);
        }
    }
}

#[test]
fn another_version_is_refused_even_with_a_right_checksum() {
    let source = filled(1, 20);
    let saved = source.cells_of(0);
    let mut bytes = source.save(&saved).unwrap();
    bytes[8] += 1;
    let body = bytes.len() - 4;
    let crc = crc32fast::hash(&bytes[..body]).to_le_bytes();
    bytes[body..].copy_from_slice(&crc);
    refused(&mut stream(), &saved, &rows(&source, &saved), &bytes, "another version");
}

#[test]
fn states_of_other_models_are_refused() {
    let source = filled(1, 720);
    let saved = source.cells_of(0);
    let (bytes, model) = (source.save(&saved).unwrap(), rows(&source, &saved));
    let refuse = |shapes: &[LayerShape], rope: &dyn Fn(usize) -> RopeParams, what: &str| {
        let mut s = Stream::new(&config(), shapes, rope);
        let before = format!("{:?}", s.table);
        assert!(matches!(s.restore(&saved, &model, &bytes), Err(Error::Data(_))), "{what}");
        assert_eq!(format!("{:?}", s.table), before, "{what}");
    };
    let [a, b] = SHAPES;
    refuse(&[b, a], &halves, "layers in another order");
    refuse(&[a], &halves, "a layer less");
    refuse(&[a, b, b], &halves, "a layer more");
    refuse(&[a, LayerShape { n_head: 4, ..b }], &halves, "more query heads");
    // The same bytes a row, cut differently.
    refuse(&[LayerShape { d_k: 16, d_v: 32, ..a }, b], &halves, "other head sizes");
    refuse(&SHAPES, &|d| RopeParams::plain(Pairing::Adjacent, d, 10000.0), "another pairing");
    refuse(&SHAPES, &|d| RopeParams::plain(Pairing::Halves, d, 500_000.0), "another base");
    refuse(&SHAPES, &|_| RopeParams::none(), "no rope");
    let mut exact = Stream::new(&Config { window: 1400, ..config() }, &SHAPES, halves);
    assert!(matches!(exact.restore(&saved, &model, &bytes), Err(Error::Data(_))), "coded rows into a cache without tiles");
    let mut coarse = Stream::new(&Config { bits: 3.0, ..config() }, &SHAPES, halves);
    assert!(matches!(coarse.restore(&saved, &model, &bytes), Err(Error::Data(_))), "more bits than there is room for");
    assert!(coarse.arena().iter().all(|x| *x == 0));
}

#[test]
fn only_rows_in_ascending_cells_can_be_saved() {
    let s = filled(1, 20);
    assert!(matches!(s.save(&[3, 20]), Err(Error::Argument(_))), "an empty cell");
    assert!(matches!(s.save(&[5000]), Err(Error::Argument(_))));
    assert!(matches!(s.save(&[5, 3]), Err(Error::Argument(_))));
    assert!(matches!(s.save(&[3, 3]), Err(Error::Argument(_))));
    assert!(s.save(&[3, 5]).is_ok());
}

#[test]
fn no_cells_make_a_state_too() {
    let a = filled(1, 720);
    let mut b = filled(2, 30);
    let own = b.cells_of(0);
    let before = b.bits(&own);
    b.restore(&[], &[], &stream().save(&[]).unwrap()).unwrap();
    assert!(b.bits(&own) == before);
    b.restore(&[], &[], &a.save(&[]).unwrap()).unwrap();
    assert!(b.bits(&own) == before);
    b.append(3, 0, 900, 100).unwrap();
    b.check(NEAR);
}

/// A stream whose tiles are being coded again in new bases.
fn amid_another_fit() -> Stream {
    let mut s = Stream::new(&Config { n_cells: 4200, n_seqs: 2, n_tokens: 64, window: 64, ..config() }, &SHAPES, halves);
    while s.former() == 0 {
        let (n, live) = (if s.table.is_fitted() { 1 } else { 40 }, s.live().len());
        s.append(5000 + live as u64, 0, n, n).unwrap();
    }
    s
}

#[test]
fn the_size_is_computed_and_exact() {
    let fit = stream().table.geometry().fit_rows;
    let streams = [stream(), filled(1, 1), filled(1, fit - 100), filled(1, fit + 200), amid_another_fit()];
    let (mut kept, mut sizes) = (Vec::new(), Vec::new());
    for s in &streams {
        let layers: Vec<_> = s.layers.iter().collect();
        // Some of the rows, too, and none: other rows may be coded in the former bases, and none need none.
        for cells in [s.live(), s.live().into_iter().step_by(3).collect(), Vec::new()] {
            let state = Saving::new(&s.table, &layers, s.arena(), &cells).unwrap();
            let mut bytes = vec![0; state.size()];
            let (need, have) = (state.size(), state.size() - 1);
            assert_eq!(state.write(&mut bytes[..have]), Err(Error::Buffer { need, have }));
            state.write(&mut bytes).unwrap();
            let mut fresh = Stream::new(&s.table.geometry().config, &SHAPES, halves);
            fresh.restore(&cells, &rows(s, &cells), &bytes).unwrap();
            assert!(cells.is_empty() || fresh.error_of(&cells) < NEAR);
            sizes.push(state.size());
        }
        kept.push(s.former());
    }
    assert!(kept[..4] == [0; 4] && kept[4] > 10, "{kept:?}");
    sizes.dedup();
    assert!(sizes.len() > 10, "{sizes:?}");
}

/// Bytes of the arena that hold these rows, or that all rows of a head need: exact rows, tiles with a row in them, bases, queries.
fn bytes_in_arena(s: &Stream, cells: &[u32]) -> usize {
    let g = s.table.geometry();
    let (mut exact, mut tiles) = (0, std::collections::BTreeSet::new());
    for cell in cells {
        match s.table.locate(*cell as usize).unwrap().0 {
            Location::Slot(_) => exact += 1,
            Location::Coded(tile, _) => drop(tiles.insert(tile)),
        }
    }
    let block = |tile: &usize| g.block_bytes.get(g.band_of(*tile)).copied().unwrap_or_else(|| g.waiting_block());
    let heads = (0..g.layers.len()).flat_map(|l| (0..g.layers[l].n_head_kv).map(move |head| (l, head)));
    let of_head = |(l, head)| {
        let r = g.head(l, head);
        exact * g.layers[l].row_bytes() + r.record.len() + r.bases.len() + r.plain.len() + r.recent.len()
    };
    tiles.iter().map(block).sum::<usize>() + heads.map(of_head).sum::<usize>()
}

#[test]
fn a_state_is_hardly_longer_than_its_rows_in_the_arena() {
    let shapes = [LayerShape { n_head: 4, n_head_kv: 2, d_k: 64, d_v: 64 }, LayerShape { n_head: 2, n_head_kv: 1, d_k: 128, d_v: 128 }];
    for ratio in [8.0, 4.0] {
        let mut s = Stream::new(&Config { n_cells: 6000, n_tokens: 64, ratio, ..Config::default() }, &shapes, halves);
        s.append(1, 0, 5800, 50).unwrap();
        let cells = s.live();
        let (held, saved) = (bytes_in_arena(&s, &cells), s.save(&cells).unwrap().len());
        println!("ratio {ratio}: {saved} bytes for {held}, {}", saved as f64 / held as f64);
        assert!(s.table.is_fitted() && s.waiting() == 0 && s.former() == 0);
        assert!(held < s.arena().len());
        assert!(saved * 10 <= held * 11, "ratio {ratio}: {saved} bytes of {held} in the arena");
    }
}
