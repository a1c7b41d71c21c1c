//! Ops whose launch on an NVIDIA GPU may wait for the op that reads it (`later`): what they are asked of, and whether the model's layers are
//! such that the kernels can. Every function gives none where the op is to be done at once.

use super::{
    later::MOST,
    running::{Part, Running},
    value::{Outcome, Value},
};
use crate::{
    kernels::{cpu::Turn, cuda::experts::Routed},
    layers::{
        Layer,
        attention::{New, Scores, on_cuda},
        experts::Activation,
        rope::Rope,
        weight::Weight,
    },
};
use candle_core::{DType, Tensor};
use plugin_api::abi::{Handle, Slot};

impl Running<'_> {
    /// Whether this step is such that launches wait.
    fn may_wait(&self) -> bool {
        let plain = self.ops.is_none() && !self.arena.is_exact() && self.place.dtype == DType::BF16;
        plain && self.places.is_some() && self.tokens <= MOST && !self.layers.is_empty()
    }

    /// A tensor that may be unwritten, and its last axis.
    fn unread(&self, handle: Handle) -> Outcome<Option<(Tensor, usize)>> {
        if !self.may_wait() {
            return Ok(None);
        }
        match self.arena.peek(handle)? {
            Value::Real(t) => Ok(t.dims().last().map(|&last| (t.clone(), last))),
            _ => Ok(None),
        }
    }

    pub(super) fn norm_later(&mut self, slot: Slot, x: Handle, dim: usize) -> Outcome<Option<Value>> {
        match (self.unread(x)?, self.layers.get(slot.0 as usize)) {
            (Some((x, last)), Some(Layer::Norm(norm))) if last == dim => {
                Ok(self.arena.later.norm(norm, &x)?.map(Value::Real))
            }
            _ => Ok(None),
        }
    }

    pub(super) fn linear_later(&mut self, slot: Slot, x: Handle) -> Outcome<Option<Value>> {
        let Some((x, last)) = self.unread(x)? else { return Ok(None) };
        let (weight, bias) = match self.layers.get(slot.0 as usize) {
            Some(Layer::Linear(linear)) if linear.adapter.is_none() => (&linear.weight, linear.bias.as_ref()),
            Some(Layer::Embedding(embedding)) if embedding.adapter.is_none() => (&embedding.weight, None),
            _ => return Ok(None),
        };
        match weight {
            Weight::Tiles(tiles) if tiles.cols == last => {
                Ok(self.arena.later.product(tiles, bias, &x)?.map(Value::Real))
            }
            _ => Ok(None),
        }
    }

    pub(super) fn experts_later(&mut self, slot: Slot, x: Handle, routed: [&Value; 2]) -> Outcome<Option<Value>> {
        let [Value::Real(chosen), Value::Real(weights)] = routed else { return Ok(None) };
        match (self.unread(x)?, self.layers.get(slot.0 as usize)) {
            (Some((x, _)), Some(Layer::Experts(experts))) => {
                let Some(stacked) = &experts.stacked else { return Ok(None) };
                let (chosen, weights) = (chosen.clone(), weights.clone());
                let routed = Routed { x: x.clone(), norm: None, chosen, weights, kind: experts.kind };
                Ok(self.arena.later.experts(stacked, &x, routed)?.map(Value::Real))
            }
            _ => Ok(None),
        }
    }

    pub(super) fn rotate_later(
        &mut self,
        rope: &Rope,
        x: Handle,
        block: usize,
        turn: Turn,
    ) -> Outcome<Option<Value>> {
        let (Some((x, _)), Some(places)) = (self.unread(x)?, &self.places) else { return Ok(None) };
        // Of several sequences, each has a cache of its own to join.
        let Some(how) = rope.on_cuda(&self.place.device)?.filter(|_| self.parts.len() == 1) else { return Ok(None) };
        Ok(self.arena.later.turn(&x, &places.positions, how, block, turn)?.map(Value::Real))
    }

    /// a + b
    pub fn add(&mut self, a: Handle, b: Handle) -> Outcome {
        if let (Some((x, _)), Some((y, _))) = (self.unread(a)?, self.unread(b)?)
            && let Some(sum) = self.arena.later.sum(&x, &y)?
        {
            return Ok(Value::Real(sum));
        }
        self.arena.look(a)?.zip(self.arena.look(b)?, |a, b| a.broadcast_add(b))
    }

    pub(super) fn gate_later(&mut self, gate: Handle, up: Handle, activation: Activation) -> Outcome<Option<Value>> {
        match (self.unread(gate)?, self.unread(up)?) {
            (Some((gate, _)), Some((up, _))) => Ok(self.arena.later.gated(&gate, &up, activation)?.map(Value::Real)),
            _ => Ok(None),
        }
    }

    /// Attention of queries and keys that are still to be turned.
    pub(super) fn attend_later(&mut self, cache: usize, q: &Tensor, new: &New, how: &Scores) -> Outcome<Option<Value>> {
        let (Some(k), Some(v), [_], true) = (&new.k, &new.v, &self.parts[..], self.may_wait()) else {
            return Ok(None);
        };
        let (Some(turned), Some(keys)) = (self.arena.later.turned(q.id()), self.arena.later.turned(k.id())) else {
            return Ok(None);
        };
        let (Some(places), [part]) = (&self.places, &mut self.parts[..]) else { return Ok(None) };
        let part: &mut Part = part;
        let done = on_cuda::attend_turned(cache, [&turned, &keys], v, how, part, self.place, places)?;
        if done.is_some() {
            self.arena.later.has_written(q.id());
        }
        Ok(done.map(Value::Real))
    }
}
