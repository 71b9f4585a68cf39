//! `skv_geometry`: sizes of everything.

use super::{borrow, borrow_mut, copy_text, guard, report, silent, skv_config, skv_layer_shape, skv_size_report, skv_status, slice, versioned};
use crate::cache::{plan, Findings, Geometry};
use crate::error::Error;
use std::ffi::c_char;
use std::sync::Arc;

/// Sizes of a cache, computed from a configuration. May be used by several threads. Tables and layers of one cache are made from one geometry:
/// bits are shared out over all of its layers.
#[allow(non_camel_case_types, reason = "the name is C's")]
pub struct skv_geometry(pub(crate) Arc<Geometry>, pub(crate) Arc<Findings>);

/// Check a configuration and compute all sizes. `*out` is owned by the caller; free it with `skv_geometry_free`.
/// `err` (may be NULL) receives the reason of a failure.
///
/// # Safety
/// `config` and `layers` (`n_layers` structs) are readable, `out` writable, `err` writable for `err_len` bytes; each may be NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_geometry_create(
    config: *const skv_config,
    layers: *const skv_layer_shape,
    n_layers: usize,
    out: *mut *mut skv_geometry,
    err: *mut c_char,
    err_len: usize,
) -> skv_status {
    // SAFETY: the caller's contract.
    let tell = |text: String| unsafe { copy_text(&text, err, err_len) };
    guard(tell, || {
        // SAFETY: the caller's contract.
        let (config, out) = unsafe { (versioned(config, skv_config::defaults(), "config")?, borrow_mut(out, "out")?) };
        // SAFETY: the caller's contract.
        let layers = unsafe { slice(layers, n_layers, "layers")? };
        if layers.iter().any(|l| l.struct_size != size_of::<skv_layer_shape>()) {
            return Err(Error::Argument("layers[i].struct_size must be sizeof(skv_layer_shape)".into()).into());
        }
        let shapes: Vec<_> = layers.iter().map(|l| l.to_shape()).collect();
        let geometry = Arc::new(Geometry::new(&config.to_config(), &shapes)?);
        *out = Box::into_raw(Box::new(skv_geometry(geometry, Arc::default())));
        Ok(())
    })
}

/// Free a geometry; NULL is allowed. Tables and layers made from it stay valid.
///
/// # Safety
/// `geometry` is NULL or came from `skv_geometry_create` and was not freed.
#[no_mangle]
pub unsafe extern "C" fn skv_geometry_free(geometry: *mut skv_geometry) {
    if !geometry.is_null() {
        // SAFETY: the caller's contract.
        drop(unsafe { Box::from_raw(geometry) });
    }
}

/// Bytes of the arena of one stream, which all layers share; a multiple of 256. An arena must start at a multiple of 32 and be zeroed before use.
///
/// # Safety
/// Pointers are valid or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_geometry_arena_bytes(geometry: *const skv_geometry, bytes: *mut usize) -> skv_status {
    guard(silent, || {
        // SAFETY: the caller's contract.
        let (g, bytes) = unsafe { (borrow(geometry, "geometry")?, borrow_mut(bytes, "bytes")?) };
        *bytes = g.0.arena_bytes;
        Ok(())
    })
}

/// Ints of the longest plan of one stream for a step of `n_tokens` tokens. More tokens than cells cannot be stored: their plan is
/// as long as that of a full stream.
///
/// # Safety
/// Pointers are valid or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_geometry_plan_ints(geometry: *const skv_geometry, n_tokens: usize, ints: *mut usize) -> skv_status {
    guard(silent, || {
        // SAFETY: the caller's contract.
        let (g, ints) = unsafe { (borrow(geometry, "geometry")?, borrow_mut(ints, "ints")?) };
        *ints = plan::capacity(&g.0, n_tokens.min(g.0.config.n_cells as usize));
        Ok(())
    })
}

/// Bytes held, against f16.
///
/// # Safety
/// Pointers are valid or NULL; `out->struct_size` is set.
#[no_mangle]
pub unsafe extern "C" fn skv_geometry_report(geometry: *const skv_geometry, out: *mut skv_size_report) -> skv_status {
    guard(silent, || {
        // SAFETY: the caller's contract.
        unsafe {
            let g = borrow(geometry, "geometry")?;
            report(out, &skv_size_report::new(&g.0.report(), &g.0), "out")
        }
    })
}
