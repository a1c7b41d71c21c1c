//! Handles -> values. A handle is an index and a generation, so that a forged, stale or twice-dropped one is an error and never a crash;
//! the arena lives for one step, and with it everything that a plugin forgot to release.

use super::value::{Outcome, Value, fault};
use plugin_api::abi::Handle;
use std::sync::atomic::{AtomicU32, Ordering};

struct Entry {
    generation: u32,
    owners: u32,
    value: Option<Value>,
}

/// The tensors of one step.
pub struct Arena {
    entries: Vec<Entry>,
    free: Vec<u32>,
    first_generation: u32,
}

/// Generations go on from step to step, so that a handle kept from an earlier step is told from today's.
static GENERATION: AtomicU32 = AtomicU32::new(1);

impl Default for Arena {
    fn default() -> Self {
        let first_generation = GENERATION.fetch_add(1, Ordering::Relaxed).max(1);
        Arena { entries: Vec::with_capacity(32), free: Vec::new(), first_generation }
    }
}

impl Arena {
    /// A handle with one owner.
    pub fn put(&mut self, value: Value) -> Handle {
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                self.entries.push(Entry { generation: self.first_generation, owners: 0, value: None });
                (self.entries.len() - 1) as u32
            }
        };
        let entry = &mut self.entries[index as usize];
        (entry.owners, entry.value) = (1, Some(value));
        Handle((entry.generation as u64) << 32 | (index as u64 + 1))
    }

    fn entry(&mut self, handle: Handle) -> Option<&mut Entry> {
        let index = (handle.0 as u32).checked_sub(1)?;
        let entry = self.entries.get_mut(index as usize)?;
        (entry.generation == (handle.0 >> 32) as u32 && entry.owners > 0).then_some(entry)
    }

    /// The value behind a handle.
    pub fn get(&mut self, handle: Handle) -> Outcome {
        let stale = || fault!("a tensor that is not of this step (kept from another step, dropped twice, or made up)");
        self.entry(handle).and_then(|e| e.value.clone()).ok_or_else(stale)
    }

    /// One more owner; a bad handle stays bad.
    pub fn retain(&mut self, handle: Handle) -> Handle {
        if let Some(entry) = self.entry(handle) {
            entry.owners += 1;
        }
        handle
    }

    /// One owner fewer; the last one frees the numbers.
    pub fn release(&mut self, handle: Handle) {
        let Some(entry) = self.entry(handle) else { return };
        entry.owners -= 1;
        if entry.owners == 0 {
            entry.value = None;
            entry.generation = entry.generation.wrapping_add(1 << 16).max(1);
            self.free.push(handle.0 as u32 - 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(n: usize) -> Value {
        Value::planned(&[n])
    }

    #[test]
    fn a_released_handle_is_refused_even_when_its_place_is_taken_again() {
        let mut arena = Arena::default();
        let old = arena.put(value(1));
        arena.release(old);
        let new = arena.put(value(2));
        assert!(arena.get(old).is_err());
        assert_eq!(arena.get(new).unwrap().dims().unwrap(), [2]);
    }

    #[test]
    fn a_second_release_changes_nothing() {
        let mut arena = Arena::default();
        let a = arena.put(value(1));
        arena.release(a);
        let b = arena.put(value(2));
        arena.release(a);
        assert!(arena.get(b).is_ok());
    }

    #[test]
    fn a_handle_of_another_step_is_refused() {
        let kept = Arena::default().put(value(1));
        let mut next = Arena::default();
        next.put(value(2));
        assert!(next.get(kept).is_err());
    }

    #[test]
    fn a_retained_handle_outlives_one_release() {
        let mut arena = Arena::default();
        let a = arena.put(value(1));
        arena.retain(a);
        arena.release(a);
        assert!(arena.get(a).is_ok());
    }
}
