//! Ops whose launch on an NVIDIA GPU may wait for the op that reads it (`later`): what they are asked of, and whether the model's layers are
//! such that the kernels can. Every function gives none where the op is to be done at once.

use super::{
    running::Running,
    value::{Outcome, Value},
};
use crate::{
    kernels::{
        cpu::Turn,
        cuda::{experts::Routed, rows::RowOp},
    },
    layers::{
        Layer,
        attention::{New, Scores, on_cuda},
        experts::Activation,
        rope::Rope,
        weight::Weight,
    },
    parallel::ranks::Seat,
    weights::plan::Wanted,
};
use candle_core::{DType, Tensor};
use plugin_api::abi::{Handle, Slot};

impl Running<'_> {
    /// Whether this step is such that launches wait.
    pub(super) fn may_wait(&self) -> bool {
        let plain = self.ops.is_none() && !self.arena.is_exact() && self.place.dtype == DType::BF16;
        plain && self.places.is_some() && !self.layers.is_empty()
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

    pub(super) fn norm_later(&mut self, slot: Slot, x: Handle) -> Outcome<Option<Value>> {
        let Some((x, last)) = self.unread(x)? else { return Ok(None) };
        match (self.wanted.get(slot.0 as usize), self.layers.get(slot.0 as usize)) {
            (Some(&Wanted::Norm { dim, .. }), Some(Layer::Norm(norm))) if last == dim => {
                Ok(self.arena.later.norm(norm, &x)?.map(Value::Real))
            }
            _ => Ok(None),
        }
    }

    pub(super) fn linear_later(&mut self, slot: Slot, x: Handle) -> Outcome<Option<Value>> {
        let (Some((x, last)), Some(summing)) = (self.unread(x)?, Seat::later(self.seat, slot)) else { return Ok(None) };
        let (weight, bias) = match self.layers.get(slot.0 as usize) {
            Some(Layer::Linear(linear)) if linear.adapter.is_none() => (&linear.weight, linear.bias.as_ref()),
            Some(Layer::Embedding(embedding)) if embedding.adapter.is_none() => (&embedding.weight, None),
            _ => return Ok(None),
        };
        match weight {
            Weight::Tiles(tiles) if tiles.cols == last => {
                Ok(self.arena.later.product(tiles, bias, &x, summing)?.map(Value::Real))
            }
            _ => Ok(None),
        }
    }

    pub(super) fn experts_later(&mut self, slot: Slot, [x, chosen, weights]: [Handle; 3]) -> Outcome<Option<Value>> {
        let (Some((chosen, _)), Some((weights, _))) = (self.unread(chosen)?, self.unread(weights)?) else {
            return Ok(None);
        };
        let Some(summing) = Seat::later(self.seat, slot) else { return Ok(None) };
        match (self.unread(x)?, self.layers.get(slot.0 as usize)) {
            (Some((x, _)), Some(Layer::Experts(experts))) => {
                let Some(stacked) = &experts.stacked else { return Ok(None) };
                if !matches!(*chosen.dims(), [tokens, k] if stacked.are_few(tokens, k)) {
                    return Ok(None);
                }
                let (route, weights) = match self.arena.later.route(&chosen, &weights)? {
                    Some((route, weights)) => (Some(route), weights),
                    None => (None, self.arena.later.wide(&weights)?),
                };
                if route.is_none() {
                    self.arena.later.read(chosen.id())?;
                }
                let routed = Routed { x: x.clone(), norm: None, chosen, weights, route, kind: experts.kind };
                Ok(self.arena.later.experts(stacked, &x, routed, summing)?.map(Value::Real))
            }
            _ => Ok(None),
        }
    }

    pub(super) fn rotate_later(&mut self, rope: &Rope, x: Handle, block: usize, turn: Turn) -> Outcome<Option<Value>> {
        let (Some((x, _)), Some(places)) = (self.unread(x)?, &self.places) else { return Ok(None) };
        // Several sequences have a cache each to join, and one token each that does.
        if self.parts.len() != 1 && self.parts.len() != self.tokens {
            return Ok(None);
        }
        let texts = self.parts.iter().map(|part| (part.state.offset + part.tokens.len()).max(part.state.horizon));
        let Some(how) = rope.on_cuda(&self.place.device, texts)? else { return Ok(None) };
        Ok(self.arena.later.turn(&x, &places.positions, how, block, turn)?.map(Value::Real))
    }

    /// a + b
    pub fn add(&mut self, a: Handle, b: Handle) -> Outcome {
        if let (Some((x, _)), Some((y, _))) = (self.unread(a)?, self.unread(b)?)
            && let Some(sum) = self.arena.later.sum(&x, &y)?
        {
            return Ok(Value::Real(sum));
        }
        if let Some(y) = self.row_later("add", a, Some(b))? {
            return Ok(y);
        }
        self.arena.look(a)?.zip(self.arena.look(b)?, |a, b| a.broadcast_add(b))
    }

    pub(super) fn gate_later(&mut self, gate: Handle, up: Handle, activation: Activation) -> Outcome<Option<Value>> {
        match (self.unread(gate)?, self.unread(up)?) {
            (Some((gate, _)), Some((up, _))) => Ok(self.arena.later.gated(&gate, &up, activation)?.map(Value::Real)),
            _ => Ok(None),
        }
    }

    /// A small op on rows, by its name in the table.
    pub(super) fn row_later(&mut self, op: &str, x: Handle, other: Option<Handle>) -> Outcome<Option<Value>> {
        if self.place.native {
            return self.by_team(op, x, other);
        }
        let op = match op {
            "softmax" => RowOp::Softmax,
            "sigmoid" => RowOp::Sigmoid,
            "sum" => RowOp::Sum,
            "gather" => RowOp::Gather,
            "add" => RowOp::Add,
            "sub" => RowOp::Sub,
            "mul" => RowOp::Mul,
            "div" => RowOp::Div,
            _ => return Ok(None),
        };
        let (Some((x, width)), other) = (self.unread(x)?, other.map(|other| self.unread(other)).transpose()?) else {
            return Ok(None);
        };
        let other = match other {
            Some(Some(other)) => Some(other),
            Some(None) => return Ok(None),
            None => None,
        };
        // These begin a chain; the others join one.
        let begins = matches!(op, RowOp::Softmax | RowOp::Sigmoid);
        let joins = |t: &Tensor| self.arena.later.is_in_chain(t.id());
        if !begins && !joins(&x) && !other.as_ref().is_some_and(|(t, _)| joins(t)) {
            return Ok(None);
        }
        let fits = match (op, &other) {
            (RowOp::Gather, Some((indices, _))) => indices.dtype() == DType::U32 && indices.rank() == 2,
            (_, Some((other, last))) => other.dtype() == x.dtype() && (*last == width || *last == 1),
            (_, None) => true,
        };
        if !fits || !matches!(x.dtype(), DType::BF16 | DType::F32) {
            return Ok(None);
        }
        let to = match (op, &other) {
            (RowOp::Sum, _) => 1,
            (RowOp::Gather, Some((_, count))) => *count,
            _ => width,
        };
        let made = self.arena.later.row(op, &x, other.as_ref().map(|(t, _)| t), to, [0.0; 2])?;
        Ok(made.map(|(y, _)| Value::Real(y)))
    }

    pub(super) fn affine_later(&mut self, x: Handle, numbers: [f32; 2]) -> Outcome<Option<Value>> {
        match self.unread(x)? {
            Some((x, width))
                if matches!(x.dtype(), DType::BF16 | DType::F32) && self.arena.later.is_in_chain(x.id()) =>
            {
                Ok(self.arena.later.row(RowOp::Affine, &x, None, width, numbers)?.map(|(y, _)| Value::Real(y)))
            }
            _ => Ok(None),
        }
    }

    pub(super) fn topk_later(&mut self, x: Handle, k: usize) -> Outcome<Option<(Value, Value)>> {
        match self.unread(x)? {
            Some((x, width)) if k > 0 && k <= width && matches!(x.dtype(), DType::BF16 | DType::F32) => {
                let made = self.arena.later.row(RowOp::TopK, &x, None, k, [0.0; 2])?;
                Ok(made.and_then(|(values, indices)| Some((Value::Real(values), Value::Real(indices?)))))
            }
            _ => Ok(None),
        }
    }

    /// Attention of queries and keys that are still to be turned.
    pub(super) fn attend_later(&mut self, cache: usize, q: &Tensor, new: &New, how: &Scores) -> Outcome<Option<Value>> {
        let (Some(k), Some(v), true) = (&new.k, &new.v, self.may_wait()) else { return Ok(None) };
        let (Some(turned), Some(keys)) = (self.arena.later.turned(q.id()), self.arena.later.turned(k.id())) else {
            return Ok(None);
        };
        let Some(places) = &self.places else { return Ok(None) };
        let done = on_cuda::attend_turned(cache, [&turned, &keys], v, how, &mut self.parts, self.place, places)?;
        if done.is_some() {
            self.arena.later.has_written(q.id());
        }
        Ok(done.map(Value::Real))
    }
}
