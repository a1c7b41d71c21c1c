//! Threads that stand ready: a product of a small model takes ten microseconds, and a pool that puts its threads to sleep takes as long to
//! wake one. Here threads watch a gate for a while before they sleep; whoever opens it works along, closes it when nothing is left, and
//! waits only for those who came in, so a thread that the system keeps away holds nobody up.

use super::ahead::Walk;
use std::{
    any::Any,
    cell::{Cell, UnsafeCell},
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Mutex, OnceLock,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::Thread,
    time::{Duration, Instant},
};

/// How long a thread watches before it sleeps: longer than the steps of a token that only one thread can do.
const WATCH: Duration = Duration::from_micros(100);

// The gate's bits, from the lowest: how many are inside; open or closed; how often it was opened.
const OPEN: u64 = 1 << 16;
const INSIDE: u64 = OPEN - 1;
const OPENED: u32 = 17;

type Work<'a> = dyn Fn() + Sync + 'a;

struct Team {
    /// Apart from what else changes: all threads look at it all the time.
    gate: Gate,
    work: UnsafeCell<Option<*const Work<'static>>>,
    /// How many may come in.
    places: AtomicUsize,
    sleepers: Vec<Sleeper>,
    /// Threads that have begun.
    running: AtomicUsize,
    panicked: Mutex<Option<Box<dyn Any + Send>>>,
    /// Held by who opens the gate.
    opener: Mutex<()>,
}

#[repr(align(128))]
struct Gate(AtomicU64);

struct Sleeper {
    asleep: AtomicBool,
    thread: OnceLock<Thread>,
}

// SAFETY: `work` is written only while the gate is closed and nobody is inside, and read only from inside.
unsafe impl Sync for Team {}
// SAFETY: as above.
unsafe impl Send for Team {}

thread_local! {
    /// Whether this thread is inside already: work within work is done by who has it.
    static BUSY: Cell<bool> = const { Cell::new(false) };
}

/// Threads that share the work, this one among them: as many as rayon's pool has here, so that one setting serves both.
pub(super) fn threads() -> usize {
    rayon::current_num_threads().max(1)
}

/// Starts the threads, which come with the first product otherwise, and waits until they run.
pub fn start_threads() {
    let team = team();
    let started = team.sleepers.iter().filter(|sleeper| sleeper.thread.get().is_some()).count();
    while team.running.load(Ordering::Acquire) < started {
        std::thread::yield_now();
    }
}

fn team() -> &'static Team {
    static TEAM: OnceLock<&'static Team> = OnceLock::new();
    TEAM.get_or_init(|| {
        let others = std::thread::available_parallelism().map_or(1, usize::from).max(threads()) - 1;
        let sleeper = || Sleeper { asleep: AtomicBool::new(false), thread: OnceLock::new() };
        // Its threads live as long as the process.
        let team: &'static Team = Box::leak(Box::new(Team {
            gate: Gate(AtomicU64::new(0)),
            work: UnsafeCell::new(None),
            places: AtomicUsize::new(0),
            sleepers: std::iter::repeat_with(sleeper).take(others).collect(),
            running: AtomicUsize::new(0),
            panicked: Mutex::new(None),
            opener: Mutex::new(()),
        }));
        for (i, sleeper) in team.sleepers.iter().enumerate() {
            // A system that gives no more threads leaves more to those that are there.
            let thread =
                std::thread::Builder::new().name("dylm kernels".into()).spawn(move || team.watch(sleeper, i == 0));
            if let Ok(handle) = thread {
                let _ = sleeper.thread.set(handle.thread().clone());
            }
        }
        team
    })
}

impl Team {
    /// One thread's life; while it waits, it may walk ahead of the products.
    fn watch(&self, me: &Sleeper, walks: bool) {
        BUSY.set(true);
        self.running.fetch_add(1, Ordering::Release);
        let (mut seen, mut since, mut walk) = (0, Instant::now(), Walk::default());
        loop {
            for _ in 0..32 {
                let gate = self.gate.0.load(Ordering::Acquire);
                if gate & OPEN != 0 && gate >> OPENED != seen {
                    if (gate & INSIDE) as usize >= self.places.load(Ordering::Relaxed) {
                        seen = gate >> OPENED;
                    } else if self.enter(gate) {
                        seen = gate >> OPENED;
                        self.join_in();
                        since = Instant::now();
                    }
                }
                if !walks || !walk.on() {
                    std::hint::spin_loop();
                }
            }
            if since.elapsed() > WATCH {
                me.asleep.store(true, Ordering::SeqCst);
                // Whoever opened the gate before this saw nobody asleep.
                if self.gate.0.load(Ordering::SeqCst) & OPEN == 0 {
                    std::thread::park();
                }
                me.asleep.store(false, Ordering::SeqCst);
                since = Instant::now();
            }
        }
    }

