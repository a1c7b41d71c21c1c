//! Weights fetched into cache before their turn. While a token is decoded one thread does much alone (norms, rotations, the plugin's own
//! steps), and memory, which is what decoding waits for, would rest; but the order in which weights are read is that of the token before.
//! So a thread that waits for work walks ahead of the products and touches what they will read. A wrong guess costs no more than what it read.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Products of a step that are remembered.
const STOPS: usize = 4096;
/// Bytes that are fetched before they are used: they must still be in a core's second-level cache by then, or at least in the third.
const FAR: usize = 3 << 20;
/// Bytes between two looks at whether there is work.
const STRIDE: usize = 2048;

/// What a step reads, product by product.
struct Route {
    stops: [Stop; STOPS],
    /// Products of this step so far.
    passed: AtomicUsize,
    /// Products of the step before.
    length: AtomicUsize,
}

struct Stop {
    start: AtomicUsize,
    len: AtomicUsize,
}

static ROUTE: Route = Route::new();

/// A step begins, in which the weights of the one before are read again.
pub fn begin_step() {
    ROUTE.begin();
}

/// A product of few tokens begins, which reads these bytes.
pub(super) fn pass(weights: &[u8]) {
    ROUTE.pass(weights.as_ptr() as usize, weights.len());
}

impl Route {
    const fn new() -> Self {
        let stops = [const { Stop { start: AtomicUsize::new(0), len: AtomicUsize::new(0) } }; STOPS];
        Self { stops, passed: AtomicUsize::new(0), length: AtomicUsize::new(0) }
    }

    fn begin(&self) {
        self.length.store(self.passed.swap(0, Relaxed), Relaxed);
    }

    fn pass(&self, start: usize, len: usize) {
        let i = self.passed.load(Relaxed);
        if let Some(stop) = self.stops.get(i) {
            stop.start.store(start, Relaxed);
            stop.len.store(len, Relaxed);
            self.passed.store(i + 1, Relaxed);
        }
    }

    fn stop(&self, i: usize) -> (usize, usize) {
        self.stops.get(i).map_or((0, 0), |stop| (stop.start.load(Relaxed), stop.len.load(Relaxed)))
    }
}

/// How far a thread has walked: to a byte of a stop.
#[derive(Default)]
pub(super) struct Walk {
    stop: usize,
    offset: usize,
    /// Bytes between the products and here.
    ahead: usize,
    /// How many products had begun when that was looked at last.
    seen: usize,
}

impl Walk {
    /// Fetches a little more; says whether there was anything to fetch.
    pub(super) fn on(&mut self) -> bool {
        self.along(&ROUTE)
    }

    fn along(&mut self, route: &Route) -> bool {
        let (passed, length) = (route.passed.load(Relaxed), route.length.load(Relaxed));
        if length == 0 {
            return false;
        }
        if passed != self.seen {
            self.seen = passed;
            // Overtaken, or on another way altogether: begin again where the products are.
            self.ahead = self.distance(route, passed % length, length).unwrap_or_else(|| {
                (self.stop, self.offset) = (passed % length, 0);
                0
            });
        }
        if self.ahead >= FAR {
            return false;
        }
        let (start, len) = route.stop(self.stop);
        let end = len.min(self.offset + STRIDE);
        (self.offset..end).step_by(64).for_each(|at| fetch((start + at) as *const u8));
        self.ahead += end.saturating_sub(self.offset);
        self.offset = end;
        if end >= len {
            (self.stop, self.offset) = ((self.stop + 1) % length, 0);
        }
        true
    }

    /// Bytes from the stop `from` to here, if it is not much farther than it may be.
    fn distance(&self, route: &Route, from: usize, length: usize) -> Option<usize> {
        let (mut at, mut bytes) = (from, self.offset);
        while at != self.stop {
            bytes += route.stop(at).1;
            at = (at + 1) % length;
            if bytes > 2 * FAR || at == from {
                return None;
            }
        }
        Some(bytes)
    }
}

/// Asks for the cache line at an address, which need not be ours.
#[inline(always)]
pub(super) fn fetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch reads nothing: an address that is no longer ours does no harm.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// The same, into the first-level cache.
#[inline(always)]
pub(super) fn fetch_near(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as above.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(route: &Route, sizes: &[usize]) {
        route.begin();
        sizes.iter().enumerate().for_each(|(i, &size)| route.pass(i << 32, size));
    }

    #[test]
    fn a_walk_keeps_in_front_of_the_products_and_goes_on_with_the_first_after_the_last() {
        let (route, mut walk) = (Box::new(Route::new()), Walk::default());
        assert!(!walk.along(&route), "nothing is known of the first step");
        let sizes = [FAR; 4];
        steps(&route, &sizes);
        steps(&route, &sizes[..1]);
        while walk.along(&route) {}
        assert_eq!((walk.stop, walk.ahead), (2, FAR), "the second product's, and no more");
        route.pass(1 << 32, FAR);
        route.pass(2 << 32, FAR);
        while walk.along(&route) {}
        assert_eq!((walk.stop, walk.ahead), (0, FAR), "the fourth's");
        route.pass(3 << 32, FAR);
        assert!(walk.along(&route));
        assert_eq!((walk.stop, walk.offset), (0, STRIDE), "the first's");
    }

    #[test]
    fn a_walk_that_is_overtaken_begins_again_where_the_products_are() {
        let (route, mut walk) = (Box::new(Route::new()), Walk::default());
        steps(&route, &[64 * STRIDE; 3000]);
        route.begin();
        assert!(walk.along(&route));
        (0..1000).for_each(|i| route.pass(i << 32, 64 * STRIDE));
        assert!(walk.along(&route));
        assert_eq!((walk.stop, walk.offset), (1000, STRIDE));
    }
}
