//! Plain C types: status, configuration and report structs, and functions on none of them.

use crate::cache::{Geometry, SizeReport, Stats};
use crate::config::{Config, LayerShape};
use crate::rope::{Pairing, RopeParams};
use std::ffi::{c_char, CStr};

/// Result of every call that can fail; the only thing such a call returns.
#[allow(non_camel_case_types, reason = "the name is C's")]
#[repr(i32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum skv_status {
    /// Done.
    SKV_STATUS_OK = 0,
    /// A required pointer is NULL.
    SKV_STATUS_NULL = 100,
    /// An argument is out of range or contradicts another.
    SKV_STATUS_ARGUMENT = 101,
    /// The configuration cannot be built.
    SKV_STATUS_CONFIG = 102,
    /// A buffer is too small.
    SKV_STATUS_BUFFER = 103,
    /// There is no room for more rows.
    SKV_STATUS_FULL = 104,
    /// The call does not fit the state of the object.
    SKV_STATUS_STATE = 105,
    /// An arena, plan or saved state is damaged, truncated or of another version.
    SKV_STATUS_DATA = 201,
    /// A key, value or query is NaN or infinite, or beyond the range of f16.
    SKV_STATUS_NOT_FINITE = 301,
    /// A matrix decomposition did not converge.
    SKV_STATUS_NUMERIC = 302,
    /// The library failed internally; the object should be freed.
    SKV_STATUS_PANIC = 900,
}

use skv_status::*;

impl skv_status {
    pub(crate) fn from_code(code: i32) -> Self {
        let all = [
            SKV_STATUS_ARGUMENT,
            SKV_STATUS_CONFIG,
            SKV_STATUS_BUFFER,
            SKV_STATUS_FULL,
            SKV_STATUS_STATE,
            SKV_STATUS_DATA,
            SKV_STATUS_NOT_FINITE,
            SKV_STATUS_NUMERIC,
        ];
        all.into_iter().find(|s| *s as i32 == code).unwrap_or(SKV_STATUS_PANIC)
    }
}

/// Changes whenever a caller compiled against an older header could misbehave.
pub const SKV_ABI_VERSION: u32 = 3;
/// Most query tokens of one attention call.
pub const SKV_MAX_QUERIES: usize = 64;
/// Rows of a tile.
pub const SKV_TILE_ROWS: usize = 64;
/// `skv_config.fine_rows`: from the number of cells.
pub const SKV_FINE_ROWS_AUTO: u32 = u32::MAX;
/// `skv_rope.pairing`: keys are stored as they are.
pub const SKV_PAIRING_NONE: i32 = 0;
/// `skv_rope.pairing`: elements 2i and 2i+1 (ggml NORM).
pub const SKV_PAIRING_ADJACENT: i32 = 1;
/// `skv_rope.pairing`: elements i and i + n_dims/2 (ggml NEOX).
pub const SKV_PAIRING_HALVES: i32 = 2;

const _: () = assert!(SKV_MAX_QUERIES == crate::layout::MAX_QUERIES && SKV_TILE_ROWS == crate::layout::TILE);
const _: () = assert!(SKV_FINE_ROWS_AUTO == crate::config::FINE_ROWS_AUTO);

/// A short name for a status; static text, never NULL. Any integer may be passed.
#[no_mangle]
pub extern "C" fn skv_status_str(status: i32) -> *const c_char {
    let text: &CStr = match status {
        0 => c"ok",
        100 => c"a required pointer is NULL",
        101 => c"invalid argument",
        102 => c"invalid configuration",
        103 => c"buffer too small",
        104 => c"the cache is full",
        105 => c"wrong state for this call",
        201 => c"damaged, truncated or foreign data",
        301 => c"a value is NaN or infinite",
        302 => c"numeric failure",
        900 => c"internal error",
        _ => c"unknown status",
    };
    text.as_ptr()
}

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
    /// Set to `sizeof(skv_config)`.
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

