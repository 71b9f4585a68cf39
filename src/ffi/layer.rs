//! `skv_layer`: what one layer does with its arenas. Called by ggml's worker threads.
//!
//! `ith` of `nth` threads call the same function with the same arguments; how they share its work is decided here, so that each writes bytes of its own.

use super::calibration::skv_calibration;
use super::error::{skv_status, Failure, Outcome};
use super::geometry::skv_geometry;
use super::object::{change, create, free, handle, peek, read, Handle, Object};
use super::pointer::{borrow_mut, check_arena, give, slice_mut, take};
use super::step::{check_queries, skv_attention, skv_step};
use super::types::{skv_rope, skv_stats};
use crate::cache::arena::{Bytes, BytesMut};
use crate::cache::{Call, Layer};
use crate::config::Scoring;
use half::f16;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

/// One layer: shapes, rotation and counters.
#[allow(non_camel_case_types, reason = "the name is C's")]
pub struct skv_layer(Object<Layer>);

handle!(skv_layer, Layer, "layer");

/// Counts all of a call of the first thread: reading the plan, which grows with the context, is a part of it.
fn timed<T>(first: bool, counter: &AtomicU64, body: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let out = body();
    if first {
        counter.fetch_add(start.elapsed().as_nanos() as u64, Relaxed);
    }
    out
}

fn check_threads(ith: u32, nth: u32) -> Outcome {
    if ith >= nth {
        return Err(Failure::argument(format!("thread {ith} of {nth}")));
    }
    Ok(())
}

/// The `ith` of `nth` shares of `n` things.
fn share(n: usize, ith: u32, nth: u32) -> Range<usize> {
    n * ith as usize / nth as usize..n * (ith as usize + 1) / nth as usize
}

/// Layer number `layer` of a geometry. `*out` is owned by the caller; free it with `skv_layer_free`. The geometry may be freed before.
///
/// # Safety
/// Pointers are valid or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_layer_create(geometry: *const skv_geometry, layer: usize, out: *mut *mut skv_layer) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe {
        create(out, || {
            let g = peek(geometry, "geometry")?;
            Ok(Layer::new(g.sizes.clone(), g.findings.clone(), layer)?)
        })
    }
}

/// Free a layer; NULL is allowed.
///
/// # Safety
/// `layer` is NULL or came from `skv_layer_create` and was not freed.
#[no_mangle]
pub unsafe extern "C" fn skv_layer_free(layer: *mut skv_layer) {
    // SAFETY: the caller's contract.
    unsafe { free(layer) }
}

/// Set the rotation of this layer's keys; without it keys are stored as they are. Setting the same again does nothing; another
/// one after rows were stored is `SKV_STATUS_STATE`.
///
/// # Safety
/// Pointers are valid or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_layer_set_rope(layer: *mut skv_layer, rope: *const skv_rope) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe { change(layer, |l| Ok(l.set_rope(&take(rope, "rope")?.to_params()?)?)) }
}

/// Set scale and soft cap (0 for none) of the scores, with which the fit weighs errors. Default `1/sqrt(d_k)`.
///
/// # Safety
/// `layer` is NULL or valid.
#[no_mangle]
pub unsafe extern "C" fn skv_layer_set_scoring(layer: *mut skv_layer, scale: f32, softcap: f32) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe { change(layer, |l| Ok(l.set_scoring(Scoring { scale, softcap })?)) }
}

/// Take the bases from layer `model_layer` (the model's number) of a calibration instead of fitting them, after the rope was set.
/// Where `skv_config.calibrated` is 1, every layer needs this before it stores rows. `SKV_STATUS_DATA` when the calibration has
/// another shape or rope for this layer. The calibration may be freed afterwards.
///
/// # Safety
/// Pointers are valid or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_layer_set_calibration(layer: *mut skv_layer, calibration: *const skv_calibration, model_layer: usize) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe { change(layer, |l| Ok(l.set_calibration(peek(calibration, "calibration")?, model_layer)?)) }
}

/// Whether the `ith` of `nth` threads that store this step wants `step->projection`: `*wants` becomes 0 or 1. Looks at the plan alone.
///
/// # Safety
/// Pointers are valid for what they describe or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_layer_wants_projection(
    layer: *const skv_layer,
    step: *const skv_step,
    ith: u32,
    nth: u32,
    wants: *mut i32,
) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe {
        read(layer, |l| {
            check_threads(ith, nth)?;
            let plan = take(step, "step")?.plan(l)?;
            *borrow_mut(wants, "wants")? = i32::from(l.wants_projection(&plan, ith as usize, nth as usize));
            Ok(())
        })
    }
}

/// An arena of which several threads change what belongs to their own heads.
struct Shared {
    at: *mut u8,
    len: usize,
}

