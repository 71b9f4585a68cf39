//! `skv_calibration`: bases made beforehand.

use super::error::skv_status;
use super::object::{create, free, handle, read, Handle, Object};
use super::pointer::{borrow_mut, slice};
use crate::codec::calibration::Calibration;

/// What `spectral-kv calibrate` found out about a model.
#[allow(non_camel_case_types, reason = "the name is C's")]
pub struct skv_calibration(Object<Calibration>);

handle!(skv_calibration, Calibration, "calibration");

/// Read the contents of a calibration file. `*out` is owned by the caller; free it with `skv_calibration_free`.
///
/// # Safety
/// `bytes` is readable for `n_bytes`, `out` writable; each may be NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_calibration_read(bytes: *const u8, n_bytes: usize, out: *mut *mut skv_calibration) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe { create(out, || Ok(Calibration::from_bytes(slice(bytes, n_bytes, "bytes")?)?)) }
}

/// Free a calibration; NULL is allowed.
///
/// # Safety
/// `calibration` is NULL or came from `skv_calibration_read` and was not freed.
#[no_mangle]
pub unsafe extern "C" fn skv_calibration_free(calibration: *mut skv_calibration) {
    // SAFETY: the caller's contract.
    unsafe { free(calibration) }
}

/// The number of the model that the calibration is for, as whoever made the file computed it.
///
/// # Safety
/// Pointers are valid or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_calibration_model_hash(calibration: *const skv_calibration, hash: *mut u64) -> skv_status {
    // SAFETY: the caller's contract.
    unsafe {
        read(calibration, |c| {
            *borrow_mut(hash, "hash")? = c.model_hash;
            Ok(())
        })
    }
}
