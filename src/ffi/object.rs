//! What stands behind a pointer that C holds: a value, and whether a call on it has panicked. Such a value may be half-changed, so that further calls are
//! refused until it is freed.
//!
//! Must not know any of the values.

use super::error::{guard, skv_status, Failure, Outcome};
use super::pointer::{borrow, borrow_mut};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// See the module.
pub(super) struct Object<T> {
    value: T,
    panicked: AtomicBool,
}

/// A type of the C interface of which C sees pointers only.
pub(super) trait Handle: From<Object<Self::Value>> {
    /// What it holds.
    type Value;
    /// What messages and the parameters of its calls name it.
    const NAME: &'static str;
    fn object(&self) -> &Object<Self::Value>;
    fn object_mut(&mut self) -> &mut Object<Self::Value>;
}

/// Make `pub struct $handle(Object<$value>)` a [`Handle`]. The struct itself is written out, as cbindgen expands no macros.
macro_rules! handle {
    ($handle:ident, $value:ty, $name:literal) => {
        impl From<Object<$value>> for $handle {
            fn from(object: Object<$value>) -> Self {
                $handle(object)
            }
        }
        impl Handle for $handle {
            type Value = $value;
            const NAME: &'static str = $name;
            fn object(&self) -> &Object<$value> {
                &self.0
            }
            fn object_mut(&mut self) -> &mut Object<$value> {
                &mut self.0
            }
        }
    };
}
pub(super) use handle;

/// Marks an object when it is dropped by a panic; else it is forgotten.
struct Mark<'a>(&'a AtomicBool);

impl Drop for Mark<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

fn marking<T>(panicked: &AtomicBool, body: impl FnOnce() -> T) -> T {
    let mark = Mark(panicked);
    let out = body();
    std::mem::forget(mark);
    out
}

fn check<H: Handle>(object: &Object<H::Value>) -> Outcome {
    if object.panicked.load(Relaxed) {
        return Err(Failure::Panicked(H::NAME));
    }
    Ok(())
}

/// Borrow an object that a call needs besides its own.
///
/// # Safety
/// `p` is NULL or valid, and nobody changes the object during `'a`.
pub(super) unsafe fn peek<'a, H: Handle + 'a>(p: *const H, name: &'static str) -> Outcome<&'a H::Value> {
    // SAFETY: the caller's contract.
    let object = unsafe { borrow(p, name)? }.object();
    check::<H>(object)?;
    Ok(&object.value)
}

/// Run a call that only reads its object, or changes what threads may share.
///
/// # Safety
/// `p` is NULL or valid, and nobody changes the object meanwhile.
pub(super) unsafe fn read<H: Handle>(p: *const H, body: impl FnOnce(&H::Value) -> Outcome) -> skv_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let object = unsafe { borrow(p, H::NAME)? }.object();
        check::<H>(object)?;
        marking(&object.panicked, || body(&object.value))
    })
}

/// Run a call that changes its object.
///
/// # Safety
/// `p` is NULL or valid, and nobody else uses the object meanwhile.
pub(super) unsafe fn change<H: Handle>(p: *mut H, body: impl FnOnce(&mut H::Value) -> Outcome) -> skv_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let object = unsafe { borrow_mut(p, H::NAME)? }.object_mut();
        check::<H>(object)?;
        marking(&object.panicked, || body(&mut object.value))
    })
}

/// Make an object and hand it to the caller.
///
/// # Safety
/// `out` is NULL or writable.
pub(super) unsafe fn create<H: Handle>(out: *mut *mut H, make: impl FnOnce() -> Outcome<H::Value>) -> skv_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let out = unsafe { borrow_mut(out, "out")? };
        let object = Object { value: make()?, panicked: AtomicBool::new(false) };
        *out = Box::into_raw(Box::new(object.into()));
        Ok(())
    })
}

