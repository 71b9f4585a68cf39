//! `skv_table`: the host table of one stream.

use super::{borrow, borrow_mut, guard, silent, skv_geometry, skv_status, slice, slice_mut, Failure, LastError};
use crate::cache::{Cells, Table};
use crate::error::Error;
use std::ffi::c_char;

/// Where the rows of one stream's cells are, and the plan of its next step. For one thread at a time.
#[allow(non_camel_case_types, reason = "the name is C's")]
pub struct skv_table {
    pub(crate) table: Table,
    pub(crate) error: LastError,
}

/// Run a call on a table, keeping the text of a failure in it.
///
/// # Safety
/// `table` is NULL or valid and not used by another thread.
pub(crate) unsafe fn on_table(table: *mut skv_table, body: impl FnOnce(&mut Table) -> Result<(), Failure>) -> skv_status {
    // SAFETY: the caller's contract.
    match unsafe { borrow_mut(table, "table") } {
        Ok(t) => guard(|text| t.error.set(text), || body(&mut t.table)),
        Err(_) => skv_status::SKV_STATUS_NULL,
    }
}

/// An empty table. `*out` is owned by the caller; free it with `skv_table_free`. The geometry may be freed before.
///
/// # Safety
/// Pointers are valid or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_table_create(geometry: *const skv_geometry, out: *mut *mut skv_table) -> skv_status {
    guard(silent, || {
        // SAFETY: the caller's contract.
        let (g, out) = unsafe { (borrow(geometry, "geometry")?, borrow_mut(out, "out")?) };
        *out = Box::into_raw(Box::new(skv_table { table: Table::new(g.0.clone(), g.1.clone()), error: LastError::default() }));
        Ok(())
    })
}

/// Free a table; NULL is allowed.
///
/// # Safety
/// `table` is NULL or came from `skv_table_create` and was not freed.
#[no_mangle]
pub unsafe extern "C" fn skv_table_free(table: *mut skv_table) {
    if !table.is_null() {
        // SAFETY: the caller's contract.
        drop(unsafe { Box::from_raw(table) });
    }
}

/// Forget every cell, the bases and a pending plan.
///
/// # Safety
/// `table` is NULL or valid.
#[no_mangle]
pub unsafe extern "C" fn skv_table_reset(table: *mut skv_table) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe {
        on_table(table, |t| {
            t.reset();
            Ok(())
        })
    }
}

/// Plan one step of one stream. `cell_pos` and `cell_seq` describe all `n_cells` cells after the new tokens were put into them:
/// the position of each cell and the lowest sequence that holds it, both -1 when it is empty. `new_cells` are the cells of the
/// step's tokens in token order. Writes at most `skv_geometry_plan_ints(n_new)` ints and sets `*used` to how many count.
/// The plan is pending until `skv_table_commit`; planning again drops it, which is right only if it was not carried out.
///
/// # Safety
/// Pointers are valid for the given counts or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_table_plan(
    table: *mut skv_table,
    cell_pos: *const i32,
    cell_seq: *const i32,
    n_cells: usize,
    new_cells: *const u32,
    n_new: usize,
    plan: *mut i32,
    plan_capacity: usize,
    used: *mut usize,
) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe {
        on_table(table, |t| {
            let cells = Cells { pos: slice(cell_pos, n_cells, "cell_pos")?, seq: slice(cell_seq, n_cells, "cell_seq")? };
            let used = borrow_mut(used, "used")?;
            *used = t.plan(cells, slice(new_cells, n_new, "new_cells")?, slice_mut(plan, plan_capacity, "plan")?)?;
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
    unsafe { on_table(table, |t| Ok(t.commit()?)) }
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
    unsafe { on_table(table, |t| Ok(t.commit_replayed()?)) }
}

/// Whether a plan waits for its commit: `*pending` becomes 0 or 1.
///
/// # Safety
/// Pointers are valid or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_table_is_pending(table: *const skv_table, pending: *mut i32) -> skv_status {
    guard(silent, || {
        // SAFETY: the caller's contract.
        let (t, pending) = unsafe { (borrow(table, "table")?, borrow_mut(pending, "pending")?) };
        *pending = i32::from(t.table.is_pending());
        Ok(())
    })
}

/// Make `table` a copy of `source`. The caller copies the arenas byte for byte.
///
/// # Safety
/// Pointers are valid or NULL, and not the same.
#[no_mangle]
pub unsafe extern "C" fn skv_table_clone_from(table: *mut skv_table, source: *const skv_table) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe {
        on_table(table, |t| {
            if std::ptr::eq(source, table) {
                return Ok(());
            }
            let source = borrow(source, "source")?;
            if source.table.geometry() != t.geometry() {
                return Err(Error::Argument("the tables are of different geometries".into()).into());
            }
            *t = source.table.copied();
            Ok(())
        })
    }
}

/// Why the last failed call on this table failed; valid until the next failing call on it. Empty without one; NULL for NULL.
///
/// # Safety
/// `table` is NULL or valid.
#[no_mangle]
pub unsafe extern "C" fn skv_table_last_error(table: *const skv_table) -> *const c_char {
    // SAFETY: the caller's contract.
    unsafe { table.as_ref() }.map_or(std::ptr::null(), |t| t.error.as_ptr())
}