impl skv_config {
    pub(crate) fn defaults() -> Self {
        let d = Config::default();
        skv_config {
            struct_size: size_of::<skv_config>(),
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
    pub(crate) fn to_config(self) -> Config {
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
    /// Set to `sizeof(skv_layer_shape)`.
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

impl skv_layer_shape {
    pub(crate) fn zero() -> Self {
        skv_layer_shape { struct_size: 0, n_head: 0, n_head_kv: 0, d_k: 0, d_v: 0 }
    }
    pub(crate) fn to_shape(self) -> LayerShape {
        LayerShape { n_head: self.n_head, n_head_kv: self.n_head_kv, d_k: self.d_k, d_v: self.d_v }
    }
}

/// What a configuration holds, against f16. Set `struct_size` before the call.
#[allow(non_camel_case_types, reason = "the name is C's")]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct skv_size_report {
    /// Set to `sizeof(skv_size_report)`.
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

impl skv_size_report {
    pub(crate) fn new(r: &SizeReport, g: &Geometry) -> Self {
        skv_size_report {
            struct_size: size_of::<Self>(),
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
    /// Set to `sizeof(skv_rope)`.
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

impl skv_rope {
    pub(crate) fn defaults() -> Self {
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
    pub(crate) fn to_params(self, freq_factors: &[f32]) -> crate::error::Result<RopeParams> {
        let pairing = match self.pairing {
            SKV_PAIRING_NONE => Pairing::None,
            SKV_PAIRING_ADJACENT => Pairing::Adjacent,
            SKV_PAIRING_HALVES => Pairing::Halves,
            other => return crate::error::argument(format!("pairing {other}")),
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

/// Rows of queries, keys or values, f32; the elements of a head are contiguous.
#[allow(non_camel_case_types, reason = "the name is C's")]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct skv_rows {
    /// First element, or NULL without rows.
    pub data: *const f32,
    /// Rows.
    pub n_rows: usize,
    /// Bytes from a row to the next.
    pub row_stride: usize,
    /// Bytes from a head to the next.
    pub head_stride: usize,
}

/// Rows of a layer's output projection, which weigh errors.
#[allow(non_camel_case_types, reason = "the name is C's")]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct skv_projection {
    /// `n_rows` rows of `n_head * d_v` floats.
    pub data: *const f32,
    /// Rows.
    pub n_rows: usize,
}

/// What a step brings to the layer that stores it. Rows of all its tokens, in the plan's order.
#[allow(non_camel_case_types, reason = "the name is C's")]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct skv_step {
    /// Set to `sizeof(skv_step)`.
    pub struct_size: usize,
    /// Queries, roped, `n_head` heads of `d_k`.
    pub q: *const skv_rows,
    /// Keys, roped, `n_head_kv` heads of `d_k`.
    pub k: *const skv_rows,
    /// Values, `n_head_kv` heads of `d_v`.
    pub v: *const skv_rows,
    /// The residual stream that the attention's output is added to, one head of `n_residual` floats: errors count in proportion to it. NULL when
    /// it is not known: then all layers count alike.
    pub residual: *const skv_rows,
    /// Floats of a row of `residual`.
    pub n_residual: usize,
    /// May be NULL: then heads count by their own outputs.
    pub projection: *const skv_projection,
}

impl skv_step {
    pub(crate) fn defaults() -> Self {
        let none = std::ptr::null();
        skv_step { struct_size: 0, q: none, k: none, v: none, residual: none, n_residual: 0, projection: std::ptr::null() }
    }
}

/// Parameters of an attention call; semantics of `ggml_flash_attn_ext`.
#[allow(non_camel_case_types, reason = "the name is C's")]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct skv_attend_params {
    /// Set to `sizeof(skv_attend_params)`.
    pub struct_size: usize,
    /// Factor on `q . k`, e.g. `1/sqrt(d_k)`.
    pub scale: f32,
    /// `cap * tanh(score / cap)`, 0 for none.
    pub softcap: f32,
    /// f16, a row of `n_kv` per query token: 0 shows a cell, -inf hides it, other values are added. NULL shows all rows.
    pub mask: *const u16,
    /// Bytes from a mask row to the next.
    pub mask_row_stride: usize,
    /// Cells the mask covers; cells behind them are hidden.
    pub n_kv: usize,
    /// One attention-sink logit per query head, or NULL.
    pub sinks: *const f32,
}

impl skv_attend_params {
    pub(crate) fn defaults() -> Self {
        skv_attend_params { struct_size: 0, scale: 0.0, softcap: 0.0, mask: std::ptr::null(), mask_row_stride: 0, n_kv: 0, sinks: std::ptr::null() }
    }
}

/// What a layer has done since it was created. Set `struct_size` before the call.
#[allow(non_camel_case_types, reason = "the name is C's")]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct skv_stats {
    /// Set to `sizeof(skv_stats)`.
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

impl skv_stats {
    pub(crate) fn new(s: &Stats) -> Self {
        skv_stats {
            struct_size: size_of::<Self>(),
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

/// Fill a configuration with the defaults.
///
/// # Safety
/// `config` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn skv_config_init(config: *mut skv_config) -> skv_status {
    super::guard(super::silent, || {
        // SAFETY: the caller's contract.
        *unsafe { super::borrow_mut(config, "config") }? = skv_config::defaults();
        Ok(())
    })
}
