//! The structs of `kernels/layer.h`: what a kernel is told of a layer, of an attention call and of a step to store.
//!
//! [`SkvLayer`] is computed from sizes, rotation and scoring, and then never changes: what fits change kernels read from the arena. Must not know how it
//! comes to a device, nor what kernels do with it.

use crate::config::Scoring;
use crate::layout::gain::{self, gains};
use crate::layout::geometry::Geometry;
use crate::layout::quant::{A_8, B_8, LEVELS_1, LEVELS_2, LEVELS_3, LEVELS_4, LEVELS_5, LEVELS_6, STEP, UNITS_1, UNITS_2, UNITS_3, UNITS_4, UNITS_5};
use crate::layout::{BANDS, QUERY_SLOTS};
use crate::rope::{Pairing, Rope};
use half::f16;
use std::mem::offset_of;

/// Pairs that a rope may turn, of the largest heads.
pub const PAIRS: usize = 512;

/// What a kernel knows of a layer; see `kernels/layer.h`.
#[allow(missing_docs, reason = "kernels/layer.h says what each is")]
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, bytemuck::NoUninit)]
pub struct SkvLayer {
    pub n_head: i32,
    pub n_head_kv: i32,
    pub d_k: i32,
    pub d_v: i32,
    pub scale: f32,
    pub softcap: f32,
    pub pairing: i32,
    pub rope_dims: i32,
    pub rope_first: i32,
    pub waiting_bits: i32,
    pub tiles: i32,
    pub waiting: i32,
    pub exact: i32,
    pub band_ends: [i32; BANDS],
    pub head_first: i64,
    pub head_stride: i64,
    pub bases: i64,
    pub plain: i64,
    pub exact_rows: i64,
    pub former_first: i64,
    pub former_stride: i64,
    pub band_first: [i64; BANDS],
    pub block_bytes: [i64; BANDS],
    pub waiting_first: i64,
    pub waiting_piece: i64,
    pub waiting_block: i64,
    pub gains: [f32; 256],
    pub levels: [u16; 128],
    pub steps: [f32; 8],
    pub cubic: [f32; 2],
    pub omega: [f64; PAIRS],
    pub recent: i64,
    pub queries_first: i64,
    pub queries_stride: i64,
    pub norms: i64,
    pub least_gains: [f32; 256],
    pub positive: [f32; 64],
    pub bounds: [f32; 64],
}

/// One attention call; see `kernels/layer.h`. Pointers are addresses in the device's memory, 0 for none.
#[allow(missing_docs, reason = "kernels/layer.h says what each is")]
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct SkvAttend {
    pub layer: u64,
    pub arena: u64,
    pub plan: u64,
    pub q: u64,
    pub k: u64,
    pub v: u64,
    pub q_row: i64,
    pub q_head: i64,
    pub k_row: i64,
    pub k_head: i64,
    pub v_row: i64,
    pub v_head: i64,
    pub mask: u64,
    pub mask_row: i64,
    pub n_kv: i32,
    pub n_tokens: i32,
    pub splits: i32,
    pub reserved: i32,
    pub partials: u64,
    pub sinks: u64,
    pub out: u64,
}

/// One step to store; see `kernels/layer.h`. Pointers are addresses in the device's memory, 0 for none.
#[allow(missing_docs, reason = "kernels/layer.h says what each is")]
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct SkvStore {
    pub layer: u64,
    pub arena: u64,
    pub plan: u64,
    pub q: u64,
    pub k: u64,
    pub v: u64,
    pub q_row: i64,
    pub q_head: i64,
    pub k_row: i64,
    pub k_head: i64,
    pub v_row: i64,
    pub v_head: i64,
    pub residual: u64,
    pub residual_row: i64,
    pub n_residual: i32,
    pub n_tokens: i32,
}

// The same numbers are in kernels/layer.h.
const _: () = assert!(size_of::<SkvLayer>() == 7176 && offset_of!(SkvLayer, omega) == 1512);
const _: () = assert!(size_of::<SkvAttend>() == 152 && offset_of!(SkvAttend, n_kv) == 112);
const _: () = assert!(size_of::<SkvStore>() == 120 && offset_of!(SkvStore, n_tokens) == 116);

