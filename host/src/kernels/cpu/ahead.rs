//! Weights fetched into cache before their turn. While a token is decoded one thread does much alone (norms, rotations, the plugin's own
//! steps), and memory, which is what decoding waits for, would rest; but the order in which weights are read is that of the token before.
//! So a thread that waits for work walks ahead of the products and touches what they will read. A wrong guess costs nothing but that.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Products of a step that are remembered.
const STOPS: usize = 4096;
/// Bytes that are fetched before they are used: they must still be in a core's second-level cache by then, or at least in the third.
const FAR: usize = 3 << 20;
/// Bytes between two looks at whether there is work.
const STRIDE: usize = 2048;

struct Stop {
    start: AtomicUsize,
    len: AtomicUsize,
}

static ROUTE: [Stop; STOPS] = [const { Stop { start: AtomicUsize::new(0), len: AtomicUsize::new(0) } }; STOPS];
/// Products of the step so far.
static PASSED: AtomicUsize = AtomicUsize::new(0);
/// Products of the step before.
static LENGTH: AtomicUsize = AtomicUsize::new(0);

/// A step begins, in which the weights of the one before are read again.
pub fn begin_step() {
    LENGTH.store(PASSED.swap(0, Relaxed).min(STOPS), Relaxed);
}

/// A product of few tokens begins, which reads these bytes.
pub(super) fn pass(weights: &[u8]) {
    let i = PASSED.load(Relaxed);
    if let Some(stop) = ROUTE.get(i) {
        stop.start.store(weights.as_ptr() as usize, Relaxed);
        stop.len.store(weights.len(), Relaxed);
        PASSED.store(i + 1, Relaxed);
    }
}

/// How far a thread has walked.
#[derive(Default)]
pub(super) struct Walk {
    stop: usize,
    offset: usize,
    /// Bytes fetched since the products were last caught up with.
    ahead: usize,
    /// What `PASSED` was when that was looked at last.
    seen: usize,
}

impl Walk {
    /// Fetches a little more; says whether there was anything to fetch.
    pub(super) fn on(&mut self) -> bool {
        let (passed, length) = (PASSED.load(Relaxed), LENGTH.load(Relaxed));
        if passed != self.seen {
            // What was fetched for products that have begun is no longer ahead.
            let begun = |i: usize| ROUTE.get(i).map_or(0, |stop| stop.len.load(Relaxed));
            let range = if passed > self.seen { self.seen..passed } else { 0..passed };
            self.ahead = range.map(begun).fold(self.ahead, usize::saturating_sub);
            let behind = if self.stop >= self.seen || passed > self.seen { self.stop < passed } else { false };
            if behind || self.ahead == 0 {
                (self.stop, self.offset, self.ahead) = (passed, 0, 0);
            }
            self.seen = passed;
        }
        if length == 0 || self.ahead >= FAR {
            return false;
        }
        if self.stop >= length {
            (self.stop, self.offset) = (0, 0);
        }
        let Some(stop) = ROUTE.get(self.stop) else { return false };
        let (start, len) = (stop.start.load(Relaxed), stop.len.load(Relaxed));
        let end = len.min(self.offset + STRIDE);
        for at in (self.offset..end).step_by(64) {
            fetch((start + at) as *const u8);
        }
        self.ahead += end.saturating_sub(self.offset);
        self.offset = end;
        if end >= len {
            (self.stop, self.offset) = (self.stop + 1, 0);
        }
        true
    }
}

#[inline]
fn fetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch reads nothing: an address that is no longer ours does no harm.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
