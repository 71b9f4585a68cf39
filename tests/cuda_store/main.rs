//! Steps that a device stores, on the host shim: against what the CPU makes of the same arenas, over whole lives of streams.

#[path = "../common/mod.rs"]
mod common;
mod compare;
mod life;
#[path = "../common/programs.rs"]
mod programs;
mod runner;
#[path = "../common/shim.rs"]
mod shim;

use common::{ropes, Input};
use life::{Did, Life};
use spectral_kv::cache::arena::Pieces;
use spectral_kv::cache::plan::{self, Change, Filling, PlanData};
use spectral_kv::cache::{Location, Plan};
use spectral_kv::config::{Config, LayerShape};
use spectral_kv::layout::geometry::{FORMER, WAITING};
use spectral_kv::layout::{Heads, TILE};
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

/// The bands, and every way that tiles go through them.
const AGES: [Did; 4] = [Did::Seal(0), Did::Recode(0, 1), Did::Recode(1, 2), Did::Recent];

#[test]
fn a_whole_life() {
    let mut life = Life::new("life", &config(), &[shape(2, 64, 64)], plain);
    for (i, (n, step)) in [(100, 5), (200, 40), (70, 1), (300, 64), (80, 8), (180, 30)].into_iter().enumerate() {
        life.append(1 + i as u64, 0, n, step);
    }
    life.end(&AGES);
}

#[test]
fn rows_wait_for_a_fit_and_are_coded_step_by_step_after_it() {
    for (bits, ratio) in [(8, 2.0), (6, 8.0)] {
        let mut life = Life::new(
            format!("waiting in {bits} bits"),
            &Config { n_cells: 4096, n_seqs: 1, window: 32, ratio, ..Config::default() },
            &[shape(2, 64, 48)],
            plain,
        );
        assert_eq!(life.s.table.geometry().waiting_bits, bits);
        life.append(1, 0, 40, 8);
        // The first tiles of waiting rows, several at once.
        life.append(2, 0, 300, 300);
        while !life.s.table.is_fitted() {
            let n = if life.s.live().len() < 500 { 30 } else { 6 };
            life.append(3 + life.s.live().len() as u64, 0, n, n);
        }
        for seed in 0..200 {
            let n = 1 + seed as usize % 3;
            life.append(5000 + seed, 0, n, n);
            if life.s.waiting() == 0 {
                break;
            }
        }
        assert_eq!(life.s.waiting(), 0);
        life.end(&[Did::Seal(WAITING), Did::Recode(WAITING, 2), Did::Record, Did::Recent]);
    }
}

#[test]
fn long_steps() {
    let config = Config { n_cells: 4096, n_seqs: 1, n_tokens: 512, window: 64, bits: 3.0, ..Config::default() };
    let mut life = Life::new("long steps", &config, &[shape(4, 64, 64)], plain);
    life.append(1, 0, 200, 100);
    life.append(2, 0, 2048, 512);
    life.append(3, 0, 400, 100);
    life.append(4, 0, 512, 512);
    life.end(&[Did::Seal(WAITING), Did::Seal(0), Did::Recode(0, 1), Did::Recode(1, 2)]);
}

#[test]
fn tiles_in_former_bases_are_coded_again_step_by_step() {
    let config = Config { n_cells: 3600, n_seqs: 1, n_tokens: 64, window: 64, bits: 4.0, ..Config::default() };
    let mut life = Life::new("former", &config, &[shape(4, 32, 16)], plain);
    life.s.begin_another_fit();
    for seed in 0..300 {
        life.append(seed, 0, 1 + seed as usize % 7, 64);
        if life.s.former() == 0 && life.s.waiting() == 0 {
            break;
        }
    }
    assert_eq!((life.s.former(), life.s.waiting()), (0, 0));
    life.append(999, 0, 128, 64);
    life.end(&[
        Did::Recode(FORMER, 2),
        Did::Recode(FORMER + 1, 2),
        Did::Recode(FORMER + 2, 2),
        Did::Recode(WAITING, 0),
        Did::Recode(WAITING, 1),
        Did::Seal(0),
    ]);
}

