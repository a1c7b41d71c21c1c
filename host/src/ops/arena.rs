//! Handles -> values. A handle is a step, a place and how often that place was taken before, so that a forged, stale or twice-dropped one is
//! an error and never a crash; the arena lives for one step, and with it everything that a plugin forgot to release.

use super::{
    last_rows::kept,
    value::{Outcome, Value, fault},
};
use candle_core::{DType, Tensor};
use plugin_api::abi::Handle;
use std::sync::atomic::{AtomicU64, Ordering};

// A handle's bits, from the lowest: place + 1, uses of that place, step. No two tensors share a handle within 2^28 steps, which are weeks.
const PLACE_BITS: u32 = 24;
const USE_BITS: u32 = 12;

struct Entry {
    uses: u64,
    owners: u32,
    value: Option<Value>,
}

/// The tensors of one step.
pub struct Arena {
    entries: Vec<Entry>,
    free: Vec<u32>,
    step: u64,
    /// Releases of handles that had no owner.
    pub stale: usize,
    /// While all floats are f32: those that were not, by place and uses.
    halved: Option<Vec<(usize, u64, Value)>>,
    /// What some of them still wait for.
    #[cfg(feature = "cuda")]
    pub later: super::later::Later,
}

static STEP: AtomicU64 = AtomicU64::new(1);

impl Default for Arena {
    fn default() -> Self {
        let step = STEP.fetch_add(1, Ordering::Relaxed);
        Arena {
            entries: Vec::with_capacity(32),
            free: Vec::new(),
            step,
            stale: 0,
            halved: None,
            #[cfg(feature = "cuda")]
            later: Default::default(),
        }
    }
}

impl Arena {
    /// A handle with one owner; none when there are 16 million tensors already.
    pub fn put(&mut self, value: Value) -> Handle {
        let place = match self.free.pop() {
            Some(place) => place as usize,
            None if self.entries.len() + 1 < 1 << PLACE_BITS => {
                self.entries.push(Entry { uses: 0, owners: 0, value: None });
                self.entries.len() - 1
            }
            None => return Handle::NONE,
        };
        let wide = if self.halved.is_some() { widened(&value) } else { None };
        let entry = &mut self.entries[place];
        (entry.owners, entry.value) = (1, Some(wide.unwrap_or(value)));
        Handle((self.step << USE_BITS | entry.uses) << PLACE_BITS | (place as u64 + 1))
    }

    /// Where the handle's value lies, if it is of this step and has an owner.
    #[inline]
    fn place(&self, handle: Handle) -> Option<usize> {
        let place = (handle.0 & ((1 << PLACE_BITS) - 1)).checked_sub(1)?;
        let entry = self.entries.get(place as usize)?;
        let whole = (self.step << USE_BITS | entry.uses) << PLACE_BITS | (place + 1);
        (whole == handle.0 && entry.owners > 0).then_some(place as usize)
    }

    fn entry(&mut self, handle: Handle) -> Option<&mut Entry> {
        let place = self.place(handle)?;
        self.entries.get_mut(place)
    }

    /// The value behind a handle.
    pub fn get(&self, handle: Handle) -> Outcome {
        self.look(handle).cloned()
    }

    /// The value behind a handle, where it lies.
    #[inline]
    pub fn look(&self, handle: Handle) -> Outcome<&Value> {
        let value = self.peek(handle)?;
        #[cfg(feature = "cuda")]
        if let Value::Real(t) = value {
            self.later.read(t.id())?;
        }
        Ok(value)
    }

    /// The same, whose numbers nobody may have written yet if it `waits`.
    pub fn look_later(&self, handle: Handle, waits: bool) -> Outcome<&Value> {
        if waits { self.peek(handle) } else { self.look(handle) }
    }

    /// The same, though nobody may have written its numbers yet.
    #[inline]
    pub fn peek(&self, handle: Handle) -> Outcome<&Value> {
        let stale = || fault!("a tensor that is not of this step (kept from another step, dropped twice, or made up)");
        self.place(handle).and_then(|place| self.entries.get(place)?.value.as_ref()).ok_or_else(stale)
    }

