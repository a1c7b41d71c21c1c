//! The running ops that need weights or the sequence. The same code serves the dry run, where values are shapes only: then slots are
//! what the plugin wanted, not yet layers.

use super::{
    arena::Arena,
    last_rows::LastRows,
    noting::Notes,
    value::{Dims, Outcome, Value, fault},
    watch::Op,
};
use crate::{
    cache::State,
    compiled::maps::Map,
    device::Placement,
    kernels::{
        cpu::{Angles, Turn},
        metal,
    },
    layers::{Layer, experts::Activation, rope},
    parallel::ranks::Seat,
    weights::plan::Wanted,
};
use plugin_api::abi::{CacheSpec, Handle, ROTATE_BACK, ROTATE_BLOCK_SHIFT, ROTATE_LAST, ROTATE_NEIGHBOURS, Slot};
use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
};

/// A sequence's share of a step.
pub struct Part<'a> {
    /// Its memory.
    pub state: &'a mut State,
    /// Its tokens among the step's.
    pub tokens: Range<usize>,
    /// So many of them, at the start, it had read before it was taken back.
    pub replayed: usize,
}

/// Where the tokens of a step on CUDA stand in their sequences. What moves on from step to step is read there, not from the host.
#[derive(Clone)]
pub struct Places {
    /// `[tokens]`, u32, on the device.
    pub positions: candle_core::Tensor,
    /// Whether the ops are being written down, to be repeated at later positions.
    pub recorded: bool,
}

/// What each cache holds of a token: `[heads, dim]` of its keys and of its values.
pub type CacheShapes = BTreeMap<u32, [usize; 4]>;

/// One call of `forward` or `head`.
pub struct Running<'a> {
    /// The step's tensors.
    pub arena: Arena,
    /// What each slot wants, for its name and shapes.
    pub wanted: &'a [Wanted],
    /// The slots' layers; empty in a dry run.
    pub layers: &'a [Layer],
    /// Where it runs.
    pub place: &'a Placement,
    /// Which of several ranks this is, where the weights are shared out.
    pub seat: Option<&'a Seat>,
    /// Where its tokens stand, on CUDA.
    pub places: Option<Places>,
    /// The sequences of the step.
    pub parts: Vec<Part<'a>>,
    /// Tokens of the step, of all sequences.
    pub tokens: usize,
    /// The caches that the architecture declared.
    pub caches: &'a [CacheSpec],
    /// Which of these this step has fed: a second time would put the same positions there again.
    pub fed: Vec<bool>,
    /// What the plugin did that no tensor could say: a building op in `forward`.
    pub misuse: Option<String>,
    /// Angles of this step's tokens, by rope and length of blocks.
    pub angles: HashMap<(u32, usize), Vec<Angles>>,
    /// The same on a GPU.
    pub turns: HashMap<(u32, usize), candle_core::Tensor>,
    /// What a dry run learns of the caches.
    pub shapes: CacheShapes,
    /// The ops of the call, where somebody watches.
    pub ops: Option<Vec<Op>>,
    /// The same with all that they were told, where the step is to be compiled.
    pub notes: Option<Notes>,
    /// The rows that are wanted, where they are not all.
    pub last_rows: Option<LastRows>,
}

impl<'a> Running<'a> {
    /// A call on these sequences' tokens, of which nothing was asked yet.
    pub fn new(
        caches: &'a [CacheSpec],
        wanted: &'a [Wanted],
        layers: &'a [Layer],
        place: &'a Placement,
        parts: Vec<Part<'a>>,
        tokens: usize,
    ) -> Self {
        Running {
            arena: Arena::default(),
            wanted,
            layers,
            place,
            seat: None,
            places: None,
            parts,
            tokens,
            caches,
            fed: vec![false; caches.len()],
            misuse: None,
            angles: HashMap::new(),
            turns: HashMap::new(),
            shapes: CacheShapes::new(),
            ops: None,
            notes: None,
            last_rows: None,
        }
    }
}

