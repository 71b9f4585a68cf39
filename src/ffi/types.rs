//! What both headers share: versions and limits, and the structs of a configuration and of what is reported. Every struct begins with its size and has an
//! `_init` function.

use super::error::{skv_status, Failure, Outcome};
use super::pointer::{init, slice, take, Struct};
use crate::cache::{Geometry, SizeReport, Stats};
use crate::config::{Config, LayerShape};
use crate::rope::{Pairing, RopeParams};
use std::ffi::c_char;

/// Changes whenever a caller compiled against an older header could misbehave.
pub const SKV_ABI_VERSION: u32 = 4;
/// Most query tokens of one attention call.
pub const SKV_MAX_QUERIES: usize = 64;
/// `skv_config.fine_rows`: from the number of cells.
pub const SKV_FINE_ROWS_AUTO: u32 = u32::MAX;
/// `skv_rope.pairing`: keys are stored as they are.
pub const SKV_PAIRING_NONE: i32 = 0;
/// `skv_rope.pairing`: elements 2i and 2i+1 (ggml NORM).
pub const SKV_PAIRING_ADJACENT: i32 = 1;
/// `skv_rope.pairing`: elements i and i + n_dims/2 (ggml NEOX).
pub const SKV_PAIRING_HALVES: i32 = 2;

const _: () = assert!(SKV_MAX_QUERIES == crate::layout::MAX_QUERIES);
const _: () = assert!(SKV_FINE_ROWS_AUTO == crate::config::FINE_ROWS_AUTO);

/// The library's version, e.g. "0.1.0"; static text.
#[no_mangle]
pub extern "C" fn skv_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// Compare with `SKV_ABI_VERSION` of the header before anything else.
#[no_mangle]
pub extern "C" fn skv_abi_version() -> u32 {
    SKV_ABI_VERSION
}

/// What a cache is asked to be. Fill it with `skv_config_init`, then change what differs.
#[allow(non_camel_case_types, reason = "the name is C's")]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct skv_config {
    /// `sizeof(struct skv_config)`; `skv_config_init` sets it.
    pub struct_size: usize,
    /// Cells of one stream: the most rows it can hold. No default.
    pub n_cells: u32,
    /// Streams: independent sets of cells. Default 1.
    pub n_streams: u32,
    /// Sequences that may share a stream; each gets an exact window. Default 1.
    pub n_seqs: u32,
    /// Most tokens of one step of a stream. Default 512.
    pub n_tokens: u32,
    /// Most recent rows of a sequence that stay exact. Default 128.
    pub window: u32,
    /// First rows of a sequence that stay exact. Default 4.
    pub sinks: u32,
    /// f16 bytes / bytes held that is asked for, 1 to 64. Default 8. Ignored when `bits` is positive.
    pub ratio: f32,
    /// Bits per element of a coded row, everything in a tile counted, mean over all tiles, up to 8; or 0 to derive them from `ratio`. Default 0.
    pub bits: f32,
    /// Rows behind the window that are coded most finely; twice as many behind them are coded more finely than the rest. 0 codes
    /// all rows at one rate. Default `SKV_FINE_ROWS_AUTO`: a 64th of the cells, at least two tiles for each sequence.
    pub fine_rows: u32,
    /// 1: bases come from a calibration (`skv_layer_set_calibration`), and rows are coded from the first step on. Default 0: they are
    /// fitted to the first rows.
    pub calibrated: u32,
}

// SAFETY: `repr(C)`, the size first, numbers only.
unsafe impl Struct for skv_config {
    fn defaults() -> Self {
        let d = Config::default();
        skv_config {
            struct_size: 0,
            n_cells: d.n_cells,
            n_streams: d.n_streams,
            n_seqs: d.n_seqs,
            n_tokens: d.n_tokens,
            window: d.window,
            sinks: d.sinks,
            ratio: d.ratio,
            bits: d.bits,
            fine_rows: d.fine_rows,
            calibrated: u32::from(d.calibrated),
        }
    }
}

