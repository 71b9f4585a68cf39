//! `skv_cuda_device` and `skv_cuda_layer`: attention and storing on a CUDA device, for `include/spectral_kv_cuda.h`; and what a program needs that launches the kernels itself.
//!
//! What lies in device memory is a number here: nothing follows such a pointer. Must not know the feature `cuda`: without it no device can be created, and
//! nothing else is different.

use super::error::{skv_status, Failure, Outcome};
use super::layer::skv_layer;
use super::object::{create, free, handle, peek, read, Handle, Object};
use super::pointer::{borrow_mut, check_arena, check_slice, give, init, slice, slice_mut, take, Struct};
use super::step::{check_queries, skv_rows};
use crate::cache::{plan, Geometry, Layer, Plan};
use crate::cuda::launch::{self, Launch, StoreLaunch, THREADS};
use crate::cuda::layer::{SkvAttend, SkvLayer, SkvStore};
use crate::cuda::{Device, DeviceLayer};
use crate::error::{Error, Result};
use std::ffi::c_void;
use std::sync::Arc;

/// A CUDA device with the library's kernels on it. It uses the device's primary context, as the CUDA runtime does.
#[allow(non_camel_case_types, reason = "the name is C's")]
pub struct skv_cuda_device(Object<Arc<Device>>);

handle!(skv_cuda_device, Arc<Device>, "device");

/// A layer on a device: what never changes of it, in device memory.
#[allow(non_camel_case_types, reason = "the name is C's")]
pub struct skv_cuda_layer(Object<OnDevice>);

/// See [`skv_cuda_layer`].
pub(super) struct OnDevice {
    layer: DeviceLayer,
    geometry: Arc<Geometry>,
    index: usize,
}

handle!(skv_cuda_layer, OnDevice, "layer");

/// Load the NVIDIA driver, if no earlier call has, and the kernels onto the device with this number. `SKV_STATUS_DEVICE` without a driver, without such a
/// device, and in a library that was built without CUDA. `*out` is owned by the caller; free it with `skv_cuda_device_free`. Not while any stream of the
/// device is captured.
///
/// # Safety
/// `out` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn skv_cuda_device_create(ordinal: u32, out: *mut *mut skv_cuda_device) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe { create(out, || Ok(Arc::new(Device::new(ordinal)?))) }
}

/// Free a device; NULL is allowed. Layers on it stay valid, and keep what they need of it. Not while any stream of the device is captured.
///
/// # Safety
/// `device` is NULL or came from `skv_cuda_device_create` and was not freed.
#[no_mangle]
pub unsafe extern "C" fn skv_cuda_device_free(device: *mut skv_cuda_device) {
    // SAFETY: the caller's contract.
    unsafe { free(device) }
}

/// Upload what kernels have to know of a layer, rope and scoring as they are now; waits for the device. `SKV_STATUS_DEVICE` where its heads need more
/// shared memory than a block may have there. `*out` is owned by the caller; free it with `skv_cuda_layer_free`. Device and layer may be freed before. Not
/// while any stream of the device is captured.
///
/// # Safety
/// Pointers are valid or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_cuda_layer_create(device: *const skv_cuda_device, layer: *const skv_layer, out: *mut *mut skv_cuda_layer) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe {
        create(out, || {
            let (device, l) = (peek(device, "device")?, peek(layer, "layer")?);
            let layer = DeviceLayer::new(device.clone(), *l.shape(), &constants(l))?;
            Ok(OnDevice { layer, geometry: l.geometry().clone(), index: l.index() })
        })
    }
}

/// Free a layer on a device; NULL is allowed. Waits for kernels that use it. Not while any stream of the device is captured.
///
/// # Safety
/// `layer` is NULL or came from `skv_cuda_layer_create` and was not freed.
#[no_mangle]
pub unsafe extern "C" fn skv_cuda_layer_free(layer: *mut skv_cuda_layer) {
    // SAFETY: the caller's contract.
    unsafe { free(layer) }
}

