//! What calls on a layer take: a step, the same for all threads, and how its queries attend.
//!
//! Must not know what becomes of the rows.

use super::error::{skv_status, Failure, Outcome};
use super::pointer::{self, check_slice, init, slice, take, Struct};
use super::types::{skv_projection, SKV_MAX_QUERIES};
use crate::cache::{Layer, Mask, Plan, Rows, Step};
use crate::config::Scoring;
use crate::error::Error;
use half::f16;

/// Rows of queries, keys or values, f32; the elements of a head are contiguous. Fill it with `skv_rows_init`, then set all of it.
#[allow(non_camel_case_types, reason = "the name is C's")]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct skv_rows {
    /// `sizeof(struct skv_rows)`; `skv_rows_init` sets it.
    pub struct_size: usize,
    /// First element, or NULL without rows.
    pub data: *const f32,
    /// Rows.
    pub n_rows: usize,
    /// Bytes from a row to the next.
    pub row_stride: usize,
    /// Bytes from a head to the next.
    pub head_stride: usize,
}

// SAFETY: `repr(C)`, the size first, numbers and a pointer only.
unsafe impl Struct for skv_rows {
    fn defaults() -> Self {
        skv_rows { struct_size: 0, data: std::ptr::null(), n_rows: 0, row_stride: 0, head_stride: 0 }
    }
}

/// Fill it with no rows. `struct_size` is `sizeof(struct skv_rows)`.
///
/// # Safety
/// `rows` is NULL or writable for `struct_size` bytes.
#[no_mangle]
pub unsafe extern "C" fn skv_rows_init(rows: *mut skv_rows, struct_size: usize) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe { init(rows, struct_size) }
}

/// One step on one layer, the same for all threads that carry it out. Fill it with `skv_step_init`, then set what the call takes.
#[allow(non_camel_case_types, reason = "the name is C's")]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct skv_step {
    /// `sizeof(struct skv_step)`; `skv_step_init` sets it.
    pub struct_size: usize,
    /// The stream's arena. Only `skv_layer_append` and `skv_layer_replay` write to it.
    pub arena: *mut u8,
    /// Bytes of `arena`.
    pub arena_bytes: usize,
    /// What `skv_table_plan` wrote.
    pub plan: *const i32,
    /// How many ints of it count.
    pub plan_ints: usize,
    /// Queries, roped, `n_head` heads of `d_k`.
    pub q: *const skv_rows,
    /// Keys of the step's tokens, roped, `n_head_kv` heads of `d_k`.
    pub k: *const skv_rows,
    /// Values of the step's tokens, `n_head_kv` heads of `d_v`.
    pub v: *const skv_rows,
    /// The residual stream that the attention's output is added to, one head of `n_residual` floats: errors count in proportion to it. NULL when
    /// it is not known: then all layers count alike. For `skv_layer_append`.
    pub residual: *const skv_rows,
    /// Floats of a row of `residual`.
    pub n_residual: usize,
    /// May be NULL: then heads count by their own outputs. For `skv_layer_append`.
    pub projection: *const skv_projection,
}

// SAFETY: `repr(C)`, the size first, numbers and pointers only.
unsafe impl Struct for skv_step {
    fn defaults() -> Self {
        let none = std::ptr::null();
        skv_step {
            struct_size: 0,
            arena: std::ptr::null_mut(),
            arena_bytes: 0,
            plan: std::ptr::null(),
            plan_ints: 0,
            q: none,
            k: none,
            v: none,
            residual: none,
            n_residual: 0,
            projection: std::ptr::null(),
        }
    }
}

/// Fill a step with nothing. `struct_size` is `sizeof(struct skv_step)`.
///
/// # Safety
/// `step` is NULL or writable for `struct_size` bytes.
#[no_mangle]
pub unsafe extern "C" fn skv_step_init(step: *mut skv_step, struct_size: usize) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe { init(step, struct_size) }
}

