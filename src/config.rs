//! Configuration, and the geometry that follows from it: how many rows, tiles and bytes everything has.
//!
//! Sizes are decided once, here, from the configuration alone; nothing grows later. Must not know what is stored.
//!
//! Layout of an arena (one layer, one stream; all offsets are multiples of 64 bytes):
//!
//! ```text
//! header                      HEADER_BYTES
//! per KV head: record + exact rows      f16 K then V of one head, `exact` slots
//! body                        before the fit: per KV head, further exact slots, then recent queries
//!                             after the fit:  per KV head the K and V basis, then per KV head its tiles, band by band
//! ```
//!
//! Rates fall with age. Attention energy does, so rows just behind the window get more bits than old ones: tiles are divided
//! into bands, each with a rate of its own, and a tile that outgrows its band is coded again in the next. Mean KL divergence on the
//! small model at 1.65 bits, 32768 cells, texts of 2048 / 4096 tokens: one rate 0.0012 / 0.0016; 1024 rows at 4 bits 0.00014 /
//! 0.00041; 512 rows at 5 and 1024 at 3 bits 0.00008 / 0.00030 (simulated; the mean rate is the same in all).

use crate::error::{Error, Result};
use std::ops::Range;

/// Rows of a tile.
pub const TILE: usize = 64;
/// Positions that share an anchor: tiles of one such stretch lie in one frame, and attention projects its queries once for all of them. Measured on the small
/// models, KL divergence against a frame for each tile: 128 positions 1.04 to 1.08 times, 256 1.08 to 1.12, 512 1.13 to 1.22; 10 %
/// are what 0.06 bits per element are worth. With 64, projecting would cost as much time as all the rest of decoding.
pub const ANCHOR_GRID: i32 = 256;
/// Bytes of the arena header.
pub const HEADER_BYTES: usize = 256;
/// Bytes of the per-head record in front of its exact rows.
pub const HEAD_RECORD_BYTES: usize = 64;
/// Recent query tokens kept for the fit.
pub const QUERY_SLOTS: usize = 256;
/// Bytes of the widths in front of a stored basis.
pub const BASIS_HEADER_BYTES: usize = 48;
/// Rows a basis is fitted on. 1024 rows measured better than 512, and with 256 no query looks behind the window yet.
pub const FIT_ROWS: usize = 1024;
/// Rows that come in while a fit is spread over decode steps, if there are slots for them.
pub const FIT_LEAD: usize = 96;
/// Heads whose rows are coded in the time it takes to look at one.
pub const FIT_LOOK: usize = 10;
/// The fewest rows a basis is fitted on, in small contexts.
pub const FIT_ROWS_MIN: usize = 512;
/// Gain bytes of one head in one tile: a byte per row for K and for V.
pub const GAIN_BYTES: usize = 2 * TILE;
/// Most query tokens of one decode attention call.
pub const MAX_QUERIES: usize = 64;
/// Pieces into which one attention call is cut at least, whatever the number of threads; see [`LayerGeometry::chunks`].
pub const UNITS: usize = 32;

/// Bands of tiles, finest rate first.
pub const BANDS: usize = 3;
/// [`Config::fine_rows`] from the number of cells.
pub const FINE_ROWS_AUTO: u32 = u32::MAX;
/// Code bits per element of each band over those of the last.
const BAND_BITS: [f64; BANDS] = [3.5, 1.5, 0.0];
/// The most that a band's rate may be, in rates of the last.
const BAND_FACTOR: f64 = 6.0;
/// Cells for one row of the finest band, by default.
const FINE_SHARE: usize = 64;

/// The least that overheads may leave of the rate a ratio stands for: in short contexts quality comes first.
const LEAST_RATE: f64 = 0.7;

const MAX_CELLS: u32 = 1 << 25;
const MAX_BITS: f64 = 8.0;