/// Bytes of the workspace of calls of up to `n_tokens` (1 to 64) query tokens.
///
/// # Safety
/// Pointers are valid or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_cuda_layer_workspace_bytes(layer: *const skv_cuda_layer, n_tokens: usize, bytes: *mut usize) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe {
        read(layer, |l| {
            check_queries(n_tokens, 1)?;
            *borrow_mut(bytes, "bytes")? = l.layer.workspace_bytes(n_tokens)?;
            Ok(())
        })
    }
}

/// An attention call on a device. Pointers to `skv_rows` are of the host, and the `data` of these rows, like all else, is device memory. Fill it with
/// `skv_cuda_attention_init`, then set what the call takes.
#[allow(non_camel_case_types, reason = "the name is C's")]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct skv_cuda_attention {
    /// `sizeof(struct skv_cuda_attention)`; `skv_cuda_attention_init` sets it.
    pub struct_size: usize,
    /// The stream's arena.
    pub arena: *const u8,
    /// Bytes of `arena`.
    pub arena_bytes: usize,
    /// A copy of what `skv_table_plan` wrote.
    pub plan: *const i32,
    /// Ints that there is room for at `plan`: as many as `skv_geometry_plan_ints` says for the tokens of `k`.
    pub plan_ints: usize,
    /// Queries, roped, `n_head` heads of `d_k`; 1 to 64 rows.
    pub q: *const skv_rows,
    /// Keys of the plan's tokens, roped, `n_head_kv` heads of `d_k`.
    pub k: *const skv_rows,
    /// Values of the plan's tokens, `n_head_kv` heads of `d_v`.
    pub v: *const skv_rows,
    /// f16, a row of `n_kv` per query token: 0 shows a cell, -inf hides it, other values are added. NULL shows all rows.
    pub mask: *const u16,
    /// Bytes from a mask row to the next.
    pub mask_row_stride: usize,
    /// Cells the mask covers; cells behind them are hidden.
    pub n_kv: usize,
    /// One attention-sink logit per query head, or NULL.
    pub sinks: *const f32,
    /// What the call works in. Calls that may run at the same time need one each.
    pub workspace: *mut c_void,
    /// Bytes of `workspace`: as many as `skv_cuda_layer_workspace_bytes` says.
    pub workspace_bytes: usize,
    /// `[token][n_head][d_v]`, last index fastest: what the call writes.
    pub out: *mut f32,
    /// Floats of `out`.
    pub n_out: usize,
}

// SAFETY: `repr(C)`, the size first, numbers and pointers only.
unsafe impl Struct for skv_cuda_attention {
    fn defaults() -> Self {
        let none = std::ptr::null();
        skv_cuda_attention {
            struct_size: 0,
            arena: std::ptr::null(),
            arena_bytes: 0,
            plan: std::ptr::null(),
            plan_ints: 0,
            q: none,
            k: none,
            v: none,
            mask: std::ptr::null(),
            mask_row_stride: 0,
            n_kv: 0,
            sinks: std::ptr::null(),
            workspace: std::ptr::null_mut(),
            workspace_bytes: 0,
            out: std::ptr::null_mut(),
            n_out: 0,
        }
    }
}

/// Fill it with zeros. `struct_size` is `sizeof(struct skv_cuda_attention)`.
///
/// # Safety
/// `attention` is NULL or writable for `struct_size` bytes.
#[no_mangle]
pub unsafe extern "C" fn skv_cuda_attention_init(attention: *mut skv_cuda_attention, struct_size: usize) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe { init(attention, struct_size) }
}

/// Rows in device memory: their address, how many there are, and the floats from one to the next and from one head to the next.
struct DeviceRows {
    at: u64,
    n: usize,
    row: i64,
    head: i64,
}

impl DeviceRows {
    /// # Safety
    /// `rows` is NULL or valid; its data is not looked at.
    unsafe fn take(rows: *const skv_rows, name: &'static str) -> Outcome<Self> {
        // SAFETY: the caller's contract.
        let r = unsafe { take(rows, name)? };
        check_slice(r.data, r.n_rows, name)?;
        let floats = |stride: usize| (stride.is_multiple_of(4)).then_some(()).and_then(|()| i64::try_from(stride / 4).ok());
        let strides = floats(r.row_stride).zip(floats(r.head_stride));
        let (row, head) = strides.ok_or_else(|| Failure::argument(format!("the strides of {name} are not whole floats")))?;
        Ok(DeviceRows { at: address(r.data), n: r.n_rows, row, head })
    }
}

