//! Ops that were appended after ABI 1.0, seen from a plugin: how its file comes to say which of them it calls, and what a call of one
//! does on a host that lacks it.
//!
//! Nobody writes that list. The accessor of such an op refers to a few bytes, the op's name, which lie in a section of their own; they
//! reach the library only with code that calls the op, since a linker drops what nothing refers to. (`#[used]` would keep them always.)
//! On ELF systems and macOS that holds for debug builds too; on Windows only for builds with LTO: others name every later op.

use super::{At, Handle, Pair, Slot, SourceId};
use crate::tensor::Call;

/// How the sections of ops that a plugin calls begin on ELF systems; the op's name follows. Their content is names, each ended by a 0.
pub const NEEDS_ELF: &str = ".dylm.needs.";
/// The same on macOS, in the segment `__DATA`; one section for all ops.
pub const NEEDS_MACHO: &str = "__dylm_needs";
/// The same on Windows.
pub const NEEDS_PE: &str = ".dylneed";
/// How the sections of ops begin that a plugin asks for with `have`, and so can do without.
pub const ASKS_ELF: &str = ".dylm.asks.";
/// The same on macOS.
pub const ASKS_MACHO: &str = "__dylm_asks";
/// The same on Windows.
pub const ASKS_PE: &str = ".dylasks";

/// The bytes of a `N - 1` bytes long name, ended by a 0.
#[doc(hidden)]
pub const fn ended<const N: usize>(name: &str) -> [u8; N] {
    let (mut bytes, mut i) = ([0; N], 0);
    while i < name.len() {
        bytes[i] = name.as_bytes()[i];
        i += 1;
    }
    bytes
}

/// Leaves an op's name in the library, if the code in which this stands gets there.
macro_rules! stamp {
    (needs $name:ident) => { stamp!(@ $name, "__DATA,__dylm_needs", ".dylneed", concat!(".dylm.needs.", stringify!($name))) };
    (asks $name:ident) => { stamp!(@ $name, "__DATA,__dylm_asks", ".dylasks", concat!(".dylm.asks.", stringify!($name))) };
    (@ $name:ident, $macho:literal, $pe:literal, $elf:expr) => {{
        #[cfg_attr(target_vendor = "apple", unsafe(link_section = $macho))]
        #[cfg_attr(windows, unsafe(link_section = $pe))]
        #[cfg_attr(not(any(windows, target_vendor = "apple")), unsafe(link_section = $elf))]
        static NAME: [u8; stringify!($name).len() + 1] = $crate::abi::later::ended(stringify!($name));
        std::hint::black_box(&NAME);
    }};
}
pub(super) use stamp;

/// What an op that the host lacks gives: nothing, and the call says so in the end.
pub trait Absent {
    /// Reports the missing op to the host, as a failed tensor or in the report on the checkpoint.
    fn absent(op: &str, at: At) -> Self;
}

fn sentence(op: &str) -> String {
    format!("{op}: the plugin calls this op, which this dylm does not have; update dylm")
}

impl Absent for Handle {
    fn absent(op: &str, at: At) -> Self {
        Call::running().map_or(Handle::NONE, |call| call.ops.fail()(call.ctx, sentence(op).as_str().into(), at))
    }
}

impl Absent for Pair {
    fn absent(op: &str, at: At) -> Self {
        Pair { first: Absent::absent(op, at), second: Absent::absent(op, at) }
    }
}

impl Absent for () {
    fn absent(op: &str, at: At) -> Self {
        let text = format!("{} (at {}:{})", sentence(op), at.file, at.line);
        if let Some(call) = Call::running() {
            call.ops.complain()(call.ctx, text.as_str().into(), at);
        }
    }
}

macro_rules! absent_while_building {
    ($($ty:ty = $nothing:expr;)*) => {$(
        impl Absent for $ty {
            fn absent(op: &str, at: At) -> Self {
                <()>::absent(op, at);
                $nothing
            }
        }
    )*};
}

absent_while_building! {
    Slot = Slot(u32::MAX);
    SourceId = SourceId::NONE;
    u8 = 0;
}
