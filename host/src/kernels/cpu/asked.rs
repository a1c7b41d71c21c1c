//! Streams of weights asked for before they are needed, line by line, where the processor wants to be told. Intel's prefetcher ends with
//! every page of four kilobytes, and with it as much as a third of the memory's speed; AMD's goes on by itself, and asking costs it a sixth,
//! but it loses a stream that jumps back and forth between planes of bits and their scales, and with that as much as half of the speed.

use super::ahead::{fetch, fetch_near};

/// Bytes between what is read and what is asked for: into the first-level cache, and where that is not enough, into the second.
const NEAR: [usize; 2] = [4 << 10, 1 << 10];
const FAR: usize = 16 << 10;
/// The same into the second-level cache alone.
const JUMPING: usize = 8 << 10;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asking {
    Nothing,
    /// All, of a processor whose prefetcher ends with the page.
    Pages,
    /// What one with a better prefetcher does not foresee either.
    Jumps,
}

impl Asking {
    /// Of weights that are read from front to back, or in `jumps`.
    pub(super) fn of(jumps: bool) -> Self {
        match (is_wanted(), jumps) {
            (true, _) => Asking::Pages,
            (false, true) => Asking::Jumps,
            (false, false) => Asking::Nothing,
        }
    }

    /// Asks for what lies some way behind `at`, as much as is read there now; `twice` as [`behind`] has it.
    #[inline(always)]
    pub(super) fn behind(self, at: *const u8, bytes: usize, twice: bool) {
        match self {
            Asking::Nothing => {}
            Asking::Pages => behind(at, bytes, twice),
            Asking::Jumps => (0..bytes).step_by(64).for_each(|line| fetch(at.wrapping_add(JUMPING + line))),
        }
    }
}

/// Whether this processor wants to be told of every stream.
#[cfg(target_arch = "x86_64")]
pub(super) fn is_wanted() -> bool {
    use std::{arch::x86_64::__cpuid, sync::OnceLock};
    static WANTED: OnceLock<bool> = OnceLock::new();
    *WANTED.get_or_init(|| {
        let name = __cpuid(0);
        [name.ebx, name.edx, name.ecx] == [*b"Genu", *b"ineI", *b"ntel"].map(u32::from_le_bytes)
    })
}

/// Elsewhere it has not been tried.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn is_wanted() -> bool {
    false
}

/// Asks for what lies some way behind `at`, as much as is read there now. Whoever has little else to do asks `twice`: first for the
/// second-level cache, which can wait for more lines at a time.
#[inline(always)]
pub(super) fn behind(at: *const u8, bytes: usize, twice: bool) {
    for line in (0..bytes).step_by(64) {
        let at = at.wrapping_add(line);
        if twice {
            fetch(at.wrapping_add(FAR));
        }
        fetch_near(at.wrapping_add(NEAR[usize::from(twice)]));
    }
}