fn address<T>(p: *const T) -> u64 {
    p.addr() as u64
}

/// Whether a pointer may be that of `have` elements, of which `need` are needed.
fn check_room<T>(p: *const T, (need, have): (usize, usize), name: &'static str) -> Outcome {
    check_slice(p, need.max(1), name)?;
    if have < need {
        return Err(Error::Buffer { need, have }.into());
    }
    Ok(())
}

impl skv_cuda_attention {
    /// The call on layer `index` as kernels take it, after all checks that the host can make. `workspace` says how many bytes of it so many query tokens need.
    ///
    /// # Safety
    /// The rows are NULL or valid.
    unsafe fn call(&self, g: &Geometry, index: usize, workspace: impl FnOnce(usize) -> Result<usize>) -> Outcome<SkvAttend> {
        // SAFETY: the caller's contract.
        let [q, k, v] =
            unsafe { [DeviceRows::take(self.q, "attention.q")?, DeviceRows::take(self.k, "attention.k")?, DeviceRows::take(self.v, "attention.v")?] };
        let h = &g.layers[index];
        check_queries(q.n, 1)?;
        if k.n != v.n {
            return Err(Failure::argument(format!("{} keys and {} values", k.n, v.n)));
        }
        check_arena(self.arena, self.arena_bytes, g.arena_bytes)?;
        let plan_ints = plan::capacity(g, k.n.min(g.config.n_cells as usize));
        check_room(self.plan, (plan_ints, self.plan_ints), "attention.plan")?;
        check_room(self.workspace.cast::<f32>(), (workspace(q.n)?, self.workspace_bytes), "attention.workspace")?;
        check_room(self.out, (q.n * h.n_head * h.d_v, self.n_out), "attention.out")?;
        check_slice(self.sinks, usize::from(!self.sinks.is_null()), "attention.sinks")?;
        let (mask_row, n_kv) = self.mask(q.n)?;
        Ok(SkvAttend {
            arena: address(self.arena),
            plan: address(self.plan),
            q: q.at,
            k: k.at,
            v: v.at,
            q_row: q.row,
            q_head: q.head,
            k_row: k.row,
            k_head: k.head,
            v_row: v.row,
            v_head: v.head,
            mask: address(self.mask),
            mask_row,
            n_kv,
            n_tokens: q.n as i32,
            partials: address(self.workspace),
            sinks: address(self.sinks),
            out: address(self.out),
            ..SkvAttend::default()
        })
    }

    /// Elements from a mask row to the next, and how many count, for `n` query tokens.
    fn mask(&self, n: usize) -> Outcome<(i64, i32)> {
        if self.mask.is_null() {
            return Ok((0, 0));
        }
        check_slice(self.mask, 1, "attention.mask")?;
        let (stride, n_kv) = (self.mask_row_stride / 2, self.n_kv);
        let fits = self.mask_row_stride.is_multiple_of(2) && (n == 1 || stride >= n_kv);
        let numbers = i64::try_from(stride).ok().zip(i32::try_from(n_kv).ok()).filter(|_| fits);
        numbers.ok_or_else(|| Failure::argument(format!("a mask row of {} bytes for {n_kv} cells", self.mask_row_stride)))
    }
}