/// What a user asks for; one cache of some layers.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Cells of one stream: the most rows it can hold.
    pub n_cells: u32,
    /// Streams: independent sets of cells.
    pub n_streams: u32,
    /// Sequences that may share a stream; each gets its own exact window.
    pub n_seqs: u32,
    /// Most recent rows of a sequence that stay exact.
    pub window: u32,
    /// First rows of a sequence that stay exact.
    pub sinks: u32,
    /// f16 bytes / bytes held that is asked for. Ignored when `bits` is positive.
    pub ratio: f32,
    /// Code bits per element, mean over all tiles, or 0 to derive them from `ratio`.
    pub bits: f32,
    /// Rows behind the window in the finest band; the next holds twice as many. 0 gives all rows one rate,
    /// [`FINE_ROWS_AUTO`] a 64th of the cells, at least two tiles for each sequence.
    pub fine_rows: u32,
    /// Bases come from a calibration ([`crate::codec::calibration`]): rows are coded from the first step on.
    pub calibrated: bool,
}

impl Default for Config {
    fn default() -> Self {
        Config { n_cells: 0, n_streams: 1, n_seqs: 1, window: 128, sinks: 4, ratio: 8.0, bits: 0.0, fine_rows: FINE_ROWS_AUTO, calibrated: false }
    }
}

/// Heads of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerShape {
    /// Query heads.
    pub n_head: u32,
    /// KV heads; divides `n_head`.
    pub n_head_kv: u32,
    /// Elements of a key head.
    pub d_k: u32,
    /// Elements of a value head.
    pub d_v: u32,
}

impl LayerShape {
    /// Heads that a layer can have.
    pub fn is_possible(&self) -> bool {
        let dims_ok = |d: u32| d > 0 && d <= 1024 && d.is_multiple_of(2);
        self.n_head_kv > 0
            && self.n_head > 0
            && self.n_head <= 4096
            && self.n_head.is_multiple_of(self.n_head_kv)
            && dims_ok(self.d_k)
            && dims_ok(self.d_v)
    }
}

/// Sizes of one layer's arena.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerGeometry {
    /// Query heads.
    pub n_head: usize,
    /// KV heads.
    pub n_head_kv: usize,
    /// Elements of a key head.
    pub d_k: usize,
    /// Elements of a value head.
    pub d_v: usize,
    /// Code bytes of one tile of each band, all heads, K and V.
    pub code_bytes: [usize; BANDS],
    /// Bytes of one KV head's record and exact rows.
    pub exact_bytes: usize,
    /// Bytes of the body, 0 when everything is exact.
    pub body_bytes: usize,
    /// Bytes of one arena.
    pub arena_bytes: usize,
}

/// Sizes of a cache. Slots, tiles and rows are counted alike in all its layers.
#[derive(Debug, Clone, PartialEq)]
pub struct Geometry {
    /// The configuration this follows from.
    pub config: Config,
    /// Exact slots that exist at all times.
    pub exact: usize,
    /// Exact slots that exist before the fit (including the former).
    pub raw: usize,
    /// Rows of one sequence that trigger the fit; 1 when there is nothing to fit.
    pub fit_rows: usize,
    /// Tiles; 0 when every row stays exact.
    pub tiles: usize,
    /// Tiles of each band; tiles are numbered band by band.
    pub band_tiles: [usize; BANDS],
    /// The layers.
    pub layers: Vec<LayerGeometry>,
}

/// What a geometry holds, against f16.
#[derive(Debug, Clone, PartialEq)]
pub struct SizeReport {
    /// Bytes of all arenas of all streams.
    pub bytes_arenas: u64,
    /// Bytes of the host tables of all streams.
    pub bytes_tables: u64,
    /// Bytes an f16 cache of these cells holds.
    pub bytes_f16: u64,
    /// `bytes_f16 / (bytes_arenas + bytes_tables)`.
    pub ratio: f64,
    /// Code bits per K or V element, mean over layers by size; 16 when everything is exact.
    pub code_bits: f64,
}

