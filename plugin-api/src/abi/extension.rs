//! Named extensions: how ABI 1 grows although its factory, model and host objects are frozen. Each of the three answers
//! `extension("name/1")` with a pointer to a table, or with null, which means "not known here" and is never an error.
//!
//! A name stands for one struct for ever. What crosses is a [`Table`] of it, which begins with its own size, so a later version may put
//! fields at the struct's end; whoever was built before finds there what it knows, whoever was built after reads zeros for the rest. What
//! would change a field that exists gets another number: `name/2`.
//!
//! | id | offered by | struct | what it is for |
//! |---|---|---|---|
//! | `examples/1` | the factory | [`Examples`](super::checking::Examples) | configurations for `dylm check`, by `export_plugin!` |
//! | `panics/1` | the factory | [`Panics`](super::checking::Panics) | panics that no call could report, by `export_plugin!` |
//! | `op/1` | the host | [`OwnOps`](super::own_op::OwnOps) | a plugin's own ops: [`Weights::op`](crate::Weights::op) |
//!
//! An author offers one from [`Architecture::extension`](crate::Architecture::extension) or
//! [`Model::extension`](crate::Model::extension), and asks the host with [`of_host`]. Ids that are not in the table above begin with a
//! name that is yours, `example.org:vision/1`, so that no two people mean different things by one.
//!
//! ```
//! use plugin_api::abi::extension::{Extension, Offer, Table};
//!
//! /// How many languages the model speaks.
//! #[repr(C)]
//! #[derive(Clone, Copy)]
//! struct Languages { count: u64 }
//! // SAFETY: `repr(C)`, and 0 languages are a number of languages.
//! unsafe impl Extension for Languages { const ID: &str = "example.org:languages/1"; }
//!
//! static LANGUAGES: Table<Languages> = Table::new(Languages { count: 3 });
//!
//! // What an `impl Architecture` has as its `extension`.
//! fn extension(id: &str) -> Option<Offer<'static>> {
//!     Offer::named(id, &LANGUAGES)
//! }
//!
//! assert!(extension("example.org:languages/1").is_some());
//! assert!(extension("example.org:languages/2").is_none());
//! ```

use crate::tensor::Call;
use std::{marker::PhantomData, mem::MaybeUninit};

/// The struct behind one name.
///
/// # Safety
/// `repr(C)`, of fields that are aligned to 8 bytes at most; those beyond the first [`FIRST`](Self::FIRST) bytes have a meaning when all
/// their bytes are 0 (`Option` of a function, a number, a raw pointer).
pub unsafe trait Extension: Copy + Send + Sync + 'static {
    /// `name/1`, or `somebody:name/1`.
    const ID: &'static str;
    /// The struct's bytes in its first version: `offset_of!` of the first field that came later. A shorter one is none.
    const FIRST: usize = size_of::<Self>();
}

/// An extension as it crosses: its size in bytes, this number included, then the struct.
#[repr(C)]
#[derive(Debug)]
pub struct Table<T> {
    size: u64,
    fields: T,
}

impl<T: Extension> Table<T> {
    /// The table of these fields.
    pub const fn new(fields: T) -> Self {
        const { assert!(align_of::<T>() <= 8, "the fields would not lie right behind the size") };
        Table { size: size_of::<Table<T>>() as u64, fields }
    }
}

/// A table that is offered under its name, for as long as the offer lives.
#[derive(Clone, Copy, Debug)]
pub struct Offer<'a> {
    table: *const (),
    _borrowed: PhantomData<&'a ()>,
}

impl<'a> Offer<'a> {
    /// The table, if that is what `id` asks for. For several tables: `Offer::named(id, &A).or_else(|| Offer::named(id, &B))`.
    pub fn named<T: Extension>(id: &str, table: &'a Table<T>) -> Option<Self> {
        (id == T::ID).then(|| Offer { table: std::ptr::from_ref(table).cast(), _borrowed: PhantomData })
    }

    /// What crosses.
    pub fn into_pointer(self) -> *const () {
        self.table
    }
}

/// The fields of a table of another side, as far as both know them; `None` for null and for a table that is shorter than the first
/// version of its name.
///
/// # Safety
/// `table` is null or what an `extension` function of the ABI answered to `T::ID`, still valid.
pub unsafe fn read<T: Extension>(table: *const ()) -> Option<T> {
    const HEADER: usize = size_of::<u64>();
    if table.is_null() {
        return None;
    }
    // SAFETY: the caller's promise: every table begins with its size.
    let size = usize::try_from(unsafe { table.cast::<u64>().read_unaligned() }).ok()?;
    let there = size.checked_sub(HEADER).filter(|&bytes| bytes >= T::FIRST)?;
    let mut fields = MaybeUninit::<T>::zeroed();
    // SAFETY: the table has `there` bytes of fields, and `fields` has room for so many of them; what it does not get is 0, which is a
    // value of every field beyond `FIRST`.
    unsafe {
        let start = table.cast::<u8>().add(HEADER);
        std::ptr::copy_nonoverlapping(start, fields.as_mut_ptr().cast::<u8>(), there.min(size_of::<T>()));
        Some(fields.assume_init())
    }
}

/// The host's extension of that name, or `None` if this host has none. Thread: call.
pub fn of_host<T: Extension>() -> Option<T> {
    // SAFETY: the host's answer to that very id; its tables live as long as the process.
    unsafe { read(Call::current().extension(T::ID)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(C)]
    #[derive(Clone, Copy, Debug, PartialEq)]
    struct Early {
        one: u64,
    }

    #[repr(C)]
    #[derive(Clone, Copy, Debug, PartialEq)]
    struct Late {
        one: u64,
        two: u64,
    }

    // SAFETY: `repr(C)`, numbers.
    unsafe impl Extension for Early {
        const ID: &'static str = "test/1";
    }
    // SAFETY: `repr(C)`, numbers.
    unsafe impl Extension for Late {
        const ID: &'static str = "test/1";
        const FIRST: usize = std::mem::offset_of!(Late, two);
    }

    fn ask<T: Extension, O: Extension>(table: &Table<O>) -> Option<T> {
        // SAFETY: a table of the same name, or of one so short that `read` must refuse it.
        unsafe { read(Offer::named(O::ID, table).unwrap().into_pointer()) }
    }

    #[test]
    fn an_extension_that_grew_is_read_by_those_built_before_and_after() {
        let (early, late) = (Table::new(Early { one: 1 }), Table::new(Late { one: 1, two: 2 }));
        assert_eq!(ask::<Early, _>(&late), Some(Early { one: 1 }));
        assert_eq!(ask::<Late, _>(&late), Some(Late { one: 1, two: 2 }));
        assert_eq!(ask::<Late, _>(&early), Some(Late { one: 1, two: 0 }));
    }

    #[test]
    fn null_and_a_table_shorter_than_the_first_version_are_no_extension() {
        // SAFETY: null is always allowed.
        assert_eq!(unsafe { read::<Early>(std::ptr::null()) }, None);
        let mut short = Table::new(Early { one: 1 });
        short.size = 8;
        assert_eq!(ask::<Early, _>(&short), None);
        assert!(Offer::named("test/2", &short).is_none());
    }
}