/// Fill a configuration with the defaults. `struct_size` is `sizeof(struct skv_config)`.
///
/// # Safety
/// `config` is NULL or writable for `struct_size` bytes.
#[no_mangle]
pub unsafe extern "C" fn skv_config_init(config: *mut skv_config, struct_size: usize) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe { init(config, struct_size) }
}

impl skv_config {
    pub(super) fn to_config(self) -> Config {
        Config {
            n_cells: self.n_cells,
            n_streams: self.n_streams,
            n_seqs: self.n_seqs,
            n_tokens: self.n_tokens,
            window: self.window,
            sinks: self.sinks,
            ratio: self.ratio,
            bits: self.bits,
            fine_rows: self.fine_rows,
            calibrated: self.calibrated != 0,
        }
    }
}

/// Heads of one layer.
#[allow(non_camel_case_types, reason = "the name is C's")]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct skv_layer_shape {
    /// `sizeof(struct skv_layer_shape)`; `skv_layer_shape_init` sets it.
    pub struct_size: usize,
    /// Query heads.
    pub n_head: u32,
    /// KV heads; divides `n_head`.
    pub n_head_kv: u32,
    /// Elements of a key head, even, at most 1024.
    pub d_k: u32,
    /// Elements of a value head, even, at most 1024.
    pub d_v: u32,
}

// SAFETY: `repr(C)`, the size first, numbers only.
unsafe impl Struct for skv_layer_shape {
    fn defaults() -> Self {
        skv_layer_shape { struct_size: 0, n_head: 0, n_head_kv: 0, d_k: 0, d_v: 0 }
    }
}

/// Fill a shape with zeros; all of it has to be set. `struct_size` is `sizeof(struct skv_layer_shape)`.
///
/// # Safety
/// `shape` is NULL or writable for `struct_size` bytes.
#[no_mangle]
pub unsafe extern "C" fn skv_layer_shape_init(shape: *mut skv_layer_shape, struct_size: usize) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe { init(shape, struct_size) }
}

impl skv_layer_shape {
    pub(super) fn to_shape(self) -> LayerShape {
        LayerShape { n_head: self.n_head, n_head_kv: self.n_head_kv, d_k: self.d_k, d_v: self.d_v }
    }
}

/// What a configuration holds, against f16. Call `skv_size_report_init` before it is filled.
#[allow(non_camel_case_types, reason = "the name is C's")]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct skv_size_report {
    /// `sizeof(struct skv_size_report)`; `skv_size_report_init` sets it.
    pub struct_size: usize,
    /// Bytes of all arenas: all layers, all streams.
    pub bytes_arenas: u64,
    /// Bytes of the host tables of all streams.
    pub bytes_tables: u64,
    /// Bytes an f16 cache of the same cells holds.
    pub bytes_f16: u64,
    /// `bytes_f16 / (bytes_arenas + bytes_tables)`.
    pub ratio: f64,
    /// Code bits per K or V element; 16 when every row stays exact.
    pub code_bits: f64,
    /// Exact rows at the end of each sequence.
    pub window: u32,
    /// Exact rows at the start of each sequence.
    pub sinks: u32,
    /// Exact slots of a stream.
    pub exact_rows: u32,
    /// Rows of one sequence that trigger the fit of the bases.
    pub fit_rows: u32,
    /// Tiles of a stream.
    pub tiles: u32,
}

// SAFETY: `repr(C)`, the size first, numbers only.
unsafe impl Struct for skv_size_report {
    fn defaults() -> Self {
        skv_size_report {
            struct_size: 0,
            bytes_arenas: 0,
            bytes_tables: 0,
            bytes_f16: 0,
            ratio: 0.0,
            code_bits: 0.0,
            window: 0,
            sinks: 0,
            exact_rows: 0,
            fit_rows: 0,
            tiles: 0,
        }
    }
}

/// Fill a report with zeros. `struct_size` is `sizeof(struct skv_size_report)`.
///
/// # Safety
/// `report` is NULL or writable for `struct_size` bytes.
#[no_mangle]
pub unsafe extern "C" fn skv_size_report_init(report: *mut skv_size_report, struct_size: usize) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe { init(report, struct_size) }
}

