//! Saved states of a stream.

use super::*;
use crate::cache::{Cells, Layer};
use crate::state;

/// Borrow an array of layers.
///
/// # Safety
/// The array holds `n` valid pointers.
unsafe fn layers<'a>(layers: *const *const skv_layer, n: usize) -> std::result::Result<Vec<&'a Layer>, Failure> {
    // SAFETY: the caller's contract.
    unsafe { slice(layers, n, "layers")?.iter().map(|l| Ok(&borrow(*l, "layers[i]")?.layer)).collect() }
}

/// Write the rows of `cells` (ascending, all holding rows) into `buffer`. With `buffer` NULL and `capacity` 0 only `*size` is set;
/// it is the same for the same contents. A plan that was carried out, wholly or in part, must be committed first. `layers` are all of the geometry's,
/// in their order, `arena` is the stream's.
///
/// # Safety
/// Pointers are valid for what they describe or NULL; nothing changes the arena during the call.
#[no_mangle]
pub unsafe extern "C" fn skv_state_write(
    table: *mut skv_table,
    layers: *const *const skv_layer,
    n_layers: usize,
    arena: *const u8,
    arena_bytes: usize,
    cells: *const u32,
    n_cells: usize,
    buffer: *mut u8,
    capacity: usize,
    size: *mut usize,
) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe {
        on_table(table, |t| {
            let size = borrow_mut(size, "size")?;
            let layers = self::layers(layers, n_layers)?;
            let arena = super::arena(arena, arena_bytes, t.geometry().arena_bytes)?;
            let bytes = state::write(t, &layers, arena, slice(cells, n_cells, "cells")?)?;
            if buffer.is_null() && capacity == 0 {
                *size = bytes.len();
                return Ok(());
            }
            if capacity < bytes.len() {
                return Err(Error::Buffer { need: bytes.len(), have: capacity }.into());
            }
            slice_mut(buffer, bytes.len(), "buffer")?.copy_from_slice(&bytes);
            *size = bytes.len();
            Ok(())
        })
    }
}

/// Read what `skv_state_write` wrote into `cells`, in the order they were written; rows that
/// these cells held are dropped. `cell_pos` and
/// `cell_seq` describe all `n_all` cells of the stream as in `skv_table_plan`. Everything is verified first; on error these cells hold no rows and no other row has changed.
///
/// # Safety
/// Pointers are valid for what they describe or NULL; nothing else uses the arena.
#[no_mangle]
pub unsafe extern "C" fn skv_state_read(
    table: *mut skv_table,
    layers: *const *const skv_layer,
    n_layers: usize,
    arena: *mut u8,
    arena_bytes: usize,
    cell_pos: *const i32,
    cell_seq: *const i32,
    n_all: usize,
    cells: *const u32,
    n_cells: usize,
    buffer: *const u8,
    size: usize,
) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe {
        on_table(table, |t| {
            let layers = self::layers(layers, n_layers)?;
            check_arena(arena, arena_bytes, t.geometry().arena_bytes)?;
            let arena = slice_mut(arena, arena_bytes, "arena")?;
            let all = Cells { pos: slice(cell_pos, n_all, "cell_pos")?, seq: slice(cell_seq, n_all, "cell_seq")? };
            let bytes = slice(buffer, size, "buffer")?;
            Ok(state::read(t, &layers, arena, all, slice(cells, n_cells, "cells")?, bytes)?)
        })
    }
}
