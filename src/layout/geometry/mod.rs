//! The sizes that follow from a configuration, and where everything lies in a stream's arena.
//!
//! Sizes are decided once, here; nothing grows later. Must not know what is stored.
//!
//! An arena holds one stream of all layers (offsets are multiples of 64 bytes, but for pieces of tiles):
//!
//! ```text
//! per layer, per KV head: record | bases of K and V | means and scales of waiting rows | recent queries | exact rows, f16 K then V
//! pool: tiles, band by band. A tile is a block with a piece for every head of every layer, one after another. How long a head's piece is,
//!       the fit decides by what it needs; all together fill the block.
//!       While it is not in use, the end of the pool holds the queries for a fit, and before them the tiles of waiting rows, the last one first.
//!       While tiles are coded again in bases of another fit, it holds the former bases instead, of each head: record | what decodes of K and V.
//! ```
//!
//! So bits are shared out over the whole model, and a block can be filled while what waits at the end of the pool is still being read by the
//! layers behind.
//!
//! Rates fall with age. Attention does, so rows just behind the window get more bits than old ones: tiles are divided into bands, each with a
//! rate of its own, and a tile that outgrows its band is coded again in the next.

mod map;
mod numbers;

pub use map::HeadRanges;

use crate::config::{Config, LayerShape, FINE_ROWS_AUTO, MAX_BITS};
use crate::error::{Error, Result};
use crate::layout::{Fine, Heads, TileForm, Widths, BANDS, QUERY_SLOTS, RECENT_QUERIES, TILE};
use std::ops::Range;

/// Rows that a basis is best fitted on, of one sequence.
const FIT_ROWS: usize = 2048;
/// The fewest, in small contexts.
const FIT_ROWS_MIN: usize = 512;
/// Bits per element of rows that wait for a fit: the first that leaves room for as many as a fit needs, or the last. Six cost what is coded finely
/// more than the last rows of a fit would bring.
pub const WAITING_BITS: [u32; 2] = [8, 6];
/// As many as a fit needs.
const FIT_ROWS_GOOD: usize = 1024;
/// Bytes of a head's record: number of the last plan it carried out, whether there are bases, the places of its pieces.
pub const RECORD_BYTES: usize = 64;

/// Bits per element of each band over those of the last.
const BAND_BITS: [f64; BANDS] = [3.5, 1.5, 0.0];
/// The most that a band's rate may be, in rates of the last.
const BAND_FACTOR: f64 = 6.0;
/// Cells for one row of the finest band, by default.
const FINE_SHARE: usize = 64;
/// The least that overheads may leave of the rate a ratio stands for: in short contexts quality comes first.
const LEAST_RATE: f64 = 0.7;
/// Bits per element with which a model begins to say other things: of these and of fewer, overheads may take less, the larger a part they are of
/// what a ratio allows and the less there is to save.
const FEW_BITS: f64 = 2.0;
/// Code bits per element that a tile has at least.
const LEAST_CODES: f64 = 0.25;

/// Bytes of blocks are a multiple of this: kernels on devices copy so many at once.
const BLOCK_ALIGN: usize = 16;

/// How a tile is coded: bands from 0 on, then [`WAITING`], then the same bands in the former bases from [`FORMER`] on.
pub type Kind = usize;
/// Rows wait.
pub const WAITING: Kind = BANDS;
/// The first band of tiles in the former bases.
pub const FORMER: Kind = BANDS + 1;
/// Kinds of tiles.
pub const KINDS: usize = FORMER + BANDS;

/// Sizes of a cache. Slots, tiles and rows are counted alike in all its layers.
#[derive(Debug, Clone, PartialEq)]
pub struct Geometry {
    /// The configuration this follows from.
    pub config: Config,
    /// Exact slots.
    pub exact: usize,
    /// Rows of one sequence with which a fit should be ready; 1 when there is nothing to fit.
    pub fit_rows: usize,
    /// Tiles; 0 when every row stays exact.
    pub tiles: usize,
    /// Tiles of each band; tiles are numbered band by band.
    pub band_tiles: [usize; BANDS],
    /// Tiles of rows that wait for a fit, numbered behind the others.
    pub waiting: usize,
    /// Bits per element of these.
    pub waiting_bits: u32,
    /// The layers.
    pub layers: Vec<Heads>,
    /// Bytes of one stream.
    pub arena_bytes: usize,
    /// Bytes of a tile of each band, all heads.
    pub block_bytes: [usize; BANDS],
    /// How many of these are shared out among the heads; the rest is none's.
    pub shared_bytes: [usize; BANDS],
    /// Where each layer's heads begin.
    offsets: Vec<usize>,
    /// Where the pool begins and how long it is.
    pool: Range<usize>,
}