impl SkvLayer {
    /// What kernels know of layer `layer` of a geometry.
    pub fn new(g: &Geometry, layer: usize, rope: &Rope, scoring: Scoring) -> Self {
        let (heads, first) = (g.layers[layer], g.head(layer, 0));
        let (piece, form) = g.waiting_piece(layer, 0);
        let from_record = |at: usize| (at - first.record.start) as i64;
        SkvLayer {
            n_head: heads.n_head as i32,
            n_head_kv: heads.n_head_kv as i32,
            d_k: heads.d_k as i32,
            d_v: heads.d_v as i32,
            scale: scoring.scale,
            softcap: scoring.softcap,
            pairing: pairing(rope),
            rope_dims: rope.n_dims() as i32,
            rope_first: rope.offset() as i32,
            waiting_bits: g.waiting_bits as i32,
            tiles: g.tiles as i32,
            waiting: g.waiting as i32,
            exact: g.exact as i32,
            band_ends: std::array::from_fn(|band| g.band(band).end as i32),
            head_first: first.record.start as i64,
            // The ranges of a head but for those in the pool follow each other, and so do heads.
            head_stride: from_record(first.exact.end),
            bases: from_record(first.bases.start),
            plain: from_record(first.plain.start),
            exact_rows: from_record(first.exact.start),
            former_first: first.former.start as i64,
            former_stride: first.former.len() as i64,
            band_first: std::array::from_fn(|band| g.band_offset(band) as i64),
            block_bytes: g.block_bytes.map(|bytes| bytes as i64),
            waiting_first: if g.waiting > 0 { (g.waiting_offset(0) + piece) as i64 } else { 0 },
            waiting_piece: form.bytes() as i64,
            waiting_block: g.waiting_block() as i64,
            gains: gains().values,
            levels: levels(),
            steps: steps(),
            cubic: [A_8, B_8],
            omega: omega(rope),
            recent: from_record(first.recent.start),
            queries_first: first.queries.start as i64,
            queries_stride: first.queries.len() as i64,
            norms: first.queries.len().saturating_sub(QUERY_SLOTS * size_of::<f32>()) as i64,
            least_gains: least_gains(),
            positive: by_width(|levels, i| levels[i]),
            bounds: by_width(|levels, i| if i == 0 { 0.0 } else { 0.5 * (levels[i - 1] + levels[i]) }),
        }
    }
}

/// By code; below what any code stands for, nothing.
fn least_gains() -> [f32; 256] {
    let mut all = [0.0; 256];
    all[1..].copy_from_slice(gain::least_gains());
    all
}

/// Something of each positive level of a code of `w` bits, from `1 << (w - 1)` on: `find` gets all positive levels of a width and the number of one.
fn by_width(find: impl Fn(&[f32], usize) -> f32) -> [f32; 64] {
    let levels: [&[f32]; 6] = [&LEVELS_1, &LEVELS_2, &LEVELS_3, &LEVELS_4, &LEVELS_5, &LEVELS_6];
    let mut all = [0.0; 64];
    for levels in levels {
        let positive = &levels[levels.len() / 2..];
        (0..positive.len()).for_each(|i| all[positive.len() + i] = find(positive, i));
    }
    all
}

fn pairing(rope: &Rope) -> i32 {
    match rope.pairing() {
        Pairing::None => 0,
        Pairing::Adjacent => 1,
        Pairing::Halves => 2,
    }
}

fn omega(rope: &Rope) -> [f64; PAIRS] {
    let mut all = [0.0; PAIRS];
    all[..rope.omega().len()].copy_from_slice(rope.omega());
    all
}

/// By width, modulo 8: levels of 6 and 8 bits are no whole numbers, and 7 bits are no width.
fn steps() -> [f32; 8] {
    let [_, one, two, three, four, five] = STEP;
    [1.0, one, two, three, four, five, 1.0, 0.0]
}