impl Bytes for Shared {
    fn get(&self, r: Range<usize>) -> &[u8] {
        assert!(r.start <= r.end && r.end <= self.len);
        // SAFETY: inside of the arena; the cache asks for bytes of the thread's own head, which no other thread touches.
        unsafe { std::slice::from_raw_parts(self.at.add(r.start), r.len()) }
    }
}

impl BytesMut for Shared {
    fn get_mut(&mut self, r: Range<usize>) -> &mut [u8] {
        assert!(r.start <= r.end && r.end <= self.len);
        // SAFETY: as in `get`, and `self` is borrowed for as long.
        unsafe { std::slice::from_raw_parts_mut(self.at.add(r.start), r.len()) }
    }
}

/// Store the step: seal tiles, move rows, write exact rows, study heads for a fit and write bases when the plan says so. Runs after the
/// attention of the same step. Only threads for which `skv_layer_wants_projection` says so read `step->projection`.
///
/// # Safety
/// Pointers are valid for what they describe or NULL; nothing else uses the arena but the other threads of this call.
#[no_mangle]
pub unsafe extern "C" fn skv_layer_append(layer: *const skv_layer, step: *const skv_step, ith: u32, nth: u32) -> skv_status {
    // SAFETY: the caller's contract; heads are shared out so that no two threads touch the same bytes.
    unsafe {
        read(layer, |l| {
            timed(ith == 0, &l.counters.ns_encode, || {
                check_threads(ith, nth)?;
                let s = take(step, "step")?;
                check_arena(s.arena, s.arena_bytes, l.geometry().arena_bytes)?;
                let (plan, step) = (s.plan(l)?, s.whole(l)?);
                if plan.fit && !plan.shared {
                    if ith > 0 {
                        return Ok(());
                    }
                    return Ok(l.append_fit(slice_mut(s.arena, s.arena_bytes, "arena")?, &plan, &step)?);
                }
                let mut bytes = Shared { at: s.arena, len: s.arena_bytes };
                let mut own = (0..l.shape().n_head_kv).filter(|h| h % nth as usize == ith as usize);
                Ok(own.try_for_each(|head| l.append_head(head, &mut bytes, &plan, &step))?)
            })
        })
    }
}

/// After a graph that failed part-way: carry out what the plan does to rows already stored, unless this arena has it already.
/// Takes arena and plan of the step. One thread.
///
/// # Safety
/// Pointers are valid for what they describe or NULL; nothing else uses the arena.
#[no_mangle]
pub unsafe extern "C" fn skv_layer_replay(layer: *const skv_layer, step: *const skv_step) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe {
        read(layer, |l| {
            let s = take(step, "step")?;
            check_arena(s.arena, s.arena_bytes, l.geometry().arena_bytes)?;
            let plan = s.plan(l)?;
            Ok(l.replay(slice_mut(s.arena, s.arena_bytes, "arena")?, &plan)?)
        })
    }
}

/// Rebuild dense roped f16 rows of all cells below `n_kv`: `k_out[n_kv][n_head_kv][d_k]` and `v_out[n_kv][n_head_kv][d_v]`, last
/// index fastest. The step's own rows are taken from its `k` and `v`; empty cells give zeros.
///
/// # Safety
/// Pointers are valid for what they describe or NULL; nothing changes the arena during the call.
#[no_mangle]
pub unsafe extern "C" fn skv_layer_reconstruct(
    layer: *const skv_layer,
    step: *const skv_step,
    k_out: *mut u16,
    v_out: *mut u16,
    n_kv: usize,
    ith: u32,
    nth: u32,
) -> skv_status {
    // SAFETY: the caller's contract; each thread writes the cells of its own share.
    unsafe {
        read(layer, |l| {
            check_threads(ith, nth)?;
            let (g, s) = (l.shape(), take(step, "step")?);
            let (arena, plan, (k, v)) = (s.arena(l)?, s.plan(l)?, s.tokens(l)?);
            if n_kv > l.geometry().config.n_cells as usize {
                return Err(Failure::argument(format!("{n_kv} cells of {}", l.geometry().config.n_cells)));
            }
            if n_kv > 0 && (k_out.is_null() || v_out.is_null()) {
                return Err(Failure::Null(if k_out.is_null() { "k_out" } else { "v_out" }));
            }
            let cells = share(n_kv, ith, nth);
            let (nk, nv) = (g.n_head_kv * g.d_k, g.n_head_kv * g.d_v);
            let k_out = slice_mut(k_out.add(cells.start * nk).cast::<f16>(), cells.len() * nk, "k_out")?;
            let v_out = slice_mut(v_out.add(cells.start * nv).cast::<f16>(), cells.len() * nv, "v_out")?;
            timed(ith == 0, &l.counters.ns_reconstruct, || Ok(l.reconstruct(arena, &plan, &k, &v, cells, k_out, v_out)?))
        })
    }
}

