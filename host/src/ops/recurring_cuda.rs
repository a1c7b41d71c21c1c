//! Recurrences on an NVIDIA GPU: all sequences of a step in one launch, each on its state in place (`Numbers::InTurn`), so that steps can
//! be recorded and replayed.

use super::{
    recurring_away::Away,
    running::Running,
    value::{Outcome, Value},
};
use crate::{
    cache::memory::{Memory, Recurrent},
    kernels::{
        cuda::{
            recurrence::{self, Input, Segment},
            step::{device_of, unwritten},
        },
        metal::launch::Launch,
    },
};
use candle_core::Tensor;

impl Running<'_> {
    /// Runs the kernel for the sequences of the step. None if there is none, or something is amiss for `recur` to tell.
    pub(super) fn recur_on_cuda<L>(&mut self, cache: u32, away: &Away<'_, L>) -> Outcome<Option<Value>>
    where
        L: Fn(usize, usize) -> Option<Launch>,
    {
        let (Some(places), Some(launch)) = (self.places.clone(), (away.launch)(1, 0)) else { return Ok(None) };
        let size = away.state.iter().product::<usize>();
        if self.tokens == 0 || size == 0 || self.layers.is_empty() || !recurrence::serves(&launch) {
            return Ok(None);
        }
        let mut inputs = Vec::with_capacity(away.order.len());
        for &i in away.order {
            inputs.push(match (away.rows.get(i), away.shared.get(i.wrapping_sub(away.rows.len()))) {
                (Some(Value::Real(t)), _) if t.dims().first() == Some(&self.tokens) => Input::Rows(t),
                (None, Some(t)) => Input::Shared(t),
                _ => return Ok(None),
            });
        }
        // A bias that is not there is given as something else.
        if launch.kernel.maker == "CONV" && launch.numbers.last() == Some(&0) {
            inputs.truncate(2);
        }
        let Some((dims, _)) = launch.outputs.first() else { return Ok(None) };
        let dims = [&[self.tokens], dims.get(1..).unwrap_or_default()].concat();
        let Some(device) = inputs.iter().find_map(|i| if let Input::Rows(t) = i { Some(t.device()) } else { None })
        else {
            return Ok(None);
        };
        let device = device.clone();
        self.claim(cache, away.state)?;
        let y = match inputs.first() {
            Some(Input::Rows(t)) => unwritten(&dims, self.place.activations(), device_of(t)?)?,
            _ => return Ok(None),
        };
        let run = |segments: &[Segment]| recurrence::run(&launch, &inputs, &places.positions, segments, &y);
        let (mut first, mut second) = (Vec::new(), Vec::new());
        let memory = |part: &mut super::running::Part<'_>| -> candle_core::Result<Option<Tensor>> {
            let offset = part.state.offset;
            let state = part.state.layers.get_mut(cache as usize).and_then(Memory::state_mut);
            state.map(|state: &mut Recurrent| state.numbers.in_turn(&device, offset)).transpose()
        };
        for part in &mut self.parts {
            let Some(states) = memory(part)? else { continue };
            let (from, again) = (part.tokens.start, part.replayed);
            if again > 0 {
                first.push(Segment { states: states.clone(), from, tokens: again });
            }
            if part.tokens.len() > again {
                second.push(Segment { states, from: from + again, tokens: part.tokens.len() - again });
            }
        }
        if !first.is_empty() {
            run(&first)?;
        }
        for part in &mut self.parts {
            let (read, offset) = (part.tokens.len(), part.state.offset);
            let Some(state) = part.state.layers.get_mut(cache as usize).and_then(Memory::state_mut) else { continue };
            if part.replayed > 0 {
                state.numbers.turned(offset + part.replayed);
                state.midway = Some(state.numbers.copied()?);
            }
            state.numbers.turned(offset + read);
        }
        if !second.is_empty() {
            run(&second)?;
        }
        Ok(Some(Value::Real(y)))
    }
}
