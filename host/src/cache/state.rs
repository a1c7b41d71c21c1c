//! One sequence's memory as a whole, which can go back in its text.
//!
//! Keys and values go back by dropping rows. The state of a recurrence cannot, so states are copied now and then: before a step of more
//! than one token, after replayed ones, and every [`EVERY`] single tokens. Going back takes the latest copy at or before the target (at
//! worst the empty state), and the next step reads the tokens in between again, before its own. A failed step is undone the same way.

use super::{
    CacheOptions,
    kv::KvCache,
    memory::{Memory, Recurrent},
    numbers::Numbers,
    prompt::UNKNOWN,
};
use crate::{
    device::Placement,
    error::{Error, Result},
};
use candle_core::Result as Candle;
use plugin_api::abi::{CACHE_STATE, CacheSpec};
use std::collections::VecDeque;

/// Tokens between two copies of the states while tokens come one by one; within what windowed caches keep beyond their window.
const EVERY: usize = 64;

/// Copies kept, the latest.
const COPIES: usize = 4;

/// One sequence's memory.
#[derive(Clone)]
pub struct State {
    /// One memory for each that the architecture declared.
    pub layers: Vec<Memory>,
    /// Tokens seen: the position of the next one.
    pub offset: usize,
    /// Those tokens.
    pub tokens: Vec<u32>,
    /// How long the text is known to become, for ropes that look at it; set it to the prompt's length before the first chunk.
    pub horizon: usize,
    /// How it is kept.
    pub options: CacheOptions,
    /// So many of the last tokens are in `tokens` but in no layer: the next step reads them first.
    pub(crate) behind: usize,
    /// Whether the last step read more than one token.
    strode: bool,
    copies: VecDeque<Copied>,
    /// The same sequence as the other ranks of the model remember it: see `parallel::ranks`.
    pub(crate) others: Vec<State>,
}

/// All states of recurrences at one position.
#[derive(Clone)]
struct Copied {
    offset: usize,
    numbers: Vec<Numbers>,
}

impl State {
    /// An empty memory.
    pub fn new(specs: &[CacheSpec], place: &Placement, options: &CacheOptions) -> Result<Self> {
        options.validate()?;
        if options.kv_bits.is_some() && !place.native && !place.device.is_cuda() {
            return Err(Error::Usage(
                "--kv-bits: quantized caches work on the cpu and on cuda; leave it out, or use --device cpu".into(),
            ));
        }
        let memory = |spec: &CacheSpec| match spec.kind {
            CACHE_STATE => Memory::State(Recurrent::new(spec)),
            _ => Memory::KeyValue(KvCache::new(spec, place, *options)),
        };
        Ok(State {
            layers: specs.iter().map(memory).collect(),
            offset: 0,
            tokens: Vec::new(),
            horizon: 0,
            options: *options,
            behind: 0,
            strode: false,
            copies: VecDeque::new(),
            others: Vec::new(),
        })
    }

    fn kept(&self) -> impl Iterator<Item = &KvCache> {
        self.layers.iter().filter_map(Memory::key_value)
    }

    fn recurrences(&mut self) -> impl Iterator<Item = &mut Recurrent> {
        self.layers.iter_mut().filter_map(Memory::state_mut)
    }

    fn recurs(&self) -> bool {
        self.layers.iter().any(|l| l.state().is_some())
    }

    /// Where the layers must be taken back to for the text to end at `target`.
    fn base(&self, target: usize) -> usize {
        let here = self.offset - self.behind;
        if target >= here || !self.recurs() {
            return target.min(here);
        }
        self.copies.iter().rev().map(|c| c.offset).find(|&offset| offset <= target).unwrap_or(0)
    }

    /// Whether the last `n` tokens can be forgotten: a window that has moved on cannot come back.
    pub fn can_trim(&self, n: usize) -> bool {
        let Some(target) = self.offset.checked_sub(n) else { return false };
        let base = self.base(target);
        // A token that a prompt cache does not tell cannot be read again.
        let again = self.tokens.get(base..target);
        let told = base == target || again.is_some_and(|again| !again.contains(&UNKNOWN));
        told && self.kept().all(|kv| kv.can_trim_to(base))
    }

    /// Forgets the last `n` tokens.
    pub fn trim(&mut self, n: usize) -> Result<()> {
        self.trim_alone(n)?;
        self.others.iter_mut().try_for_each(|other| other.trim_alone(n))
    }

