//! A step of one token a sequence, compiled for the CPU: the ops that a plugin calls, noted once on shapes alone, become a list of kernels
//! over buffers that are there from the start. Then a step needs neither the plugin nor candle's tensors, and what a layer costs beside its
//! products falls from a hundred microseconds to a few.
//!
//! Plugins promise that `forward` asks for the same ops whenever the shapes are the same; the bits are those of the step op by op. A model
//! with an op that has no kernel here runs op by op as before; [`Model::not_replayed`] says which op.

mod attend;
mod buffers;
mod lower;
pub(crate) mod maps;
mod play;
mod recur;

use crate::{
    kernels::cpu::Turn,
    layers::experts::Activation,
    model::{Input, Model, Want},
    ops::running::CacheShapes,
};
use attend::Attending;
use maps::{Map, Spread, Zip};
use plugin_api::abi::Slot;
use recur::Recurring;
use std::{
    collections::{HashMap, hash_map::Entry},
    sync::{Mutex, PoisonError, TryLockError},
};

/// A buffer's number.
type Place = usize;

/// One kernel and its buffers.
struct Step {
    kernel: Kernel,
    reads: Vec<Place>,
    writes: Vec<Place>,
}

/// What is done; where nothing else is said it reads one buffer and writes one.
enum Kernel {
    /// Rows of an embedding, by the step's ids, or by numbers that are read.
    Gather(Slot),
    /// Where the tokens stand, as numbers.
    Positions,
    /// Products of one input with several matrices, a buffer each.
    Products(Vec<Slot>),
    Norm {
        weight: Option<Vec<f32>>,
        bias: Option<Vec<f32>>,
        eps: f32,
        dim: usize,
        centred: bool,
    },
    /// Rotation by one of the step's sets of angles.
    Rotate {
        angles: usize,
        heads: usize,
        dim: usize,
        turn: Turn,
    },
    /// Queries; then keys and values that join the cache, sinks and slopes, as far as there are any.
    Attend(Box<Attending>),
    /// A gate's output and what it lets through.
    Gate(Activation),
    Map(Map),
    /// Two numbers to one.
    Zip(Zip, [Spread; 2]),
    /// Entries of rows of so many.
    Narrow {
        of: usize,
        start: usize,
        len: usize,
    },
    /// Rows of these widths, side by side.
    Join(Vec<usize>),
    /// The largest of each row of so many: they, and in a second buffer where they are.
    Largest {
        of: usize,
        k: usize,
    },
    /// What carries a state from token to token.
    Recur(Recurring),
    /// What is done as if step by step, with the shapes of what is read.
    Whole(Whole, Vec<Vec<usize>>),
}

/// Ops on tensors as a whole, of which a step has few. Indices are numbers like all others here.
#[derive(Clone, Copy)]
enum Whole {
    Softmax,
    Softplus,
    Round,
    Sum,
    Mean,
    Max,
    TopMask(usize),
    Taken,
    MultiLinear(Slot),
    /// Activations, the experts chosen for them, and these' shares.
    Experts(Slot),
}

/// A compiled step for some number of sequences.
struct Compiled {
    steps: Vec<Step>,
    buffers: Vec<Vec<f32>>,
    /// Ropes and lengths of blocks, of which a step has angles.
    angles: Vec<(Slot, usize)>,
    logits: Place,
    /// What each cache that is fed holds of a token.
    shapes: CacheShapes,
}

/// The compiled steps of a model, by their number of sequences.
#[derive(Default)]
pub struct Steps(Mutex<Kept>);

#[derive(Default)]
struct Kept {
    steps: HashMap<usize, Compiled>,
    refused: Option<String>,
}

impl Steps {
    /// Why steps are not compiled, if that was tried and they are not.
    pub fn refused(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).refused.clone()
    }
}

impl Model {
    /// Logits of a step of one token for each of these sequences, if it is one and can be compiled. The caller begins and ends the
    /// sequences' steps.
    pub(crate) fn played(&self, inputs: &mut [Input], ids: &[u32]) -> candle_core::Result<Option<Vec<Vec<f32>>>> {
        let single = |i: &Input| i.tokens.len() == 1 && i.want == Want::Last;
        if !self.place.native
            || self.watch.is_some()
            || self.seat.is_some()
            || ids.len() != inputs.len()
            || !inputs.iter().all(single)
        {
            return Ok(None);
        }
        let mut kept = match self.compiled.0.try_lock() {
            Ok(kept) => kept,
            // A panic may have left a buffer out of its place.
            Err(TryLockError::Poisoned(kept)) => {
                self.compiled.0.clear_poison();
                let mut kept = kept.into_inner();
                kept.steps.clear();
                kept
            }
            // Another step of this model has the buffers.
            Err(TryLockError::WouldBlock) => return Ok(None),
        };
        let Kept { steps, refused } = &mut *kept;
        if refused.is_none() && std::env::var("DYLM_REPLAY").is_ok_and(|set| set == "off") {
            *refused = Some("DYLM_REPLAY=off".into());
        }
        if refused.is_some() {
            return Ok(None);
        }
        let compiled = match steps.entry(ids.len()) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => match self.compile(ids.len()) {
                Ok(compiled) => new.insert(compiled),
                Err(why) => {
                    *refused = Some(why);
                    return Ok(None);
                }
            },
        };
        compiled.play(self, inputs, ids).map(Some)
    }
}
