//! Saved states of a stream.

use super::error::{skv_status, Failure, Outcome};
use super::layer::skv_layer;
use super::object::{change, peek, read};
use super::pointer::{arena, borrow_mut, check_arena, init, slice, slice_mut, take, Struct};
use super::table::{skv_cells, skv_table};
use crate::cache::Layer;
use crate::state;

/// What holds the rows of a stream besides its table. Fill it with `skv_stream_init`, then set all of it.
#[allow(non_camel_case_types, reason = "the name is C's")]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct skv_stream {
    /// `sizeof(struct skv_stream)`; `skv_stream_init` sets it.
    pub struct_size: usize,
    /// All layers of the geometry, in their order.
    pub layers: *const *const skv_layer,
    /// How many.
    pub n_layers: usize,
    /// The stream's arena. Only `skv_state_read` writes to it.
    pub arena: *mut u8,
    /// Bytes of `arena`.
    pub arena_bytes: usize,
}

// SAFETY: `repr(C)`, the size first, numbers and pointers only.
unsafe impl Struct for skv_stream {
    fn defaults() -> Self {
        skv_stream { struct_size: 0, layers: std::ptr::null(), n_layers: 0, arena: std::ptr::null_mut(), arena_bytes: 0 }
    }
}

impl skv_stream {
    /// The layers.
    ///
    /// # Safety
    /// The array holds valid pointers or NULL.
    unsafe fn layers<'a>(&self) -> Outcome<Vec<&'a Layer>> {
        // SAFETY: the caller's contract.
        unsafe { slice(self.layers, self.n_layers, "stream.layers")?.iter().map(|l| peek(*l, "stream.layers[i]")).collect() }
    }
}

/// Fill a stream with nothing. `struct_size` is `sizeof(struct skv_stream)`.
///
/// # Safety
/// `stream` is NULL or writable for `struct_size` bytes.
#[no_mangle]
pub unsafe extern "C" fn skv_stream_init(stream: *mut skv_stream, struct_size: usize) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe { init(stream, struct_size) }
}

/// Write the rows of `cells` (ascending, all holding rows) into `buffer`, and their bytes to `*size`. With `buffer` NULL and `capacity` 0 only `*size` is
/// set, which takes little time. A plan that was carried out, wholly or in part, must be committed first. The bytes are the same on every machine that
/// could read them: little-endian.
///
/// # Safety
/// Pointers are valid for what they describe or NULL; nothing changes the arena during the call.
#[no_mangle]
pub unsafe extern "C" fn skv_state_write(
    table: *const skv_table,
    stream: *const skv_stream,
    cells: *const u32,
    n_cells: usize,
    buffer: *mut u8,
    capacity: usize,
    size: *mut usize,
) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe {
        read(table, |t| {
            let (s, size) = (take(stream, "stream")?, borrow_mut(size, "size")?);
            let arena = arena(s.arena, s.arena_bytes, t.geometry().arena_bytes)?;
            let state = state::Saving::new(t, &s.layers()?, arena, slice(cells, n_cells, "cells")?)?;
            if !(buffer.is_null() && capacity == 0) {
                if buffer.is_null() {
                    return Err(Failure::Null("buffer"));
                }
                state.write(slice_mut(buffer, capacity, "buffer")?)?;
            }
            *size = state.size();
            Ok(())
        })
    }
}

/// Read what `skv_state_write` wrote into the cells `new_cells`, in the order they were written; rows that these cells held are dropped. `cells` are all
/// cells of the stream as they are with the rows that come. Everything is verified first; on error `new_cells` hold no rows and no other row has changed.
///
/// # Safety
/// Pointers are valid for what they describe or NULL; nothing else uses the arena.
#[no_mangle]
pub unsafe extern "C" fn skv_state_read(
    table: *mut skv_table,
    stream: *const skv_stream,
    cells: *const skv_cells,
    new_cells: *const u32,
    n_new: usize,
    buffer: *const u8,
    size: usize,
) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe {
        change(table, |t| {
            let s = take(stream, "stream")?;
            let (layers, cells) = (s.layers()?, skv_cells::borrow(cells)?);
            check_arena(s.arena, s.arena_bytes, t.geometry().arena_bytes)?;
            let (new, bytes) = (slice(new_cells, n_new, "new_cells")?, slice(buffer, size, "buffer")?);
            Ok(state::read(t, &layers, slice_mut(s.arena, s.arena_bytes, "arena")?, cells, new, bytes)?)
        })
    }
}
