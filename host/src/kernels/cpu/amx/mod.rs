//! Intel's matrix unit (AMX): tiles of sixteen rows of 64 bytes, of which one instruction multiplies two and adds the product to a third.
//! It multiplies pairs of bfloat16: weights that are such (`halves`), panels that are opened for many tokens (`panels::amx`), attention.
//!
//! The unit's registers are eight kilobytes that the system saves for a process only once that has asked for it.

mod halves;
mod laid_out;
mod tiles;

pub(super) use halves::{multiply, two};
pub(super) use laid_out::PAIR;
pub(super) use tiles::{Operands, Shape, TILE, Tiles};

/// Whether this processor has the unit, for bfloat16, and the system lets this process use it.
#[cfg(target_os = "linux")]
pub(super) fn available() -> bool {
    use std::{arch::x86_64::__cpuid_count, sync::OnceLock};
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    // Of leaf 7: AMX-BF16, AMX-TILE.
    const UNIT: u32 = 1 << 22 | 1 << 24;
    // Linux: ARCH_REQ_XCOMP_PERM, for the state component of the tiles' data.
    const ASK: libc::c_int = 0x1023;
    const TILE_DATA: libc::c_ulong = 18;
    *AVAILABLE.get_or_init(|| {
        is_x86_feature_detected!("avx512bf16")
            && is_x86_feature_detected!("avx512vbmi")
            && is_x86_feature_detected!("xsave")
            && __cpuid_count(7, 0).edx & UNIT == UNIT
            // SAFETY: the processor has the instruction.
            && unsafe { system_saves_tiles() }
            // SAFETY: changes nothing but what this process may use; an older system knows no such call and says so.
            && unsafe { libc::syscall(libc::SYS_arch_prctl, ASK, TILE_DATA) } == 0
    })
}

/// Other systems have no such question to ask, or it has not been tried there.
#[cfg(not(target_os = "linux"))]
pub(super) fn available() -> bool {
    false
}

/// Whether the tiles' configuration and data are among what the system saves when it changes threads.
#[cfg(target_os = "linux")]
#[target_feature(enable = "xsave")]
unsafe fn system_saves_tiles() -> bool {
    const TILES: u64 = 1 << 17 | 1 << 18;
    // SAFETY: the caller vouches for the instruction; register 0 is always there.
    unsafe { std::arch::x86_64::_xgetbv(0) & TILES == TILES }
}
