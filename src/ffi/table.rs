//! `skv_table`: the host table of one stream.

use super::error::{skv_status, Failure, Outcome};
use super::geometry::skv_geometry;
use super::object::{change, create, free, handle, peek, Handle, Object};
use super::pointer::{borrow_mut, init, slice, slice_mut, take, Struct};
use crate::cache::{Cells, Table};

/// Where the rows of one stream's cells are, and the plan of its next step.
#[allow(non_camel_case_types, reason = "the name is C's")]
pub struct skv_table(Object<Table>);

handle!(skv_table, Table, "table");

/// All cells of a stream. Fill it with `skv_cells_init`, then set all of it.
#[allow(non_camel_case_types, reason = "the name is C's")]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct skv_cells {
    /// `sizeof(struct skv_cells)`; `skv_cells_init` sets it.
    pub struct_size: usize,
    /// Position of each cell, -1 when it is empty.
    pub pos: *const i32,
    /// The lowest sequence that holds each cell, -1 when it is empty.
    pub seq: *const i32,
    /// Cells: all that the stream has.
    pub n_cells: usize,
}

// SAFETY: `repr(C)`, the size first, a number and pointers only.
unsafe impl Struct for skv_cells {
    fn defaults() -> Self {
        skv_cells { struct_size: 0, pos: std::ptr::null(), seq: std::ptr::null(), n_cells: 0 }
    }
}

impl skv_cells {
    /// The cells as the library has them.
    ///
    /// # Safety
    /// `p` is NULL or valid, and the cells are there.
    pub(super) unsafe fn borrow<'a>(p: *const Self) -> Outcome<Cells<'a>> {
        // SAFETY: the caller's contract.
        unsafe {
            let c = take(p, "cells")?;
            Ok(Cells { pos: slice(c.pos, c.n_cells, "cells.pos")?, seq: slice(c.seq, c.n_cells, "cells.seq")? })
        }
    }
}

/// Fill it with no cells. `struct_size` is `sizeof(struct skv_cells)`.
///
/// # Safety
/// `cells` is NULL or writable for `struct_size` bytes.
#[no_mangle]
pub unsafe extern "C" fn skv_cells_init(cells: *mut skv_cells, struct_size: usize) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe { init(cells, struct_size) }
}

/// An empty table. `*out` is owned by the caller; free it with `skv_table_free`. The geometry may be freed before.
///
/// # Safety
/// Pointers are valid or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_table_create(geometry: *const skv_geometry, out: *mut *mut skv_table) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe {
        create(out, || {
            let g = peek(geometry, "geometry")?;
            Ok(Table::new(g.sizes.clone(), g.findings.clone()))
        })
    }
}

/// Free a table; NULL is allowed.
///
/// # Safety
/// `table` is NULL or came from `skv_table_create` and was not freed.
#[no_mangle]
pub unsafe extern "C" fn skv_table_free(table: *mut skv_table) {
    // SAFETY: the caller's contract.
    unsafe { free(table) }
}

/// Forget every cell, the bases and a pending plan.
///
/// # Safety
/// `table` is NULL or valid.
#[no_mangle]
pub unsafe extern "C" fn skv_table_reset(table: *mut skv_table) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe {
        change(table, |t| {
            t.reset();
            Ok(())
        })
    }
}

/// Plan one step of one stream. `cells` are as they are after the new tokens were put into them, `new_cells` those of the step's tokens in token order.
/// Writes at most `skv_geometry_plan_ints(n_new)` ints, which `capacity` must allow, and sets `*used` to how many count.
/// The plan is pending until `skv_table_commit`; planning again drops it, which is right only if it was not carried out.
///
/// # Safety
/// Pointers are valid for the given counts or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_table_plan(
    table: *mut skv_table,
    cells: *const skv_cells,
    new_cells: *const u32,
    n_new: usize,
    plan: *mut i32,
    capacity: usize,
    used: *mut usize,
) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe {
        change(table, |t| {
            let (cells, used) = (skv_cells::borrow(cells)?, borrow_mut(used, "used")?);
            *used = t.plan(cells, slice(new_cells, n_new, "new_cells")?, slice_mut(plan, capacity, "plan")?)?;
            Ok(())
        })
    }
}

/// The pending plan was carried out on every layer.
///
/// # Safety
/// `table` is NULL or valid.
#[no_mangle]
pub unsafe extern "C" fn skv_table_commit(table: *mut skv_table) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe { change(table, |t| Ok(t.commit()?)) }
}

/// The pending plan was carried out on some layers only, and `skv_layer_replay` was called on all: keep what it did to rows
/// already stored, without the new tokens. `SKV_STATUS_STATE` when the step was to fit the bases and too few rows were stored
/// before it: then the table has forgotten all rows.
///
/// # Safety
/// `table` is NULL or valid.
#[no_mangle]
pub unsafe extern "C" fn skv_table_commit_replayed(table: *mut skv_table) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe { change(table, |t| Ok(t.commit_replayed()?)) }
}

/// Make `table` a copy of `source`. The caller copies the arenas byte for byte.
///
/// # Safety
/// Pointers are valid or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_table_clone_from(table: *mut skv_table, source: *const skv_table) -> skv_status {
    if std::ptr::eq(source, table) {
        // SAFETY: the caller's contract; nothing is borrowed twice.
        return unsafe { change(table, |_| Ok(())) };
    }
    // SAFETY: the caller's contract.
    unsafe {
        change(table, |t| {
            let source = peek(source, "source")?;
            if source.geometry() != t.geometry() {
                return Err(Failure::argument("the tables are of different geometries"));
            }
            *t = source.copied();
            Ok(())
        })
    }
}
