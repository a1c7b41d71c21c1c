//! A recurrence of the author's own: the step of one token, written with the same words as everything else. The host keeps the states,
//! knows where one sequence ends and the next begins, and calls the step for each token in turn; so prompts in chunks, batches, going
//! back and saved caches work as for the recurrences that dylm has. Those are faster: their loops run in one op.
//!
//! ```
//! use plugin_api::prelude::*;
//!
//! /// The gated delta rule, as `layer.gated_delta` has it; the layer's `Cache::state(&[heads, d, e])`.
//! fn delta_rule(layer: &mut Layer, q: &Tensor, k: &Tensor, v: &Tensor, g: &Tensor, beta: &Tensor) -> Tensor {
//!     layer.scan([q, k, v, g, beta], |[s], [q, k, v, g, beta]| {
//!         let s = s * g.exp().column().column();
//!         let seen = k.row().matmul(&s);
//!         let s = s + k.column() * (v.row() - seen) * beta.column().column();
//!         let y = q.row().matmul(&s);
//!         ([s], y.flatten())
//!     })
//! }
//! ```

use crate::{
    Layer, Tensor,
    abi::{At, Handle, ScanStep},
    tensor::Call,
};
use abi_stable::std_types::{RSlice, RSliceMut};
use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
};

/// The author's step, and what it threw.
struct Work<F> {
    step: F,
    thrown: Option<Box<dyn Any + Send>>,
}

impl Layer {
    /// Walks through each sequence's tokens by `step`, which makes of the layer's states (the next `S` that its
    /// [`caches`](crate::Model::caches) declares) before a token, and of that token's rows of the inputs, the states after it and a row of
    /// the result. Inputs `[tokens, ..]` come as `[1, ..]`, a state of shape `[a, b]` as `[1, a, b]`, and so must go what the step gives;
    /// all in f32, as are weights that the step uses. States are 0 before a sequence's first token. Gives `[tokens, ..]`.
    ///
    /// Replay contract: the step issues the same ops for every token. Thread: step.
    #[track_caller]
    pub fn scan<const S: usize, const N: usize, F>(&mut self, inputs: [&Tensor; N], step: F) -> Tensor
    where
        F: FnMut([Tensor; S], [Tensor; N]) -> ([Tensor; S], Tensor),
    {
        let (call, at) = (Call::current(), At::caller());
        let caches = [(); S].map(|()| self.next_state());
        let inputs = inputs.map(Tensor::handle);
        let mut work = Work { step, thrown: None };
        let step = ScanStep { data: (&raw mut work).cast(), run: run::<S, N, F> };
        let scan = call.ops.scan();
        let y = scan(call.ctx, RSlice::from_slice(&caches), RSlice::from_slice(&inputs), step, at);
        match work.thrown {
            // Goes on to where the export macro catches it; its text and place are kept.
            Some(thrown) => resume_unwind(thrown),
            None => Tensor::own(y),
        }
    }
}

extern "C" fn run<const S: usize, const N: usize, F>(
    data: *mut (),
    states: RSlice<'_, Handle>,
    now: RSlice<'_, Handle>,
    mut out: RSliceMut<'_, Handle>,
) -> u8
where
    F: FnMut([Tensor; S], [Tensor; N]) -> ([Tensor; S], Tensor),
{
    // SAFETY: the `Work` of the `scan` that is running, which holds no other reference to it meanwhile.
    let work = unsafe { &mut *data.cast::<Work<F>>() };
    let (states, now) = (<[Handle; S]>::try_from(states.as_slice()), <[Handle; N]>::try_from(now.as_slice()));
    let (Ok(states), Ok(now), Some((y_out, states_out))) = (states, now, out.as_mut_slice().split_last_mut()) else {
        return 0;
    };
    let made = catch_unwind(AssertUnwindSafe(|| (work.step)(states.map(Tensor::own), now.map(Tensor::own))));
    match made {
        Ok((states, y)) => {
            states_out.iter_mut().zip(states).for_each(|(to, state)| *to = state.into_handle());
            *y_out = y.into_handle();
            1
        }
        Err(thrown) => {
            work.thrown = Some(thrown);
            0
        }
    }
}
