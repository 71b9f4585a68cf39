//! `skv_cache`: a cache of one layer and one sequence that owns its memory.

use super::*;
use crate::cache::{Cache, Mask, Rows};
use crate::config::Scoring;
use half::f16;

/// A cache of one layer and one sequence, for callers that have no arenas to lend. Cells are numbered in the order of appending.
/// For one thread at a time.
#[allow(non_camel_case_types, reason = "the name is C's")]
pub struct skv_cache {
    cache: Cache,
    error: LastError,
}

/// Run a call on a cache, keeping the text of a failure in it.
///
/// # Safety
/// `cache` is NULL or valid and not used by another thread.
unsafe fn on_cache(cache: *mut skv_cache, body: impl FnOnce(&mut Cache) -> std::result::Result<(), Failure>) -> skv_status {
    // SAFETY: the caller's contract.
    match unsafe { borrow_mut(cache, "cache") } {
        Ok(c) => guard(|text| c.error.set(text), || body(&mut c.cache)),
        Err(_) => skv_status::SKV_STATUS_NULL,
    }
}

/// Contiguous rows `[n][heads][d]`.
///
/// # Safety
/// `p` is NULL or readable for that many floats.
unsafe fn dense<'a>(p: *const f32, n: usize, heads: usize, d: usize, name: &'static str) -> std::result::Result<Rows<'a>, Failure> {
    let len = n.checked_mul(heads * d).ok_or_else(|| Error::Argument(format!("{n} rows of {name}")))?;
    // SAFETY: the caller's contract.
    Ok(Rows::new(unsafe { slice(p, len, name)? }, n, heads * d, d, heads, d)?)
}

/// Create a cache of `shape`. `config.n_streams` and `config.n_seqs` must be 1. `scale` and `softcap` (0 for none) are those of the
/// scores. `projection` (may be NULL) holds rows of the layer's output projection; it is copied. `err` (may be NULL) receives the
/// reason of a failure. `*out` is owned by the caller; free it with `skv_cache_free`.
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
    err: *mut c_char,
    err_len: usize,
) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe {
        guard(
            |text| copy_text(&text, err, err_len),
            || {
                let config = versioned(config, skv_config::defaults(), "config")?.to_config();
                let shape = versioned(shape, skv_layer_shape::zero(), "shape")?.to_shape();
                let rope = versioned(rope, skv_rope::defaults(), "rope")?;
                let rope = rope.to_params(slice(rope.freq_factors, rope.n_freq_factors, "freq_factors")?)?;
                let out = borrow_mut(out, "out")?;
                let wo = match projection.as_ref() {
                    Some(p) => {
                        let n = p.n_rows.checked_mul(shape.n_head as usize * shape.d_v as usize);
                        slice(p.data, n.ok_or_else(|| Error::Argument("projection.n_rows".into()))?, "projection.data")?
                    }
                    None => &[],
                };
                let cache = Cache::new(&config, shape, &rope, Scoring { scale, softcap }, wo)?;
                *out = Box::into_raw(Box::new(skv_cache { cache, error: LastError::default() }));
                Ok(())
            },
        )
    }
}

/// Free a cache; NULL is allowed.
///
/// # Safety
/// `cache` is NULL or came from `skv_cache_create` and was not freed.
#[no_mangle]
pub unsafe extern "C" fn skv_cache_free(cache: *mut skv_cache) {
    if !cache.is_null() {
        // SAFETY: the caller's contract.
        drop(unsafe { Box::from_raw(cache) });
    }
}

/// Store `n` rows: `q[n][n_head][d_k]` (the queries of the same tokens, which the fit looks at), `k[n][n_head_kv][d_k]` as the model gives them (roped) and
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
        on_cache(cache, |c| {
            let g = c.layer().shape().clone();
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
        on_cache(cache, |c| {
            let g = c.layer().shape().clone();
            if n > c.len() {
                return Err(Error::Argument(format!("{n} rows of {}", c.len())).into());
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
    scale: f32,
    softcap: f32,
    mask: *const f32,
    sinks: *const f32,
    out: *mut f32,
) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe {
        on_cache(cache, |c| {
            let g = c.layer().shape().clone();
            if n == 0 || n > SKV_MAX_QUERIES {
                return Err(Error::Argument(format!("{n} query tokens; 1 to {SKV_MAX_QUERIES} are possible")).into());
            }
            let q = dense(q, n, g.n_head, g.d_k, "q")?;
            let rows = c.len();
            let mask = if mask.is_null() { Mask::All } else { Mask::F32 { values: slice(mask, n * rows, "mask")?, stride: rows, n_kv: rows } };
            let sinks = slice(sinks, if sinks.is_null() { 0 } else { g.n_head }, "sinks")?;
            let out = slice_mut(out, n * g.n_head * g.d_v, "out")?;
            Ok(c.attend(&q, Scoring { scale, softcap }, mask, sinks, out)?)
        })
    }
}

/// Forget every row and the bases; what is stored next is stored as in a new cache. Counters go on.
///
/// # Safety
/// `cache` is NULL or valid.
#[no_mangle]
pub unsafe extern "C" fn skv_cache_reset(cache: *mut skv_cache) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe {
        on_cache(cache, |c| {
            c.reset();
            Ok(())
        })
    }
}

/// Copy the positions of all stored rows, in the order of their cells, to `out` (`capacity` ints) and their number to `*n`. With
/// `out` NULL and `capacity` 0 only `*n` is set.
///
/// # Safety
/// Pointers are valid for what they describe or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_cache_positions(cache: *mut skv_cache, out: *mut i32, capacity: usize, n: *mut usize) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe {
        on_cache(cache, |c| {
            let n = borrow_mut(n, "n")?;
            let positions = c.positions();
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
/// Pointers are valid or NULL; `out->struct_size` is set.
#[no_mangle]
pub unsafe extern "C" fn skv_cache_stats(cache: *mut skv_cache, out: *mut skv_stats) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe { on_cache(cache, |c| report(out, &skv_stats::new(&c.stats()), "out")) }
}

/// Bytes held, against f16.
///
/// # Safety
/// Pointers are valid or NULL; `out->struct_size` is set.
#[no_mangle]
pub unsafe extern "C" fn skv_cache_report(cache: *mut skv_cache, out: *mut skv_size_report) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe { on_cache(cache, |c| report(out, &skv_size_report::new(&c.report(), c.layer().geometry()), "out")) }
}

/// Why the last failed call on this cache failed; valid until the next failing call on it. Empty without one; NULL for NULL.
///
/// # Safety
/// `cache` is NULL or valid.
#[no_mangle]
pub unsafe extern "C" fn skv_cache_last_error(cache: *const skv_cache) -> *const c_char {
    // SAFETY: the caller's contract.
    unsafe { cache.as_ref() }.map_or(std::ptr::null(), |c| c.error.as_ptr())
}