/// Floats of the partial results of an attention call with `n_tokens` query tokens.
///
/// # Safety
/// Pointers are valid or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_layer_partial_floats(layer: *const skv_layer, n_tokens: usize, floats: *mut usize) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe {
        read(layer, |l| {
            check_queries(n_tokens, 0)?;
            *borrow_mut(floats, "floats")? = l.partial_floats(n_tokens);
            Ok(())
        })
    }
}

/// Attention of 1 to 64 query tokens over the stored rows and the step's own rows, first half: writes `attention->partials`. The result does
/// not depend on the number of threads.
///
/// # Safety
/// Pointers are valid for what they describe or NULL; nothing changes the arena during the call.
#[no_mangle]
pub unsafe extern "C" fn skv_layer_attend(
    layer: *const skv_layer,
    step: *const skv_step,
    attention: *const skv_attention,
    ith: u32,
    nth: u32,
) -> skv_status {
    // SAFETY: the caller's contract; each thread writes the units of its own share.
    unsafe {
        read(layer, |l| {
            timed(ith == 0, &l.counters.ns_attend, || {
                check_threads(ith, nth)?;
                let (s, a) = (take(step, "step")?, take(attention, "attention")?);
                let (arena, plan, q, (k, v)) = (s.arena(l)?, s.plan(l)?, s.queries(l)?, s.tokens(l)?);
                check_queries(q.len(), 1)?;
                let (partials, size, mask) = (a.partials(l, q.len())?, l.unit_floats(q.len()), a.mask(q.len())?);
                let units = share(l.units(), ith, nth);
                let out = slice_mut(partials.add(units.start * size), units.len() * size, "attention.partials")?;
                let call = Call { arena, plan: &plan, q: &q, k: &k, v: &v, scoring: a.scoring(), mask };
                Ok(l.attend(units, &call, out)?)
            })
        })
    }
}

/// Second half: merge the partial results of `n_tokens` query tokens into `attention->out`.
///
/// # Safety
/// Pointers are valid for what they describe or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_layer_combine(
    layer: *const skv_layer,
    attention: *const skv_attention,
    n_tokens: usize,
    ith: u32,
    nth: u32,
) -> skv_status {
    // SAFETY: the caller's contract; each thread writes the output rows of its own share.
    unsafe {
        read(layer, |l| {
            timed(ith == 0, &l.counters.ns_attend, || {
                check_threads(ith, nth)?;
                check_queries(n_tokens, 0)?;
                let (g, a) = (l.shape(), take(attention, "attention")?);
                let (partials, sinks, out) = (a.partials(l, n_tokens)?, a.sinks(l)?, a.out(l, n_tokens)?);
                let partials = std::slice::from_raw_parts(partials, a.n_partials);
                let mine = share(n_tokens * g.n_head, ith, nth);
                let out = slice_mut(out.add(mine.start * g.d_v), mine.len() * g.d_v, "attention.out")?;
                Ok(l.combine(n_tokens, partials, sinks, mine, out)?)
            })
        })
    }
}

/// Attention of any number of query tokens over the stored rows and the step's own rows, into `attention->out`. Rows are
/// rebuilt as they are looked at and kept nowhere: for up to 64 tokens `skv_layer_attend` is faster. The result does not depend on the number of threads.
///
/// # Safety
/// Pointers are valid for what they describe or NULL; nothing changes the arena during the call.
#[no_mangle]
pub unsafe extern "C" fn skv_layer_prefill(
    layer: *const skv_layer,
    step: *const skv_step,
    attention: *const skv_attention,
    ith: u32,
    nth: u32,
) -> skv_status {
    // SAFETY: the caller's contract; each thread writes the output rows of its own share.
    unsafe {
        read(layer, |l| {
            timed(ith == 0, &l.counters.ns_attend, || {
                check_threads(ith, nth)?;
                let (s, a) = (take(step, "step")?, take(attention, "attention")?);
                let (arena, plan, q, (k, v)) = (s.arena(l)?, s.plan(l)?, s.queries(l)?, s.tokens(l)?);
                let (n, d) = (q.len(), l.shape().d_v);
                if n == 0 {
                    return Err(Failure::argument("no query tokens"));
                }
                let (out, sinks, mask) = (a.out(l, n)?, a.sinks(l)?, a.mask(n)?);
                let call = Call { arena, plan: &plan, q: &q, k: &k, v: &v, scoring: a.scoring(), mask };
                // Output rows of a share lie between those of others, so there is no slice of them.
                let put = |row: usize, x: &[f32]| std::ptr::copy_nonoverlapping(x.as_ptr(), out.add(row * d), d);
                Ok(l.prefill(share(l.prefill_pieces(n), ith, nth), &call, sinks, put)?)
            })
        })
    }
}

/// Counters of a layer.
///
/// # Safety
/// Pointers are valid or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_layer_stats(layer: *const skv_layer, out: *mut skv_stats) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe { read(layer, |l| give(out, &skv_stats::new(&l.counters.read()), "out")) }
}
