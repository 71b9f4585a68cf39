//! From pointers to references and back: NULL, alignment and lengths are checked here, and how much of a struct its caller knows.
//!
//! Must not know what the calls do.

use super::error::{guard, skv_status, Failure, Outcome};
use crate::error::{Error, Result};

/// Borrow what a required pointer points to.
///
/// # Safety
/// `p` is NULL or points to a valid `T` that nobody changes during `'a`.
pub(super) unsafe fn borrow<'a, T>(p: *const T, name: &'static str) -> Outcome<&'a T> {
    // SAFETY: the caller's contract.
    unsafe { p.as_ref() }.ok_or(Failure::Null(name))
}

/// Borrow what a required pointer points to, exclusively.
///
/// # Safety
/// `p` is NULL or points to a valid `T` that nobody else uses during `'a`.
pub(super) unsafe fn borrow_mut<'a, T>(p: *mut T, name: &'static str) -> Outcome<&'a mut T> {
    // SAFETY: the caller's contract.
    unsafe { p.as_mut() }.ok_or(Failure::Null(name))
}

/// A slice from pointer and length; NULL is allowed for no elements.
///
/// # Safety
/// `p` is NULL or points to `n` elements that nobody changes during `'a`.
pub(super) unsafe fn slice<'a, T>(p: *const T, n: usize, name: &'static str) -> Outcome<&'a [T]> {
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
pub(super) unsafe fn slice_mut<'a, T>(p: *mut T, n: usize, name: &'static str) -> Outcome<&'a mut [T]> {
    check_slice(p, n, name)?;
    if n == 0 {
        return Ok(&mut []);
    }
    // SAFETY: not NULL, aligned, short enough; the rest is the caller's contract.
    Ok(unsafe { std::slice::from_raw_parts_mut(p, n) })
}

/// Whether a pointer may be that of `n` elements.
pub(super) fn check_slice<T>(p: *const T, n: usize, name: &'static str) -> Outcome {
    if n > 0 && p.is_null() {
        return Err(Failure::Null(name));
    }
    if n > isize::MAX as usize / size_of::<T>().max(1) {
        return Err(Failure::argument(format!("{name}: {n} elements are more than memory holds")));
    }
    if n > 0 && !p.is_aligned() {
        return Err(Failure::argument(format!("{name} is not aligned to {} bytes", align_of::<T>())));
    }
    Ok(())
}

/// An arena as bytes.
///
/// # Safety
/// As [`slice`].
pub(super) unsafe fn arena<'a>(p: *const u8, n: usize, need: usize) -> Outcome<&'a [u8]> {
    check_arena(p, n, need)?;
    // SAFETY: the caller's contract.
    unsafe { slice(p, n, "arena") }
}

/// ggml aligns tensors to as much on most platforms.
const ARENA_ALIGN: usize = 32;

/// Whether a pointer may be that of an arena of `need` bytes.
pub(super) fn check_arena(p: *const u8, n: usize, need: usize) -> Outcome {
    let fits = || -> Result<()> {
        if !p.addr().is_multiple_of(ARENA_ALIGN) {
            return Err(Error::Argument(format!("the arena is not aligned to {ARENA_ALIGN} bytes")));
        }
        if n < need {
            return Err(Error::Buffer { need, have: n });
        }
        Ok(())
    };
    if p.is_null() {
        return Err(Failure::Null("arena"));
    }
    Ok(fits()?)
}

/// A struct of the C interface that callers fill or have filled.
///
/// # Safety
/// The type is `repr(C)`, begins with `struct_size: usize`, and any bytes of its size are one: numbers and raw pointers only.
pub(super) unsafe trait Struct: Copy {
    /// What its `_init` function gives, but for the size.
    fn defaults() -> Self;
}

/// More than any struct will ever have: what lies beyond is no size.
const LARGEST: usize = 4096;

fn check_size(given: usize, name: &str) -> Outcome {
    if !(size_of::<usize>()..=LARGEST).contains(&given) {
        return Err(Failure::argument(format!("{name}.struct_size is {given}; its _init function sets it")));
    }
    Ok(())
}

/// Fill a struct of `size` bytes with defaults, as far as the library knows it, and with zeros behind.
///
/// # Safety
/// `p` is NULL or writable for `size` bytes.
pub(super) unsafe fn init<T: Struct>(p: *mut T, size: usize) -> skv_status {
    guard(|| {
        check_slice(p, 1, "the struct")?;
        check_size(size, "the struct")?;
        let known = T::defaults();
        // SAFETY: `size` bytes are writable, `known` has as many as are copied, and the first field is the size.
        unsafe {
            p.cast::<u8>().write_bytes(0, size);
            std::ptr::copy_nonoverlapping((&raw const known).cast::<u8>(), p.cast::<u8>(), size.min(size_of::<T>()));
            p.cast::<usize>().write(size);
        }
        Ok(())
    })
}

/// The size that a struct says it has.
///
/// # Safety
/// `p` is NULL or points to a struct that begins with its size.
unsafe fn size_of_given<T: Struct>(p: *const T, name: &'static str) -> Outcome<usize> {
    check_slice(p, 1, name)?;
    // SAFETY: not NULL and aligned; the rest is the caller's contract.
    let given = unsafe { p.cast::<usize>().read() };
    check_size(given, name)?;
    Ok(given)
}