/// Attention of 1 to 64 query tokens over the stored rows and the step's own rows, as `skv_layer_attend` and `skv_layer_combine` compute it, with the
/// layer's scale and soft cap. Launches kernels on `stream`, a `cudaStream_t` or `CUstream` of the device (NULL: its default one), and returns before they
/// are done; it neither allocates nor waits, so that the stream may be captured. A captured call replays with other contents of the same memory, plans
/// among them. What is in device memory is not looked at: a plan of another geometry or of more tokens than `k` has rows makes kernels read anywhere, and
/// queries that are not finite give such outputs. Nothing is counted in `skv_layer_stats`.
///
/// # Safety
/// Pointers are valid for what they describe or NULL, in device memory until the stream has come past the call; nothing changes the arena meanwhile.
#[no_mangle]
pub unsafe extern "C" fn skv_cuda_layer_attend(
    layer: *const skv_cuda_layer,
    attention: *const skv_cuda_attention,
    stream: *mut c_void,
) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe {
        read(layer, |l| {
            let workspace = |n_tokens| Ok(l.layer.launch(n_tokens)?.workspace_bytes());
            let call = take(attention, "attention")?.call(&l.geometry, l.index, workspace)?;
            Ok(l.layer.attend(call, stream)?)
        })
    }
}

/// A step that a device stores. Pointers to `skv_rows` are of the host, and the `data` of these rows, like all else, is device memory. Fill it with
/// `skv_cuda_step_init`, then set what the call takes.
#[allow(non_camel_case_types, reason = "the name is C's")]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct skv_cuda_step {
    /// `sizeof(struct skv_cuda_step)`; `skv_cuda_step_init` sets it.
    pub struct_size: usize,
    /// The stream's arena.
    pub arena: *mut u8,
    /// Bytes of `arena`.
    pub arena_bytes: usize,
    /// A copy of what `skv_table_plan` wrote.
    pub plan: *const i32,
    /// Ints that there is room for at `plan`: as many as `skv_geometry_plan_ints` says for the tokens of `k`.
    pub plan_ints: usize,
    /// Queries of the plan's tokens, roped, `n_head` heads of `d_k`.
    pub q: *const skv_rows,
    /// Keys of the plan's tokens, roped, `n_head_kv` heads of `d_k`.
    pub k: *const skv_rows,
    /// Values of the plan's tokens, `n_head_kv` heads of `d_v`.
    pub v: *const skv_rows,
    /// As in `skv_step`; may be NULL.
    pub residual: *const skv_rows,
    /// Floats of a row of `residual`.
    pub n_residual: usize,
}

// SAFETY: `repr(C)`, the size first, numbers and pointers only.
unsafe impl Struct for skv_cuda_step {
    fn defaults() -> Self {
        let none = std::ptr::null();
        skv_cuda_step {
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
        }
    }
}

/// Fill it with zeros. `struct_size` is `sizeof(struct skv_cuda_step)`.
///
/// # Safety
/// `step` is NULL or writable for `struct_size` bytes.
#[no_mangle]
pub unsafe extern "C" fn skv_cuda_step_init(step: *mut skv_cuda_step, struct_size: usize) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe { init(step, struct_size) }
}

impl skv_cuda_step {
    /// The step as the kernel takes it, after all checks that the host can make.
    ///
    /// # Safety
    /// The rows are NULL or valid.
    unsafe fn call(&self, g: &Geometry) -> Outcome<SkvStore> {
        // SAFETY: the caller's contract.
        let [q, k, v] = unsafe { [DeviceRows::take(self.q, "step.q")?, DeviceRows::take(self.k, "step.k")?, DeviceRows::take(self.v, "step.v")?] };
        if q.n != k.n || k.n != v.n || k.n > g.config.n_cells as usize {
            return Err(Failure::argument(format!("{} queries, {} keys and {} values for {} cells", q.n, k.n, v.n, g.config.n_cells)));
        }
        check_arena(self.arena, self.arena_bytes, g.arena_bytes)?;
        check_room(self.plan, (plan::capacity(g, k.n), self.plan_ints), "step.plan")?;
        // SAFETY: the caller's contract.
        let (residual, n_residual) = unsafe { self.residual(k.n)? };
        Ok(SkvStore {
            arena: address(self.arena),
            plan: address(self.plan),
            q: q.at,
            k: k.at,
            v: v.at,
            q_row: q.row,
            q_head: q.head,
            k_row: k.row,
            k_head: k.head,
            v_row: v.row,
            v_head: v.head,
            residual: residual.at,
            residual_row: residual.row,
            n_residual,
            n_tokens: k.n as i32,
            ..SkvStore::default()
        })
    }