/// How the queries of a step attend, and where the result goes; semantics of `ggml_flash_attn_ext`. Fill it with `skv_attention_init`, then set what
/// the call takes.
#[allow(non_camel_case_types, reason = "the name is C's")]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct skv_attention {
    /// `sizeof(struct skv_attention)`; `skv_attention_init` sets it.
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
    /// One attention-sink logit per query head, or NULL. For `skv_layer_combine` and `skv_layer_prefill`.
    pub sinks: *const f32,
    /// Between `skv_layer_attend`, which writes it, and `skv_layer_combine`: as many floats as `skv_layer_partial_floats` says.
    pub partials: *mut f32,
    /// Floats of `partials`.
    pub n_partials: usize,
    /// `[token][n_head][d_v]`, last index fastest: what `skv_layer_combine` and `skv_layer_prefill` write.
    pub out: *mut f32,
    /// Floats of `out`.
    pub n_out: usize,
}

// SAFETY: `repr(C)`, the size first, numbers and pointers only.
unsafe impl Struct for skv_attention {
    fn defaults() -> Self {
        skv_attention {
            struct_size: 0,
            scale: 0.0,
            softcap: 0.0,
            mask: std::ptr::null(),
            mask_row_stride: 0,
            n_kv: 0,
            sinks: std::ptr::null(),
            partials: std::ptr::null_mut(),
            n_partials: 0,
            out: std::ptr::null_mut(),
            n_out: 0,
        }
    }
}

/// Fill it with zeros. `struct_size` is `sizeof(struct skv_attention)`.
///
/// # Safety
/// `attention` is NULL or writable for `struct_size` bytes.
#[no_mangle]
pub unsafe extern "C" fn skv_attention_init(attention: *mut skv_attention, struct_size: usize) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe { init(attention, struct_size) }
}

/// Borrow rows of `heads` heads of `d` floats.
///
/// # Safety
/// `rows` is NULL or valid, and its data covers what it describes.
unsafe fn rows<'a>(rows: *const skv_rows, heads: usize, d: usize, name: &'static str) -> Outcome<Rows<'a>> {
    // SAFETY: the caller's contract.
    let r = unsafe { take(rows, name)? };
    if r.n_rows == 0 {
        return Ok(Rows::empty());
    }
    if r.row_stride % 4 != 0 || r.head_stride % 4 != 0 {
        return Err(Failure::argument(format!("the strides of {name} are not whole floats")));
    }
    let (row, head) = (r.row_stride / 4, r.head_stride / 4);
    let span = (r.n_rows - 1).checked_mul(row).and_then(|a| (heads - 1).checked_mul(head).and_then(|b| a.checked_add(b)?.checked_add(d)));
    let span = span.ok_or_else(|| Failure::argument(format!("{name} is longer than memory")))?;
    // SAFETY: `span` floats are what the strides describe.
    Ok(Rows::new(unsafe { slice(r.data, span, name)? }, r.n_rows, row, head, heads, d)?)
}

impl skv_step {
    /// A plan whose indices fit the layer.
    ///
    /// # Safety
    /// The plan is there.
    pub(super) unsafe fn plan<'a>(&self, l: &Layer) -> Outcome<Plan<'a>> {
        // SAFETY: the caller's contract.
        let plan = Plan::parse(unsafe { slice(self.plan, self.plan_ints, "step.plan")? })?;
        plan.check(l.geometry())?;
        Ok(plan)
    }

    /// The arena, to read.
    ///
    /// # Safety
    /// The arena is there, and nobody changes it during `'a`.
    pub(super) unsafe fn arena<'a>(&self, l: &Layer) -> Outcome<&'a [u8]> {
        // SAFETY: the caller's contract.
        unsafe { pointer::arena(self.arena, self.arena_bytes, l.geometry().arena_bytes) }
    }

    /// The queries.
    ///
    /// # Safety
    /// The rows are there.
    pub(super) unsafe fn queries<'a>(&self, l: &Layer) -> Outcome<Rows<'a>> {
        // SAFETY: the caller's contract.
        unsafe { rows(self.q, l.shape().n_head, l.shape().d_k, "step.q") }
    }

