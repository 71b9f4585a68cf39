//! The C interface. All pointer casts of the library are here; every export catches panics and NULL.
//!
//! One file per C type. Exports only check, convert and call; they hold no logic of their own.

mod cache;
mod calibration;
mod geometry;
mod layer;
mod state;
mod table;
mod types;

pub use cache::*;
pub use calibration::*;
pub use geometry::*;
pub use layer::*;
pub use state::*;
pub use table::*;
pub use types::*;

use crate::error::{Error, Result};
use std::ffi::{c_char, CString};
use std::panic::{catch_unwind, AssertUnwindSafe};

/// Why an export stops: NULL for a required pointer, an error of the library, or a panic.
pub(crate) enum Failure {
    Null(&'static str),
    Library(Error),
    Panic(String),
}

impl From<Error> for Failure {
    fn from(e: Error) -> Self {
        Failure::Library(e)
    }
}

impl Failure {
    fn status(&self) -> skv_status {
        match self {
            Failure::Null(_) => skv_status::SKV_STATUS_NULL,
            Failure::Library(e) => skv_status::from_code(e.code()),
            Failure::Panic(_) => skv_status::SKV_STATUS_PANIC,
        }
    }
    fn text(&self) -> String {
        match self {
            Failure::Null(name) => format!("{name} is NULL"),
            Failure::Library(e) => e.to_string(),
            Failure::Panic(m) => format!("internal error: {m}"),
        }
    }
}

/// Run the body of an export: panics become a status, and the text of a failure goes to `tell`.
pub(crate) fn guard(tell: impl FnOnce(String), body: impl FnOnce() -> std::result::Result<(), Failure>) -> skv_status {
    let failure = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return skv_status::SKV_STATUS_OK,
        Ok(Err(failure)) => failure,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned().or_else(|| panic.downcast_ref::<&str>().map(|s| s.to_string()));
            Failure::Panic(text.unwrap_or_default())
        }
    };
    let status = failure.status();
    tell(failure.text());
    status
}

/// Nobody to tell.
pub(crate) fn silent(_: String) {}

/// Text of an object's last failed call.
#[derive(Default)]
pub(crate) struct LastError(CString);

impl LastError {
    pub(crate) fn set(&mut self, text: String) {
        self.0 = CString::new(text.replace('\0', " ")).unwrap_or_default();
    }
    pub(crate) fn as_ptr(&self) -> *const c_char {
        self.0.as_ptr()
    }
}

/// Copy text into a caller's buffer, cut to fit, with a closing NUL.
///
/// # Safety
/// `buffer` is NULL or writable for `capacity` bytes.
pub(crate) unsafe fn copy_text(text: &str, buffer: *mut c_char, capacity: usize) {
    if buffer.is_null() || capacity == 0 {
        return;
    }
    let n = text.len().min(capacity - 1);
    // SAFETY: at most `capacity` bytes are written to a buffer that is writable for them.
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr().cast(), buffer, n);
        *buffer.add(n) = 0;
    }
}

/// Borrow what a required pointer points to.
///
/// # Safety
/// `p` is NULL or points to a valid `T` that nobody changes during `'a`.
pub(crate) unsafe fn borrow<'a, T>(p: *const T, name: &'static str) -> std::result::Result<&'a T, Failure> {
    // SAFETY: the caller's contract.
    unsafe { p.as_ref() }.ok_or(Failure::Null(name))
}

/// Borrow what a required pointer points to, exclusively.
///
/// # Safety
/// `p` is NULL or points to a valid `T` that nobody else uses during `'a`.
pub(crate) unsafe fn borrow_mut<'a, T>(p: *mut T, name: &'static str) -> std::result::Result<&'a mut T, Failure> {
    // SAFETY: the caller's contract.
    unsafe { p.as_mut() }.ok_or(Failure::Null(name))
}

/// A slice from pointer and length; NULL is allowed for no elements.
///
/// # Safety
/// `p` is NULL or points to `n` elements that nobody changes during `'a`.
pub(crate) unsafe fn slice<'a, T>(p: *const T, n: usize, name: &'static str) -> std::result::Result<&'a [T], Failure> {
    check_slice(p, n, name)?;
    if n == 0 {
        return Ok(&[]);
    }
    // SAFETY: not NULL, aligned, short enough; the rest is the caller's contract.
    Ok(unsafe { std::slice::from_raw_parts(p, n) })
}