    /// Rows of the residual stream at `n` tokens, at no address where there are none, and their length.
    ///
    /// # Safety
    /// The rows are NULL or valid.
    unsafe fn residual(&self, n: usize) -> Outcome<(DeviceRows, i32)> {
        if self.residual.is_null() {
            return Ok((DeviceRows { at: 0, n: 0, row: 0, head: 0 }, 0));
        }
        // SAFETY: the caller's contract.
        let rows = unsafe { DeviceRows::take(self.residual, "step.residual")? };
        let floats = i32::try_from(self.n_residual).ok().filter(|_| rows.n == n);
        let floats = floats
            .ok_or_else(|| Failure::argument(format!("{} rows of {} floats of the residual stream for {n} tokens", rows.n, self.n_residual)))?;
        Ok((rows, floats))
    }
}

/// Whether `skv_cuda_layer_append` can carry out a plan on this layer: `*appends` becomes 0 or 1. It can unless the plan fits bases, studies heads for a fit, or
/// tells of a study that is over, which it does in one step after each fit: then the arena has to be on the host for `skv_layer_append`. Looks at `plan_ints` ints of the
/// plan, on the host, as `skv_table_plan` wrote it. No device is needed.
///
/// # Safety
/// Pointers are valid for what they describe or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_layer_cuda_appends(layer: *const skv_layer, plan: *const i32, plan_ints: usize, appends: *mut i32) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe {
        read(layer, |l| {
            let plan = Plan::parse(slice(plan, plan_ints, "plan")?)?;
            plan.check(l.geometry())?;
            *borrow_mut(appends, "appends")? = i32::from(plan.is_for_devices() && StoreLaunch::new(l.shape()).is_ok());
            Ok(())
        })
    }
}

/// Store the step, as `skv_layer_append` does, where `skv_layer_cuda_appends` says so. Runs after the attention of the same step, on the same stream. Launches a kernel on
/// `stream` and returns before it is done, as `skv_cuda_layer_attend` does: captured, it stores other steps of as many tokens. Any other plan leaves the arena as it is, and so
/// does one of another number of tokens than `k` has rows; all else of the plan is believed.
///
/// Keys and values must be finite in f16: nobody looks. How well the bases still fit what comes is not watched: where it matters that another fit follows when a text
/// changes its kind, let the host store a step now and then. Neither counts what a device stores in `skv_layer_stats`. `SKV_STATUS_DEVICE` for heads of more than 512 elements,
/// and where they need more shared memory than a block may have there.
///
/// # Safety
/// Pointers are valid for what they describe or NULL, in device memory until the stream has come past the call; nothing else uses the arena meanwhile.
#[no_mangle]
pub unsafe extern "C" fn skv_cuda_layer_append(layer: *const skv_cuda_layer, step: *const skv_cuda_step, stream: *mut c_void) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe {
        read(layer, |l| {
            let call = take(step, "step")?.call(&l.geometry)?;
            Ok(l.layer.store(call, stream)?)
        })
    }
}

/// What kernels have to know of a layer.
fn constants(l: &Layer) -> SkvLayer {
    SkvLayer::new(l.geometry(), l.index(), l.rope(), l.scoring())
}

/// For programs that launch the kernels themselves, where there is no device: write `struct SkvLayer` of kernels/layer.h into `buffer`, rope and scoring as
/// they are now, and its bytes to `*size`. With `buffer` NULL and `capacity` 0 only `*size` is set. Works in every build, without a device.
///
/// # Safety
/// Pointers are valid for what they describe or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_layer_cuda_constants(layer: *const skv_layer, buffer: *mut u8, capacity: usize, size: *mut usize) -> skv_status {
    const BYTES: usize = size_of::<SkvLayer>();
    // SAFETY: the caller's contract.
    unsafe {
        read(layer, |l| {
            let size = borrow_mut(size, "size")?;
            if !(buffer.is_null() && capacity == 0) {
                if capacity < BYTES {
                    return Err(Error::Buffer { need: BYTES, have: capacity }.into());
                }
                let constants = constants(l);
                std::ptr::copy_nonoverlapping((&raw const constants).cast::<u8>(), slice_mut(buffer, BYTES, "buffer")?.as_mut_ptr(), BYTES);
            }
            *size = BYTES;
            Ok(())
        })
    }
}

