//! `skv_layer`: what one layer does with its arenas. Called by ggml's worker threads.
//!
//! `ith` of `nth` threads call the same function with the same arguments; each does its share and writes bytes of its own.

use super::*;
use crate::cache::arena::{Bytes, BytesMut};
use crate::cache::{Call, Layer, Mask, Plan, Rows, Step};
use crate::config::Scoring;
use half::f16;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::Mutex;
use std::time::Instant;

/// One layer: shapes, rotation and counters. Everything but `skv_layer_set_*` and `skv_layer_free` may be called from several
/// threads at once.
#[allow(non_camel_case_types, reason = "the name is C's")]
pub struct skv_layer {
    pub(crate) layer: Layer,
    error: Mutex<String>,
}

/// Run a call on a layer, keeping the text of a failure in it.
///
/// # Safety
/// `layer` is NULL or valid.
unsafe fn on_layer(layer: *const skv_layer, body: impl FnOnce(&Layer) -> std::result::Result<(), Failure>) -> skv_status {
    // SAFETY: the caller's contract.
    let Ok(l) = (unsafe { borrow(layer, "layer") }) else { return skv_status::SKV_STATUS_NULL };
    let tell = |text| *l.error.lock().unwrap_or_else(|e| e.into_inner()) = text;
    guard(tell, || body(&l.layer))
}

fn timed<T>(first: bool, counter: &AtomicU64, body: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let out = body();
    if first {
        counter.fetch_add(start.elapsed().as_nanos() as u64, Relaxed);
    }
    out
}

fn check_threads(ith: u32, nth: u32) -> Result<()> {
    if ith >= nth {
        return Err(Error::Argument(format!("thread {ith} of {nth}")));
    }
    Ok(())
}

/// The `ith` of `nth` shares of `n` things.
fn share(n: usize, ith: u32, nth: u32) -> Range<usize> {
    n * ith as usize / nth as usize..n * (ith as usize + 1) / nth as usize
}

/// Borrow a plan whose indices fit the layer.
///
/// # Safety
/// `plan` is NULL or readable for `n` ints.
unsafe fn checked_plan<'a>(l: &Layer, plan: *const i32, n: usize) -> std::result::Result<Plan<'a>, Failure> {
    // SAFETY: the caller's contract.
    let plan = Plan::parse(unsafe { slice(plan, n, "plan")? })?;
    plan.check(l.geometry())?;
    Ok(plan)
}

/// Borrow rows of `heads` heads of `d` floats.
///
/// # Safety
/// `rows` is NULL or valid, and its data covers what it describes.
pub(crate) unsafe fn rows<'a>(rows: *const skv_rows, heads: usize, d: usize, name: &'static str) -> std::result::Result<Rows<'a>, Failure> {
    // SAFETY: the caller's contract.
    let r = unsafe { borrow(rows, name)? };
    if r.n_rows == 0 {
        return Ok(Rows::empty());
    }
    if r.row_stride % 4 != 0 || r.head_stride % 4 != 0 {
        return Err(Error::Argument(format!("the strides of {name} are not whole floats")).into());
    }
    let (row, head) = (r.row_stride / 4, r.head_stride / 4);
    let span = (r.n_rows - 1).checked_mul(row).and_then(|a| (heads - 1).checked_mul(head).and_then(|b| a.checked_add(b)?.checked_add(d)));
    let span = span.ok_or_else(|| Error::Argument(format!("{name} is longer than memory")))?;
    // SAFETY: `span` floats are what the strides describe.
    Ok(Rows::new(unsafe { slice(r.data, span, name)? }, r.n_rows, row, head, heads, d)?)
}

/// Layer number `layer` of a geometry. `*out` is owned by the caller; free it with `skv_layer_free`.
///
/// # Safety
/// Pointers are valid or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_layer_create(geometry: *const skv_geometry, layer: usize, out: *mut *mut skv_layer) -> skv_status {
    guard(silent, || {
        // SAFETY: the caller's contract.
        let (g, out) = unsafe { (borrow(geometry, "geometry")?, borrow_mut(out, "out")?) };
        let layer = Layer::new(g.0.clone(), g.1.clone(), layer)?;
        *out = Box::into_raw(Box::new(skv_layer { layer, error: Mutex::default() }));
        Ok(())
    })
}

