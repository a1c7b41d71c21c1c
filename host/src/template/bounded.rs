//! Runs untrusted work on its own thread, within bounds of memory, time and stack.
//! The engine's fuel bounds the number of steps, not what a step allocates: forty doublings of a string ask for a terabyte, and a
//! failed allocation aborts the process. So the process' allocator keeps an account for such a thread and, instead of overdrawing it,
//! parks the thread for ever. That leaks what the thread had (never more than its bound), which is why callers count their strikes.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

/// Charged for every allocation beside its size. What a template nests (`[[[..]]]`) is dropped, printed and compared recursively, so
/// the number of levels must be bounded, and each takes two allocations.
const OVERHEAD: usize = 256;
/// Bytes of stack for each byte of memory: 2 KiB for each of those levels. Only touched pages cost memory.
const STACK_PER_BYTE: usize = if cfg!(target_pointer_width = "64") { 4 } else { 1 };

/// What one piece of work may use.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Bytes held at any one moment, with 256 added for every allocation.
    pub memory: usize,
    /// Wall clock.
    pub time: Duration,
}

/// Why bounded work came to nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overrun {
    /// It asked for more memory than allowed; its thread is parked.
    Memory,
    /// It did not end in time; its thread ends or parks at its next allocation.
    Time,
    /// It panicked.
    Panic,
    /// The system gave no thread.
    Thread,
}

struct Account {
    used: AtomicUsize,
    limit: usize,
    overdrawn: AtomicBool,
    abandoned: AtomicBool,
    finished: AtomicBool,
    waiter: Thread,
}

thread_local! {
    static ACCOUNT: Cell<*const Account> = const { Cell::new(ptr::null()) };
}

/// The system's allocator, which meters the threads of [`run`] and leaves all others alone. The binary installs it; a program that uses
/// this library and renders templates that it does not trust should too, else only time bounds them, not memory.
pub struct Metered;

impl Metered {
    #[inline]
    fn charge(bytes: usize) {
        let account = ACCOUNT.try_with(Cell::get).unwrap_or(ptr::null());
        if !account.is_null() {
            // SAFETY: `run` keeps the account alive for as long as the pointer is set on this thread.
            charge_to(unsafe { &*account }, bytes);
        }
    }

    #[inline]
    fn refund(bytes: usize) {
        let account = ACCOUNT.try_with(Cell::get).unwrap_or(ptr::null());
        if !account.is_null() {
            // SAFETY: as in `charge`.
            let used = unsafe { &(*account).used };
            used.store(used.load(Ordering::Relaxed).saturating_sub(bytes), Ordering::Relaxed);
        }
    }
}

#[cold]
#[inline(never)]
fn charge_to(account: &Account, bytes: usize) {
    let used = account.used.load(Ordering::Relaxed).saturating_add(bytes);
    if used <= account.limit && !account.abandoned.load(Ordering::Relaxed) {
        account.used.store(used, Ordering::Relaxed);
        return;
    }
    // Returning null would abort the process and unwinding out of an allocator is undefined: never returning is neither.
    account.overdrawn.store(true, Ordering::Release);
    account.waiter.unpark();
    loop {
        thread::sleep(Duration::from_secs(3600));
    }
}

// SAFETY: every call is passed on to `System` unchanged; the bookkeeping around it allocates nothing and never unwinds.
unsafe impl GlobalAlloc for Metered {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::charge(layout.size() + OVERHEAD);
        // SAFETY: the caller's contract is `System`'s.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::charge(layout.size() + OVERHEAD);
        // SAFETY: the caller's contract is `System`'s.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Old and new may exist at once.
        Self::charge(size.saturating_add(OVERHEAD));
        // SAFETY: the caller's contract is `System`'s.
        let moved = unsafe { System.realloc(at, layout, size) };
        Self::refund(OVERHEAD + if moved.is_null() { size } else { layout.size() });
        moved
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract is `System`'s.
        unsafe { System.dealloc(at, layout) };
        Self::refund(layout.size() + OVERHEAD);
    }
}

/// Clears the thread's account even when the work panics, before the thread's own ending frees things.
struct Metering;

impl Drop for Metering {
    fn drop(&mut self) {
        ACCOUNT.with(|a| a.set(ptr::null()));
    }
}

/// Runs `work` within `bounds` and waits for it. `work` must hold no lock that others need: it may be parked at any allocation.
pub fn run<T: Send + 'static>(bounds: Bounds, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Overrun> {
    let account = Arc::new(Account {
        used: AtomicUsize::new(0),
        limit: bounds.memory,
        overdrawn: AtomicBool::new(false),
        abandoned: AtomicBool::new(false),
        finished: AtomicBool::new(false),
        waiter: thread::current(),
    });
    let outcome = Arc::new(Mutex::new(None));
    let (theirs, slot) = (account.clone(), outcome.clone());
    thread::Builder::new()
        .name("bounded".into())
        .stack_size(bounds.memory.saturating_mul(STACK_PER_BYTE))
        .spawn(move || {
            let result = catch_unwind(AssertUnwindSafe(|| {
                ACCOUNT.with(|a| a.set(Arc::as_ptr(&theirs)));
                let _metering = Metering;
                work()
            }));
            if let Ok(mut slot) = slot.lock() {
                *slot = Some(result.map_err(|_| Overrun::Panic));
            }
            theirs.finished.store(true, Ordering::Release);
            theirs.waiter.unpark();
        })
        .map_err(|_| Overrun::Thread)?;
    let deadline = Instant::now() + bounds.time;
    loop {
        if account.finished.load(Ordering::Acquire) {
            let result = outcome.lock().ok().and_then(|mut slot| slot.take());
            return result.unwrap_or(Err(Overrun::Panic));
        }
        if account.overdrawn.load(Ordering::Acquire) {
            return Err(Overrun::Memory);
        }
        let now = Instant::now();
        if now >= deadline {
            account.abandoned.store(true, Ordering::Relaxed);
            return Err(Overrun::Time);
        }
        thread::park_timeout(deadline - now);
    }
}