impl skv_size_report {
    pub(super) fn new(r: &SizeReport, g: &Geometry) -> Self {
        skv_size_report {
            struct_size: 0,
            bytes_arenas: r.bytes_arenas,
            bytes_tables: r.bytes_tables,
            bytes_f16: r.bytes_f16,
            ratio: r.ratio,
            code_bits: r.code_bits,
            window: g.config.window,
            sinks: g.config.sinks,
            exact_rows: g.exact as u32,
            fit_rows: g.fit_rows as u32,
            tiles: g.tiles as u32,
        }
    }
}

/// Rotation of keys, as a `GGML_OP_ROPE` node describes it.
#[allow(non_camel_case_types, reason = "the name is C's")]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct skv_rope {
    /// `sizeof(struct skv_rope)`; `skv_rope_init` sets it.
    pub struct_size: usize,
    /// One of `SKV_PAIRING_*`.
    pub pairing: i32,
    /// Rotated elements of a head.
    pub n_dims: u32,
    /// First rotated element.
    pub offset: u32,
    /// Training context of the model (YaRN).
    pub n_ctx_orig: u32,
    /// Base of the frequencies, e.g. 10000.
    pub freq_base: f32,
    /// Linear position scale, e.g. 1.
    pub freq_scale: f32,
    /// YaRN extrapolation mix, 0 for none.
    pub ext_factor: f32,
    /// YaRN, e.g. 32.
    pub beta_fast: f32,
    /// YaRN, e.g. 1.
    pub beta_slow: f32,
    /// `n_dims/2` divisors of the frequencies, or NULL. Borrowed for the call.
    pub freq_factors: *const f32,
    /// Number of `freq_factors`.
    pub n_freq_factors: usize,
}

// SAFETY: `repr(C)`, the size first, numbers and a pointer only.
unsafe impl Struct for skv_rope {
    fn defaults() -> Self {
        skv_rope {
            struct_size: 0,
            pairing: SKV_PAIRING_NONE,
            n_dims: 0,
            offset: 0,
            n_ctx_orig: 0,
            freq_base: 10000.0,
            freq_scale: 1.0,
            ext_factor: 0.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            freq_factors: std::ptr::null(),
            n_freq_factors: 0,
        }
    }
}

/// Fill a rotation with that of none: set `pairing` and `n_dims`, and what else differs from 10000 as the base, 1 as the scale and no YaRN. `struct_size` is `sizeof(struct skv_rope)`.
///
/// # Safety
/// `rope` is NULL or writable for `struct_size` bytes.
#[no_mangle]
pub unsafe extern "C" fn skv_rope_init(rope: *mut skv_rope, struct_size: usize) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe { init(rope, struct_size) }
}

impl skv_rope {
    /// The rotation as the library has it.
    ///
    /// # Safety
    /// The frequency factors are there.
    pub(super) unsafe fn to_params(self) -> Outcome<RopeParams> {
        // SAFETY: the caller's contract.
        let freq_factors = unsafe { slice(self.freq_factors, self.n_freq_factors, "rope.freq_factors")? };
        let pairing = match self.pairing {
            SKV_PAIRING_NONE => Pairing::None,
            SKV_PAIRING_ADJACENT => Pairing::Adjacent,
            SKV_PAIRING_HALVES => Pairing::Halves,
            other => return Err(Failure::argument(format!("pairing {other}"))),
        };
        Ok(RopeParams {
            pairing,
            n_dims: self.n_dims as usize,
            offset: self.offset as usize,
            n_ctx_orig: self.n_ctx_orig,
            freq_base: self.freq_base,
            freq_scale: self.freq_scale,
            ext_factor: self.ext_factor,
            beta_fast: self.beta_fast,
            beta_slow: self.beta_slow,
            freq_factors: freq_factors.to_vec(),
        })
    }
}

/// Rows of a layer's output projection, which weigh errors.
#[allow(non_camel_case_types, reason = "the name is C's")]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct skv_projection {
    /// `sizeof(struct skv_projection)`; `skv_projection_init` sets it.
    pub struct_size: usize,
    /// `n_rows` rows of `n_head * d_v` floats.
    pub data: *const f32,
    /// Rows.
    pub n_rows: usize,
}