/// A mutable [`slice`].
///
/// # Safety
/// `p` is NULL or points to `n` elements that nobody else uses during `'a`.
pub(crate) unsafe fn slice_mut<'a, T>(p: *mut T, n: usize, name: &'static str) -> std::result::Result<&'a mut [T], Failure> {
    check_slice(p, n, name)?;
    if n == 0 {
        return Ok(&mut []);
    }
    // SAFETY: not NULL, aligned, short enough; the rest is the caller's contract.
    Ok(unsafe { std::slice::from_raw_parts_mut(p, n) })
}

fn check_slice<T>(p: *const T, n: usize, name: &'static str) -> std::result::Result<(), Failure> {
    if n > 0 && p.is_null() {
        return Err(Failure::Null(name));
    }
    if n > isize::MAX as usize / size_of::<T>().max(1) {
        return Err(Error::Argument(format!("{name}: {n} elements are more than memory holds")).into());
    }
    if n > 0 && !p.is_aligned() {
        return Err(Error::Argument(format!("{name} is not aligned to {} bytes", align_of::<T>())).into());
    }
    Ok(())
}

/// An arena as bytes; its start must be aligned to 32 bytes.
///
/// # Safety
/// As [`slice`].
pub(crate) unsafe fn arena<'a>(p: *const u8, n: usize, need: usize) -> std::result::Result<&'a [u8], Failure> {
    check_arena(p, n, need)?;
    // SAFETY: the caller's contract.
    unsafe { slice(p, n, "arena") }
}

/// ggml aligns tensors to as much on most platforms.
const ARENA_ALIGN: usize = 32;

fn check_arena(p: *const u8, n: usize, need: usize) -> Result<()> {
    if !p.addr().is_multiple_of(ARENA_ALIGN) {
        return Err(Error::Argument(format!("the arena is not aligned to {ARENA_ALIGN} bytes")));
    }
    if n < need {
        return Err(Error::Buffer { need, have: n });
    }
    Ok(())
}

/// Read a versioned config struct: its `struct_size` says how much of it the caller knows; the rest comes from `defaults`.
///
/// # Safety
/// `p` is NULL or points to a struct whose first field is its size in bytes and which is readable for that size.
pub(crate) unsafe fn versioned<T: Copy>(p: *const T, defaults: T, name: &'static str) -> std::result::Result<T, Failure> {
    if p.is_null() {
        return Err(Failure::Null(name));
    }
    check_slice(p, 1, name)?;
    // SAFETY: every versioned struct begins with its size.
    let given = unsafe { p.cast::<usize>().read() };
    if given < size_of::<usize>() || given > 4096 {
        return Err(Error::Argument(format!("{name}.struct_size is {given}; set it with the struct's size")).into());
    }
    let mut out = defaults;
    // SAFETY: both sides are valid for the smaller of the two sizes, and `T` is plain data.
    unsafe { std::ptr::copy_nonoverlapping(p.cast::<u8>(), (&raw mut out).cast::<u8>(), given.min(size_of::<T>())) };
    Ok(out)
}

/// Write a report struct as far as the caller's `struct_size` reaches, keeping that field.
///
/// # Safety
/// `out` is NULL or points to a struct whose first field is its size in bytes and which is writable for that size.
pub(crate) unsafe fn report<T: Copy>(out: *mut T, value: &T, name: &'static str) -> std::result::Result<(), Failure> {
    if out.is_null() {
        return Err(Failure::Null(name));
    }
    check_slice(out, 1, name)?;
    // SAFETY: every versioned struct begins with its size.
    let given = unsafe { out.cast::<usize>().read() };
    let head = size_of::<usize>();
    if given < head || given > 4096 {
        return Err(Error::Argument(format!("{name}.struct_size is {given}; set it with the struct's size")).into());
    }
    let n = given.min(size_of::<T>()) - head;
    // SAFETY: both sides are valid for `head + n` bytes, and `T` is plain data.
    unsafe { std::ptr::copy_nonoverlapping((&raw const *value).cast::<u8>().add(head), out.cast::<u8>().add(head), n) };
    Ok(())
}
