//! `skv_cache`: a cache of one layer and one sequence that owns its memory.

use super::error::{skv_status, Failure, Outcome};
use super::object::{change, create, free, handle, read, Handle, Object};
use super::pointer::{borrow_mut, give, slice, slice_mut, take};
use super::step::check_queries;
use super::types::{skv_config, skv_layer_shape, skv_projection, skv_rope, skv_size_report, skv_stats};
use crate::cache::{Cache, Mask, Rows};
use crate::config::Scoring;
use crate::error::Error;
use half::f16;

/// A cache of one layer and one sequence, for callers that have no arenas to lend. Its rows are numbered in the order of appending.
#[allow(non_camel_case_types, reason = "the name is C's")]
pub struct skv_cache(Object<Cache>);

handle!(skv_cache, Cache, "cache");

/// Contiguous rows `[n][heads][d]`.
///
/// # Safety
/// `p` is NULL or readable for that many floats.
unsafe fn dense<'a>(p: *const f32, n: usize, heads: usize, d: usize, name: &'static str) -> Outcome<Rows<'a>> {
    let len = n.checked_mul(heads * d).ok_or_else(|| Failure::argument(format!("{n} rows of {name}")))?;
    // SAFETY: the caller's contract.
    Ok(Rows::new(unsafe { slice(p, len, name)? }, n, heads * d, d, heads, d)?)
}

/// Create a cache of `shape`. `config.n_streams` and `config.n_seqs` must be 1, `config.calibrated` 0. `scale` (e.g. `1/sqrt(d_k)`) and `softcap` (0 for
/// none) are those of the scores. `projection` (may be NULL) holds rows of the layer's output projection; it is copied. `*out` is owned by the caller;
/// free it with `skv_cache_free`.
///
/// # Safety
/// Pointers are valid for what they describe or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_cache_create(
    config: *const skv_config,
    shape: *const skv_layer_shape,
    rope: *const skv_rope,
    scale: f32,
    softcap: f32,
    projection: *const skv_projection,
    out: *mut *mut skv_cache,
) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe {
        create(out, || {
            let (config, shape) = (take(config, "config")?.to_config(), take(shape, "shape")?.to_shape());
            let rope = take(rope, "rope")?.to_params()?;
            let projection = skv_projection::rows(projection, shape.n_head as usize * shape.d_v as usize)?;
            Ok(Cache::new(&config, shape, &rope, Scoring { scale, softcap }, projection)?)
        })
    }
}

/// Free a cache; NULL is allowed.
///
/// # Safety
/// `cache` is NULL or came from `skv_cache_create` and was not freed.
#[no_mangle]
pub unsafe extern "C" fn skv_cache_free(cache: *mut skv_cache) {
    // SAFETY: the caller's contract.
    unsafe { free(cache) }
}

/// Store `n` rows: `q[n][n_head][d_k]` (the queries of the same tokens, which are part of a fit's sample), `k[n][n_head_kv][d_k]` as the model gives them (roped) and
/// `v[n][n_head_kv][d_v]`, with their positions, ascending. On error nothing has changed.
///
/// # Safety
/// Pointers are readable for what they describe or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_cache_append(
    cache: *mut skv_cache,
    positions: *const i32,
    n: usize,
    q: *const f32,
    k: *const f32,
    v: *const f32,
) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe {
        change(cache, |c| {
            let g = *c.layer().shape();
            let q = dense(q, n, g.n_head, g.d_k, "q")?;
            let k = dense(k, n, g.n_head_kv, g.d_k, "k")?;
            let v = dense(v, n, g.n_head_kv, g.d_v, "v")?;
            Ok(c.append(slice(positions, n, "positions")?, &q, &k, &v)?)
        })
    }
}