    /// The same without the other ranks'.
    pub(crate) fn trim_alone(&mut self, n: usize) -> Result<()> {
        if !self.can_trim(n) {
            return Err(Error::Generate(format!(
                "the cache cannot go back {n} of {} tokens: older ones were dropped",
                self.offset
            )));
        }
        self.back_to(self.offset - n);
        self.horizon = self.horizon.min(self.offset);
        Ok(())
    }

    fn back_to(&mut self, target: usize) {
        let (base, here) = (self.base(target), self.offset - self.behind);
        if base < here {
            self.layers.iter_mut().filter_map(Memory::key_value_mut).for_each(|kv| kv.trim_to(base));
            self.copies.retain(|c| c.offset <= base);
            let numbers = self.copies.back().filter(|c| c.offset == base).map(|c| c.numbers.clone());
            let mut numbers = numbers.unwrap_or_default().into_iter();
            for state in self.recurrences() {
                match numbers.next() {
                    Some(then) => state.numbers = then,
                    None => state.numbers = Numbers::zeros(state.numbers.count()),
                }
            }
        }
        (self.offset, self.behind) = (target, target - base);
        self.tokens.truncate(target);
    }

    /// Copies the states as they are, so that [`Self::trim`] can come back to here without reading anything again.
    pub fn remember(&mut self) {
        let here = self.offset - self.behind;
        if here > self.copies.back().map_or(0, |c| c.offset) && self.recurs() {
            let numbers = self.layers.iter().filter_map(Memory::state).map(|s| &s.numbers);
            // Where there is no memory for a copy they are shared, and the next step takes another place for its own.
            let numbers = numbers.map(|numbers| numbers.copied().unwrap_or_else(|_| numbers.clone())).collect();
            self.keep(here, numbers);
        }
    }

    fn keep(&mut self, offset: usize, numbers: Vec<Numbers>) {
        if self.copies.len() == COPIES {
            self.copies.pop_front();
        }
        self.copies.push_back(Copied { offset, numbers });
    }

    /// Before a step of `new` tokens: the tokens to read again, which leave `tokens` and `offset` until the step is done.
    pub(crate) fn begin(&mut self, new: usize) -> Vec<u32> {
        if self.behind == 0 {
            let last = self.copies.back().map_or(0, |c| c.offset);
            if new > 1 || self.strode || self.offset - last >= EVERY {
                self.remember();
            }
        }
        self.recurrences().for_each(|state| state.midway = None);
        self.offset -= self.behind;
        self.behind = 0;
        self.tokens.split_off(self.offset.min(self.tokens.len()))
    }

    /// After the step has read `again`, as `begin` gave it, and then `new`.
    pub(crate) fn finish(&mut self, again: &[u32], new: &[u32]) -> Candle<()> {
        let midway = self.recurrences().map(|state| state.midway.take()).collect::<Option<Vec<_>>>();
        if let (false, Some(numbers)) = (again.is_empty(), midway) {
            self.keep(self.offset + again.len(), numbers);
        }
        self.tokens.extend_from_slice(again);
        self.tokens.extend_from_slice(new);
        self.offset += again.len() + new.len();
        self.horizon = self.horizon.max(self.offset);
        self.strode = again.len() + new.len() > 1;
        let offset = self.offset;
        self.layers.iter_mut().filter_map(Memory::key_value_mut).try_for_each(|kv| kv.settle(offset))
    }

    /// After the step has failed: everything is as it was before it.
    pub(crate) fn undo(&mut self, again: &[u32]) {
        let here = self.offset;
        // What the layers hold of the failed step lies beyond `offset`, where `back_to` would not look.
        self.tokens.extend_from_slice(again);
        (self.offset, self.behind) = (here + again.len() + 1, 0);
        self.back_to(here + again.len());
    }

    /// After a step that was to be recorded has failed, of which no kernel ran: nothing needs to be read again.
    #[cfg(feature = "cuda")]
    pub(crate) fn unwrite(&mut self) {
        let offset = self.offset;
        self.layers.iter_mut().for_each(|memory| match memory {
            Memory::KeyValue(kv) => kv.trim_to(offset),
            Memory::State(state) => state.numbers.turned(offset),
        });
    }

