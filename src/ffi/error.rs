//! `skv_status`, and the text of what went wrong last on a thread. Every export runs in [`guard`]: a panic becomes a status and never crosses into C.
//!
//! Must not know what the calls do.

use crate::error::Error;
use std::cell::RefCell;
use std::ffi::{c_char, CStr, CString};
use std::panic::{catch_unwind, AssertUnwindSafe};

/// Result of every call that can fail; the only thing such a call returns.
#[allow(non_camel_case_types, reason = "the name is C's")]
#[repr(i32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum skv_status {
    /// Done.
    SKV_STATUS_OK = 0,
    /// A required pointer is NULL.
    SKV_STATUS_NULL = 100,
    /// An argument is out of range or contradicts another.
    SKV_STATUS_ARGUMENT = 101,
    /// The configuration cannot be built.
    SKV_STATUS_CONFIG = 102,
    /// A buffer is too small.
    SKV_STATUS_BUFFER = 103,
    /// There is no room for more rows.
    SKV_STATUS_FULL = 104,
    /// The call does not fit the state of the object.
    SKV_STATUS_STATE = 105,
    /// An arena, plan or saved state is damaged, truncated or of another version.
    SKV_STATUS_DATA = 201,
    /// A key, value or query is NaN or infinite, or beyond the range of f16.
    SKV_STATUS_NOT_FINITE = 301,
    /// A matrix decomposition did not converge.
    SKV_STATUS_NUMERIC = 302,
    /// A CUDA device, its driver or this build of the library lacks what the call needs.
    SKV_STATUS_DEVICE = 401,
    /// The library failed internally, in this call or in an earlier one on the same object, which can only be freed.
    SKV_STATUS_PANIC = 900,
}

use skv_status::*;

impl skv_status {
    fn from_code(code: i32) -> Self {
        let all = [
            SKV_STATUS_ARGUMENT,
            SKV_STATUS_CONFIG,
            SKV_STATUS_BUFFER,
            SKV_STATUS_FULL,
            SKV_STATUS_STATE,
            SKV_STATUS_DATA,
            SKV_STATUS_NOT_FINITE,
            SKV_STATUS_NUMERIC,
            SKV_STATUS_DEVICE,
        ];
        all.into_iter().find(|s| *s as i32 == code).unwrap_or(SKV_STATUS_PANIC)
    }
}

/// A short name for a status; static text, never NULL. Any integer may be passed.
#[no_mangle]
pub extern "C" fn skv_status_str(status: i32) -> *const c_char {
    let text: &CStr = match status {
        0 => c"ok",
        100 => c"a required pointer is NULL",
        101 => c"invalid argument",
        102 => c"invalid configuration",
        103 => c"buffer too small",
        104 => c"the cache is full",
        105 => c"wrong state for this call",
        201 => c"damaged, truncated or foreign data",
        301 => c"a value is NaN or infinite",
        302 => c"numeric failure",
        401 => c"no CUDA for this call",
        900 => c"internal error",
        _ => c"unknown status",
    };
    text.as_ptr()
}

/// Why an export stops.
pub(super) enum Failure {
    /// A required pointer is NULL.
    Null(&'static str),
    /// The library refuses.
    Library(Error),
    /// The call panicked.
    Panic(String),
    /// An earlier call on this object panicked.
    Panicked(&'static str),
}

/// What an export's body gives.
pub(super) type Outcome<T = ()> = std::result::Result<T, Failure>;

impl From<Error> for Failure {
    fn from(e: Error) -> Self {
        Failure::Library(e)
    }
}

impl Failure {
    pub(super) fn argument(text: impl Into<String>) -> Self {
        Failure::Library(Error::Argument(text.into()))
    }
    fn status(&self) -> skv_status {
        match self {
            Failure::Null(_) => SKV_STATUS_NULL,
            Failure::Library(e) => skv_status::from_code(e.code()),
            Failure::Panic(_) | Failure::Panicked(_) => SKV_STATUS_PANIC,
        }
    }
    fn text(&self) -> String {
        match self {
            Failure::Null(name) => format!("{name} is NULL"),
            Failure::Library(e) => e.to_string(),
            Failure::Panic(m) => format!("internal error: {m}"),
            Failure::Panicked(name) => format!("this {name} had an internal error in an earlier call and can only be freed"),
        }
    }
}

thread_local! {
    /// Text of this thread's last failed call.
    static LAST: RefCell<CString> = RefCell::default();
}

/// Run the body of an export: panics become a status, and the text of a failure is kept for [`skv_last_error`].
pub(super) fn guard(body: impl FnOnce() -> Outcome) -> skv_status {
    let failure = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return SKV_STATUS_OK,
        Ok(Err(failure)) => failure,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned().or_else(|| panic.downcast_ref::<&str>().map(|s| s.to_string()));
            Failure::Panic(text.unwrap_or_default())
        }
    };
    let text = CString::new(failure.text().replace('\0', " ")).unwrap_or_default();
    // A thread that is ending has nobody left who would ask.
    let _ = LAST.try_with(|last| last.replace(text));
    failure.status()
}

/// Why the last call failed that failed on the calling thread, on whichever object: a sentence for a person, never NULL, empty before the first
/// failure. Valid until the next failing call of this thread; calls that succeed leave it.
#[no_mangle]
pub extern "C" fn skv_last_error() -> *const c_char {
    LAST.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}
