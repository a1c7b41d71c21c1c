//! What an op takes, as plain C has it, and the way from there: a pointer may be null where there is nothing, and a text may be no UTF-8.
//! Pointers to memory that is not there cannot be told; that is C.

use crate::abi::{At, CacheSpec, Ctx, Handle, Pair, ScanStep, Slot, SourceId, SpecRef, ops::OpsRef};
use abi_stable::std_types::{RSlice, RSliceMut, RStr};
use std::slice;

/// Borrowed entries: where they lie, and how many.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct List<T> {
    /// The first; may be null if there is none.
    pub start: *const T,
    /// How many.
    pub len: usize,
}

/// Borrowed text in UTF-8.
pub type Text = List<u8>;

/// A borrowed struct that grows at its end: [`SpecRef`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Lent {
    /// Its length in bytes, as the plugin was compiled.
    pub size: u64,
    /// Where it lies.
    pub start: *const u8,
}

impl<T> List<T> {
    /// Entries of this side.
    pub const fn of(entries: &[T]) -> Self {
        List { start: entries.as_ptr(), len: entries.len() }
    }

    /// The entries.
    ///
    /// # Errors
    /// If no memory can have these.
    ///
    /// # Safety
    /// What `start` leads to, unless null, stays readable for `'a`.
    pub unsafe fn entries<'a>(self) -> Result<&'a [T], &'static str> {
        match self {
            List { len: 0, .. } => Ok(&[]),
            List { start, .. } if start.is_null() || !start.is_aligned() => Err("a list at no address"),
            List { len, .. } if len > isize::MAX as usize / size_of::<T>().max(1) => Err("a list longer than memory"),
            // SAFETY: the caller's promise, and the arms above.
            List { start, len } => Ok(unsafe { slice::from_raw_parts(start, len) }),
        }
    }
}

/// A type of an op's argument: how C hands it over, and back to what the op takes.
pub trait Argument: Sized {
    /// What crosses.
    type C;
    /// Whether it crosses as it is.
    const SAME: bool = false;
    /// The argument, or what is wrong with it.
    ///
    /// # Safety
    /// Pointers in it lead to what they say, for the length of the call.
    unsafe fn accept(c: Self::C) -> Result<Self, &'static str>;
}

macro_rules! same {
    ($($ty:ty),*) => {$(
        impl Argument for $ty {
            type C = Self;
            const SAME: bool = true;
            unsafe fn accept(c: Self) -> Result<Self, &'static str> {
                Ok(c)
            }
        }
    )*};
}

same!(u32, u64, f32, f64, Handle, Slot, SourceId);

impl Argument for RStr<'_> {
    type C = Text;
    unsafe fn accept(c: Text) -> Result<Self, &'static str> {
        // SAFETY: the caller's promise.
        let bytes = unsafe { c.entries() }?;
        str::from_utf8(bytes).map(RStr::from_str).map_err(|_| "a text that is not UTF-8")
    }
}

impl<T> Argument for RSlice<'_, T> {
    type C = List<T>;
    unsafe fn accept(c: List<T>) -> Result<Self, &'static str> {
        // SAFETY: the caller's promise.
        unsafe { c.entries() }.map(RSlice::from_slice)
    }
}

impl Argument for SpecRef<'_> {
    type C = Lent;
    unsafe fn accept(c: Lent) -> Result<Self, &'static str> {
        // More than any such struct will ever have.
        const LONGEST: u64 = 4096;
        if c.start.is_null() || c.size > LONGEST {
            return Err("a struct without a size or an address");
        }
        // SAFETY: the caller's promise.
        Ok(unsafe { SpecRef::from_parts(c.size, c.start) })
    }
}

/// [`ScanStep`], which C may leave without a function.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Step {
    /// The plugin's own.
    pub data: *mut (),
    /// Its function.
    pub run: Option<StepFn>,
}

/// What [`ScanStep::run`] is.
type StepFn = extern "C" fn(*mut (), RSlice<'_, Handle>, RSlice<'_, Handle>, RSliceMut<'_, Handle>) -> u8;

impl Argument for ScanStep {
    type C = Step;
    unsafe fn accept(c: Step) -> Result<Self, &'static str> {
        c.run.map(|run| ScanStep { data: c.data, run }).ok_or("a step without a function")
    }
}

/// What an op gives back when one of its arguments was not accepted, having said so to the host.
pub trait Refused {
    /// As the op itself would fail.
    fn refused(ops: OpsRef, ctx: Ctx, why: &str, at: At) -> Self;
}

macro_rules! refused_while_building {
    ($($ty:ty: $value:expr),*) => {$(
        impl Refused for $ty {
            fn refused(ops: OpsRef, ctx: Ctx, why: &str, at: At) -> Self {
                ops.complain()(ctx, RStr::from_str(&format!("{why} (at {at})")), at);
                $value
            }
        }
    )*};
}

refused_while_building!(u8: 0, (): (), SourceId: SourceId::NONE, Slot: Slot(u32::MAX));

impl Refused for Handle {
    fn refused(ops: OpsRef, ctx: Ctx, why: &str, at: At) -> Self {
        ops.fail()(ctx, RStr::from_str(why), at)
    }
}

impl Refused for Pair {
    fn refused(ops: OpsRef, ctx: Ctx, why: &str, at: At) -> Self {
        Pair { first: Handle::refused(ops, ctx, why, at), second: Handle::refused(ops, ctx, why, at) }
    }
}

// dylm.h says where a file's name lies with a text of its own, so both must lie alike: a pointer, then a length.
const _: () = {
    assert!(size_of::<RStr<'_>>() == size_of::<Text>() && align_of::<RStr<'_>>() == align_of::<Text>());
    // SAFETY: of equal size, and any address and length are a `Text`.
    let text = unsafe { std::mem::transmute::<RStr<'static>, Text>(RStr::from_str("four")) };
    assert!(text.len == 4);
};
const _: () = assert!(size_of::<At>() == size_of::<Text>() + size_of::<usize>() && std::mem::offset_of!(At, file) == 0);
const _: () = assert!(size_of::<Handle>() == 8 && size_of::<Pair>() == 16 && size_of::<CacheSpec>() == 64);
