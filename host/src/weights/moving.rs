//! Weights that are read where the file lies until a model is in use, and then move into memory of their own on huge pages, which is read a
//! third faster: rows a few at each step, [coded](crate::kernels::cpu::Coded) on the way where that is faster yet, and panels, which products
//! must pack each time until then, at the second one. So the first token waits for nothing, and each weight is in memory once: the file's pages
//! are let go as they are copied.

use super::bytes::{Bytes, Room};
use crate::{kernels::cpu, machine};
use rayon::prelude::*;
use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, OnceLock, PoisonError, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

/// Bytes that a step moves at least.
const LEAST: usize = 16 << 20;
/// In how many steps all is moved, if there is more.
const STEPS: usize = 16;
/// Parts below this size are not worth it.
pub const SMALL: usize = 1 << 15;

/// What moves later.
pub trait Later: Send + Sync {
    /// Bytes that are still to be moved.
    fn bytes(&self) -> usize;
    /// Moves them, with this thread `alone` or with all.
    fn go(&self, alone: bool) -> std::io::Result<()>;
    /// Whether little is lost while they stay, so that they can be moved a few at a time, or never.
    fn may_stay(&self) -> bool;
    /// Where they are until then.
    fn lying(&self) -> Vec<Bytes>;
}

/// Bytes of a file, or their copy.
pub struct Moving {
    from: Bytes,
    to: OnceLock<Room>,
}

impl Moving {
    /// Where they are now.
    pub fn bytes(&self) -> &[u8] {
        self.to.get().map_or(&self.from, |room| room)
    }

    /// Lets go of the file's pages, moved or not.
    pub fn let_go(&self) {
        self.from.let_go();
    }
}

impl Later for Moving {
    fn bytes(&self) -> usize {
        self.from.len()
    }

    fn may_stay(&self) -> bool {
        true
    }

    fn lying(&self) -> Vec<Bytes> {
        vec![self.from.clone()]
    }

    fn go(&self, _: bool) -> std::io::Result<()> {
        let _ = self.to.set(copied(&self.from)?);
        Ok(())
    }
}

/// A copy of bytes, which are let go.
fn copied(bytes: &Bytes) -> std::io::Result<Room> {
    let mut room = Room::new(bytes.len())?;
    for (i, piece) in room.chunks_mut(LEAST).enumerate() {
        let from = bytes.slice(i * LEAST..i * LEAST + piece.len());
        let from = from.ok_or(std::io::ErrorKind::InvalidInput)?;
        cpu::copy(&from, piece);
        // Before all is moved, so that no large matrix is there twice; whoever reads it meanwhile gets its pages from the file again.
        from.let_go();
    }
    Ok(room)
}

/// The same bytes where they are read fastest, at once.
pub fn moved(bytes: &Bytes) -> std::io::Result<Bytes> {
    Ok(if is_worth_while(bytes) { copied(bytes)?.into() } else { bytes.clone() })
}

fn is_worth_while(bytes: &Bytes) -> bool {
    bytes.is_of_file() && bytes.len() >= SMALL && has_huge_pages()
}

/// What is still to be moved, in the order in which it was loaded, and how much of it may stay.
static QUEUE: Mutex<VecDeque<Weak<dyn Later>>> = Mutex::new(VecDeque::new());
static QUEUED: AtomicUsize = AtomicUsize::new(0);

fn queue() -> std::sync::MutexGuard<'static, VecDeque<Weak<dyn Later>>> {
    QUEUE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The same bytes, to be moved later if they lie in a file and the system has huge pages.
pub fn later(bytes: Bytes) -> Bytes {
    if !is_worth_while(&bytes) {
        return bytes;
    }
    let moving = Arc::new(Moving { from: bytes, to: OnceLock::new() });
    enqueue(&(moving.clone() as Arc<dyn Later>));
    Bytes::from(moving)
}

/// Has it moved later, unless it is gone by then.
pub fn enqueue(later: &Arc<dyn Later>) {
    queue().push_back(Arc::downgrade(later));
    if later.may_stay() {
        QUEUED.fetch_add(later.bytes(), Ordering::Relaxed);
    }
}

/// What this thread can do for a first step until it is `done` with what that waits for: has the system map what is to be moved where it lies
/// now, so that whoever reads it first need not, and then moves some already.
pub fn prepare_until(done: &AtomicBool) {
    // Whoever asks for memory waits for the whole piece.
    const PIECE: usize = 1 << 17;
    const LARGE: usize = 2 << 20;
    let is_done = || done.load(Ordering::Acquire);
    let all: Vec<_> = queue().iter().filter_map(Weak::upgrade).collect();
    for bytes in all.iter().flat_map(|later| later.lying()) {
        for start in (0..bytes.len()).step_by(PIECE) {
            if is_done() {
                return;
            }
            if let Some(piece) = bytes.slice(start..bytes.len().min(start + PIECE)) {
                piece.map_now();
            }
        }
    }
    // What has moved is nothing to those who find it in the queue.
    let mut urgent = all.iter().filter(|later| !later.may_stay() && later.bytes() < LARGE);
    while let Some(later) = urgent.next().filter(|_| !is_done()) {
        if later.go(true).is_err() {
            return;
        }
    }
}