/// Rebuild rows `first` to `first + n` as roped f16: `k_out[n][n_head_kv][d_k]` and `v_out[n][n_head_kv][d_v]`.
///
/// # Safety
/// Pointers are writable for what they describe or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_cache_get(cache: *mut skv_cache, first: usize, n: usize, k_out: *mut u16, v_out: *mut u16) -> skv_status {
    // SAFETY: the caller's contract; f16 has the layout of u16.
    unsafe {
        change(cache, |c| {
            let g = *c.layer().shape();
            if n > c.len() {
                return Err(Failure::argument(format!("{n} rows of {}", c.len())));
            }
            let k_out = slice_mut(k_out.cast::<f16>(), n * g.n_head_kv * g.d_k, "k_out")?;
            let v_out = slice_mut(v_out.cast::<f16>(), n * g.n_head_kv * g.d_v, "v_out")?;
            Ok(c.get(first, n, k_out, v_out)?)
        })
    }
}

/// Attention of `n` (1 to 64) query tokens `q[n][n_head][d_k]` (roped) over all stored rows into `out[n][n_head][d_v]`.
/// `mask[n][rows stored]` is f32: 0 shows a row, -inf hides it, other values are added; NULL shows all. `sinks` has one logit per
/// query head or is NULL. A query that sees no row gives zeros.
///
/// # Safety
/// Pointers are valid for what they describe or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_cache_attend(
    cache: *mut skv_cache,
    q: *const f32,
    n: usize,
    mask: *const f32,
    sinks: *const f32,
    out: *mut f32,
) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe {
        change(cache, |c| {
            check_queries(n, 1)?;
            let (g, rows) = (*c.layer().shape(), c.len());
            let q = dense(q, n, g.n_head, g.d_k, "q")?;
            let mask = if mask.is_null() { Mask::All } else { Mask::F32 { values: slice(mask, n * rows, "mask")?, stride: rows, n_kv: rows } };
            let sinks = slice(sinks, if sinks.is_null() { 0 } else { g.n_head }, "sinks")?;
            Ok(c.attend(&q, mask, sinks, slice_mut(out, n * g.n_head * g.d_v, "out")?)?)
        })
    }
}

/// Keep the first `n_rows` rows and drop all behind them; the next rows appended follow those. What is kept stays as it is stored: rows that were coded
/// do not become exact because the newest ones are now among them, and the bases remain, though dropped rows may have had a part in them; but
/// without any row left the cache is as new.
///
/// # Safety
/// `cache` is NULL or valid.
#[no_mangle]
pub unsafe extern "C" fn skv_cache_truncate(cache: *mut skv_cache, n_rows: usize) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe { change(cache, |c| Ok(c.truncate(n_rows)?)) }
}

/// Forget every row and the bases; what is stored next is stored as in a new cache. Counters go on.
///
/// # Safety
/// `cache` is NULL or valid.
#[no_mangle]
pub unsafe extern "C" fn skv_cache_reset(cache: *mut skv_cache) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe {
        change(cache, |c| {
            c.reset();
            Ok(())
        })
    }
}

/// Copy the positions of all stored rows, in their order, to `out` (`capacity` ints) and their number to `*n`. With
/// `out` NULL and `capacity` 0 only `*n` is set.
///
/// # Safety
/// Pointers are valid for what they describe or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_cache_positions(cache: *const skv_cache, out: *mut i32, capacity: usize, n: *mut usize) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe {
        read(cache, |c| {
            let (n, positions) = (borrow_mut(n, "n")?, c.positions());
            if !(out.is_null() && capacity == 0) {
                if capacity < positions.len() {
                    return Err(Error::Buffer { need: positions.len(), have: capacity }.into());
                }
                slice_mut(out, positions.len(), "out")?.copy_from_slice(positions);
            }
            *n = positions.len();
            Ok(())
        })
    }
}

/// What the cache has done.
///
/// # Safety
/// Pointers are valid or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_cache_stats(cache: *const skv_cache, out: *mut skv_stats) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe { read(cache, |c| give(out, &skv_stats::new(&c.stats()), "out")) }
}

/// Bytes held, against f16.
///
/// # Safety
/// Pointers are valid or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_cache_report(cache: *const skv_cache, out: *mut skv_size_report) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe { read(cache, |c| give(out, &skv_size_report::new(&c.report(), c.layer().geometry()), "out")) }
}