/// Free an object; NULL is allowed.
///
/// # Safety
/// `p` is NULL or came from [`create`] and was not freed.
pub(super) unsafe fn free<H: Handle>(p: *mut H) {
    if !p.is_null() {
        guard(|| {
            // SAFETY: the caller's contract.
            drop(unsafe { Box::from_raw(p) });
            Ok(())
        });
    }
}

#[cfg(test)]
mod tests {
    use crate::ffi::*;
    use std::ffi::CStr;

    fn last_error() -> String {
        // SAFETY: the text of this thread, on which no call fails meanwhile.
        unsafe { CStr::from_ptr(skv_last_error()) }.to_string_lossy().into_owned()
    }

    fn geometry() -> *mut skv_geometry {
        let mut config = skv_config { n_cells: 1024, ..Struct::defaults() };
        let mut shape = skv_layer_shape { n_head: 2, n_head_kv: 1, d_k: 32, d_v: 32, ..Struct::defaults() };
        (config.struct_size, shape.struct_size) = (size_of_val(&config), size_of_val(&shape));
        let mut g = std::ptr::null_mut();
        // SAFETY: all of it is there.
        assert_eq!(unsafe { skv_geometry_create(&config, &shape, 1, &mut g) }, skv_status::SKV_STATUS_OK);
        g
    }

    #[test]
    fn a_panic_is_a_status_and_its_object_refuses_all_but_free() {
        let (g, mut table, mut layer) = (geometry(), std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: objects are valid until they are freed, and used by this thread only.
        unsafe {
            assert_eq!(skv_table_create(g, &mut table), skv_status::SKV_STATUS_OK);
            assert_eq!(skv_layer_create(g, 0, &mut layer), skv_status::SKV_STATUS_OK);
            assert_eq!(skv_table_reset(table), skv_status::SKV_STATUS_OK);
            let broken = super::change(table, |t| {
                t.reset();
                let none: Vec<u32> = Vec::new();
                Err(super::Failure::argument(none[t.geometry().tiles].to_string()))
            });
            assert_eq!(broken, skv_status::SKV_STATUS_PANIC);
            assert!(last_error().contains("internal error: index out of bounds"), "{}", last_error());
            assert_eq!(super::read(layer, |_| panic!("on purpose: {}", 1)), skv_status::SKV_STATUS_PANIC);
            assert_eq!(last_error(), "internal error: on purpose: 1");

            assert_eq!(skv_table_reset(table), skv_status::SKV_STATUS_PANIC);
            assert!(last_error().contains("this table had an internal error"), "{}", last_error());
            assert_eq!(skv_table_commit(table), skv_status::SKV_STATUS_PANIC);
            let mut other = std::ptr::null_mut();
            assert_eq!(skv_table_create(g, &mut other), skv_status::SKV_STATUS_OK);
            assert_eq!(skv_table_clone_from(other, table), skv_status::SKV_STATUS_PANIC);
            assert_eq!(skv_table_reset(other), skv_status::SKV_STATUS_OK);
            let mut floats = 77;
            assert_eq!(skv_layer_partial_floats(layer, 1, &mut floats), skv_status::SKV_STATUS_PANIC);
            assert!(last_error().contains("this layer had"), "{}", last_error());
            assert_eq!(floats, 77);
            skv_table_free(table);
            skv_table_free(other);
            skv_layer_free(layer);
            skv_geometry_free(g);
        }
    }

    #[test]
    fn a_thread_has_its_own_last_error() {
        // SAFETY: NULL is refused.
        let fail = || assert_eq!(unsafe { skv_table_reset(std::ptr::null_mut()) }, skv_status::SKV_STATUS_NULL);
        std::thread::spawn(move || {
            assert_eq!(last_error(), "");
            fail();
            assert_eq!(last_error(), "table is NULL");
            // Success does not touch it.
            // SAFETY: came from create.
            unsafe { skv_geometry_free(geometry()) };
            assert_eq!(last_error(), "table is NULL");
            std::thread::spawn(|| assert_eq!(last_error(), "")).join().unwrap();
        })
        .join()
        .unwrap();
    }
}
