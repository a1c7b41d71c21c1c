//! The running ops that carry a state from token to token: convolutions and recurrences. Each reads a layer's state per sequence, walks
//! through the sequence's new tokens and leaves the state after the last one.
//!
//! The kernels here are plain loops over f32 slices, on the CPU wherever the model lies: where a GPU has no kernel of its own
//! (`recurring_away`), inputs come to the CPU and the result goes back, which is right but slow.

use super::{
    recurring_away::Away,
    running::Running,
    value::{Outcome, Value, fault},
};
use crate::{
    cache::{memory, numbers::Numbers},
    kernels::{cpu::recurrence, metal::recurrence as kernels},
    layers::{
        Layer,
        slices::{filled, with_all_f32},
    },
    weights::plan::Wanted,
};
use candle_core::{DType, Device, Tensor};
use plugin_api::abi::{CACHE_STATE, Handle, Slot};

/// One sequence's tokens of a step, as a kernel sees them.
pub struct Turn<'a, const N: usize, const M: usize> {
    /// The layer's state before the first of the tokens; the kernel leaves that after the last one.
    pub state: &'a mut [f32],
    /// These tokens' rows of the inputs that have rows.
    pub rows: [&'a [f32]; N],
    /// The inputs that all tokens share.
    pub shared: [&'a [f32]; M],
    /// These tokens' rows of the result; 0 at first.
    pub out: &'a mut [f32],
    /// How many tokens.
    pub tokens: usize,
    /// Where the first of them stands in its sequence.
    pub offset: usize,
}

impl Running<'_> {
    /// Claims a cache for an op that needs a state of this shape: it must be declared so, and be used once a step.
    pub(super) fn claim(&mut self, cache: u32, dims: &[usize]) -> Outcome<()> {
        let Some(spec) = self.caches.get(cache as usize) else {
            return Err(fault!("the layer's caches() declares no further state"));
        };
        let declared = memory::dims(spec);
        // An axis of 0 numbers ends a declared shape.
        let needed: Vec<usize> = dims.iter().copied().take_while(|&d| d > 0).collect();
        if spec.kind != CACHE_STATE || declared != needed {
            return Err(fault!("needs a state of {dims:?}, the layer's caches() declares one of {declared:?}"));
        }
        match self.fed.get_mut(cache as usize) {
            Some(fed) if !*fed => *fed = true,
            _ => return Err(fault!("the state {cache} is used twice in one step")),
        }
        Ok(())
    }

    /// Runs `kernel` for each sequence of the step on its own state of shape `state`: `rows` are the inputs `[tokens, ..]`, `shared` those
    /// without tokens, `output` the shape of the result, which begins with the step's tokens. Shapes beyond that are the op's to check.
    pub(super) fn recur<const N: usize, const M: usize>(
        &mut self,
        cache: u32,
        state: &[usize],
        rows: [&Value; N],
        shared: [&Value; M],
        output: &[usize],
        mut kernel: impl FnMut(Turn<'_, N, M>),
    ) -> Outcome {
        let tokens = self.tokens;
        for value in rows {
            if value.dims()?.first() != Some(&tokens) {
                return Err(fault!("{:?} in a step of {tokens} tokens", value.dims()?));
            }
        }
        self.claim(cache, state)?;
        let here = |value: &Value| match value {
            Value::Real(t) => Ok(Some(t.to_device(&Device::Cpu)?.to_dtype(DType::F32)?)),
            _ => Ok(None),
        };
        let gather = |values: &[&Value]| values.iter().map(|v| here(v)).collect::<Outcome<Option<Vec<Tensor>>>>();
        let (Some(rows), Some(shared)) = (gather(&rows)?, gather(&shared)?) else { return Ok(Value::planned(output)) };
        let parts = &mut self.parts;
        for part in parts.iter_mut() {
            if let Some(recurrent) = part.state.layers.get_mut(cache as usize).and_then(memory::Memory::state_mut) {
                recurrent.numbers.here()?;
            }
        }
        let result = with_all_f32::<N, _>(&rows, |rows| {
            with_all_f32::<M, _>(&shared, |shared| {
                filled(output, |out| {
                    for part in parts {
                        let Some(memory) = part.state.layers.get_mut(cache as usize) else { continue };
                        let Some(recurrent) = memory.state_mut() else { continue };
                        let (start, end) = (part.tokens.start, part.tokens.end);
                        let middle = start + part.replayed;
                        for (from, to) in [(start, middle), (middle, end)] {
                            if from == middle && part.replayed > 0 {
                                recurrent.midway = Some(recurrent.numbers.clone());
                            }
                            if from == to {
                                continue;
                            }
                            let of = |all: &[f32]| from * (all.len() / tokens)..to * (all.len() / tokens);
                            let range = of(out);
                            let Numbers::Here(numbers) = &mut recurrent.numbers else { continue };
                            kernel(Turn {
                                state: numbers,
                                rows: rows.map(|all| &all[of(all)]),
                                shared,
                                out: &mut out[range],
                                tokens: to - from,
                                offset: part.state.offset + from - start,
                            });
                        }
                    }
                })
            })
        });
        let result = result???;
        Ok(Value::Real(result.to_dtype(self.place.activations())?.to_device(&self.place.device)?))
    }

    /// x `[tokens, channels]` -> the same, each channel folded with its kernel.
    pub fn conv1d(&mut self, slot: Slot, cache: u32, x: Handle) -> Outcome {
        let x = self.arena.get(x)?;
        let Some(Wanted::Conv1d { channels, kernel, .. }) = self.wanted.get(slot.0 as usize) else {
            return Err(fault!("this layer is no convolution"));
        };
        let (channels, kernel, dims) = (*channels, *kernel, x.dims()?.to_vec());
        if dims != [self.tokens, channels] {
            return Err(fault!("{dims:?} is not [{} tokens, {channels}]", self.tokens));
        }
        let state = [kernel.saturating_sub(1), channels];
        let layers = self.layers;
        if let Some(Layer::Conv1d(conv)) = layers.get(slot.0 as usize)
            && let Some([weight, bias]) = &conv.away
        {
            let launch = |tokens, _| kernels::conv1d(tokens, channels, kernel, conv.bias.is_some());
            let (rows, shared, order) = (&[&x], &[weight, bias], &[0, 1, 2]);
            if let Some(y) = self.recur_away(cache, Away { state: &state, rows, shared, order, launch })? {
                return Ok(y);
            }
        }
        match layers.get(slot.0 as usize) {
            Some(Layer::Conv1d(conv)) => self.recur(cache, &state, [&x], [], &dims, |turn: Turn<1, 0>| {
                recurrence::conv1d(turn.state, turn.rows[0], &conv.weight, conv.bias.as_deref(), channels, turn.out)
            }),
            _ => self.recur(cache, &state, [&x], [], &dims, |_: Turn<1, 0>| {}),
        }
    }

    /// x `[tokens, dim]` -> each token's predecessor.
    pub fn shift(&mut self, cache: u32, x: Handle) -> Outcome {
        let x = self.arena.get(x)?;
        let &[tokens, dim] = x.dims()? else { return Err(fault!("{:?} is not [tokens, dim]", x.dims()?)) };
        #[cfg(feature = "cuda")]
        if self.place.device.is_cuda() {
            // A convolution of two taps, the former of which is 1.
            let launch = |tokens, _| kernels::conv1d(tokens, dim, 2, false);
            let away = Away { state: &[1, dim], rows: &[&x], shared: &[], order: &[0], launch };
            if let Some(y) = self.recur_on_cuda(cache, &away)? {
                return Ok(y);
            }
        }
        self.recur(cache, &[1, dim], [&x], [], &[tokens, dim], |turn: Turn<1, 0>| {
            recurrence::shift(turn.state, turn.rows[0], turn.out)
        })
    }

    /// Mamba 2: x `[tokens, heads, d]`, dt `[tokens, heads]`, a `[heads]`, b and c `[tokens, groups, n]`.
    pub fn ssd(&mut self, cache: u32, inputs: [Handle; 5]) -> Outcome {
        let [x, dt, a, b, c] = self.values(inputs)?;
        let (x_dims, groups) = (x.dims()?.to_vec(), b.dims()?.to_vec());
        let (&[tokens, heads, d], &[_, groups, n]) = (x_dims.as_slice(), groups.as_slice()) else {
            return Err(fault!("x {x_dims:?} and b {groups:?} are not [tokens, heads, d] and [tokens, groups, n]"));
        };
        let fits = dt.dims()? == [tokens, heads] && a.dims()? == [heads];
        let grouped = b.dims()? == [tokens, groups, n] && c.dims()? == b.dims()?;
        if !fits || !grouped || groups == 0 || !heads.is_multiple_of(groups) {
            let [dt, a, b, c] = [dt.dims()?, a.dims()?, b.dims()?, c.dims()?];
            return Err(fault!("x {x_dims:?} against dt {dt:?}, a {a:?}, b {b:?}, c {c:?}"));
        }
        let shape = recurrence::Ssd { heads, d, groups, n };
        if let Value::Real(a) = &a {
            let a = a.to_dtype(DType::F32)?;
            let launch = |tokens, _| kernels::ssd(tokens, shape);
            let (rows, order) = (&[&x, &dt, &b, &c], &[0, 1, 2, 3, 4]);
            let away = Away { state: &[heads, d, n], rows, shared: &[&a], order, launch };
            if let Some(y) = self.recur_away(cache, away)? {
                return Ok(y);
            }
        }
        self.recur(cache, &[heads, d, n], [&x, &dt, &b, &c], [&a], &x_dims, |turn: Turn<4, 1>| {
            recurrence::ssd(shape, turn.state, turn.rows, turn.shared[0], turn.out)
        })
    }

    /// Mamba 1: x and dt `[tokens, d]`, a `[d, n]`, b and c `[tokens, n]`.
    pub fn selective_scan(&mut self, cache: u32, inputs: [Handle; 5]) -> Outcome {
        let [x, dt, a, b, c] = self.values(inputs)?;
        let (x_dims, a_dims) = (x.dims()?.to_vec(), a.dims()?.to_vec());
        let (&[tokens, d], &[a_d, n]) = (x_dims.as_slice(), a_dims.as_slice()) else {
            return Err(fault!("x {x_dims:?} and a {a_dims:?} are not [tokens, d] and [d, n]"));
        };
        let fits = a_d == d && dt.dims()? == x_dims && b.dims()? == [tokens, n] && c.dims()? == [tokens, n];
        if !fits {
            let [dt, b, c] = [dt.dims()?, b.dims()?, c.dims()?];
            return Err(fault!("x {x_dims:?} against dt {dt:?}, a {a_dims:?}, b {b:?}, c {c:?}"));
        }
        if let Value::Real(a) = &a {
            let a = a.to_dtype(DType::F32)?;
            let launch = |tokens, _| kernels::selective_scan(tokens, [d, n]);
            let (rows, order) = (&[&x, &dt, &b, &c], &[0, 1, 2, 3, 4]);
            if let Some(y) = self.recur_away(cache, Away { state: &[d, n], rows, shared: &[&a], order, launch })? {
                return Ok(y);
            }
        }
        self.recur(cache, &[d, n], [&x, &dt, &b, &c], [&a], &x_dims, |turn: Turn<4, 1>| {
            recurrence::selective_scan([d, n], turn.state, turn.rows, turn.shared[0], turn.out)
        })
    }

    pub(super) fn values<const N: usize>(&mut self, handles: [Handle; N]) -> Outcome<[Value; N]> {
        let mut values = handles.map(|_| Value::planned(&[]));
        for (value, handle) in values.iter_mut().zip(handles) {
            *value = self.arena.get(handle)?;
        }
        Ok(values)
    }
}