#[test]
fn head_sizes_and_rotations() {
    let shapes = [
        (1, 64, 64),
        (2, 80, 80),
        (4, 96, 64),
        (7, 128, 128),
        (8, 64, 80),
        (1, 256, 256),
        (2, 20, 36),
        (3, 34, 18),
        (1, 2, 6),
        (2, 128, 96),
        (1, 320, 272),
    ];
    for (i, (group, d_k, d_v)) in shapes.into_iter().enumerate() {
        let mut life = Life::new(format!("heads of {d_k} and {d_v}"), &config(), &[shape(group, d_k, d_v)], |d| ropes(d).swap_remove(i % 7));
        life.append(1, 0, 90, 90);
        life.s.append(2, 0, 470, 94).unwrap();
        life.append(3, 0, 330, 110);
        life.append(4, 0, 66, 33);
        life.end(&[Did::Seal(WAITING), Did::Seal(0), Did::Recode(0, 1), Did::Recode(1, 2)]);
    }
}

fn shift(life: &mut Life, seq: u32, from: i32, by: i32) {
    for cell in life.s.cells_of(seq) {
        let row = life.s.rows[cell as usize].as_mut().unwrap();
        row.pos += if row.pos >= from { by } else { 0 };
    }
}

/// Tokens of two sequences in turn.
fn append_both(life: &mut Life, seed: u64, n: usize) {
    let (cells, first) = (life.s.free()[..n].to_vec(), [life.s.next_pos(0), life.s.next_pos(1)]);
    let places: Vec<_> = (0..n).map(|i| (first[i % 2] + i as i32 / 2, i as u32 % 2)).collect();
    life.step(seed, &cells, &places);
}

#[test]
fn sequences_holes_shifts_and_moves() {
    let mut life = Life::new("apart", &config(), &[shape(2, 64, 32)], plain);
    for round in 0..9 {
        append_both(&mut life, round, 90);
    }
    for round in 0..12 {
        // Holes in all tiles, of one sequence or the other; what is left moves together.
        let seq = round % 2;
        let gone: Vec<u32> =
            life.s.cells_of(seq).into_iter().enumerate().filter(|(i, _)| i % 4 == 1 || (20..50).contains(i)).map(|(_, c)| c).collect();
        life.s.remove(seq, &gone);
        shift(&mut life, seq, 60, if round % 3 == 0 { 1500 } else { -7 });
        append_both(&mut life, 100 + u64::from(round), 60);
        append_both(&mut life, 200 + u64::from(round), 2);
    }
    life.end(&[Did::Move(1), Did::Seal(0), Did::Recode(0, 1), Did::Recode(1, 2)]);
}

#[test]
fn exact_and_calibrated_caches() {
    let mut life = Life::new("exact", &Config { window: CELLS, n_seqs: 1, ..config() }, &[shape(3, 80, 40)], plain);
    assert_eq!(life.s.table.geometry().tiles, 0);
    life.append(1, 0, 300, 100);
    shift(&mut life, 0, 100, 77);
    life.append(2, 0, 5, 1);
    assert_eq!(life.steps, [8, 0]);
    life.end(&[]);

    let mut life = Life::new("calibrated", &Config { calibrated: true, ..config() }, &[shape(2, 64, 64)], plain);
    let calibration = life.s.calibration();
    life.s.calibrate(&calibration);
    life.append(3, 0, 400, 50);
    life.append(4, 0, 300, 100);
    assert_eq!(life.steps, [10, 1]);
    life.end(&AGES);
}

#[test]
fn layers_and_heads_lie_where_the_geometry_has_them() {
    let shapes = [(6, 3, 64, 32), (4, 4, 32, 64), (5, 1, 20, 10)].map(|(n_head, n_head_kv, d_k, d_v)| LayerShape { n_head, n_head_kv, d_k, d_v });
    let mut life = Life::new("layers", &config(), &shapes, plain);
    life.append(1, 0, 900, 60);
    life.end(&AGES);
}

/// Multiply each row of some heads by a power of two of its own.
fn scale_rows(x: &mut [f32], d: usize, octaves: i32) {
    for row in x.chunks_exact_mut(d) {
        let by = (row[0].to_bits() % (2 * octaves as u32 + 1)) as i32 - octaves;
        row.iter_mut().for_each(|x| *x *= 2f32.powi(by));
    }
}