    /// Leaves all tensors that have `tokens` rows with these of them.
    pub fn keep_rows(&mut self, tokens: usize, rows: &Tensor) -> candle_core::Result<()> {
        #[cfg(feature = "cuda")]
        self.later.read_all()?;
        for entry in self.entries.iter_mut().filter(|entry| entry.owners > 0) {
            if let Some(kept) = entry.value.as_ref().map(|value| kept(value, tokens, rows)).transpose()?.flatten() {
                entry.value = Some(kept);
            }
        }
        Ok(())
    }

    /// Tensors that somebody still owns.
    pub fn owned(&self) -> usize {
        self.entries.iter().filter(|entry| entry.owners > 0).count()
    }

    /// Whether all floats are f32 just now.
    pub fn is_exact(&self) -> bool {
        self.halved.is_some()
    }

    /// Until [`Self::end_exact`] all floats are f32: a recurrence's step runs, whose roundings would add up from token to token.
    pub fn begin_exact(&mut self) -> Outcome<()> {
        #[cfg(feature = "cuda")]
        self.later.read_all()?;
        let mut halved = Vec::new();
        for (place, entry) in self.entries.iter_mut().enumerate() {
            if let Some(wide) = entry.value.as_ref().and_then(widened) {
                halved.extend(entry.value.replace(wide).map(|was| (place, entry.uses, was)));
            }
        }
        self.halved = Some(halved);
        Ok(())
    }

    /// Gives those that are still there their own type back.
    pub fn end_exact(&mut self) {
        for (place, uses, was) in self.halved.take().unwrap_or_default() {
            if let Some(entry) = self.entries.get_mut(place).filter(|entry| entry.uses == uses && entry.owners > 0) {
                entry.value = Some(was);
            }
        }
    }

    /// One more owner; a bad handle stays bad.
    pub fn retain(&mut self, handle: Handle) -> Handle {
        if let Some(entry) = self.entry(handle) {
            entry.owners = entry.owners.saturating_add(1);
        }
        handle
    }

    /// One owner fewer; the last one frees the numbers.
    pub fn release(&mut self, handle: Handle) {
        let Some(entry) = self.entry(handle) else {
            // What an op gave that was refused altogether is no tensor, and may be dropped.
            self.stale += usize::from(handle != Handle::NONE);
            return;
        };
        entry.owners -= 1;
        if entry.owners == 0 {
            let _last = entry.value.take();
            entry.uses += 1;
            // A place whose count is used up is not taken again.
            if entry.uses < 1 << USE_BITS {
                self.free.push((handle.0 & ((1 << PLACE_BITS) - 1)) as u32 - 1);
            }
            #[cfg(feature = "cuda")]
            if let Some(Value::Real(t)) = _last {
                self.later.forget(t.id());
            }
        }
    }
}

/// Halved floats as f32; none if they are something else.
fn widened(value: &Value) -> Option<Value> {
    let Value::Real(t) = value else { return None };
    matches!(t.dtype(), DType::BF16 | DType::F16).then(|| t.to_dtype(DType::F32).ok().map(Value::Real))?
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

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

    #[test]
    fn halved_floats_are_wide_for_a_while_and_then_what_they_were() {
        let half = || Value::Real(Tensor::new(&[1f32, 2.5], &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap());
        let dtype = |arena: &Arena, handle| match arena.get(handle).unwrap() {
            Value::Real(t) => t.dtype(),
            other => panic!("{other:?}"),
        };
        let mut arena = Arena::default();
        let (kept, released) = (arena.put(half()), arena.put(half()));
        arena.begin_exact().unwrap();
        assert_eq!((arena.is_exact(), dtype(&arena, kept)), (true, DType::F32));
        arena.release(released);
        let later = arena.put(half());
        assert_eq!(dtype(&arena, later), DType::F32);
        arena.end_exact();
        assert_eq!((arena.is_exact(), dtype(&arena, kept), dtype(&arena, later)), (false, DType::BF16, DType::F32));
    }

    #[test]
    fn no_two_tensors_of_a_step_share_a_handle() {
        let mut arena = Arena::default();
        let mut seen = std::collections::HashSet::new();
        for _ in 0..10_000 {
            let handle = arena.put(value(1));
            assert!(seen.insert(handle.0));
            arena.release(handle);
            assert!(arena.get(handle).is_err());
        }
    }
}
