//! The ranks of a model in step: the first runs on the caller's thread, each other one on a thread of its own with a model of its own.
//! They are given the same tokens and do the same; what they remember of a sequence travels inside of the first rank's state.

use super::group::{Group, LET_GO};
use crate::{
    cache::{CacheOptions, State},
    device::Placement,
    error::{Error, Result},
    model::{Input, Model, Want},
};
use candle_core::{D, Tensor};
use plugin_api::abi::{CacheSpec, Slot};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, Sender, channel},
    },
    thread::JoinHandle,
};

/// Which rank a model is.
pub struct Seat {
    /// Where it meets the others.
    pub group: Arc<Group>,
    /// From 0.
    pub rank: usize,
    /// By layer.
    pub joins: Vec<Join>,
}

/// How the outputs of a layer become whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Join {
    /// They are, or are not to be yet.
    None,
    /// Each rank has a summand.
    Sum,
    /// Each rank has entries of the last axis.
    Gather {
        /// The first that this rank has.
        start: usize,
        /// Of all ranks.
        of: usize,
    },
}

impl Seat {
    /// A layer's output, made whole where each rank has a part of it only.
    pub fn joined(seat: Option<&Seat>, slot: Slot, y: Tensor) -> candle_core::Result<Tensor> {
        let Some((seat, join)) = seat.and_then(|seat| Some((seat, seat.joins.get(slot.0 as usize)?))) else {
            return Ok(y);
        };
        match *join {
            Join::None => Ok(y),
            Join::Sum => seat.group.sum(seat.rank, y),
            // Parts of any length, by the one thing that ranks do together: the other ranks' entries are zeros here.
            Join::Gather { start, of } => {
                let after = of.saturating_sub(start + y.dim(D::Minus1)?);
                seat.group.sum(seat.rank, y.pad_with_zeros(D::Minus1, start, after)?)
            }
        }
    }
}

/// Where a rank's summand meets the others', so that what waits can carry it along.
#[cfg(feature = "cuda")]
#[derive(Clone)]
pub struct Summing {
    /// As in [`Seat`].
    pub group: Arc<Group>,
    /// As in [`Seat`].
    pub rank: usize,
}

#[cfg(feature = "cuda")]
impl Seat {
    /// Whether a layer's output may be written later, and whose summands it needs then.
    pub fn later(seat: Option<&Seat>, slot: Slot) -> Option<Option<Summing>> {
        let Some(seat) = seat else { return Some(None) };
        match seat.joins.get(slot.0 as usize) {
            None | Some(Join::None) => Some(None),
            Some(Join::Sum) => Some(Some(Summing { group: seat.group.clone(), rank: seat.rank })),
            Some(Join::Gather { .. }) => None,
        }
    }
}

/// The ranks behind the first.
pub struct Followers {
    group: Arc<Group>,
    ranks: Mutex<Vec<Follower>>,
}

struct Follower {
    place: Placement,
    orders: Sender<Order>,
    answers: Receiver<Answer>,
    thread: JoinHandle<()>,
}

/// A step, as the first rank does it.
struct Order {
    sequences: Vec<(State, Vec<u32>, Want)>,
    chooses: bool,
}

struct Answer {
    states: Vec<State>,
    outcome: Result<()>,
}

/// A model that was loaded for a rank, waiting for orders until nobody can give any.
fn follow(model: &Model, group: &Arc<Group>, orders: &Receiver<Order>, answers: &Sender<Answer>) {
    while let Ok(Order { mut sequences, chooses }) = orders.recv() {
        let outcome = guarded(group, || {
            let each = sequences.iter_mut().map(|(state, tokens, want)| Input { state, tokens, want: *want });
            let mut inputs = each.collect::<Vec<_>>();
            if chooses { model.choose(&mut inputs).map(|_| ()) } else { model.step(&mut inputs).map(|_| ()) }
        });
        let states = sequences.into_iter().map(|(state, ..)| state).collect();
        if answers.send(Answer { states, outcome }).is_err() {
            return;
        }
    }
}

/// One rank's part of a step; if it fails, or panics, the others do not wait for it.
fn guarded<T>(group: &Arc<Group>, step: impl FnOnce() -> Result<T>) -> Result<T> {
    let outcome = catch_unwind(AssertUnwindSafe(step))
        .unwrap_or_else(|_| Err(Error::Generate("a device's part of the step panicked".into())));
    if outcome.is_err() {
        group.fail();
    }
    outcome
}