/// What a geometry holds, against f16.
#[derive(Debug, Clone, PartialEq)]
pub struct SizeReport {
    /// Bytes of the arenas of all streams.
    pub bytes_arenas: u64,
    /// Bytes of the host tables of all streams.
    pub bytes_tables: u64,
    /// Bytes an f16 cache of these cells holds.
    pub bytes_f16: u64,
    /// `bytes_f16 / (bytes_arenas + bytes_tables)`.
    pub ratio: f64,
    /// Bits per element of a coded row, everything in a tile counted, mean over the tiles; 16 when everything is exact.
    pub code_bits: f64,
}

fn align(n: usize, to: usize) -> usize {
    n.div_ceil(to) * to
}

/// How many tiles each band has, for `rows` coded rows at most.
fn bands(c: &Config, rows: usize) -> [usize; BANDS] {
    let cells = c.n_cells as usize;
    let fine = match c.fine_rows {
        FINE_ROWS_AUTO => (cells / FINE_SHARE).max(2 * TILE * c.n_seqs as usize).min(cells / 8),
        n => n as usize,
    };
    let first = fine.div_ceil(TILE).min(rows / TILE / 4);
    let young = if first == 0 { [0, 0] } else { [first, 2 * first] };
    // Each of the younger bands may hold less than a tile of holes, which the last must make up for.
    let spare = young.iter().filter(|n| **n > 0).count();
    [young[0], young[1], (rows.div_ceil(TILE) + spare).saturating_sub(young[0] + young[1])]
}

/// Bits of each band, whose mean over all tiles is `mean`.
fn rates(mean: f64, band_tiles: &[usize; BANDS]) -> [f64; BANDS] {
    let at = |last: f64| BAND_BITS.map(|more| (last + more).min(last * BAND_FACTOR).min(MAX_BITS));
    let total = |last: f64| -> f64 { at(last).iter().zip(band_tiles).map(|(bits, n)| bits * *n as f64).sum() };
    let wanted = mean * band_tiles.iter().sum::<usize>() as f64;
    // The mean grows with the last band's rate; 40 halvings of the interval are exact to f32.
    let (mut low, mut high) = (0.0, mean);
    for _ in 0..40 {
        let middle = 0.5 * (low + high);
        if total(middle) <= wanted {
            low = middle;
        } else {
            high = middle;
        }
    }
    at(low)
}

/// How a head's waiting rows are coded.
pub fn waiting_form(h: &Heads, bits: u32) -> TileForm {
    TileForm::new(Widths::equal(h.d_k, bits), Widths::equal(h.d_v, bits), h.d_k, h.d_v, Fine::Marks)
}

/// The most that a head's piece of a tile has beside its codes.
pub fn overhead_bytes(h: &Heads) -> usize {
    // A coefficient of each part.
    let widths = Widths { counts: [1, 0, 0, 0, 0, 0, 1] };
    TileForm::new(widths, widths, h.d_k, h.d_v, Fine::Residuals).bytes() - 2 * widths.bytes()
}

fn query_bytes(h: &Heads, slots: usize) -> usize {
    align(slots * h.group() * (h.d_k + 4), 64)
}

/// Host bytes of the table of one stream ([`crate::cache::Table`]).
fn table_bytes(g: &Geometry) -> usize {
    // Location of a cell; cell and turn of a coded row; live rows and age of a tile; cell and position of a slot; query places.
    let tiles = g.tiles + g.waiting;
    g.config.n_cells as usize * 4 + tiles * (TILE * 8 + 16) + g.exact * 8 + (QUERY_SLOTS + RECENT_QUERIES) * 8
}

impl Geometry {
    /// Check a configuration and compute every size.
    pub fn new(config: &Config, shapes: &[LayerShape]) -> Result<Self> {
        config.check()?;
        if shapes.is_empty() || shapes.len() > 4096 {
            return Err(Error::Config(format!("{} layers; 1 to 4096 are possible", shapes.len())));
        }
        for (i, s) in shapes.iter().enumerate() {
            if !s.is_possible() {
                let m = format!("layer {i}: {} query heads, {} KV heads, head sizes {} and {}", s.n_head, s.n_head_kv, s.d_k, s.d_v);
                return Err(Error::Config(m));
            }
        }
        let layers: Vec<Heads> = shapes.iter().map(Heads::of).collect();
        let exact = Self::all_exact(config, layers.clone());
        let wanted = config.n_seqs as usize * (config.window as usize + config.sinks as usize + TILE);
        if exact.exact <= wanted {
            return Ok(exact);
        }
        let coded = Self::coded(config, layers, wanted);
        // Who asks for a rate gets codes.
        let is_larger = coded.arena_bytes + table_bytes(&coded) >= exact.arena_bytes + table_bytes(&exact);
        Ok(if is_larger && config.bits == 0.0 { exact } else { coded })
    }