#[test]
fn adversarial_magnitudes() {
    type Alter = fn(&Heads, &mut Input);
    let cases: [(&str, Alter); 7] = [
        ("gains over many octaves", |g, x| (scale_rows(&mut x.v, g.d_v, 12), scale_rows(&mut x.k, g.d_k, 10)).1),
        ("a large mean", |g, x| x.k.iter_mut().enumerate().for_each(|(i, x)| *x += if i % g.d_k % 16 == 3 { 300.0 } else { 0.0 })),
        ("huge", |_, x| x.k.iter_mut().chain(&mut x.v).for_each(|x| *x *= 4000.0)),
        // Queries make up for it, as what draws attention would be a matter of rounding.
        ("tiny", |_, x| (x.k.iter_mut().chain(&mut x.v).for_each(|x| *x *= 1e-4), x.q.iter_mut().for_each(|x| *x *= 1e4)).1),
        ("nothing", |_, x| x.q.iter_mut().chain(&mut x.k).chain(&mut x.v).for_each(|x| *x = 0.0)),
        // What coding leaves of them is no longer Gaussian.
        ("outliers", |_, x| x.k.iter_mut().chain(&mut x.v).step_by(37).for_each(|x| *x *= 60.0)),
        ("one row draws all", |_, x| x.q.iter_mut().for_each(|x| *x *= 40.0)),
    ];
    for (name, alter) in cases {
        // What comes is of another kind than what bases were fitted to, or of the same.
        for from in [600, 0] {
            let mut life = Life::new(format!("{name} from {from} on"), &config(), &[shape(2, 32, 48)], plain);
            life.s.append(1, 0, from, 100).unwrap();
            life.s.alter = alter;
            life.append(2, 0, 950 - from, 50);
            life.end(&[]);
        }
    }
}

#[test]
fn residuals_of_one_coefficient() {
    let mut life = Life::new("one coefficient", &Config { bits: 0.5, ..config() }, &[shape(2, 64, 64)], |_| RopeParams::none());
    life.s.append(1, 0, 600, 100).unwrap();
    // Of least variance, so that it is not coded, and larger than the others by more and less.
    life.s.alter = |g, x| (0..x.v.len()).filter(|i| i % g.d_v == g.d_v - 1).for_each(|i| x.v[i] += 0.25 * 1.5f32.powi((i / g.d_v % 9) as i32));
    life.append(2, 0, 400, 50);
    life.end(&[Did::Seal(0), Did::Recode(0, 1)]);
}

#[test]
fn queries_half_way_between_whole_numbers() {
    let mut life = Life::new("halves", &config(), &[shape(2, 32, 16)], |_| RopeParams::none());
    life.s.alter = |g, x| {
        // The largest is 127, so that numbers are kept as they are, but for halves.
        (0..x.q.len()).for_each(|i| x.q[i] = if i % g.d_k == 3 { -127.0 } else { (i * 7 % 253) as f32 * 0.5 - 63.0 });
    };
    life.append(1, 0, 60, 4);
    life.end(&[Did::Record, Did::Recent]);
}

/// Changes that no table has planned, to a stream whose tiles are all coded.
fn change(life: &mut Life, changes: Vec<Change<Filling>>) {
    let data = PlanData { epoch: 77, stream: 1, fitted: true, changes, ..PlanData::default() };
    let mut ints = vec![0; plan::capacity(life.s.table.geometry(), 0)];
    let used = data.write(std::iter::empty::<(u32, fn(&mut [i32]))>(), &mut ints).unwrap();
    life.change(&ints[..used]);
}

fn tile_of(at: Location) -> Option<usize> {
    match at {
        Location::Coded(tile, _) => Some(tile),
        Location::Slot(_) => None,
    }
}