impl Followers {
    /// Starts a thread for each.
    pub fn start(group: Arc<Group>, models: Vec<Model>) -> Result<Self> {
        let mut ranks = Vec::with_capacity(models.len());
        for model in models {
            let place = model.place.clone();
            let ((orders, theirs), (ours, answers)) = (channel(), channel());
            let group = group.clone();
            let thread = std::thread::Builder::new()
                .name("dylm rank".into())
                .spawn(move || follow(&model, &group, &theirs, &ours))
                .map_err(|e| {
                    Error::Device(format!("--devices: the system starts no thread for a device ({e}); name fewer"))
                })?;
            ranks.push(Follower { place, orders, answers, thread });
        }
        Ok(Followers { group, ranks: Mutex::new(ranks) })
    }

    /// Empty memories of one sequence, a rank each.
    pub fn states(&self, specs: &[CacheSpec], options: &CacheOptions) -> Result<Vec<State>> {
        let ranks = self.ranks.lock().unwrap_or_else(PoisonError::into_inner);
        ranks.iter().map(|rank| State::new(specs, &rank.place, options)).collect()
    }

    /// A step on all ranks. `own` does the first one's part; the others are given the same inputs. If any rank fails, no state has moved.
    pub fn step<T>(
        &self,
        inputs: &mut [Input],
        chooses: bool,
        own: impl FnOnce(&mut [Input]) -> Result<T>,
    ) -> Result<T> {
        // One step at a time: in another order, ranks would wait for each other for ever.
        let ranks = self.ranks.lock().unwrap_or_else(PoisonError::into_inner);
        let gone = || Error::Generate("a device's thread has ended: load the model again".into());
        let before: Vec<usize> = inputs.iter().map(|i| i.state.offset).collect();
        let mut orders: Vec<Vec<(State, Vec<u32>, Want)>> = ranks.iter().map(|_| Vec::new()).collect();
        for input in inputs.iter_mut() {
            let horizon = input.state.horizon;
            if input.state.others.len() != ranks.len() {
                return Err(Error::Usage("this memory of a text is of a model on other devices: begin it anew".into()));
            }
            for (order, mut state) in orders.iter_mut().zip(std::mem::take(&mut input.state.others)) {
                state.horizon = horizon;
                order.push((state, input.tokens.to_vec(), input.want));
            }
        }
        let sent = ranks.iter().zip(orders).map(|(rank, sequences)| rank.orders.send(Order { sequences, chooses }));
        if sent.collect::<Vec<_>>().iter().any(|sent| sent.is_err()) {
            self.group.fail();
        }
        let outcome = guarded(&self.group, || own(inputs));
        let mut failures = Vec::new();
        for rank in ranks.iter() {
            let Ok(answer) = rank.answers.recv() else { return Err(gone()) };
            for (input, state) in inputs.iter_mut().zip(answer.states) {
                input.state.others.push(state);
            }
            failures.extend(answer.outcome.err());
        }
        let (value, first) = match outcome {
            Ok(value) => (Some(value), None),
            Err(e) => (None, Some(e)),
        };
        let mut failures: Vec<Error> = first.into_iter().chain(failures).collect();
        let Some(value) = value.filter(|_| failures.is_empty()) else {
            self.group.renew();
            for (input, offset) in inputs.iter_mut().zip(before) {
                let state = &mut *input.state;
                // Who had finished its part goes back.
                for state in state.others.iter_mut().filter(|state| state.offset > offset) {
                    state.trim(state.offset - offset)?;
                }
                if state.offset > offset {
                    state.trim_alone(state.offset - offset)?;
                }
            }
            // The rank that failed first says why, not those that it let go.
            let cause = failures.iter().position(|e| !e.to_string().contains(LET_GO)).unwrap_or(0);
            return Err(failures.swap_remove(cause));
        };
        Ok(value)
    }
}

impl Drop for Followers {
    fn drop(&mut self) {
        let ranks = self.ranks.get_mut().unwrap_or_else(PoisonError::into_inner);
        for Follower { orders, thread, .. } in ranks.drain(..) {
            drop(orders);
            // What the thread has on its device is given back before the model counts as gone.
            let _ = thread.join();
        }
    }
}