/// Read a struct: what a shorter one lacks has its default; what a longer one has more must be zero.
///
/// # Safety
/// `p` is NULL or points to a struct that begins with its size and is readable for as many bytes.
pub(super) unsafe fn take<T: Struct>(p: *const T, name: &'static str) -> Outcome<T> {
    // SAFETY: the caller's contract.
    let given = unsafe { size_of_given(p, name)? };
    if given > size_of::<T>() {
        // SAFETY: readable for `given` bytes.
        let unknown = unsafe { std::slice::from_raw_parts(p.cast::<u8>().add(size_of::<T>()), given - size_of::<T>()) };
        if unknown.iter().any(|x| *x != 0) {
            return Err(Failure::argument(format!("{name} sets something that this version of the library does not know")));
        }
    }
    let mut out = T::defaults();
    // SAFETY: both sides are valid for the smaller of the two sizes, and any bytes are a `T`.
    unsafe { std::ptr::copy_nonoverlapping(p.cast::<u8>(), (&raw mut out).cast::<u8>(), given.min(size_of::<T>())) };
    Ok(out)
}

/// Read `n` structs that lie one after another; all are as long as the first says.
///
/// # Safety
/// `p` is NULL or points to `n` structs as for [`take`].
pub(super) unsafe fn take_all<T: Struct>(p: *const T, n: usize, name: &'static str) -> Outcome<Vec<T>> {
    if n == 0 {
        return Ok(Vec::new());
    }
    // SAFETY: the caller's contract.
    let size = unsafe { size_of_given(p, name)? };
    if n > isize::MAX as usize / size {
        return Err(Failure::argument(format!("{name}: {n} structs are more than memory holds")));
    }
    let one = |i: usize| {
        let at = p.wrapping_byte_add(i * size);
        // SAFETY: the caller's contract.
        let given = unsafe { size_of_given(at, name)? };
        if given != size {
            return Err(Failure::argument(format!("{name}[{i}].struct_size is {given}, and {size} in the first")));
        }
        // SAFETY: the caller's contract.
        unsafe { take(at, name) }
    };
    (0..n).map(one).collect()
}

/// Fill a struct as far as its caller knows it, but for its size.
///
/// # Safety
/// `out` is NULL or points to a struct that begins with its size and is writable for as many bytes.
pub(super) unsafe fn give<T: Struct>(out: *mut T, value: &T, name: &'static str) -> Outcome {
    let head = size_of::<usize>();
    // SAFETY: the caller's contract.
    let n = unsafe { size_of_given(out.cast_const(), name)? }.min(size_of::<T>()) - head;
    // SAFETY: both sides are valid for `head + n` bytes.
    unsafe { std::ptr::copy_nonoverlapping((&raw const *value).cast::<u8>().add(head), out.cast::<u8>().add(head), n) };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ffi::{skv_config, skv_status::*};

    /// A caller that knows less than the library, as much, or more.
    #[repr(C)]
    struct Longer {
        known: skv_config,
        later: [u64; 3],
    }

    fn filled(byte: u8) -> Longer {
        // SAFETY: numbers only.
        unsafe {
            let mut x = std::mem::MaybeUninit::<Longer>::uninit();
            x.as_mut_ptr().cast::<u8>().write_bytes(byte, size_of::<Longer>());
            x.assume_init()
        }
    }

    #[test]
    fn a_struct_is_filled_as_far_as_it_reaches() {
        let mut x = filled(0x5a);
        // SAFETY: as many bytes as are said are there.
        assert_eq!(unsafe { init((&raw mut x).cast::<skv_config>(), size_of::<Longer>()) }, SKV_STATUS_OK);
        assert!(x.known.struct_size == size_of::<Longer>() && x.known.window == 128 && x.later == [0; 3]);
        let mut x = filled(0x5a);
        let short = std::mem::offset_of!(skv_config, window);
        // SAFETY: the same.
        assert_eq!(unsafe { init((&raw mut x).cast::<skv_config>(), short) }, SKV_STATUS_OK);
        assert!(x.known.struct_size == short && x.known.n_seqs == 1 && x.known.window == 0x5a5a_5a5a);
        for size in [0, 7, LARGEST + 1] {
            // SAFETY: refused before anything is written.
            assert_eq!(unsafe { init((&raw mut x).cast::<skv_config>(), size) }, SKV_STATUS_ARGUMENT);
        }
    }

    #[test]
    fn a_shorter_struct_is_completed_and_a_longer_one_must_say_nothing_new() {
        let mut x = filled(0);
        (x.known.struct_size, x.known.n_cells, x.known.sinks) = (std::mem::offset_of!(skv_config, n_seqs), 5, 77);
        // SAFETY: the struct is as long as it says, or longer.
        let got = unsafe { take((&raw const x).cast::<skv_config>(), "config") }.ok().unwrap();
        assert_eq!((got.n_cells, got.n_seqs, got.sinks), (5, 1, 4));
        x.known.struct_size = size_of::<Longer>();
        // SAFETY: the same.
        assert_eq!(unsafe { take((&raw const x).cast::<skv_config>(), "config") }.ok().map(|c| (c.sinks, c.n_seqs)), Some((77, 0)));
        x.later[2] = 1 << 40;
        // SAFETY: the same.
        assert!(matches!(unsafe { take((&raw const x).cast::<skv_config>(), "config") }, Err(Failure::Library(Error::Argument(_)))));
    }

    #[test]
    fn structs_in_a_row_are_as_long_as_the_first() {
        let mut all = [filled(0), filled(0)];
        for (i, x) in all.iter_mut().enumerate() {
            (x.known.struct_size, x.known.n_cells) = (size_of::<Longer>(), 10 + i as u32);
        }
        // SAFETY: two structs, as long as they say.
        let got = unsafe { take_all(all.as_ptr().cast::<skv_config>(), 2, "configs") }.ok().unwrap();
        assert_eq!(got.iter().map(|c| c.n_cells).collect::<Vec<_>>(), [10, 11]);
        all[1].known.struct_size -= 8;
        // SAFETY: the same.
        assert!(unsafe { take_all(all.as_ptr().cast::<skv_config>(), 2, "configs") }.is_err());
    }
}