/// How an attention call is launched. Call `skv_cuda_launch_init` before it is filled.
#[allow(non_camel_case_types, reason = "the name is C's")]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct skv_cuda_launch {
    /// `sizeof(struct skv_cuda_launch)`; `skv_cuda_launch_init` sets it.
    pub struct_size: usize,
    /// Query columns of a block, 8 or 16: which kernel, `skv_attend_8` or `skv_attend_16`.
    pub columns: u32,
    /// Threads of a block, of all kernels.
    pub threads: u32,
    /// Blocks of the attention kernel in x, y and z; x is the number of splits.
    pub grid: [u32; 3],
    /// Blocks of `skv_combine`.
    pub combine_blocks: u32,
    /// Dynamic shared memory of a block of the attention kernel; `skv_combine` has none.
    pub shared_bytes: usize,
    /// Bytes of the partial results.
    pub workspace_bytes: usize,
}

// SAFETY: `repr(C)`, the size first, numbers only.
unsafe impl Struct for skv_cuda_launch {
    fn defaults() -> Self {
        skv_cuda_launch { struct_size: 0, columns: 0, threads: 0, grid: [0; 3], combine_blocks: 0, shared_bytes: 0, workspace_bytes: 0 }
    }
}

/// Fill it with zeros. `struct_size` is `sizeof(struct skv_cuda_launch)`.
///
/// # Safety
/// `launch` is NULL or writable for `struct_size` bytes.
#[no_mangle]
pub unsafe extern "C" fn skv_cuda_launch_init(launch: *mut skv_cuda_launch, struct_size: usize) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe { init(launch, struct_size) }
}

