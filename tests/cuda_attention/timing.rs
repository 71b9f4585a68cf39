//! Calls to be timed on a device: a token of a usual model in a long context. Tiles are filled with codes that stand for nothing. Knows how tiles lie, not how
//! they are coded.

use crate::calls::folder;
use crate::common::{Random, Stream};
use crate::file::{Parts, Strides};
use half::f16;
use spectral_kv::config::{Config, LayerShape, Scoring};
use spectral_kv::cuda::layer::SkvLayer;
use spectral_kv::layout::basis::{bytes_of, widths_of};
use spectral_kv::layout::{Fine, TileForm, ANCHOR_GRID, BANDS, FINE_ROWS, TILE};
use spectral_kv::rope::{Pairing, RopeParams};

const D: usize = 128;
const HEADS: usize = 8;
const SCORING: Scoring = Scoring { scale: 0.088, softcap: 0.0 };
/// Ints of a plan's header, and which of them counts tiles.
const PLAN_HEADER: usize = 17;
const PLAN_TILES: usize = 6;

#[test]
#[ignore = "writes files for tests/gpu"]
fn calls_to_be_timed() {
    let folder = folder().expect("a folder to write them to");
    for rows in [64 << 10, 128 << 10] {
        let shape = LayerShape { n_head: 4 * HEADS as u32, n_head_kv: HEADS as u32, d_k: D as u32, d_v: D as u32 };
        let config = Config { n_cells: rows, calibrated: true, ..Config::default() };
        let mut s = Stream::new(&config, &[shape], |d| RopeParams::plain(Pairing::Halves, d, 500_000.0));
        let calibration = s.calibration();
        s.calibrate(&calibration);
        s.append(1, 0, 100, 50).unwrap();
        let bytes_to_read = fill(&mut s);
        let (cell, place) = (s.free()[0], (s.next_pos(0), 0));
        let t = s.tokens(2, &[cell], &[place]);
        s.enter(&t);
        let mut plan = s.plan(&[cell]).unwrap();
        list_all_tiles(&mut plan, s.table.geometry().tiles);
        let mask = vec![f16::ZERO; rows as usize];
        let parts = Parts {
            layer: &s.layers[0],
            scoring: SCORING,
            n: 1,
            multiprocessors: 132,
            splits: None,
            arena: s.arena(),
            plan: &plan,
            input: &t.inputs[0],
            n_own: 1,
            strides: Strides::Packed,
            mask: (&mask, mask.len(), mask.len()),
            sinks: &[],
            want: &[],
            bounds: &[],
            bytes_to_read: bytes_to_read + 4 * plan.len() + 2 * mask.len(),
        };
        std::fs::write(folder.join(format!("time.{}k.call", rows >> 10)), parts.to_bytes()).unwrap();
    }
}

/// Fill all tiles; gives how many bytes they have. All begin with the same bytes, so that files can be compressed.
fn fill(s: &mut Stream) -> usize {
    let (l, g) = (&s.layers[0], s.table.geometry().clone());
    let c = SkvLayer::new(&g, 0, l.rope(), SCORING);
    let mut r = Random::new(1);
    let noise: Vec<u8> = (0..TILE * 2 * D).map(|_| (r.next() >> 32) as u8).collect();
    let mut all = 0;
    for head in 0..HEADS {
        let record = (c.head_first + head as i64 * c.head_stride) as usize;
        let bases = record + c.bases as usize;
        let [k, v] = [bases, bases + bytes_of(D)].map(|at| widths_of(&s.arena()[at..]));
        for band in 0..BANDS {
            let form = TileForm::new(k[band], v[band], D, D, Fine::Residuals);
            let at = record + 4 * (2 + band);
            let offset = u32::from_le_bytes(s.arena()[at..at + 4].try_into().unwrap()) as usize;
            for i in 0..g.band_tiles[band] {
                let at = c.band_first[band] as usize + offset + i * c.block_bytes[band] as usize;
                tile(&form, &noise, &mut s.arena_mut()[at..at + form.bytes()]);
                all += form.bytes();
            }
        }
    }
    all
}

/// Gains around 1, any codes, and two fine rows.
fn tile(form: &TileForm, noise: &[u8], out: &mut [u8]) {
    let gains = [&form.k, &form.v].iter().map(|side| side.some_parts().count()).sum::<usize>() * TILE;
    let fine = gains + form.k.widths.bytes() + form.v.widths.bytes();
    out[..fine].copy_from_slice(&noise[..fine]);
    out[..gains].iter_mut().for_each(|gain| *gain = 120 + *gain % 16);
    out[fine..fine + FINE_ROWS].copy_from_slice(&[5, 50]);
    for residual in out[fine + FINE_ROWS..].chunks_exact_mut(2 + D / 2).take(2 * FINE_ROWS) {
        residual[..2].copy_from_slice(&f16::from_f32(0.05).to_le_bytes());
        residual[2..].copy_from_slice(&noise[..D / 2]);
    }
}

/// All tiles become a plan's: full ones, four of them in a frame.
fn list_all_tiles(plan: &mut Vec<i32>, tiles: usize) {
    let from = PLAN_HEADER + 2 * plan[4] as usize + 3 * plan[5] as usize;
    let to = from + plan[PLAN_TILES] as usize * (1 + 2 * TILE);
    let rows = |tile: usize| (0..TILE).flat_map(move |row| [(tile * TILE + row) as i32, tile as i32 / 4 * ANCHOR_GRID]);
    let all: Vec<i32> = (0..tiles).flat_map(|tile| [tile as i32].into_iter().chain(rows(tile))).collect();
    plan.splice(from..to, all);
    plan[PLAN_TILES] = tiles as i32;
}
