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

use life::{Did, Life};
use spectral_kv::config::{Config, LayerShape};
use spectral_kv::layout::geometry::WAITING;
use spectral_kv::rope::{Pairing, RopeParams};

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

#[test]
fn a_whole_life() {
    let mut life = Life::new("life", &config(), &[shape(2, 64, 64)], plain);
    life.append(1, 0, 100, 5);
    life.append(2, 0, 200, 40);
    life.append(3, 0, 500, 64);
    life.append(4, 0, 70, 1);
    life.append(5, 0, 180, 30);
    life.end(&[Did::Seal(WAITING), Did::Seal(0), Did::Recode(WAITING, 2), Did::Recode(0, 1), Did::Recode(1, 2), Did::Record, Did::Recent]);
}