impl Running<'_> {
    fn wanted(&self, slot: Slot) -> Outcome<&Wanted> {
        self.wanted.get(slot.0 as usize).ok_or_else(|| fault!("a layer that this model does not have"))
    }

    fn layer(&self, slot: Slot) -> Outcome<&Layer> {
        self.layers.get(slot.0 as usize).ok_or_else(|| fault!("a layer that is not loaded"))
    }

    /// What to call a slot in messages.
    pub fn name(&self, slot: Slot) -> String {
        self.wanted.get(slot.0 as usize).map(|w| w.name().to_owned()).unwrap_or_default()
    }

    fn with_last(x: &Value, expected: usize, last: usize) -> Outcome<Dims> {
        let mut dims = x.own_dims()?;
        match dims.last_mut() {
            Some(width) if *width == expected => *width = last,
            _ => return Err(fault!("input {dims:?}, it takes [.., {expected}]")),
        }
        Ok(dims)
    }

    pub fn embed(&mut self, slot: Slot, ids: Handle) -> Outcome {
        let ids = self.arena.get(ids)?;
        let Wanted::Embedding { dim, .. } = self.wanted(slot)? else {
            return Err(fault!("this layer is no embedding"));
        };
        let mut dims = ids.own_dims()?;
        dims.push(*dim);
        let layer = self.layer(slot);
        ids.make(dims, |ids| match layer {
            Ok(Layer::Embedding(e)) => e.forward(ids),
            Ok(Layer::Ids(table)) => table.forward(ids),
            _ => candle_core::bail!("this layer is not loaded"),
        })
    }

    pub fn unembed(&mut self, slot: Slot, x: Handle) -> Outcome {
        #[cfg(feature = "cuda")]
        if matches!(self.wanted(slot)?, Wanted::Embedding { .. })
            && let Some(y) = self.linear_later(slot, x)?
        {
            return Ok(y);
        }
        let x = self.arena.get(x)?;
        let Wanted::Embedding { dim, vocab, .. } = self.wanted(slot)? else {
            return Err(fault!("this layer is no embedding"));
        };
        let (dims, layer) = (Self::with_last(&x, *dim, *vocab)?, self.layer(slot));
        x.make(dims, |x| match layer {
            Ok(Layer::Embedding(e)) => e.as_linear(x),
            _ => candle_core::bail!("this layer is not loaded"),
        })
    }

    pub fn linear(&mut self, slot: Slot, x: Handle) -> Outcome {
        #[cfg(feature = "cuda")]
        if matches!(self.wanted(slot)?, Wanted::Linear { .. })
            && let Some(y) = self.linear_later(slot, x)?
        {
            return Ok(y);
        }
        let x = self.arena.get(x)?;
        let Wanted::Linear { inputs, outputs, .. } = self.wanted(slot)? else {
            return Err(fault!("this layer is not linear"));
        };
        let (dims, layer) = (Self::with_last(&x, *inputs, *outputs)?, self.layer(slot));
        x.make(dims, |x| match layer {
            Ok(Layer::Linear(l)) => Seat::joined(self.seat, slot, l.forward(x)?),
            _ => candle_core::bail!("this layer is not loaded"),
        })
    }

    pub fn norm(&mut self, slot: Slot, x: Handle) -> Outcome {
        #[cfg(feature = "cuda")]
        if let Some(y) = self.norm_later(slot, x)? {
            return Ok(y);
        }
        let x = self.arena.get(x)?;
        let Wanted::Norm { dim, .. } = self.wanted(slot)? else { return Err(fault!("this layer is no norm")) };
        let (dims, layer) = (Self::with_last(&x, *dim, *dim)?, self.layer(slot));
        x.make(dims, |x| match layer {
            Ok(Layer::Norm(n)) => n.forward(x),
            _ => candle_core::bail!("this layer is not loaded"),
        })
    }

    pub fn experts(&mut self, slot: Slot, x: Handle, chosen: Handle, weights: Handle) -> Outcome {
        let (handles, waits) = ([x, chosen, weights], self.may_wait());
        let look = |handle| self.arena.look_later(handle, waits).cloned();
        let (x, chosen, weights) = (look(x)?, look(chosen)?, look(weights)?);
        let Wanted::Experts { dim, .. } = self.wanted(slot)? else { return Err(fault!("this layer has no experts")) };
        let dims = Self::with_last(&x, *dim, *dim)?;
        if chosen.dims()? != weights.dims()? || chosen.dims()?.len() != 2 || chosen.dims()?[0] != dims[0] {
            return Err(fault!("x {dims:?}, chosen {:?}, weights {:?}", chosen.dims()?, weights.dims()?));
        }
        if waits {
            #[cfg(feature = "cuda")]
            if let Some(y) = self.experts_later(slot, handles)? {
                return Ok(y);
            }
            handles.into_iter().try_for_each(|handle| self.arena.look(handle).map(|_| ()))?;
        }
        match (&x, &chosen, &weights) {
            (Value::Real(x), Value::Real(chosen), Value::Real(weights)) => match self.layer(slot)? {
                Layer::Experts(e) => Ok(Value::Real(Seat::joined(self.seat, slot, e.forward(x, chosen, weights)?)?)),
                _ => Err(fault!("this layer has no experts")),
            },
            _ => Ok(Value::Planned(dims)),
        }
    }

    pub fn parameter(&mut self, slot: Slot) -> Outcome {
        let Wanted::Parameter { dims, .. } = self.wanted(slot)? else { return Err(fault!("this layer is no tensor")) };
        match self.layer(slot) {
            Ok(Layer::Parameter(t)) => Ok(Value::Real(t.clone())),
            _ => Ok(Value::planned(dims)),
        }
    }

    pub fn rotate(&mut self, slot: Slot, x: Handle, flags: u32) -> Outcome {
        let (handle, waits) = (x, self.may_wait());
        let x = self.arena.look_later(x, waits)?.clone();
        let (ways, block) = (flags & ((1 << ROTATE_BLOCK_SHIFT) - 1), (flags >> ROTATE_BLOCK_SHIFT) as usize);
        if ways & !(ROTATE_NEIGHBOURS | ROTATE_LAST | ROTATE_BACK) != 0 {
            return Err(fault!("the plugin asks for a way to turn that this dylm does not know; update dylm"));
        }
        let turn = Turn {
            neighbours: ways & ROTATE_NEIGHBOURS != 0,
            last: ways & ROTATE_LAST != 0,
            back: ways & ROTATE_BACK != 0,
        };
        let wanted = self.wanted;
        let Some(Wanted::Rope(rope)) = wanted.get(slot.0 as usize) else {
            return Err(fault!("this layer has no rope"));
        };
        let dims = x.own_dims()?;
        if dims.len() != 3 || dims[0] != self.tokens || dims[2] < rope.dims {
            return Err(fault!("{dims:?} is not [{} tokens, heads, at least {}]", self.tokens, rope.dims));
        }
        if waits {
            #[cfg(feature = "cuda")]
            if rope.dims > 0
                && let Some(y) = self.rotate_later(rope, handle, block, turn)?
            {
                return Ok(y);
            }
            self.arena.look(handle)?;
        }
        if rope.dims == 0 {
            return Ok(x);
        }
        let spans = self.parts.iter().map(|p| rope::Span {
            offset: p.state.offset,
            len: p.tokens.len(),
            horizon: p.state.horizon,
        });
        let spans = spans.collect::<Vec<_>>();
        #[cfg(feature = "cuda")]
        if let Some(places) = &self.places {
            return x.make(dims, |x| rope.rotate_on_cuda(x, &spans, places, block, turn));
        }
        if !self.place.native {
            if metal::serves(&self.place.device)
                && let Value::Real(x) = &x
            {
                let turns = match self.turns.get(&(slot.0, block)) {
                    Some(turns) => turns.clone(),
                    None => rope.turns(&spans, block, &self.place.device)?,
                };
                self.turns.insert((slot.0, block), turns.clone());
                if let Some(y) = metal::ops::rotate(x, &turns, turn)? {
                    return Ok(Value::Real(y));
                }
            }
            return x.make(dims, |x| rope.rotate(x, &spans, block, turn));
        }
        let angles = self.angles.entry((slot.0, block)).or_insert_with(|| rope.angles(&spans, block));
        x.make(dims, |x| rope::Rope::rotate_on_cpu(x, &spans, angles, turn))
    }

    /// Where each token stands in its sequence.
    pub fn positions(&mut self) -> Outcome {
        if self.parts.is_empty() {
            return Ok(Value::planned(&[self.tokens]));
        }
        if let Some(places) = &self.places {
            return Ok(Value::Real(places.positions.clone()));
        }
        let device = self.place.device.clone();
        let of = |p: &Part| (p.state.offset as u32..).take(p.tokens.len()).collect::<Vec<_>>();
        let positions: Vec<u32> = self.parts.iter().flat_map(of).collect();
        Ok(Value::Real(candle_core::Tensor::from_vec(positions, self.tokens, &device)?))
    }

    /// `silu(gate) * up` or `gelu_tanh(gate) * up`.
    pub fn gate(&mut self, gate: Handle, up: Handle, activation: Activation) -> Outcome {
        #[cfg(feature = "cuda")]
        if let Some(y) = self.gate_later(gate, up, activation)? {
            return Ok(y);
        }
        let (gate, up) = (self.arena.get(gate)?, self.arena.get(up)?);
        let native = self.place.native && gate.dims()? == up.dims()?;
        gate.zip(&up, |gate, up| if native { activation.on_cpu(gate, up) } else { activation.elsewhere(gate, up) })
    }

    /// scale · x + offset
    pub fn affine(&mut self, x: Handle, scale: f64, offset: f64) -> Outcome {
        #[cfg(feature = "cuda")]
        if let Some(y) = self.affine_later(x, [scale as f32, offset as f32])? {
            return Ok(y);
        }
        if let Some(y) = self.mapped(Map::Affine(scale as f32, offset as f32), x)? {
            return Ok(y);
        }
        self.arena.look(x)?.map(|x| x.affine(scale, offset))
    }

    /// The k largest of the last axis, and their indices.
    pub fn topk(&mut self, x: Handle, k: usize) -> Outcome<(Value, Value)> {
        #[cfg(feature = "cuda")]
        if let Some(chosen) = self.topk_later(x, k)? {
            return Ok(chosen);
        }
        self.arena.look(x)?.topk(k)
    }

    /// Whether this step's launches may wait for the ops that read them.
    #[cfg(not(feature = "cuda"))]
    pub(super) fn may_wait(&self) -> bool {
        false
    }

    #[cfg(not(feature = "cuda"))]
    pub(super) fn row_later(&mut self, op: &str, a: Handle, b: Option<Handle>) -> Outcome<Option<Value>> {
        self.by_team(op, a, b)
    }

    /// a + b
    #[cfg(not(feature = "cuda"))]
    pub fn add(&mut self, a: Handle, b: Handle) -> Outcome {
        if let Some(y) = self.by_team("add", a, Some(b))? {
            return Ok(y);
        }
        self.arena.look(a)?.zip(self.arena.look(b)?, |a, b| a.broadcast_add(b))
    }

    /// x `[tokens, heads, inputs]` -> `[tokens, heads, outputs]`
    pub fn multi_linear(&mut self, slot: Slot, x: Handle) -> Outcome {
        let x = self.arena.get(x)?;
        let Wanted::MultiLinear { heads, inputs, outputs, .. } = self.wanted(slot)? else {
            return Err(fault!("this layer is not linear by heads"));
        };
        let dims = Self::with_last(&x, *inputs, *outputs)?;
        if dims.len() != 3 || dims[1] != *heads {
            return Err(fault!("input {:?}, it takes [tokens, {heads}, {inputs}]", x.dims()?));
        }
        let layer = self.layer(slot);
        x.make(dims, |x| match layer {
            Ok(Layer::MultiLinear(l)) => l.forward(x),
            _ => candle_core::bail!("this layer is not loaded"),
        })
    }
}