// SAFETY: `repr(C)`, the size first, a number and a pointer only.
unsafe impl Struct for skv_projection {
    fn defaults() -> Self {
        skv_projection { struct_size: 0, data: std::ptr::null(), n_rows: 0 }
    }
}

/// Fill a projection with no rows. `struct_size` is `sizeof(struct skv_projection)`.
///
/// # Safety
/// `projection` is NULL or writable for `struct_size` bytes.
#[no_mangle]
pub unsafe extern "C" fn skv_projection_init(projection: *mut skv_projection, struct_size: usize) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe { init(projection, struct_size) }
}

impl skv_projection {
    /// The rows of an optional projection of so many elements a row; none where it is NULL.
    ///
    /// # Safety
    /// `p` is NULL or valid, and its rows are there.
    pub(super) unsafe fn rows<'a>(p: *const Self, row: usize) -> Outcome<&'a [f32]> {
        if p.is_null() {
            return Ok(&[]);
        }
        // SAFETY: the caller's contract.
        let p = unsafe { take(p, "projection")? };
        let n = p.n_rows.checked_mul(row).ok_or_else(|| Failure::argument("projection.n_rows is more than memory holds"))?;
        // SAFETY: the caller's contract.
        unsafe { slice(p.data, n, "projection.data") }
    }
}

/// What a layer or a cache has done since it was created. Call `skv_stats_init` before it is filled.
#[allow(non_camel_case_types, reason = "the name is C's")]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct skv_stats {
    /// `sizeof(struct skv_stats)`; `skv_stats_init` sets it.
    pub struct_size: usize,
    /// Rows stored by steps of more than 64 tokens.
    pub appended_prefill: u64,
    /// Rows stored by steps of up to 64 tokens.
    pub appended_decode: u64,
    /// Rows coded by steps of more than 64 tokens.
    pub sealed_prefill: u64,
    /// Rows coded by steps of up to 64 tokens.
    pub sealed_decode: u64,
    /// Visible exact rows, summed over the query tokens of steps of up to 64 that attended to them.
    pub attended_exact: u64,
    /// Visible coded rows, summed over the query tokens of steps of up to 64 that attended to them.
    pub attended_coded: u64,
    /// Coded rows rebuilt: each once for a step of more than 64 tokens, or on request.
    pub reconstructed: u64,
    /// Times the bases were fitted.
    pub fits: u64,
    /// Coded rows moved by compaction.
    pub moved: u64,
    /// Rows coded again in a coarser band.
    pub recoded: u64,
    /// Nanoseconds of the first thread in storing.
    pub ns_encode: u64,
    /// Nanoseconds of the first thread in attention.
    pub ns_attend: u64,
    /// Nanoseconds of the first thread in rebuilding.
    pub ns_reconstruct: u64,
}

// SAFETY: `repr(C)`, the size first, numbers only.
unsafe impl Struct for skv_stats {
    fn defaults() -> Self {
        skv_stats::new(&Stats::default())
    }
}

/// Fill counters with zeros. `struct_size` is `sizeof(struct skv_stats)`.
///
/// # Safety
/// `stats` is NULL or writable for `struct_size` bytes.
#[no_mangle]
pub unsafe extern "C" fn skv_stats_init(stats: *mut skv_stats, struct_size: usize) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe { init(stats, struct_size) }
}

impl skv_stats {
    pub(super) fn new(s: &Stats) -> Self {
        skv_stats {
            struct_size: 0,
            appended_prefill: s.appended_prefill,
            appended_decode: s.appended_decode,
            sealed_prefill: s.sealed_prefill,
            sealed_decode: s.sealed_decode,
            attended_exact: s.attended_exact,
            attended_coded: s.attended_coded,
            reconstructed: s.reconstructed,
            fits: s.fits,
            moved: s.moved,
            recoded: s.recoded,
            ns_encode: s.ns_encode,
            ns_attend: s.ns_attend,
            ns_reconstruct: s.ns_reconstruct,
        }
    }
}
