//! Recurrences by a kernel of the GPU that the model is on: inputs and states stay there. What there is no kernel for goes the way of
//! `recurring`, over the CPU.

use super::{
    running::Running,
    value::{Outcome, Value},
};
use crate::{
    cache::numbers::Numbers,
    kernels::metal::{self, launch::Launch},
};
use candle_core::{DType, Tensor};

/// How a kernel takes the inputs of an op.
pub struct Away<'a, L> {
    /// The shape of the state.
    pub state: &'a [usize],
    /// The inputs `[tokens, ..]`.
    pub rows: &'a [&'a Value],
    /// The inputs that all tokens share.
    pub shared: &'a [&'a Tensor],
    /// Of these two lists, one after the other, the kernel's inputs in its order; the state comes last.
    pub order: &'a [usize],
    /// So many tokens, of which the first stands there in its sequence.
    pub launch: L,
}

impl Running<'_> {
    /// Runs the kernel for each sequence of the step on its own state. None if there is none, or something is amiss for `recur` to tell.
    pub(super) fn recur_away<L>(&mut self, cache: u32, away: Away<'_, L>) -> Outcome<Option<Value>>
    where
        L: Fn(usize, usize) -> Option<Launch>,
    {
        #[cfg(feature = "cuda")]
        if self.place.device.is_cuda() {
            return self.recur_on_cuda(cache, &away);
        }
        let device = self.place.device.clone();
        let known = !self.place.native && metal::serves(&device) && (away.launch)(1, 0).is_some();
        if !known || self.tokens == 0 || away.state.iter().product::<usize>() == 0 {
            return Ok(None);
        }
        let mut rows = Vec::with_capacity(away.rows.len());
        for value in away.rows {
            match value {
                Value::Real(t) if t.dims().first() == Some(&self.tokens) => rows.push(t.to_dtype(DType::F32)?),
                _ => return Ok(None),
            }
        }
        self.claim(cache, away.state)?;
        let mut outputs = Vec::new();
        for part in &mut self.parts {
            let Some(memory) = part.state.layers.get_mut(cache as usize) else { continue };
            let Some(recurrent) = memory.state_mut() else { continue };
            let (start, end) = (part.tokens.start, part.tokens.end);
            let middle = start + part.replayed;
            for (from, to) in [(start, middle), (middle, end)] {
                if from == middle && part.replayed > 0 {
                    recurrent.midway = Some(recurrent.numbers.clone());
                }
                let Some(launch) = (away.launch)(to - from, part.state.offset + from - start) else { continue };
                if from == to {
                    continue;
                }
                let cut = rows.iter().map(|t| t.narrow(0, from, to - from)).collect::<candle_core::Result<Vec<_>>>()?;
                let all: Vec<&Tensor> = cut.iter().chain(away.shared.iter().copied()).collect();
                let before = recurrent.numbers.on(&device, away.state)?;
                let mut inputs: Vec<&Tensor> = away.order.iter().filter_map(|&i| all.get(i).copied()).collect();
                inputs.push(&before);
                let mut made = metal::device::run(&launch, &inputs)?.into_iter();
                if let (Some(y), Some(after)) = (made.next(), made.next()) {
                    recurrent.numbers = Numbers::There(after);
                    outputs.push(y);
                }
            }
        }
        let y = Tensor::cat(&outputs, 0)?;
        Ok(Some(Value::Real(y.to_dtype(self.place.activations())?)))
    }
}