/// Free a layer; NULL is allowed.
///
/// # Safety
/// `layer` is NULL or came from `skv_layer_create` and was not freed.
#[no_mangle]
pub unsafe extern "C" fn skv_layer_free(layer: *mut skv_layer) {
    if !layer.is_null() {
        // SAFETY: the caller's contract.
        drop(unsafe { Box::from_raw(layer) });
    }
}

/// Run an exclusive call on a layer.
///
/// # Safety
/// `layer` is NULL or valid and not used by another thread.
unsafe fn change_layer(layer: *mut skv_layer, body: impl FnOnce(&mut Layer) -> std::result::Result<(), Failure>) -> skv_status {
    // SAFETY: the caller's contract.
    let Ok(l) = (unsafe { borrow_mut(layer, "layer") }) else { return skv_status::SKV_STATUS_NULL };
    let error = &l.error;
    guard(|text| *error.lock().unwrap_or_else(|e| e.into_inner()) = text, || body(&mut l.layer))
}

/// Set the rotation of this layer's keys; without it keys are stored as they are. Setting the same again does nothing; another
/// one after rows were stored is `SKV_STATUS_STATE`. Exclusive.
///
/// # Safety
/// Pointers are valid or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_layer_set_rope(layer: *mut skv_layer, rope: *const skv_rope) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe {
        change_layer(layer, |l| {
            let rope = versioned(rope, skv_rope::defaults(), "rope")?;
            let factors = slice(rope.freq_factors, rope.n_freq_factors, "freq_factors")?;
            Ok(l.set_rope(&rope.to_params(factors)?)?)
        })
    }
}

/// Set scale and soft cap (0 for none) of the scores, with which the fit weighs errors. Default `1/sqrt(d_k)`. Exclusive.
///
/// # Safety
/// `layer` is NULL or valid.
#[no_mangle]
pub unsafe extern "C" fn skv_layer_set_scoring(layer: *mut skv_layer, scale: f32, softcap: f32) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe { change_layer(layer, |l| Ok(l.set_scoring(Scoring { scale, softcap })?)) }
}

/// Take the bases from layer `model_layer` (the model's number) of a calibration instead of fitting them, after the rope was set.
/// Where `skv_config.calibrated` is 1, every layer needs this before it stores rows. `SKV_STATUS_DATA` when the calibration has
/// another shape or rope for this layer. The calibration may be freed afterwards. Exclusive.
///
/// # Safety
/// Pointers are valid or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_layer_set_calibration(layer: *mut skv_layer, calibration: *const skv_calibration, model_layer: usize) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe { change_layer(layer, |l| Ok(l.set_calibration(&borrow(calibration, "calibration")?.0, model_layer)?)) }
}