#[test]
fn rows_move_with_all_that_they_have() {
    let mut life = Life::new("moves", &config(), &[shape(2, 64, 32), shape(1, 34, 20)], plain);
    life.s.append(1, 0, 900, 50).unwrap();
    // Tiles of the last band, first those in use with two fine rows in the first layer.
    let (g, arena) = (life.s.table.geometry().clone(), life.s.arena());
    let pieces = Pieces::new(&g, 0, 0, &arena, &g.head(0, 0), (true, false)).unwrap();
    let fine = |tile: usize| pieces.form(2).fine_rows(&arena[pieces.place(tile).1]).map(usize::from);
    let used: BTreeSet<usize> = life.s.live().iter().filter_map(|c| life.s.table.locate(*c as usize)).filter_map(|(at, _)| tile_of(at)).collect();
    let is_full = |tile: &usize| used.contains(tile) && fine(*tile).iter().all(|row| *row < TILE);
    let (full, others): (Vec<usize>, Vec<usize>) = g.band(2).partition(is_full);
    let tiles = [full[0], full[1], others[0], others[1]];
    let [from, to] = [fine(tiles[0]), fine(tiles[1])];
    let at = |tile: usize, row: usize| tiles[tile] * TILE + row;
    let moves = |rows: &[(usize, usize)]| rows.iter().map(|(from, to)| Change::Move { from: *from, to: *to }).collect::<Vec<_>>();
    // A fine row where no slot is free, to one that was fine, and within its tile; a row that is not fine, to one that was.
    let other = (0..TILE).find(|row| !from.contains(row) && !to.contains(row)).unwrap();
    change(&mut life, moves(&[(at(0, from[0]), at(1, other)), (at(0, from[1]), at(1, to[1])), (at(0, from[0]), at(0, other))]));
    change(&mut life, moves(&[(at(0, other + 1), at(1, to[0])), (at(0, from[0]), at(1, to[0] ^ 1)), (at(0, from[1]), at(1, to[1] ^ 1))]));
    // One after another, and then all of the tile in the next band's form of nothing but itself.
    let all: Vec<_> = (0..TILE).map(|row| (at(1, row), at(2, TILE - 1 - row))).collect();
    change(
        &mut life,
        [moves(&all), vec![Change::Recode { from: tiles[2], to: tiles[3] }], moves(&[(at(3, 5), at(1, 6)), (at(1, 6), at(0, 63))])].concat(),
    );
    life.end(&[Did::Move(2), Did::Recode(2, 2)]);
}

#[test]
fn rates_of_every_kind() {
    for bits in [0.5, 1.0, 2.0, 4.5, 6.0, 10.0] {
        let mut life = Life::new(format!("{bits} bits"), &Config { bits, ..config() }, &[shape(2, 64, 64)], |_| RopeParams::none());
        life.s.append(1, 0, 600, 100).unwrap();
        life.append(2, 0, 400, 50);
        life.end(&AGES);
    }
}

#[test]
fn a_plan_for_the_host_changes_nothing() {
    let mut life = Life::new("refused", &config(), &[shape(2, 32, 16)], plain);
    let (mut fits, mut studies) = (0, 0);
    for step in 0..60 {
        let (cells, first) = (life.s.free()[..12].to_vec(), life.s.next_pos(0));
        let places: Vec<_> = (0..12).map(|i| (first + i, 0)).collect();
        let seen = life.s.table.clone();
        let t = life.s.tokens(step, &cells, &places);
        life.s.enter(&t);
        let ints = life.s.plan(&cells).unwrap();
        let plan = Plan::parse(&ints).unwrap();
        (fits, studies) = (fits + usize::from(plan.fit), studies + usize::from(plan.study.id != 0));
        if !plan.is_for_devices() {
            assert!(life.on_device(&ints, &t, 12) == life.s.arena());
        } else if step % 10 == 0 {
            // As many rows as tokens there must be.
            assert!(life.on_device(&ints, &t, 11) == life.s.arena());
        }
        cells.iter().for_each(|c| life.s.rows[*c as usize] = None);
        life.s.table = seen;
        life.s.step(step, &cells, &places).unwrap();
    }
    assert!(fits > 0 && studies > 1, "{fits} {studies}");
}

#[test]
fn nothing_races_in_shared_memory() {
    let mut life = Life::new("races", &config(), &[shape(3, 32, 20)], plain);
    life.watch_races();
    life.append(1, 0, 90, 90);
    life.s.append(2, 0, 470, 94).unwrap();
    life.append(3, 0, 330, 66);
    life.end(&[Did::Seal(WAITING), Did::Seal(0), Did::Recode(0, 1), Did::Recode(1, 2)]);

    let mut life = Life::new("more races", &config(), &[shape(1, 144, 16)], plain);
    life.s.append(1, 0, 800, 100).unwrap();
    life.watch_races();
    life.append(2, 0, 70, 35);
    life.end(&[Did::Seal(0)]);

    let config = Config { n_cells: 3600, n_seqs: 1, n_tokens: 64, window: 64, bits: 4.0, ..Config::default() };
    let mut life = Life::new("races of former bases", &config, &[shape(4, 32, 16)], plain);
    life.s.begin_another_fit();
    life.watch_races();
    life.append(3, 0, 6, 2);
    life.end(&[Did::Recode(FORMER + 2, 2)]);
}
