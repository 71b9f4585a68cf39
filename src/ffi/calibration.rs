//! `skv_calibration`: bases made beforehand.

use super::{borrow, borrow_mut, copy_text, guard, silent, skv_status, slice};
use crate::codec::calibration::Calibration;
use std::ffi::c_char;

/// What `spectral-kv calibrate` found out about a model. Immutable; may be used by several threads.
#[allow(non_camel_case_types, reason = "the name is C's")]
pub struct skv_calibration(pub(crate) Calibration);

/// Read the contents of a calibration file. `*out` is owned by the caller; free it with `skv_calibration_free`. `err` (may be
/// NULL) receives the reason of a failure.
///
/// # Safety
/// `bytes` is readable for `n_bytes`, `out` writable, `err` writable for `err_len` bytes; each may be NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_calibration_read(
    bytes: *const u8,
    n_bytes: usize,
    out: *mut *mut skv_calibration,
    err: *mut c_char,
    err_len: usize,
) -> skv_status {
    // SAFETY: the caller's contract.
    let tell = |text: String| unsafe { copy_text(&text, err, err_len) };
    guard(tell, || {
        // SAFETY: the caller's contract.
        let (bytes, out) = unsafe { (slice(bytes, n_bytes, "bytes")?, borrow_mut(out, "out")?) };
        *out = Box::into_raw(Box::new(skv_calibration(Calibration::from_bytes(bytes)?)));
        Ok(())
    })
}

/// Free a calibration; NULL is allowed.
///
/// # Safety
/// `calibration` is NULL or came from `skv_calibration_read` and was not freed.
#[no_mangle]
pub unsafe extern "C" fn skv_calibration_free(calibration: *mut skv_calibration) {
    if !calibration.is_null() {
        // SAFETY: the caller's contract.
        drop(unsafe { Box::from_raw(calibration) });
    }
}

/// The number of the model that the calibration is for, as whoever made the file computed it.
///
/// # Safety
/// Pointers are valid or NULL.
#[no_mangle]
pub unsafe extern "C" fn skv_calibration_model_hash(calibration: *const skv_calibration, hash: *mut u64) -> skv_status {
    guard(silent, || {
        // SAFETY: the caller's contract.
        let (c, hash) = unsafe { (borrow(calibration, "calibration")?, borrow_mut(hash, "hash")?) };
        *hash = c.0.model_hash;
        Ok(())
    })
}