    fn all_exact(config: &Config, layers: Vec<Heads>) -> Self {
        let mut g = Geometry {
            config: config.clone(),
            exact: config.n_cells as usize,
            fit_rows: config.n_cells as usize,
            tiles: 0,
            band_tiles: [0; BANDS],
            waiting: 0,
            waiting_bits: WAITING_BITS[0],
            layers,
            arena_bytes: 0,
            block_bytes: [0; BANDS],
            shared_bytes: [0; BANDS],
            offsets: Vec::new(),
            pool: 0..0,
        };
        g.place();
        g
    }

    fn coded(config: &Config, layers: Vec<Heads>, exact: usize) -> Self {
        let cells = config.n_cells as usize;
        // Sinks are not counted on: a sequence whose first positions were removed has none.
        let band_tiles = bands(config, cells - config.window as usize);
        let mut g = Geometry { exact, band_tiles, tiles: band_tiles.iter().sum(), ..Self::all_exact(config, layers) };
        // With bases at hand no row has to wait.
        g.fit_rows = if config.calibrated { 1 } else { g.best_fit_rows() };
        g.waiting = if config.calibrated { 0 } else { g.fit_rows.div_ceil(TILE) };
        g.place();
        g.shared_bytes = g.blocks();
        g.block_bytes = g.shared_bytes.map(|bytes| align(bytes, BLOCK_ALIGN));
        if config.bits == 0.0 {
            // Who asks for a ratio pays for no padding.
            g.shared_bytes = g.shared_bytes.map(|bytes| (bytes / BLOCK_ALIGN * BLOCK_ALIGN).max(align(g.least_bytes(), BLOCK_ALIGN)));
            g.block_bytes = g.shared_bytes;
        }
        g.place();
        if !config.calibrated {
            g.find_room_to_wait();
        }
        g
    }

    /// Bytes of a block of each band, from the bits asked for or those that the ratio leaves.
    fn blocks(&self) -> [usize; BANDS] {
        let c = &self.config;
        let block_elements = self.block_elements();
        let least = self.least_bytes() as f64 * 8.0 / block_elements;
        let mean = if c.bits > 0.0 {
            f64::from(c.bits)
        } else {
            let target = (c.n_cells as usize * self.f16_row_bytes()) as f64 / f64::from(c.ratio) - table_bytes(self) as f64;
            let left = target - (self.pool.start + 255) as f64;
            let (nominal, overheads) = (16.0 / f64::from(c.ratio), (1.0 - left / target).clamp(0.0, 1.0));
            let few = nominal.min(FEW_BITS) * (LEAST_RATE + (1.0 - LEAST_RATE) * overheads);
            (left / self.tiles as f64 * 8.0 / block_elements).max(few.max(LEAST_RATE * nominal))
        };
        rates(mean.clamp(least, MAX_BITS), &self.band_tiles).map(|bits| (bits.max(least) * block_elements / 8.0) as usize)
    }

    /// Elements of all rows of a tile.
    fn block_elements(&self) -> f64 {
        (TILE * self.layers.iter().map(|l| l.n_head_kv * l.elements()).sum::<usize>()) as f64
    }

    /// The least that a block has.
    fn least_bytes(&self) -> usize {
        let overhead: usize = self.layers.iter().map(|l| l.n_head_kv * overhead_bytes(l)).sum();
        overhead + (LEAST_CODES * self.block_elements() / 8.0) as usize
    }

    /// Rows that a fit is best made on.
    pub fn best_fit_rows(&self) -> usize {
        (self.config.n_cells as usize / 2).clamp(FIT_ROWS_MIN, FIT_ROWS)
    }

    /// Most tiles that the rows which leave their windows in one step fill: of each sequence, less than a tile was left over.
    pub fn step_tiles(&self) -> usize {
        (self.config.n_tokens.min(self.config.n_cells) as usize).div_ceil(TILE) + self.config.n_seqs as usize - 1
    }

