//! The op tables in plain C: the same functions at the same places. An op whose arguments C hands over as they are is the host's own
//! function; one that takes a text, a list or a struct goes through a function that looks at these first.

use super::argument::{Argument, Refused};
use crate::abi::{
    At, Ctx, Handle, Pair, ScanStep, Slot, SourceId, SpecRef,
    ops::{OpsRef, ops_1_0, ops_today},
};
use abi_stable::std_types::{RSlice, RStr};
use std::mem::transmute;

/// Whoever has the ops: a host.
pub trait HasOps {
    /// The table as plugins in Rust see it.
    fn ops() -> OpsRef;
}

macro_rules! c_tables {
    ($($table:ident = $(#[$tdoc:meta])* $struct:ident $ref:ident {
        $($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)?;)*
        last fn $lname:ident($($larg:ident: $lty:ty),*) $(-> $lret:ty)?;
        $($(#[$adoc:meta])* later fn $aname:ident($($aarg:ident: $aty:ty),*) $(-> $aret:ty)?;)*
    })*) => { c_tables! { @tables $($table = $(#[$tdoc])* $struct {
        $($name($($arg: $ty),*) $(-> $ret)?;)*
        $lname($($larg: $lty),*) $(-> $lret)?;
        $($aname($($aarg: $aty),*) $(-> $aret)?;)*
    })* } };
    (@tables $($table:ident = $(#[$tdoc:meta])* $struct:ident {
        $($name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)?;)*
    })*) => { $(
        $(#[$tdoc])*
        #[repr(C)]
        #[allow(missing_docs)]
        pub struct $struct {
            /// Its length in bytes.
            pub size: u64,
            $(pub $name: extern "C" fn(Ctx, $(<$ty as Argument>::C,)* At) $(-> $ret)?,)*
        }

        impl $struct {
            /// The table over a host's ops.
            #[allow(clippy::useless_transmute)] // where both types are one, which a macro cannot see
            pub fn over<H: HasOps>() -> Self {
                $(extern "C" fn $name<H: HasOps>(ctx: Ctx, $($arg: <$ty as Argument>::C,)* at: At) $(-> $ret)? {
                    let ops = H::ops();
                    $(
                        // SAFETY: what dylm.h says of an argument is the plugin's promise.
                        let $arg = match unsafe { <$ty as Argument>::accept($arg) } {
                            Ok(argument) => argument,
                            Err(why) => {
                                let why = format!("{}: {}: {why}", stringify!($name), stringify!($arg));
                                return Refused::refused(ops, ctx, &why, at);
                            }
                        };
                    )*
                    ops.$name()(ctx, $($arg,)* at)
                })*
                let ops = H::ops();
                $struct {
                    size: size_of::<Self>() as u64,
                    $($name: if true $(&& <$ty as Argument>::SAME)* {
                        // SAFETY: each argument's type in C is its own type, so both are the same type.
                        unsafe {
                            transmute::<
                                extern "C" fn(Ctx, $($ty,)* At) $(-> $ret)?,
                                extern "C" fn(Ctx, $(<$ty as Argument>::C,)* At) $(-> $ret)?,
                            >(ops.$name())
                        }
                    } else {
                        $name::<H>
                    },)*
                }
            }
        }

        impl $struct {
            /// The ops' names with their places in the table, in bytes.
            pub const PLACES: &[(&str, usize)] = &[$((stringify!($name), std::mem::offset_of!($struct, $name)),)*];
        }
    )*

    /// Every op by its name: all tables of [`Host`](super::Host) one after the other.
    pub const TABLES: &[(&str, &[(&str, usize)])] = &[$((stringify!($table), $struct::PLACES),)*];
    };
}

ops_today! { c_tables }