/// Levels of a code of `w` bits as f16, from `1 << w` on: whole numbers, but for those of 6 bits.
fn levels() -> [u16; 128] {
    let whole: [&[i8]; 5] = [&UNITS_1, &UNITS_2, &UNITS_3, &UNITS_4, &UNITS_5];
    let whole = whole.into_iter().flatten().map(|unit| f16::from_f32(f32::from(*unit)));
    let all = [f16::ZERO; 2].into_iter().chain(whole).chain(LEVELS_6.iter().map(|level| f16::from_f32(*level)));
    let mut levels = [0; 128];
    levels.iter_mut().zip(all).for_each(|(to, level)| *to = level.to_bits());
    levels
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::arena::{keep_former, set_pieces, Pieces};
    use crate::config::{Config, LayerShape};
    use crate::layout::gain::gain_code;
    use crate::layout::geometry::KINDS;
    use crate::layout::quant::{self, level};
    use crate::rope::RopeParams;

    const fn shape(n_head: u32, n_head_kv: u32, d_k: u32, d_v: u32) -> LayerShape {
        LayerShape { n_head, n_head_kv, d_k, d_v }
    }

    fn constants(g: &Geometry, layer: usize) -> SkvLayer {
        SkvLayer::new(g, layer, &Rope::identity(), Scoring { scale: 1.0, softcap: 0.0 })
    }

    /// As real models have them, alike and mixed; with a fit to wait for, in 8 bits and in 6, and without; of one rate; all exact.
    fn geometries() -> Vec<Geometry> {
        let (smol, qwen) = (vec![shape(9, 3, 64, 64); 30], vec![shape(12, 2, 128, 128); 28]);
        let mixed = vec![shape(8, 4, 256, 256), shape(16, 16, 192, 128), shape(8, 1, 64, 512), shape(9, 3, 64, 64)];
        let config = |n_cells| Config { n_cells, ..Config::default() };
        let all = [
            (config(8192), &smol),
            (Config { ratio: 4.0, ..config(4096) }, &smol),
            (config(32768), &qwen),
            (config(16384), &mixed),
            (Config { n_seqs: 4, bits: 2.5, ..config(4096) }, &mixed),
            (Config { calibrated: true, ..config(8192) }, &mixed),
            (Config { fine_rows: 0, ..config(8192) }, &qwen),
            (Config { window: u32::MAX, ..config(512) }, &smol),
        ];
        all.iter().map(|(config, shapes)| Geometry::new(config, shapes).unwrap()).collect()
    }

    /// First, last and some in between.
    fn some(n: usize) -> impl Iterator<Item = usize> {
        (0..n).filter(move |i| i.is_multiple_of(5) || i + 1 == n)
    }

    #[test]
    fn the_ranges_of_a_head_are_where_the_geometry_has_them() {
        for g in geometries() {
            for layer in some(g.layers.len()) {
                let (l, h) = (constants(&g, layer), g.layers[layer]);
                assert_eq!([l.n_head, l.n_head_kv, l.d_k, l.d_v].map(|n| n as usize), [h.n_head, h.n_head_kv, h.d_k, h.d_v]);
                assert_eq!([l.tiles, l.waiting, l.exact, l.band_ends[BANDS - 1]].map(|n| n as usize), [g.tiles, g.waiting, g.exact, g.tiles]);
                for head in some(h.n_head_kv) {
                    let (want, record) = (g.head(layer, head), l.head_first + head as i64 * l.head_stride);
                    let former = l.former_first + head as i64 * l.former_stride;
                    let queries = l.queries_first + head as i64 * l.queries_stride;
                    let at = [record, record + l.bases, record + l.plain, record + l.recent, record + l.exact_rows, former, queries];
                    if g.keeps_queries() {
                        assert_eq!((queries + l.norms) as usize, want.queries.end - 4 * QUERY_SLOTS);
                    }
                    let want = [want.record, want.bases, want.plain, want.recent, want.exact, want.former, want.queries];
                    assert_eq!(at, want.map(|range| range.start as i64), "layer {layer}, head {head}");
                }
            }
        }
    }

    /// What a kernel makes of a plan's number of a tile: where the head's piece begins, if its pieces begin at `offsets` in blocks.
    fn piece(l: &SkvLayer, head: usize, offsets: [usize; BANDS], number: usize) -> i64 {
        let (tiles, number) = (l.tiles, number as i32);
        if (tiles..tiles + l.waiting).contains(&number) {
            return l.waiting_first + head as i64 * l.waiting_piece - i64::from(number - tiles) * l.waiting_block;
        }
        let tile = if number < tiles { number } else { number - tiles - l.waiting };
        let band = l.band_ends.iter().position(|end| tile < *end).unwrap();
        let first = if band == 0 { 0 } else { l.band_ends[band - 1] };
        l.band_first[band] + offsets[band] as i64 + i64::from(tile - first) * l.block_bytes[band]
    }

    #[test]
    fn the_pieces_of_tiles_are_where_the_cache_has_them() {
        let mut kinds = [0; KINDS];
        for g in geometries().into_iter().filter(|g| g.tiles > 0) {
            let mut arena = vec![0; g.arena_bytes];
            for layer in some(g.layers.len()) {
                let (l, h) = (constants(&g, layer), g.layers[layer]);
                for head in some(h.n_head_kv) {
                    let (range, offsets) = (g.head(layer, head), [11 + head, 5 * head, 64 + 3 * head]);
                    let mut bytes = arena.as_mut_slice();
                    set_pieces(&mut bytes[range.record.clone()], offsets);
                    // Former bases are there only where others may follow.
                    let former = g.keeps_queries();
                    if former {
                        keep_former(&h, &mut bytes, &range);
                    }
                    let pieces = Pieces::new(&g, layer, head, &arena.as_slice(), &range, (true, former)).unwrap();
                    for number in some(if former { g.former(g.tiles) } else { g.tiles }) {
                        let (kind, place) = pieces.place(number);
                        assert_eq!(piece(&l, head, offsets, number), place.start as i64, "layer {layer}, head {head}, tile {number}");
                        kinds[kind] += 1;
                    }
                }
            }
        }
        assert!(kinds.iter().all(|n| *n > 50), "{kinds:?}");
    }

    #[test]
    fn rope_and_scoring_are_handed_on() {
        let g = Geometry::new(&Config { n_cells: 4096, ..Config::default() }, &[shape(8, 2, 128, 128)]).unwrap();
        let params = RopeParams { offset: 32, ..RopeParams::plain(Pairing::Halves, 64, 10000.0) };
        let l = SkvLayer::new(&g, 0, &Rope::new(&params, 128).unwrap(), Scoring { scale: 0.25, softcap: 30.0 });
        assert_eq!((l.scale, l.softcap, l.pairing, l.rope_dims, l.rope_first), (0.25, 30.0, 2, 64, 32));
        assert!(l.omega[0] == 1.0 && (l.omega[16] - 0.01).abs() < 1e-15 && l.omega[31] > 0.0 && l.omega[32..].iter().all(|w| *w == 0.0));
        let none = constants(&g, 0);
        assert!(none.pairing == 0 && none.rope_dims == 0 && none.omega == [0.0; PAIRS]);
    }

    #[test]
    fn codes_stand_for_what_they_do_on_the_host() {
        let g = Geometry::new(&Config { n_cells: 4096, ..Config::default() }, &[shape(8, 2, 128, 128)]).unwrap();
        let l = constants(&g, 0);
        for width in 1..=6u32 {
            for code in 0..1u8 << width {
                let unit = f16::from_bits(l.levels[(1 << width) + code as usize]).to_f32();
                let want = level(width, code);
                // A level of 6 bits is rounded to f16.
                assert!((unit * l.steps[width as usize] - want).abs() <= if width < 6 { 0.0 } else { want.abs() / 2048.0 }, "{width} {code}");
            }
        }
        for code in [-127i8, -3, 0, 1, 90] {
            let c = f32::from(code);
            assert_eq!(c * (l.cubic[0] + l.cubic[1] * c * c), level(8, code as u8));
        }
        for width in 1..=6 {
            let half = 1 << (width - 1);
            let nearest = |x: f32| (0..half).rev().find(|i| x >= l.bounds[half + i]).unwrap();
            for x in (0..7000).map(|i| i as f32 * 1e-3) {
                let i = nearest(x);
                assert_eq!((half + i) as u8, quant::code(width as u32, x), "{width} {x}");
                assert_eq!(l.positive[half + i], level(width as u32, (half + i) as u8));
            }
        }
        for gain in (0..4000).map(|i| (i as f32 * 0.009 - 18.0).exp2()) {
            assert_eq!(gain_code(gain) as usize, (1..256).rev().find(|code| gain >= l.least_gains[*code]).unwrap_or(0), "{gain}");
        }
        assert_eq!((l.steps[8 % 8], l.gains[0], l.gains[128]), (1.0, 0.0, 1.0));
    }
}