    fn enter(&self, gate: u64) -> bool {
        self.gate.0.compare_exchange(gate, gate + 1, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    fn join_in(&self) {
        // SAFETY: inside an open gate: the opener wrote the work before and keeps it until everybody is outside.
        let work = unsafe { (*self.work.get()).map(|work| &*work) };
        if let Some(Err(panic)) = work.map(|work| catch_unwind(AssertUnwindSafe(work))) {
            *self.panicked.lock().unwrap_or_else(|e| e.into_inner()) = Some(panic);
        }
        self.gate.0.fetch_sub(1, Ordering::Release);
    }

    /// Runs `work` on this thread and on up to `others` more, all at once.
    fn run(&self, others: usize, work: &Work<'_>) {
        let Ok(opener) = self.opener.try_lock() else { return work() };
        // SAFETY: only the lifetime changes; nobody is inside once this function ends.
        let kept = unsafe { std::mem::transmute::<*const Work<'_>, *const Work<'static>>(std::ptr::from_ref(work)) };
        // SAFETY: the gate is closed and nobody inside, since who opened it last has gone.
        unsafe { *self.work.get() = Some(kept) };
        self.places.store(others, Ordering::Relaxed);
        let opened = (self.gate.0.load(Ordering::Relaxed) >> OPENED) + 1;
        self.gate.0.store(opened << OPENED | OPEN, Ordering::SeqCst);
        for sleeper in self.sleepers.iter().filter(|s| s.asleep.load(Ordering::SeqCst)).take(others) {
            if let Some(thread) = sleeper.thread.get() {
                thread.unpark();
            }
        }
        BUSY.set(true);
        let mine = catch_unwind(AssertUnwindSafe(work));
        BUSY.set(false);
        self.gate.0.fetch_and(!OPEN, Ordering::AcqRel);
        let mut turns = 0u32;
        while self.gate.0.load(Ordering::Acquire) & INSIDE != 0 {
            turns += 1;
            // Somebody inside may wait for this very processor.
            if turns.is_multiple_of(4096) { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
        let theirs = self.panicked.lock().unwrap_or_else(|e| e.into_inner()).take();
        // Before a panic goes on, which would spoil the lock for all who come after.
        drop(opener);
        if let Some(panic) = mine.err().or(theirs) {
            resume_unwind(panic);
        }
    }
}

/// Does `task` for all of 0..n, in no order, on several threads if this one is not already one of several. Each thread has an `S` of its own.
pub(super) fn each_with<S: Default>(n: usize, task: impl Fn(&mut S, usize) + Sync) {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut own = S::default();
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= n {
                break;
            }
            task(&mut own, i);
        }
    };
    let others = threads().min(n).saturating_sub(1);
    if others == 0 || BUSY.get() { work() } else { team().run(others, &work) }
}

/// The same in runs: each thread begins with neighbours, one after the other, and helps with what is left of the others' when it has none
/// left. Memory gives one long stream much faster than many short ones.
pub(super) fn each_in_runs<S: Default>(n: usize, task: impl Fn(&mut S, usize) + Sync) {
    let runs = threads().min(n).max(1);
    let length = n.div_ceil(runs);
    let came = AtomicUsize::new(0);
    let next: Vec<Apart> = (0..runs).map(|_| Apart::default()).collect();
    let work = || {
        let mut own = S::default();
        let mine = came.fetch_add(1, Ordering::Relaxed);
        for run in (mine..mine + runs).map(|run| run % runs) {
            let tasks = run * length..n.min((run + 1) * length);
            loop {
                let i = tasks.start + next[run].0.fetch_add(1, Ordering::Relaxed);
                if i >= tasks.end {
                    break;
                }
                task(&mut own, i);
            }
        }
    };
    if runs == 1 || BUSY.get() { work() } else { team().run(runs - 1, &work) }
}

/// A count that one thread changes far more often than others look at it.
#[derive(Default)]
#[repr(align(128))]
struct Apart(AtomicUsize);

/// The same without anything of their own.
pub fn each(n: usize, task: impl Fn(usize) + Sync) {
    each_with(n, |(): &mut (), i| task(i));
}

/// Numbers of which each task takes its own.
struct Shared<T>(*mut T);
// SAFETY: tasks take disjoint parts.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// # Safety
    /// Inside what was shared, and nobody else takes any of it.
    #[allow(clippy::mut_from_ref)] // that is what it is for
    unsafe fn part(&self, start: usize, len: usize) -> &mut [T] {
        // SAFETY: passed on to the caller.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }
}

/// Does `task` for all pieces of `size`, the last of which may be shorter.
pub(super) fn each_chunk<T: Send>(all: &mut [T], size: usize, task: impl Fn(usize, &mut [T]) + Sync) {
    let (len, shared) = (all.len(), Shared(all.as_mut_ptr()));
    each(len.div_ceil(size.max(1)), |i| {
        let start = i * size;
        // SAFETY: pieces do not overlap, and all lie inside.
        task(i, unsafe { shared.part(start, size.min(len - start)) });
    });
}

/// Copies bytes with all threads.
///
/// # Panics
/// If the lengths differ.
pub fn copy(from: &[u8], to: &mut [u8]) {
    const PIECE: usize = 1 << 20;
    assert!(from.len() == to.len(), "copy: {} bytes to {}", from.len(), to.len());
    each_chunk(to, PIECE, |i, to| to.copy_from_slice(&from[i * PIECE..][..to.len()]));
}

/// The same for pieces of two lists, as many of each.
pub(super) fn each_chunk_of_two<T: Send, U: Send>(
    (all, size): (&mut [T], usize),
    (beside, width): (&mut [U], usize),
    task: impl Fn(usize, &mut [T], &mut [U]) + Sync,
) {
    let (len, shared) = (all.len().div_ceil(size.max(1)), Shared(all.as_mut_ptr()));
    assert!(beside.len().div_ceil(width.max(1)) == len, "as many pieces of both");
    let (sizes, others) = ([all.len(), beside.len()], Shared(beside.as_mut_ptr()));
    each(len, |i| {
        let (a, b) = (i * size, i * width);
        // SAFETY: pieces do not overlap, and all lie inside.
        unsafe { task(i, shared.part(a, size.min(sizes[0] - a)), others.part(b, width.min(sizes[1] - b))) };
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    fn counts(n: usize) -> Vec<AtomicU32> {
        (0..n).map(|_| AtomicU32::new(0)).collect()
    }

    fn count(times: &AtomicU32) {
        times.fetch_add(1, Ordering::Relaxed);
    }

    #[test]
    fn each_task_is_done_once_whoever_asks_at_the_same_time() {
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for n in (0..400).map(|i| i % 37) {
                        let done = counts(n);
                        // Work within work, too.
                        each(n, |i| each(2, |_| count(&done[i])));
                        assert!(done.iter().all(|times| times.load(Ordering::Relaxed) == 2), "{n} tasks");
                    }
                });
            }
        });
    }

    #[test]
    fn runs_cover_everything_once_whoever_comes() {
        for n in (0..40).chain([1000]) {
            let done = counts(n);
            each_in_runs(n, |(): &mut (), i| count(&done[i]));
            assert!(done.iter().all(|times| times.load(Ordering::Relaxed) == 1), "{n} tasks");
        }
    }

    #[test]
    fn chunks_cover_everything_and_the_last_may_be_shorter() {
        for (len, size) in [(0, 4), (1, 4), (8, 4), (9, 4), (1000, 7)] {
            let mut all = vec![0; len];
            each_chunk(&mut all, size, |i, part| part.iter_mut().for_each(|x| *x += i + 1));
            assert!(all.iter().enumerate().all(|(at, &x)| x == at / size + 1), "{len} in pieces of {size}");
        }
    }

    #[test]
    fn threads_sleep_and_are_woken() {
        for _ in 0..5 {
            let done = counts(64);
            each(64, |i| count(&done[i]));
            assert!(done.iter().all(|times| times.load(Ordering::Relaxed) == 1));
            std::thread::sleep(5 * WATCH);
        }
    }

    #[test]
    fn a_panic_in_a_task_comes_out_and_the_threads_serve_the_next() {
        let panic = catch_unwind(|| each(100, |i| assert!(i != 50, "task {i}")));
        let text = panic.unwrap_err().downcast::<String>().map(|text| *text);
        assert!(text.is_ok_and(|text| text == "task 50"));
        assert!(!BUSY.get() && !team().opener.is_poisoned());
        let done = counts(100);
        each(100, |i| count(&done[i]));
        assert!(done.iter().all(|times| times.load(Ordering::Relaxed) == 1));
    }
}