/// Moves what is to be moved: at once what products are slow with until then, of the rest some. That stays as soon as there is not enough
/// memory for all.
pub fn some() {
    // A step that finds another one at it goes on.
    let Ok(mut queue) = QUEUE.try_lock() else { return };
    let mut urgent = Vec::new();
    queue.retain(|later| {
        let later = later.upgrade();
        let may_stay = later.as_ref().is_none_or(|later| later.may_stay());
        urgent.extend(later.filter(|_| !may_stay));
        may_stay
    });
    if !urgent.is_empty() {
        // Threads that help may be waiting for the queue, to load another model.
        drop(queue);
        // Without memory for it they are multiplied as they lie.
        let _ = urgent.par_iter().try_for_each(|later| later.go(false));
        return;
    }
    if queue.is_empty() {
        return;
    }
    let left: usize = queue.iter().filter_map(Weak::upgrade).map(|later| later.bytes()).sum();
    // Pages of files count as free, as they will be once they are let go: what is asked for is room for the copies.
    if machine::memory().is_none_or(|memory| (memory.free as usize) < left + left / 4) {
        queue.clear();
        return;
    }
    let most = LEAST.max(QUEUED.load(Ordering::Relaxed) / STEPS);
    let mut moved = 0;
    while moved < most
        && let Some(next) = queue.pop_front()
    {
        let Some(later) = next.upgrade() else { continue };
        moved += later.bytes();
        if later.go(false).is_err() {
            return queue.clear();
        }
    }
    if queue.is_empty() {
        QUEUED.store(0, Ordering::Relaxed);
    }
}

/// Moves all that steps would move in time, for who measures what a step takes after that.
pub fn all() {
    let mut left = usize::MAX;
    loop {
        let now = queue().iter().filter(|later| later.strong_count() > 0).count();
        if now == 0 || now >= left {
            return;
        }
        left = now;
        some();
    }
}

#[cfg(target_os = "linux")]
fn has_huge_pages() -> bool {
    static HAS: OnceLock<bool> = OnceLock::new();
    let setting = || std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
    *HAS.get_or_init(|| setting().is_ok_and(|setting| !setting.contains("[never]")))
}

#[cfg(not(target_os = "linux"))]
fn has_huge_pages() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_the_same_before_and_after_they_move() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let numbers: Vec<u8> = (0..5 * SMALL).map(|i| (i * 7 + i / 256) as u8).collect();
        std::fs::write(file.path(), &numbers).unwrap();
        let all = Bytes::map(file.path()).unwrap();
        let (a, b) = (later(all.slice(3..2 * SMALL + 3).unwrap()), later(all.slice(3 * SMALL..5 * SMALL).unwrap()));
        let part = b.slice(1..100).unwrap();
        let is =
            || assert!(a[..] == numbers[3..2 * SMALL + 3] && b[..] == numbers[3 * SMALL..] && part[..] == b[1..100]);
        is();
        let before = a.as_ptr();
        some();
        is();
        if has_huge_pages() {
            assert_ne!(a.as_ptr(), before, "has moved");
        }
    }

    #[test]
    fn all_that_steps_would_move_can_be_moved_at_once() {
        // Each part is as much as a step moves.
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(3 * LEAST as u64).unwrap();
        let whole = Bytes::map(file.path()).unwrap();
        let parts: Vec<Bytes> = (0..3).map(|i| later(whole.slice(i * LEAST..(i + 1) * LEAST).unwrap())).collect();
        let places = || parts.iter().map(|part| part.as_ptr()).collect::<Vec<_>>();
        let before = places();
        some();
        let still = |now: &[*const u8]| now.iter().zip(&before).filter(|(now, before)| now == before).count();
        assert_eq!(still(&places()), if has_huge_pages() { 2 } else { 3 }, "a step moves one");
        all();
        assert_eq!(still(&places()), if has_huge_pages() { 0 } else { 3 });
    }

    #[test]
    fn what_is_gone_before_it_moves_is_not_moved() {
        struct Counted(Arc<AtomicUsize>, bool);
        impl Later for Counted {
            fn bytes(&self) -> usize {
                SMALL
            }
            fn go(&self, _: bool) -> std::io::Result<()> {
                self.0.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
            fn may_stay(&self) -> bool {
                self.1
            }
            fn lying(&self) -> Vec<Bytes> {
                Vec::new()
            }
        }
        for may_stay in [false, true] {
            let moved = Arc::new(AtomicUsize::new(0));
            let all: Vec<Arc<dyn Later>> = (0..3).map(|_| Arc::new(Counted(moved.clone(), may_stay)) as _).collect();
            all.iter().for_each(enqueue);
            drop(all.into_iter().skip(1).collect::<Vec<_>>().split_off(1));
            assert_eq!(Arc::strong_count(&moved), 1, "the queue keeps nothing");
            (0..3).for_each(|_| some());
            assert_eq!(moved.load(Ordering::Relaxed), 0);
            let last: Arc<dyn Later> = Arc::new(Counted(moved.clone(), may_stay));
            enqueue(&last);
            (0..3).for_each(|_| some());
            assert_eq!(moved.load(Ordering::Relaxed), 1, "and what is there moves once");
        }
    }

    #[test]
    fn what_is_small_or_lies_in_memory_stays() {
        let stays = |bytes: Bytes| {
            let before = bytes.as_ptr();
            let bytes = later(bytes);
            some();
            assert_eq!(bytes.as_ptr(), before);
        };
        stays(Bytes::from(vec![1; 4 * SMALL]));
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [5; 100]).unwrap();
        stays(Bytes::map(file.path()).unwrap());
    }
}