/// Whether the `ith` of `nth` threads that store this plan wants the output projection: `*wants` becomes 0 or 1.
///
/// # Safety
/// Pointers are valid for the given counts or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_layer_wants_projection(
    layer: *const skv_layer,
    plan: *const i32,
    plan_ints: usize,
    ith: u32,
    nth: u32,
    wants: *mut i32,
) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe {
        on_layer(layer, |l| {
            check_threads(ith, nth)?;
            let wants = borrow_mut(wants, "wants")?;
            *wants = i32::from(l.wants_projection(&checked_plan(l, plan, plan_ints)?, ith as usize, nth as usize));
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

/// Borrow what a step brings to a layer.
///
/// # Safety
/// `step` is NULL or points to a struct that begins with its size; what it points to is valid for what it describes.
unsafe fn step<'a>(l: &Layer, step: *const skv_step) -> std::result::Result<Step<'a>, Failure> {
    let g = l.shape();
    // SAFETY: the caller's contract.
    unsafe {
        let s = versioned(step, skv_step::defaults(), "step")?;
        let [q, k, v] = [rows(s.q, g.n_head, g.d_k, "step.q")?, rows(s.k, g.n_head_kv, g.d_k, "step.k")?, rows(s.v, g.n_head_kv, g.d_v, "step.v")?];
        let residual = match s.residual.is_null() {
            true => None,
            false => Some((rows(s.residual, 1, s.n_residual, "step.residual")?, s.n_residual)),
        };
        let projection = match s.projection.as_ref() {
            Some(p) => {
                let n = p.n_rows.checked_mul(g.n_head * g.d_v).ok_or_else(|| Error::Argument("projection.n_rows".into()))?;
                slice(p.data, n, "projection.data")?
            }
            None => &[],
        };
        Ok(Step { q, k, v, residual, projection })
    }
}

/// Store the step: seal tiles, move rows, write exact rows, look at heads for a fit and write bases when the plan says so. Runs after the
/// attention of the same step. Only threads that `skv_layer_wants_projection` look at `step->projection`.
///
/// # Safety
/// Pointers are valid for what they describe or NULL; nothing else uses the arena but the other threads of this call.
#[no_mangle]
pub unsafe extern "C" fn skv_layer_append(
    layer: *const skv_layer,
    arena: *mut u8,
    arena_bytes: usize,
    plan: *const i32,
    plan_ints: usize,
    step: *const skv_step,
    ith: u32,
    nth: u32,
) -> skv_status {
    // SAFETY: the caller's contract; heads are shared out so that no two threads touch the same bytes.
    unsafe {
        on_layer(layer, |l| {
            check_threads(ith, nth)?;
            if arena.is_null() {
                return Err(Failure::Null("arena"));
            }
            check_arena(arena, arena_bytes, l.geometry().arena_bytes)?;
            let plan = checked_plan(l, plan, plan_ints)?;
            let step = self::step(l, step)?;
            timed(ith == 0, &l.counters.ns_encode, || {
                if plan.fit && !plan.shared {
                    if ith > 0 {
                        return Ok(());
                    }
                    return Ok(l.append_fit(slice_mut(arena, arena_bytes, "arena")?, &plan, &step)?);
                }
                let mut bytes = Shared { at: arena, len: arena_bytes };
                let mut own = (0..l.shape().n_head_kv).filter(|h| h % nth as usize == ith as usize);
                Ok(own.try_for_each(|head| l.append_head(head, &mut bytes, &plan, &step))?)
            })
        })
    }
}

/// After a graph that failed part-way: carry out what the plan does to rows already stored, unless this arena has it already.
/// One thread.
///
/// # Safety
/// Pointers are valid for what they describe or NULL; nothing else uses the arena.
#[no_mangle]
pub unsafe extern "C" fn skv_layer_replay(
    layer: *const skv_layer,
    arena: *mut u8,
    arena_bytes: usize,
    plan: *const i32,
    plan_ints: usize,
) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe {
        on_layer(layer, |l| {
            check_arena(arena, arena_bytes, l.geometry().arena_bytes)?;
            let plan = checked_plan(l, plan, plan_ints)?;
            Ok(l.replay(slice_mut(arena, arena_bytes, "arena")?, &plan)?)
        })
    }
}

/// Rebuild dense roped f16 rows of all cells below `n_kv`: `k_out[n_kv][n_head_kv][d_k]` and `v_out[n_kv][n_head_kv][d_v]`, last
/// index fastest. The step's own rows are taken from `k` and `v`; empty cells give zeros.
///
/// # Safety
/// Pointers are valid for what they describe or NULL; nothing changes the arena during the call.
#[no_mangle]
pub unsafe extern "C" fn skv_layer_reconstruct(
    layer: *const skv_layer,
    arena: *const u8,
    arena_bytes: usize,
    plan: *const i32,
    plan_ints: usize,
    k: *const skv_rows,
    v: *const skv_rows,
    k_out: *mut u16,
    v_out: *mut u16,
    n_kv: usize,
    ith: u32,
    nth: u32,
) -> skv_status {
    // SAFETY: the caller's contract; each thread writes the cells of its own share.
    unsafe {
        on_layer(layer, |l| {
            check_threads(ith, nth)?;
            let g = l.shape();
            let arena = super::arena(arena, arena_bytes, l.geometry().arena_bytes)?;
            let plan = checked_plan(l, plan, plan_ints)?;
            let k = rows(k, g.n_head_kv, g.d_k, "k")?;
            let v = rows(v, g.n_head_kv, g.d_v, "v")?;
            if n_kv > l.geometry().config.n_cells as usize {
                return Err(Error::Argument(format!("{n_kv} cells of {}", l.geometry().config.n_cells)).into());
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
        on_layer(layer, |l| {
            let floats = borrow_mut(floats, "floats")?;
            if n_tokens > SKV_MAX_QUERIES {
                return Err(Error::Argument(format!("{n_tokens} query tokens; at most {SKV_MAX_QUERIES} are possible")).into());
            }
            *floats = l.partial_floats(n_tokens);
            Ok(())
        })
    }
}

fn scoring(p: &skv_attend_params) -> Scoring {
    Scoring { scale: p.scale, softcap: p.softcap }
}

/// Borrow a mask for `n` query tokens.
///
/// # Safety
/// The mask covers what the parameters describe.
unsafe fn mask<'a>(p: &skv_attend_params, n: usize) -> std::result::Result<Mask<'a>, Failure> {
    if p.mask.is_null() {
        return Ok(Mask::All);
    }
    let stride = p.mask_row_stride / 2;
    if !p.mask_row_stride.is_multiple_of(2) || (n > 1 && stride < p.n_kv) {
        return Err(Error::Argument(format!("a mask row of {} bytes for {} cells", p.mask_row_stride, p.n_kv)).into());
    }
    let len = (n - 1).checked_mul(stride).and_then(|x| x.checked_add(p.n_kv)).ok_or_else(|| Error::Argument("mask".into()))?;
    // SAFETY: the caller's contract; f16 has the layout of u16.
    let values = unsafe { slice(p.mask.cast::<f16>(), len, "mask")? };
    Ok(Mask::F16 { values, stride, n_kv: p.n_kv })
}

/// Attention of 1 to 64 query tokens over the stored rows and the step's own rows, first half: partial results. The result does
/// not depend on the number of threads.
///
/// # Safety
/// Pointers are valid for what they describe or NULL; nothing changes the arena during the call.
#[no_mangle]
pub unsafe extern "C" fn skv_layer_attend(
    layer: *const skv_layer,
    arena: *const u8,
    arena_bytes: usize,
    plan: *const i32,
    plan_ints: usize,
    q: *const skv_rows,
    k: *const skv_rows,
    v: *const skv_rows,
    params: *const skv_attend_params,
    partials: *mut f32,
    n_partials: usize,
    ith: u32,
    nth: u32,
) -> skv_status {
    // SAFETY: the caller's contract; each thread writes the units of its own share.
    unsafe {
        on_layer(layer, |l| {
            check_threads(ith, nth)?;
            let g = l.shape();
            let arena = super::arena(arena, arena_bytes, l.geometry().arena_bytes)?;
            let plan = checked_plan(l, plan, plan_ints)?;
            let q = rows(q, g.n_head, g.d_k, "q")?;
            let k = rows(k, g.n_head_kv, g.d_k, "k")?;
            let v = rows(v, g.n_head_kv, g.d_v, "v")?;
            let p = versioned(params, skv_attend_params::defaults(), "params")?;
            let n = q.len();
            if n == 0 || n > SKV_MAX_QUERIES {
                return Err(Error::Argument(format!("{n} query tokens; 1 to {SKV_MAX_QUERIES} are possible")).into());
            }
            let (need, size) = (l.partial_floats(n), l.unit_floats(n));
            if n_partials < need {
                return Err(Error::Buffer { need, have: n_partials }.into());
            }
            if partials.is_null() {
                return Err(Failure::Null("partials"));
            }
            let mask = mask(&p, n)?;
            timed(ith == 0, &l.counters.ns_attend, || {
                let units = share(l.units(), ith, nth);
                let out = slice_mut(partials.add(units.start * size), units.len() * size, "partials")?;
                let call = Call { arena, plan: &plan, q: &q, k: &k, v: &v, scoring: scoring(&p), mask };
                Ok(l.attend(units, &call, out)?)
            })
        })
    }
}

/// Second half: merge partial results into `out[n_tokens][n_head][d_v]`, `n_out` floats. `params` as in the first half.
///
/// # Safety
/// Pointers are valid for what they describe or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_layer_combine(
    layer: *const skv_layer,
    params: *const skv_attend_params,
    partials: *const f32,
    n_partials: usize,
    n_tokens: usize,
    out: *mut f32,
    n_out: usize,
    ith: u32,
    nth: u32,
) -> skv_status {
    // SAFETY: the caller's contract; each thread writes the output rows of its own share.
    unsafe {
        on_layer(layer, |l| {
            check_threads(ith, nth)?;
            let g = l.shape();
            let p = versioned(params, skv_attend_params::defaults(), "params")?;
            let partials = slice(partials, n_partials, "partials")?;
            let sinks = slice(p.sinks, if p.sinks.is_null() { 0 } else { g.n_head }, "sinks")?;
            if n_tokens > SKV_MAX_QUERIES {
                return Err(Error::Argument(format!("{n_tokens} query tokens; at most {SKV_MAX_QUERIES} are possible")).into());
            }
            if n_out < n_tokens * g.n_head * g.d_v {
                return Err(Error::Buffer { need: n_tokens * g.n_head * g.d_v, have: n_out }.into());
            }
            if out.is_null() {
                return Err(Failure::Null("out"));
            }
            let mine = share(n_tokens * g.n_head, ith, nth);
            let out = slice_mut(out.add(mine.start * g.d_v), mine.len() * g.d_v, "out")?;
            Ok(l.combine(n_tokens, partials, sinks, mine, out)?)
        })
    }
}

/// Attention of any number of query tokens over the stored rows and the step's own rows, into `out[n_tokens][n_head][d_v]`, `n_out` floats. Rows are
/// rebuilt as they are looked at and kept nowhere: for up to 64 tokens `skv_layer_attend` is faster. The result does not depend on the number of threads.
///
/// # Safety
/// Pointers are valid for what they describe or NULL; nothing changes the arena during the call.
#[no_mangle]
pub unsafe extern "C" fn skv_layer_prefill(
    layer: *const skv_layer,
    arena: *const u8,
    arena_bytes: usize,
    plan: *const i32,
    plan_ints: usize,
    q: *const skv_rows,
    k: *const skv_rows,
    v: *const skv_rows,
    params: *const skv_attend_params,
    out: *mut f32,
    n_out: usize,
    ith: u32,
    nth: u32,
) -> skv_status {
    // SAFETY: the caller's contract; each thread writes the output rows of its own share.
    unsafe {
        on_layer(layer, |l| {
            check_threads(ith, nth)?;
            let g = l.shape();
            let arena = super::arena(arena, arena_bytes, l.geometry().arena_bytes)?;
            let plan = checked_plan(l, plan, plan_ints)?;
            let q = rows(q, g.n_head, g.d_k, "q")?;
            let k = rows(k, g.n_head_kv, g.d_k, "k")?;
            let v = rows(v, g.n_head_kv, g.d_v, "v")?;
            let p = versioned(params, skv_attend_params::defaults(), "params")?;
            let sinks = slice(p.sinks, if p.sinks.is_null() { 0 } else { g.n_head }, "sinks")?;
            let n = q.len();
            if n == 0 {
                return Err(Error::Argument("no query tokens".into()).into());
            }
            let need = n.checked_mul(g.n_head * g.d_v).ok_or_else(|| Error::Argument("q is longer than memory".into()))?;
            if n_out < need {
                return Err(Error::Buffer { need, have: n_out }.into());
            }
            if out.is_null() {
                return Err(Failure::Null("out"));
            }
            check_slice(out, n_out, "out")?;
            let mask = mask(&p, n)?;
            timed(ith == 0, &l.counters.ns_attend, || {
                let call = Call { arena, plan: &plan, q: &q, k: &k, v: &v, scoring: scoring(&p), mask };
                // Output rows of a share lie between those of others, so there is no slice of them.
                let put = |row: usize, x: &[f32]| std::ptr::copy_nonoverlapping(x.as_ptr(), out.add(row * g.d_v), g.d_v);
                Ok(l.prefill(share(l.prefill_pieces(n), ith, nth), &call, sinks, put)?)
            })
        })
    }
}

/// Counters of a layer.
///
/// # Safety
/// Pointers are valid or NULL; `out->struct_size` is set.
#[no_mangle]
pub unsafe extern "C" fn skv_layer_stats(layer: *const skv_layer, out: *mut skv_stats) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe { on_layer(layer, |l| report(out, &skv_stats::new(&l.counters.read()), "out")) }
}

/// Copy the reason of the last failed call on this layer, on whichever thread it was, into `buffer` (cut to fit).
///
/// # Safety
/// `layer` is NULL or valid; `buffer` is NULL or writable for `capacity` bytes.
#[no_mangle]
pub unsafe extern "C" fn skv_layer_last_error(layer: *const skv_layer, buffer: *mut c_char, capacity: usize) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe {
        guard(silent, || {
            let l = borrow(layer, "layer")?;
            copy_text(&l.error.lock().unwrap_or_else(|e| e.into_inner()), buffer, capacity);
            Ok(())
        })
    }
}