/// Host bytes of the table of one stream ([`crate::cache::Table`]).
pub fn table_bytes(n_cells: usize, tiles: usize, raw: usize) -> usize {
    // Location of a cell; cell and turn of a coded row; live rows and age of a tile; cell and position of a slot; query places.
    n_cells * 4 + tiles * (TILE * 8 + 16) + raw * 8 + QUERY_SLOTS * 8
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

/// Code bits of each band, whose mean over all tiles is `mean`.
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

fn align(n: usize, to: usize) -> usize {
    n.div_ceil(to) * to
}

impl LayerGeometry {
    /// A layer of these heads, with nothing in it.
    pub fn heads(s: &LayerShape) -> Self {
        LayerGeometry {
            n_head: s.n_head as usize,
            n_head_kv: s.n_head_kv as usize,
            d_k: s.d_k as usize,
            d_v: s.d_v as usize,
            code_bytes: [0; BANDS],
            exact_bytes: 0,
            body_bytes: 0,
            arena_bytes: 0,
        }
    }
    /// Query heads per KV head.
    pub fn group(&self) -> usize {
        self.n_head / self.n_head_kv
    }
    /// Elements of one row of one KV head, K and V.
    pub fn head_elements(&self) -> usize {
        self.d_k + self.d_v
    }
    /// Chunks into which the rows of one KV head are split in one attention call.
    pub fn chunks(&self) -> usize {
        UNITS.div_ceil(self.n_head_kv).max(2)
    }
    /// f16 bytes of one row of one KV head, K and V.
    pub fn row_bytes(&self) -> usize {
        2 * self.head_elements()
    }
    /// f16 bytes of one row of all KV heads.
    pub fn f16_row_bytes(&self) -> usize {
        self.n_head_kv * self.row_bytes()
    }
    /// Bytes of the stored basis of heads of `d` elements.
    pub fn basis_bytes_of(d: usize) -> usize {
        align(BASIS_HEADER_BYTES + 16 * d + 4 * d * d, 64)
    }
    /// Bytes of one KV head's two bases.
    pub fn basis_bytes(&self) -> usize {
        Self::basis_bytes_of(self.d_k) + Self::basis_bytes_of(self.d_v)
    }
    /// Bytes of the recent queries of one KV head's group.
    pub fn query_bytes(&self) -> usize {
        align(QUERY_SLOTS * self.group() * self.d_k * 2, 64)
    }
    /// Bytes of the body that belong to one KV head before the fit.
    pub fn raw_head_bytes(&self) -> usize {
        self.body_bytes / self.n_head_kv / 64 * 64
    }
    /// Offset of a KV head's record and exact rows.
    pub fn exact_offset(&self, head: usize) -> usize {
        HEADER_BYTES + head * self.exact_bytes
    }
    /// Offset of the body.
    pub fn body_offset(&self) -> usize {
        HEADER_BYTES + self.n_head_kv * self.exact_bytes
    }
    /// Bits of one row that the coefficients of a band may have, all heads, K and V.
    pub fn row_bits(&self, band: usize) -> usize {
        self.code_bytes[band] * 8 / TILE
    }
    /// Code bits per element, mean over `band_tiles`.
    pub fn code_bits(&self, band_tiles: &[usize; BANDS]) -> f64 {
        let bytes: usize = self.code_bytes.iter().zip(band_tiles).map(|(b, n)| b * n).sum();
        bytes as f64 * 8.0 / (band_tiles.iter().sum::<usize>() * TILE * self.n_head_kv * self.head_elements()) as f64
    }
}

impl Geometry {
    /// Check a configuration and compute every size.
    pub fn new(config: &Config, shapes: &[LayerShape]) -> Result<Self> {
        let fail = |m: String| Err(Error::Config(m));
        let c = config;
        if c.n_cells == 0 || c.n_cells > MAX_CELLS {
            return fail(format!("{} cells; 1 to {MAX_CELLS} are possible", c.n_cells));
        }
        if c.n_streams == 0 || c.n_streams > 1024 || c.n_seqs == 0 || c.n_seqs > 1024 {
            return fail(format!("{} streams and {} sequences; 1 to 1024 are possible", c.n_streams, c.n_seqs));
        }
        if c.sinks > 1024 {
            return fail(format!("{} sinks; at most 1024 are possible", c.sinks));
        }
        if !(c.bits.is_finite() && (0.0..=MAX_BITS as f32).contains(&c.bits)) {
            return fail(format!("{} code bits per element; 0 (from the ratio) to 8 are possible", c.bits));
        }
        if c.bits == 0.0 && !(c.ratio.is_finite() && (1.0..=64.0).contains(&c.ratio)) {
            return fail(format!("a ratio of {}; 1 to 64 are possible", c.ratio));
        }
        if shapes.is_empty() || shapes.len() > 4096 {
            return fail(format!("{} layers; 1 to 4096 are possible", shapes.len()));
        }
        for (i, s) in shapes.iter().enumerate() {
            if !s.is_possible() {
                return fail(format!("layer {i}: {} query heads, {} KV heads, head sizes {} and {}", s.n_head, s.n_head_kv, s.d_k, s.d_v));
            }
        }
        let cells = c.n_cells as usize;
        // With bases at hand no row has to wait.
        let fit_rows = if c.calibrated { 1 } else { (cells / 2).clamp(FIT_ROWS_MIN, FIT_ROWS) };
        let wanted = c.n_seqs as usize * (c.window as usize + c.sinks as usize + TILE);
        let all_exact = cells <= wanted.max(fit_rows);
        let exact = if all_exact { cells } else { wanted };
        // Sinks are not counted on: a sequence whose first positions were removed has none.
        let band_tiles = if all_exact { [0; BANDS] } else { bands(c, cells - c.window as usize) };
        let tiles = band_tiles.iter().sum();
        let f16_row: usize = shapes.iter().map(|s| (s.n_head_kv * (s.d_k + s.d_v) * 2) as usize).sum();
        let most_raw = if c.calibrated { exact } else { cells.min(exact + FIT_ROWS) };
        let tables = table_bytes(cells, tiles, most_raw) as f64;
        let raw_least = fit_rows.max(exact);

        let mut layers = Vec::with_capacity(shapes.len());
        for s in shapes {
            let mut l = LayerGeometry::heads(s);
            l.exact_bytes = align(HEAD_RECORD_BYTES + exact * l.row_bytes(), 64);
            if tiles > 0 {
                let elements = (l.n_head_kv * l.head_elements()) as f64;
                let bytes_at = |bits: f64| (elements * TILE as f64 / 8.0 * bits) as usize / 16 * 16;
                let coded_fixed = l.n_head_kv * (l.basis_bytes() + tiles * GAIN_BYTES);
                let mean_bits = if c.bits > 0.0 {
                    f64::from(c.bits)
                } else {
                    let share = l.f16_row_bytes() as f64 / f16_row as f64;
                    let target = (cells * l.f16_row_bytes()) as f64 / f64::from(c.ratio) - tables * share;
                    let left = target - (HEADER_BYTES + l.n_head_kv * l.exact_bytes + coded_fixed + 255) as f64;
                    let least = LEAST_RATE * 16.0 / f64::from(c.ratio);
                    (left / tiles as f64 * 8.0 / (TILE as f64 * elements)).clamp(least.min(MAX_BITS), MAX_BITS)
                };
                l.code_bytes = rates(mean_bits, &band_tiles).map(bytes_at);
                let codes: usize = l.code_bytes.iter().zip(band_tiles).map(|(bytes, n)| bytes * n).sum();
                let coded = coded_fixed + codes;
                let before_fit = if c.calibrated { 0 } else { align((raw_least - exact) * l.row_bytes() + l.query_bytes(), 64) };
                l.body_bytes = align(coded.max(l.n_head_kv * before_fit), 64);
            }
            l.arena_bytes = (HEADER_BYTES + l.n_head_kv * l.exact_bytes + l.body_bytes).next_multiple_of(256);
            layers.push(l);
        }
        let raw = if tiles == 0 || c.calibrated {
            exact
        } else {
            let spare = layers.iter().map(|l| (l.raw_head_bytes() - l.query_bytes()) / l.row_bytes()).min();
            // More than a few windows of rows waiting for a fit would only slow the steps before it.
            (exact + spare.unwrap_or(0)).min(most_raw)
        };
        Ok(Geometry { config: c.clone(), exact, raw, fit_rows, tiles, band_tiles, layers })
    }

    /// KV heads of all layers, which are counted one layer after another.
    pub fn n_heads(&self) -> usize {
        self.layers.iter().map(|l| l.n_head_kv).sum()
    }

    /// Whether queries are kept for a fit.
    pub fn keeps_queries(&self) -> bool {
        self.tiles > 0 && !self.config.calibrated
    }

    /// Rows behind the window at which each band ends.
    pub fn band_ends(&self) -> [i64; BANDS] {
        std::array::from_fn(|b| if b + 1 < BANDS { (self.band(b).end * TILE) as i64 } else { i64::MAX })
    }

    /// Tiles of a band.
    pub fn band(&self, band: usize) -> Range<usize> {
        let first = self.band_tiles[..band].iter().sum();
        first..first + self.band_tiles[band]
    }

    /// Band of a tile.
    pub fn band_of(&self, tile: usize) -> usize {
        (0..BANDS - 1).find(|b| tile < self.band(*b).end).unwrap_or(BANDS - 1)
    }

    /// Bytes held, against f16.
    pub fn report(&self) -> SizeReport {
        let streams = u64::from(self.config.n_streams);
        let all =
            |bytes: fn(&LayerGeometry) -> usize| self.layers.iter().fold(0u64, |sum, l| sum.saturating_add(bytes(l) as u64)).saturating_mul(streams);
        let arenas = all(|l| l.arena_bytes);
        let tables = streams * table_bytes(self.config.n_cells as usize, self.tiles, self.raw) as u64;
        let f16 = all(LayerGeometry::f16_row_bytes).saturating_mul(u64::from(self.config.n_cells));
        let weight: f64 = self.layers.iter().map(|l| l.f16_row_bytes() as f64).sum();
        let bits = self.layers.iter().map(|l| l.code_bits(&self.band_tiles) * l.f16_row_bytes() as f64).sum::<f64>() / weight;
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

    #[test]
    fn an_eighth_of_f16_is_reached_at_32k_by_default() {
        for (shape, layers) in [(SMALL, 3), (LARGE, 32)] {
            let g = Geometry::new(&Config { n_cells: 32768, ..Config::default() }, &vec![shape; layers]).unwrap();
            let r = g.report();
            assert!(r.ratio >= 8.0, "{r:?}");
            assert!(r.ratio < 8.05, "the budget is used up: {r:?}");
            assert!(r.code_bits >= 1.5, "{r:?}");
        }
    }

    #[test]
    fn code_bits_never_fall_far_under_the_nominal_rate() {
        for cells in [2048, 4096, 8192, 16384] {
            let g = Geometry::new(&Config { n_cells: cells, ..Config::default() }, &[SMALL; 3]).unwrap();
            assert!(g.report().code_bits >= 1.39, "{cells}: {:?}", g.report());
            assert!(g.raw >= g.fit_rows);
        }
    }

    #[test]
    fn a_window_as_long_as_the_context_stores_everything_exactly() {
        let g = Geometry::new(&Config { n_cells: 2048, window: 2048, ..Config::default() }, &[SMALL]).unwrap();
        assert_eq!((g.tiles, g.exact, g.raw), (0, 2048, 2048));
    }

    #[test]
    fn absurd_configurations_are_refused() {
        let ok = Config { n_cells: 4096, ..Config::default() };
        for bad in [
            Config { n_cells: 0, ..ok.clone() },
            Config { n_cells: u32::MAX, ..ok.clone() },
            Config { n_streams: 0, ..ok.clone() },
            Config { ratio: f32::NAN, ..ok.clone() },
            Config { ratio: 0.5, ..ok.clone() },
            Config { bits: -1.0, ..ok.clone() },
            Config { bits: 9.0, ..ok.clone() },
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