    /// Keys and values of the step's tokens.
    ///
    /// # Safety
    /// The rows are there.
    pub(super) unsafe fn tokens<'a>(&self, l: &Layer) -> Outcome<(Rows<'a>, Rows<'a>)> {
        let g = l.shape();
        // SAFETY: the caller's contract.
        unsafe { Ok((rows(self.k, g.n_head_kv, g.d_k, "step.k")?, rows(self.v, g.n_head_kv, g.d_v, "step.v")?)) }
    }

    /// All that a step brings to the layer that stores it.
    ///
    /// # Safety
    /// What the step points to is there.
    pub(super) unsafe fn whole<'a>(&self, l: &Layer) -> Outcome<Step<'a>> {
        // SAFETY: the caller's contract.
        unsafe {
            let (q, (k, v)) = (self.queries(l)?, self.tokens(l)?);
            let residual = match self.residual.is_null() {
                true => None,
                false => Some((rows(self.residual, 1, self.n_residual, "step.residual")?, self.n_residual)),
            };
            Ok(Step { q, k, v, residual, projection: skv_projection::rows(self.projection, l.shape().n_head * l.shape().d_v)? })
        }
    }
}

impl skv_attention {
    pub(super) fn scoring(&self) -> Scoring {
        Scoring { scale: self.scale, softcap: self.softcap }
    }

    /// The mask of `n` query tokens.
    ///
    /// # Safety
    /// The mask covers what is described.
    pub(super) unsafe fn mask<'a>(&self, n: usize) -> Outcome<Mask<'a>> {
        if self.mask.is_null() {
            return Ok(Mask::All);
        }
        let stride = self.mask_row_stride / 2;
        if !self.mask_row_stride.is_multiple_of(2) || (n > 1 && stride < self.n_kv) {
            return Err(Failure::argument(format!("a mask row of {} bytes for {} cells", self.mask_row_stride, self.n_kv)));
        }
        let len = (n - 1).checked_mul(stride).and_then(|x| x.checked_add(self.n_kv)).ok_or_else(|| Failure::argument("attention.mask"))?;
        // SAFETY: the caller's contract; f16 has the layout of u16.
        let values = unsafe { slice(self.mask.cast::<f16>(), len, "attention.mask")? };
        Ok(Mask::F16 { values, stride, n_kv: self.n_kv })
    }

    /// The sinks of a layer's query heads.
    ///
    /// # Safety
    /// The sinks are there.
    pub(super) unsafe fn sinks<'a>(&self, l: &Layer) -> Outcome<&'a [f32]> {
        // SAFETY: the caller's contract.
        unsafe { slice(self.sinks, if self.sinks.is_null() { 0 } else { l.shape().n_head }, "attention.sinks") }
    }

    /// The output of `n` query tokens, of which each thread writes a part.
    pub(super) fn out(&self, l: &Layer, n: usize) -> Outcome<*mut f32> {
        let need = n.checked_mul(l.shape().n_head * l.shape().d_v).ok_or_else(|| Failure::argument(format!("{n} query tokens")))?;
        if self.n_out < need {
            return Err(Error::Buffer { need, have: self.n_out }.into());
        }
        if self.out.is_null() {
            return Err(Failure::Null("attention.out"));
        }
        check_slice(self.out, self.n_out, "attention.out")?;
        Ok(self.out)
    }

    /// The partial results of `n` query tokens, of which each thread writes a part.
    pub(super) fn partials(&self, l: &Layer, n: usize) -> Outcome<*mut f32> {
        let need = l.partial_floats(n);
        if self.n_partials < need {
            return Err(Error::Buffer { need, have: self.n_partials }.into());
        }
        if self.partials.is_null() {
            return Err(Failure::Null("attention.partials"));
        }
        check_slice(self.partials, self.n_partials, "attention.partials")?;
        Ok(self.partials)
    }
}

/// Whether so many query tokens can attend at once.
pub(super) fn check_queries(n: usize, least: usize) -> Outcome {
    if !(least..=SKV_MAX_QUERIES).contains(&n) {
        return Err(Failure::argument(format!("{n} query tokens; {least} to {SKV_MAX_QUERIES} are possible")));
    }
    Ok(())
}
