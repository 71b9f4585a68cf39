//! `skv_geometry`: sizes of everything.

use super::error::skv_status;
use super::object::{create, free, handle, read, Handle, Object};
use super::pointer::{borrow_mut, give, take, take_all};
use super::types::{skv_config, skv_layer_shape, skv_size_report};
use crate::cache::{plan, Findings, Geometry};
use std::sync::Arc;

/// Sizes of a cache, computed from a configuration. Tables and layers of one cache are made from one geometry: bits are shared out over all of its layers.
#[allow(non_camel_case_types, reason = "the name is C's")]
pub struct skv_geometry(Object<Shared>);

/// What the tables and layers of one geometry have in common.
pub(super) struct Shared {
    pub(super) sizes: Arc<Geometry>,
    pub(super) findings: Arc<Findings>,
}

handle!(skv_geometry, Shared, "geometry");

/// Check a configuration and compute all sizes. `*out` is owned by the caller; free it with `skv_geometry_free`. `layers` are `n_layers` shapes, one
/// after another.
///
/// # Safety
/// Pointers are valid for what they describe or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_geometry_create(
    config: *const skv_config,
    layers: *const skv_layer_shape,
    n_layers: usize,
    out: *mut *mut skv_geometry,
) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe {
        create(out, || {
            let config = take(config, "config")?.to_config();
            let shapes: Vec<_> = take_all(layers, n_layers, "layers")?.into_iter().map(skv_layer_shape::to_shape).collect();
            Ok(Shared { sizes: Arc::new(Geometry::new(&config, &shapes)?), findings: Arc::default() })
        })
    }
}

/// Free a geometry; NULL is allowed. Tables and layers made from it stay valid.
///
/// # Safety
/// `geometry` is NULL or came from `skv_geometry_create` and was not freed.
#[no_mangle]
pub unsafe extern "C" fn skv_geometry_free(geometry: *mut skv_geometry) {
    // SAFETY: the caller's contract.
    unsafe { free(geometry) }
}

/// Bytes of the arena of one stream, which all layers share; a multiple of 256. An arena must start at a multiple of 32 and be zeroed before use.
///
/// # Safety
/// Pointers are valid or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_geometry_arena_bytes(geometry: *const skv_geometry, bytes: *mut usize) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe {
        read(geometry, |g| {
            *borrow_mut(bytes, "bytes")? = g.sizes.arena_bytes;
            Ok(())
        })
    }
}

/// Ints of the longest plan of one stream for a step of `n_tokens` tokens. More tokens than cells cannot be stored: their plan is
/// as long as that of a full stream.
///
/// # Safety
/// Pointers are valid or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_geometry_plan_ints(geometry: *const skv_geometry, n_tokens: usize, ints: *mut usize) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe {
        read(geometry, |g| {
            *borrow_mut(ints, "ints")? = plan::capacity(&g.sizes, n_tokens.min(g.sizes.config.n_cells as usize));
            Ok(())
        })
    }
}

/// Bytes held, against f16.
///
/// # Safety
/// Pointers are valid or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_geometry_report(geometry: *const skv_geometry, out: *mut skv_size_report) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe { read(geometry, |g| give(out, &skv_size_report::new(&g.sizes.report(), &g.sizes), "out")) }
}