    /// Bytes held: keys, values, states, and the copies of these.
    pub fn bytes(&self) -> usize {
        let copies = self.copies.iter().flat_map(|c| &c.numbers).map(|numbers| 4 * numbers.count());
        let here: usize = self.layers.iter().map(Memory::bytes).chain(copies).sum();
        here + self.others.iter().map(State::bytes).sum::<usize>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{DeviceChoice, DtypeChoice};

    /// A state whose recurrence adds up its tokens, beside a cache of keys.
    struct Sum {
        state: State,
        fails: bool,
    }

    impl Sum {
        fn new() -> Self {
            let place = Placement::new(DeviceChoice::Cpu, DtypeChoice::Float32, candle_core::DType::F32).unwrap();
            let spec = |kind, dims| CacheSpec { kind, flags: 0, window: 0, dims };
            let specs = [spec(0, [0; 6]), spec(CACHE_STATE, [1, 0, 0, 0, 0, 0])];
            Sum { state: State::new(&specs, &place, &CacheOptions::default()).unwrap(), fails: false }
        }

        /// What `Model::step` does, with these layers; gives how many tokens were read again.
        fn step(&mut self, new: &[u32]) -> usize {
            let again = self.state.begin(new.len());
            let offset = self.state.offset;
            let [Memory::KeyValue(kv), Memory::State(sum)] = self.state.layers.as_mut_slice() else { unreachable!() };
            kv.shape = Some([1, 1, 1, 1]);
            let rows: Vec<f32> = again.iter().chain(new).map(|&t| t as f32).collect();
            kv.append(&rows, &rows, offset, rows.len());
            sum.numbers.here().unwrap()[0] += rows[..again.len()].iter().sum::<f32>();
            if !again.is_empty() {
                sum.midway = Some(sum.numbers.clone());
            }
            sum.numbers.here().unwrap()[0] += rows[again.len()..].iter().sum::<f32>();
            match self.fails {
                true => self.state.undo(&again),
                false => self.state.finish(&again, new).unwrap(),
            }
            again.len()
        }

        /// That the next step of token 1 leaves what reading the whole text at once would leave.
        fn assert_is(&mut self, text: &[u32]) {
            assert_eq!((self.state.offset, self.state.tokens.as_slice()), (text.len(), text));
            self.fails = false;
            self.step(&[1]);
            let whole: Vec<f32> = text.iter().chain(&[1]).map(|&t| t as f32).collect();
            let [Memory::KeyValue(kv), Memory::State(sum)] = self.state.layers.as_slice() else { unreachable!() };
            assert_eq!(kv.keys.numbers().unwrap(), whole);
            assert_eq!(kv.positions, (0..whole.len() as u32).collect::<Vec<_>>());
            assert_eq!(sum.numbers, vec![whole.iter().sum::<f32>()].into());
        }
    }

    #[test]
    fn going_back_is_as_if_the_text_had_ended_there() {
        for target in 0..14 {
            let mut sum = Sum::new();
            for chunk in [&[5, 6, 7][..], &[8], &[9], &[10, 11], &[12], &[13], &[14, 15, 16, 17]] {
                sum.step(chunk);
            }
            sum.state.trim(13 - target.min(13)).unwrap();
            sum.assert_is(&(5..5 + target.min(13) as u32).collect::<Vec<_>>());
        }
    }

    #[test]
    fn going_back_twice_and_further_than_the_oldest_copy_works() {
        let mut sum = Sum::new();
        for i in 0..20 {
            sum.step(&[i, i + 1]);
        }
        sum.state.trim(3).unwrap();
        sum.state.trim(2).unwrap();
        assert_eq!((sum.state.offset, sum.state.behind), (35, 1));
        sum.state.trim(33).unwrap();
        sum.assert_is(&[0, 1]);
    }

    #[test]
    fn a_failed_step_is_undone_also_where_it_read_again() {
        let mut sum = Sum::new();
        sum.step(&[3, 4, 5]);
        for t in 6..10 {
            sum.step(&[t]);
        }
        sum.fails = true;
        sum.step(&[20]);
        sum.step(&[20, 21]);
        assert_eq!(sum.state.offset, 7);
        sum.state.trim(1).unwrap();
        sum.step(&[20, 21]);
        sum.assert_is(&[3, 4, 5, 6, 7, 8]);
    }

    #[test]
    fn drafts_refused_again_and_again_do_not_make_the_step_read_ever_more() {
        let mut sum = Sum::new();
        sum.step(&[1; 10]);
        for _ in 0..20 {
            let again = sum.step(&[1; 5]);
            assert!(again <= 3, "{again} tokens read again");
            sum.state.trim(2).unwrap();
        }
        sum.assert_is(&[1; 70]);
    }

    #[test]
    fn tokens_that_nobody_told_cannot_be_read_again() {
        let mut sum = Sum::new();
        (sum.state.offset, sum.state.tokens) = (3, vec![UNKNOWN; 3]);
        sum.state.remember();
        assert!(!sum.state.can_trim(1) && sum.state.can_trim(0) && sum.state.can_trim(3));
        sum.state.trim(3).unwrap();
        sum.assert_is(&[]);
    }
}