/// For the same programs: how a call of `n_tokens` (1 to 64) query tokens is launched on a device of so many multiprocessors. It depends on nothing that is
/// stored.
///
/// # Safety
/// Pointers are valid or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_layer_cuda_launch(
    layer: *const skv_layer,
    n_tokens: usize,
    n_multiprocessors: u32,
    out: *mut skv_cuda_launch,
) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe {
        read(layer, |l| {
            check_queries(n_tokens, 1)?;
            let units = launch::units(l.geometry().exact, l.geometry().tiles);
            let launch = Launch::new(l.shape(), units, n_tokens, n_multiprocessors)?;
            let out_launch = skv_cuda_launch {
                struct_size: 0,
                columns: launch.columns as u32,
                threads: THREADS as u32,
                grid: launch.grid,
                combine_blocks: launch.combine_blocks,
                shared_bytes: launch.shared_bytes,
                workspace_bytes: launch.workspace_bytes(),
            };
            give(out, &out_launch, "out")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, LayerShape};

    /// Addresses of no memory: nothing may follow them.
    fn somewhere<T>(at: usize) -> *mut T {
        std::ptr::without_provenance_mut(at)
    }

    fn rows(at: usize, n_rows: usize, heads: usize, d: usize) -> skv_rows {
        skv_rows { struct_size: size_of::<skv_rows>(), data: somewhere(at), n_rows, row_stride: 4 * heads * d, head_stride: 4 * d }
    }

    /// A call of three tokens on a layer of 8 query heads, 2 KV heads, 64 elements of K and 32 of V, with this changed.
    fn call(change: impl FnOnce(&mut skv_cuda_attention, &mut [skv_rows; 3])) -> Outcome<SkvAttend> {
        let shape = LayerShape { n_head: 8, n_head_kv: 2, d_k: 64, d_v: 32 };
        let g = Geometry::new(&Config { n_cells: 4096, ..Config::default() }, &[shape]).unwrap();
        let mut all = [rows(0x1000, 3, 8, 64), rows(0x2000, 3, 2, 64), rows(0x3000, 3, 2, 32)];
        let mut attention = skv_cuda_attention {
            arena: somewhere(0x4000),
            arena_bytes: g.arena_bytes,
            plan: somewhere(0x5000),
            plan_ints: plan::capacity(&g, 3),
            mask: somewhere(0x6000),
            mask_row_stride: 2 * 300,
            n_kv: 256,
            sinks: somewhere(0x7000),
            workspace: somewhere(0x8000),
            workspace_bytes: 3000,
            out: somewhere(0x9000),
            n_out: 3 * 8 * 32,
            ..Struct::defaults()
        };
        change(&mut attention, &mut all);
        let given = |rows: &skv_rows| if rows.struct_size == 0 { std::ptr::null() } else { &raw const *rows };
        (attention.q, attention.k, attention.v) = (given(&all[0]), given(&all[1]), given(&all[2]));
        // SAFETY: the rows are there.
        unsafe { attention.call(&g, 0, |n_tokens| Ok(1000 * n_tokens)) }
    }

    #[test]
    fn a_call_reaches_the_kernels_in_floats_and_elements() {
        let c = call(|_, _| ()).ok().unwrap();
        assert_eq!([c.q, c.k, c.v, c.arena, c.plan, c.mask, c.sinks, c.partials, c.out], [1, 2, 3, 4, 5, 6, 7, 8, 9].map(|at| at << 12));
        assert_eq!([c.q_row, c.q_head, c.k_row, c.k_head, c.v_row, c.v_head, c.mask_row], [512, 64, 128, 64, 64, 32, 300]);
        assert_eq!((c.n_tokens, c.n_kv, c.layer, c.splits), (3, 256, 0, 0));
        let c = call(|a, _| (a.mask, a.sinks, a.mask_row_stride) = (somewhere(0), somewhere(0), 1)).ok().unwrap();
        assert_eq!((c.mask, c.sinks), (0, 0));
        // A plan without tokens has no keys.
        assert!(call(|_, all| all[1..].iter_mut().for_each(|rows| (rows.data, rows.n_rows) = (somewhere(0), 0))).is_ok());
    }

    #[test]
    fn what_is_missing_is_named() {
        let missing = |change: fn(&mut skv_cuda_attention, &mut [skv_rows; 3])| match call(change) {
            Err(Failure::Null(name)) => name,
            _ => panic!("nothing is missing"),
        };
        assert_eq!(missing(|a, _| a.arena = somewhere(0)), "arena");
        assert_eq!(missing(|a, _| a.plan = somewhere(0)), "attention.plan");
        assert_eq!(missing(|a, _| a.workspace = somewhere(0)), "attention.workspace");
        assert_eq!(missing(|a, _| a.out = somewhere(0)), "attention.out");
        assert_eq!(missing(|_, all| all[0].data = somewhere(0)), "attention.q");
        assert_eq!(missing(|_, all| all[1].data = somewhere(0)), "attention.k");
        assert_eq!(missing(|_, all| all[2].struct_size = 0), "attention.v");
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        type Change = fn(&mut skv_cuda_attention, &mut [skv_rows; 3]);
        let short: [Change; 4] = [|a, _| a.arena_bytes -= 1, |a, _| a.plan_ints -= 1, |a, _| a.workspace_bytes -= 1, |a, _| a.n_out -= 1];
        for change in short {
            assert!(matches!(call(change), Err(Failure::Library(Error::Buffer { need, have })) if need == have + 1));
        }
        let wrong: [Change; 13] = [
            |_, all| all[0].n_rows = 0,
            |_, all| all[0].n_rows = 65,
            |_, all| all[1].n_rows = 2,
            |_, all| all[0].row_stride = 2,
            |_, all| all[2].head_stride = usize::MAX,
            |_, all| all[1].data = somewhere(0x2002),
            |a, _| a.arena = somewhere(0x4010),
            |a, _| a.plan = somewhere(0x5002),
            |a, _| a.mask = somewhere(0x6001),
            |a, _| a.mask_row_stride = 2 * 255,
            |a, _| a.mask_row_stride = 601,
            |a, _| a.sinks = somewhere(0x7001),
            |a, _| (a.n_kv, a.mask_row_stride) = (1 << 31, 1 << 33),
        ];
        for (i, change) in wrong.into_iter().enumerate() {
            assert!(matches!(call(change), Err(Failure::Library(Error::Argument(_)))), "{i}");
        }
    }

    /// A step of three tokens on the same layer, with this changed.
    fn step(change: impl FnOnce(&mut skv_cuda_step, &mut [skv_rows; 4])) -> Outcome<SkvStore> {
        let shape = LayerShape { n_head: 8, n_head_kv: 2, d_k: 64, d_v: 32 };
        let g = Geometry::new(&Config { n_cells: 4096, ..Config::default() }, &[shape]).unwrap();
        let mut all = [rows(0x1000, 3, 8, 64), rows(0x2000, 3, 2, 64), rows(0x3000, 3, 2, 32), rows(0x6000, 3, 1, 300)];
        let mut step = skv_cuda_step {
            arena: somewhere(0x4000),
            arena_bytes: g.arena_bytes,
            plan: somewhere(0x5000),
            plan_ints: plan::capacity(&g, 3),
            n_residual: 300,
            ..Struct::defaults()
        };
        change(&mut step, &mut all);
        let given = |rows: &skv_rows| if rows.struct_size == 0 { std::ptr::null() } else { &raw const *rows };
        (step.q, step.k, step.v, step.residual) = (given(&all[0]), given(&all[1]), given(&all[2]), given(&all[3]));
        // SAFETY: the rows are there.
        unsafe { step.call(&g) }
    }

    #[test]
    fn a_step_reaches_the_kernel_in_floats() {
        let c = step(|_, _| ()).ok().unwrap();
        assert_eq!([c.q, c.k, c.v, c.arena, c.plan, c.residual], [1, 2, 3, 4, 5, 6].map(|at| at << 12));
        assert_eq!([c.q_row, c.q_head, c.k_row, c.k_head, c.v_row, c.v_head, c.residual_row], [512, 64, 128, 64, 64, 32, 300]);
        assert_eq!((c.n_tokens, c.n_residual, c.layer), (3, 300, 0));
        let c = step(|_, all| all[3].struct_size = 0).ok().unwrap();
        assert_eq!((c.residual, c.n_residual), (0, 0));
        // A plan without tokens has no rows.
        assert!(step(|_, all| all.iter_mut().for_each(|rows| (rows.data, rows.n_rows) = (somewhere(0), 0))).is_ok());
    }

    #[test]
    fn a_step_that_does_not_fit_is_refused() {
        let missing = |change: fn(&mut skv_cuda_step, &mut [skv_rows; 4])| match step(change) {
            Err(Failure::Null(name)) => name,
            _ => panic!("nothing is missing"),
        };
        assert_eq!(missing(|s, _| s.arena = somewhere(0)), "arena");
        assert_eq!(missing(|s, _| s.plan = somewhere(0)), "step.plan");
        assert_eq!(missing(|_, all| all[0].struct_size = 0), "step.q");
        assert_eq!(missing(|_, all| all[2].data = somewhere(0)), "step.v");
        type Change = fn(&mut skv_cuda_step, &mut [skv_rows; 4]);
        let short: [Change; 2] = [|s, _| s.arena_bytes -= 1, |s, _| s.plan_ints -= 1];
        for change in short {
            assert!(matches!(step(change), Err(Failure::Library(Error::Buffer { need, have })) if need == have + 1));
        }
        let wrong: [Change; 8] = [
            |_, all| all[0].n_rows = 2,
            |_, all| all[2].n_rows = 4,
            |_, all| all.iter_mut().for_each(|rows| rows.n_rows = 4097),
            |_, all| all[3].n_rows = 2,
            |_, all| all[3].row_stride = 1201,
            |s, _| s.n_residual = 1 << 31,
            |_, all| all[1].data = somewhere(0x2002),
            |s, _| s.arena = somewhere(0x4010),
        ];
        for (i, change) in wrong.into_iter().enumerate() {
            assert!(matches!(step(change), Err(Failure::Library(Error::Argument(_)))), "{i}");
        }
    }
}