    /// As many rows may wait for a fit as the end of the pool has room for; the pool grows where that is too few. Who asks for a rate, and not for a
    /// ratio, has room for a good fit.
    fn find_room_to_wait(&mut self) {
        let window = (self.config.window + self.config.sinks) as usize;
        let rows = if self.config.bits > 0.0 { FIT_ROWS_GOOD } else { FIT_ROWS_MIN };
        let least = (rows.saturating_sub(window)).div_ceil(TILE).min(self.waiting);
        // The step that finds no more room codes all of them, and its own rows: these were in the sample, those that come next may be of another kind.
        let fits = |g: &Self, n: usize| g.tiles_beside(n) >= (n + g.step_tiles()).min(g.tiles);
        let most = self.waiting;
        for bits in WAITING_BITS {
            self.waiting_bits = bits;
            self.waiting = (least..=most).rev().find(|n| fits(self, *n)).unwrap_or(least);
            if self.waiting == most || self.waiting * TILE + window >= FIT_ROWS_GOOD {
                break;
            }
        }
        self.fit_rows = self.fit_rows.min(self.waiting * TILE + window);
        while !fits(self, self.waiting) {
            self.pool.end += align(self.block_bytes[BANDS - 1], 64);
            self.arena_bytes = align(self.pool.end, 256);
        }
    }

    /// Whether `former` tiles, in the former bases, and then the `waiting` tiles can be coded in new bases, beside `used` tiles (the former ones among
    /// them) and the rows of steps that are as long as they may be. What a step empties can be filled from the next one on. In steps of few
    /// tokens as many tiles are coded as there are tokens.
    pub fn can_code_all(&self, mut used: usize, mut former: usize, mut waiting: Range<usize>) -> bool {
        used += (former + waiting.len()) / TILE;
        while former > 0 || !waiting.is_empty() {
            let in_former = if former > 0 { self.waiting_in_former() } else { 0 };
            let beside = self.tiles_beside(if waiting.is_empty() { in_former } else { waiting.end });
            used += self.step_tiles();
            let Some(free) = beside.checked_sub(used).filter(|free| *free > 0) else { return false };
            if former > 0 {
                former -= free.min(former);
            } else {
                let n = free.min(waiting.len());
                (used, waiting.end) = (used + n, waiting.end - n);
            }
        }
        true
    }

    /// f16 bytes of one row of all layers.
    fn f16_row_bytes(&self) -> usize {
        self.layers.iter().map(|h| h.n_head_kv * h.row_bytes()).sum()
    }

    /// Bits per element of a band, everything in its tiles counted.
    pub fn bits(&self, band: usize) -> f64 {
        let elements: usize = self.layers.iter().map(|h| h.n_head_kv * h.elements()).sum();
        self.block_bytes[band] as f64 * 8.0 / (TILE * elements) as f64
    }

    /// Bits per element of a band that are left for codes.
    pub fn code_bits(&self, band: usize) -> f64 {
        let sum = |of: fn(&Heads) -> usize| self.layers.iter().map(|h| h.n_head_kv * of(h)).sum::<usize>();
        self.block_bytes[band].saturating_sub(sum(overhead_bytes)) as f64 * 8.0 / (TILE * sum(Heads::elements)) as f64
    }

