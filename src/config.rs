//! What a user asks for, the checks of it and its defaults: a cache's [`Config`], the heads of a layer and how its products
//! become scores.
//!
//! The ground floor: every other module may look here. Must not know what follows from it, sizes and formats included ([`crate::layout`]).

use crate::error::{argument, Error, Result};

/// [`Config::fine_rows`] from the number of cells.
pub const FINE_ROWS_AUTO: u32 = u32::MAX;
/// Most bits per element of a coded row, everything counted: codes have 8 at most.
pub const MAX_BITS: f64 = 12.0;

const MAX_CELLS: u32 = 1 << 25;

/// What a user asks for; one cache of some layers.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Cells of one stream: the most rows it can hold.
    pub n_cells: u32,
    /// Streams: independent sets of cells.
    pub n_streams: u32,
    /// Sequences that may share a stream; each gets its own exact window.
    pub n_seqs: u32,
    /// Most tokens of one step of a stream.
    pub n_tokens: u32,
    /// Most recent rows of a sequence that stay exact.
    pub window: u32,
    /// First rows of a sequence that stay exact.
    pub sinks: u32,
    /// f16 bytes / bytes held that is asked for. Ignored when `bits` is positive.
    pub ratio: f32,
    /// Bits per element of a coded row, everything in a tile counted, mean over all tiles; or 0 to derive them from `ratio`.
    pub bits: f32,
    /// Rows behind the window in the finest band; the next holds twice as many. 0 gives all rows one rate,
    /// [`FINE_ROWS_AUTO`] a 64th of the cells, at least two tiles for each sequence.
    pub fine_rows: u32,
    /// Bases come from a calibration ([`crate::codec::calibration`]): rows are coded from the first step on.
    pub calibrated: bool,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            n_cells: 0,
            n_streams: 1,
            n_seqs: 1,
            n_tokens: 512,
            window: 128,
            sinks: 4,
            ratio: 8.0,
            bits: 0.0,
            fine_rows: FINE_ROWS_AUTO,
            calibrated: false,
        }
    }
}

impl Config {
    /// Refuse what no cache can be.
    pub fn check(&self) -> Result<()> {
        let fail = |m: String| Err(Error::Config(m));
        let c = self;
        if c.n_cells == 0 || c.n_cells > MAX_CELLS {
            return fail(format!("{} cells; 1 to {MAX_CELLS} are possible", c.n_cells));
        }
        if c.n_streams == 0 || c.n_streams > 1024 || c.n_seqs == 0 || c.n_seqs > 1024 {
            return fail(format!("{} streams and {} sequences; 1 to 1024 are possible", c.n_streams, c.n_seqs));
        }
        if c.n_tokens == 0 {
            return fail("steps of no tokens".into());
        }
        if c.sinks > 1024 {
            return fail(format!("{} sinks; at most 1024 are possible", c.sinks));
        }
        if !(c.bits.is_finite() && (0.0..=MAX_BITS as f32).contains(&c.bits)) {
            return fail(format!("{} bits per element; 0 (from the ratio) to {MAX_BITS} are possible", c.bits));
        }
        if c.bits == 0.0 && !(c.ratio.is_finite() && (1.0..=64.0).contains(&c.ratio)) {
            return fail(format!("a ratio of {}; 1 to 64 are possible", c.ratio));
        }
        Ok(())
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

/// How a raw product becomes a score.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scoring {
    /// Factor on `q . k`.
    pub scale: f32,
    /// `cap * tanh(score / cap)`, 0 for none.
    pub softcap: f32,
}

impl Scoring {
    /// Refuse what gives no scores.
    pub fn check(&self) -> Result<()> {
        if self.scale.is_finite() && self.softcap.is_finite() && self.softcap >= 0.0 {
            return Ok(());
        }
        argument(format!("score scale {} and soft cap {}", self.scale, self.softcap))
    }
    /// Bend scores that are scaled already.
    pub(crate) fn cap(&self, scores: &mut [f32]) {
        if self.softcap > 0.0 {
            scores.iter_mut().for_each(|s| *s = self.softcap * (*s / self.softcap).tanh());
        }
    }
}