    /// Bytes held, against f16.
    pub fn report(&self) -> SizeReport {
        let streams = u64::from(self.config.n_streams);
        let arenas = streams.saturating_mul(self.arena_bytes as u64);
        let tables = streams * table_bytes(self) as u64;
        let f16 = streams.saturating_mul(self.f16_row_bytes() as u64).saturating_mul(u64::from(self.config.n_cells));
        let bits = (0..BANDS).map(|b| self.bits(b) * self.band_tiles[b] as f64).sum::<f64>() / self.tiles.max(1) as f64;
        SizeReport {
            bytes_arenas: arenas,
            bytes_tables: tables,
            bytes_f16: f16,
            ratio: f16 as f64 / arenas.saturating_add(tables) as f64,
            code_bits: if self.tiles == 0 { 16.0 } else { bits },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: LayerShape = LayerShape { n_head: 4, n_head_kv: 2, d_k: 128, d_v: 128 };
    const LARGE: LayerShape = LayerShape { n_head: 32, n_head_kv: 8, d_k: 128, d_v: 128 };
    /// Qwen2.5-1.5B's.
    const QWEN: LayerShape = LayerShape { n_head: 12, n_head_kv: 2, d_k: 128, d_v: 128 };
    /// SmolLM2-135M's.
    const THREE: LayerShape = LayerShape { n_head: 9, n_head_kv: 3, d_k: 64, d_v: 64 };

    fn geometry(n_cells: u32, ratio: f32, shape: LayerShape, layers: usize) -> Geometry {
        Geometry::new(&Config { n_cells, ratio, ..Config::default() }, &vec![shape; layers]).unwrap()
    }

    #[test]
    fn the_ratio_asked_for_is_reached_where_exact_rows_and_bases_allow_it() {
        for (cells, ratio, shape, layers, least) in [
            (32768, 8.0, SMALL, 3, 8.0),
            (32768, 8.0, LARGE, 32, 8.0),
            (32768, 8.0, QWEN, 28, 7.9),
            (4096, 4.0, THREE, 30, 3.7),
            (8192, 4.0, THREE, 30, 3.99),
            (8192, 8.0, THREE, 30, 6.5),
        ] {
            let r = geometry(cells, ratio, shape, layers).report();
            assert!(r.ratio >= least && r.ratio < f64::from(ratio) + 0.05, "{cells} {ratio}: {r:?}");
            assert!(r.code_bits >= 0.7 * 16.0 / f64::from(ratio) - 0.01, "{r:?}");
        }
    }

    #[test]
    fn rows_wait_where_nothing_is_written_before_all_of_them_are_coded() {
        for (cells, ratio, n_tokens) in [(2048, 8.0, 512), (4096, 4.0, 512), (4096, 8.0, 64), (4096, 4.0, 2048), (131_072, 8.0, 512)] {
            let g = Geometry::new(&Config { n_cells: cells, ratio, n_tokens, ..Config::default() }, &[THREE; 30]).unwrap();
            let step = (n_tokens.min(cells) as usize).div_ceil(TILE);
            assert!(g.tiles_beside(g.waiting) >= (g.waiting + step).min(g.tiles), "{cells}: {} {}", g.tiles_beside(g.waiting), g.waiting);
            assert!(g.waiting * TILE + 132 >= FIT_ROWS_MIN);
            let (first, last) = (g.head(0, 0), g.head(29, 2));
            assert!(first.queries.start.is_multiple_of(64) && last.queries.end <= g.arena_bytes);
            assert!(g.waiting_offset(0) + g.waiting_block() <= first.queries.start);
        }
    }

    #[test]
    fn blocks_are_whole_words_and_have_room_for_the_least() {
        for bits in [0.01, 0.6, 1.0, 1.7, 2.4, 5.0, 12.0] {
            for shape in [SMALL, QWEN, THREE, LayerShape { n_head: 1, n_head_kv: 1, d_k: 2, d_v: 6 }] {
                let g = Geometry::new(&Config { n_cells: 8192, bits, ..Config::default() }, &[shape; 3]).unwrap();
                let overheads: usize = g.layers.iter().map(|h| h.n_head_kv * overhead_bytes(h)).sum();
                assert!((0..BANDS).all(|b| g.block_bytes[b].is_multiple_of(BLOCK_ALIGN) && g.band_offset(b).is_multiple_of(BLOCK_ALIGN)));
                assert!((0..BANDS).all(|b| g.block_bytes[b] > overheads && g.bits(b) <= g.bits(0)), "{bits} {shape:?}: {:?}", g.block_bytes);
            }
        }
    }

    #[test]
    fn a_context_that_codes_would_not_make_smaller_stays_exact() {
        let g = geometry(513, 8.0, THREE, 30);
        assert_eq!((g.tiles, g.exact), (0, 513));
        assert!(g.report().ratio > 0.99);
    }

    #[test]
    fn a_window_as_long_as_the_context_stores_everything_exactly() {
        let g = Geometry::new(&Config { n_cells: 2048, window: 2048, ..Config::default() }, &[SMALL]).unwrap();
        assert_eq!((g.tiles, g.exact), (0, 2048));
    }

    #[test]
    fn absurd_configurations_are_refused() {
        let ok = Config { n_cells: 4096, ..Config::default() };
        for bad in [
            Config { n_cells: 0, ..ok.clone() },
            Config { n_cells: u32::MAX, ..ok.clone() },
            Config { n_streams: 0, ..ok.clone() },
            Config { n_tokens: 0, ..ok.clone() },
            Config { ratio: f32::NAN, ..ok.clone() },
            Config { ratio: 0.5, ..ok.clone() },
            Config { bits: -1.0, ..ok.clone() },
            Config { bits: 12.5, ..ok.clone() },
        ] {
            assert!(Geometry::new(&bad, &[SMALL]).is_err(), "{bad:?}");
        }
        assert!(Geometry::new(&ok, &[]).is_err());
        assert!(Geometry::new(&ok, &[LayerShape { n_head: 3, ..SMALL }]).is_err());
        assert!(Geometry::new(&ok, &[LayerShape { d_k: 0, ..SMALL }]).is_err());
        // A window of u32::MAX rows is a context-long window, not an overflow.
        assert_eq!(Geometry::new(&Config { window: u32::MAX, ..ok }, &[SMALL]).unwrap().tiles, 0);
    }
}
