//! From noted ops to kernels: each op that makes numbers is a step that writes a value, reshapes are names for values that are there.
//! Products of one input move to the first of them, where they are done together.

use super::{
    Compiled, Kernel, Step, Whole,
    buffers::{Made, share_out},
    maps,
    recur::{Recurring, Rule},
};
use crate::{
    kernels::cpu::Turn,
    layers::{Layer, experts::Activation, slices::with_f32, weight::Weight},
    model::Model,
    ops::{
        noting::{Noted, Word},
        running::CacheShapes,
    },
    weights::plan::Wanted,
};
use candle_core::{DType, Tensor};
use maps::{Map, Spread};
use plugin_api::abi::{Handle, ROTATE_BACK, ROTATE_BLOCK_SHIFT, ROTATE_LAST, ROTATE_NEIGHBOURS, Slot};
use std::collections::HashMap;

pub(super) type Lowered<T> = Result<T, String>;

/// What a handle stands for.
#[derive(Clone)]
pub(super) struct Known {
    /// Who made the numbers; none for the step's ids.
    pub(super) made: Option<usize>,
    dims: Vec<usize>,
}

#[derive(Default)]
pub(super) struct Lowering {
    known: HashMap<u64, Known>,
    made: Vec<Made>,
    steps: Vec<Step>,
    /// The products of an input.
    products: HashMap<usize, usize>,
    angles: Vec<(Slot, usize)>,
    logits: Option<usize>,
    /// What the caches that the step feeds hold of a token.
    pub(super) shapes: CacheShapes,
}

/// What an op was told.
pub(super) struct Said<'a>(&'a Noted);

impl Said<'_> {
    pub(super) fn tensor(&self, i: usize) -> Lowered<Handle> {
        match self.0.said.get(i) {
            Some(&Word::Tensor(handle)) => Ok(handle),
            _ => Err(format!("{}: argument {i} is no tensor", self.0.op)),
        }
    }

    pub(super) fn count(&self, i: usize) -> Lowered<usize> {
        match self.0.said.get(i) {
            Some(&Word::Whole(n)) => Ok(n as usize),
            _ => Err(format!("{}: argument {i} is no count", self.0.op)),
        }
    }

    fn number(&self, i: usize) -> Lowered<f64> {
        match self.0.said.get(i) {
            Some(&Word::Number(x)) => Ok(x),
            _ => Err(format!("{}: argument {i} is no number", self.0.op)),
        }
    }

    fn slot(&self) -> Lowered<Slot> {
        self.0.slot.ok_or_else(|| format!("{}: of no layer", self.0.op))
    }
}

impl Model {
    /// The step for so many sequences, or which op stands in the way.
    pub(super) fn compile(&self, sequences: usize) -> Lowered<Compiled> {
        let (notes, shapes) = self.note(sequences).map_err(|e| e.to_string())?;
        let mut lowering = Lowering { shapes, ..Lowering::default() };
        for noted in &notes {
            lowering.lower(self, noted)?;
        }
        let logits = lowering.logits.ok_or("the head gave nothing")?;
        let Lowering { made, steps, angles, shapes, .. } = lowering;
        let (steps, buffers, logits) = share_out(steps, made, logits);
        Ok(Compiled { steps, buffers, angles, logits, shapes })
    }

    fn layer(&self, slot: Slot) -> Lowered<&Layer> {
        self.layers.get(slot.0 as usize).ok_or_else(|| "a layer that is not loaded".into())
    }

    fn wanted(&self, slot: Slot) -> Lowered<&Wanted> {
        self.wanted.get(slot.0 as usize).ok_or_else(|| "a layer that this model does not have".into())
    }
}

/// Whether products of it run in kernels of the CPU.
fn multiplies(weight: &Weight) -> bool {
    weight.factor().is_some()
}

fn numbers(t: &Option<Tensor>) -> Lowered<Option<Vec<f32>>> {
    let read = |t: &Tensor| with_f32(&t.to_dtype(DType::F32)?, <[f32]>::to_vec);
    t.as_ref().map(read).transpose().map_err(|e| e.to_string())
}

impl Lowering {
    pub(super) fn find(&self, handle: Handle) -> Lowered<&Known> {
        self.known.get(&handle.0).ok_or_else(|| "a tensor of which it is not known how it was made".into())
    }

    /// The value behind an op's argument.
    pub(super) fn input(&self, said: &Said, i: usize) -> Lowered<usize> {
        self.find(said.tensor(i)?)?.made.ok_or_else(|| format!("{} of ids", said.0.op))
    }

    pub(super) fn dims(&self, said: &Said, i: usize) -> Lowered<&[usize]> {
        Ok(&self.find(said.tensor(i)?)?.dims)
    }

    fn same_numbers(&mut self, noted: &Noted, of: Handle) -> Lowered<()> {
        let made = self.find(of)?.made;
        self.known.insert(noted.gives.0, Known { made, dims: noted.dims.clone() });
        Ok(())
    }

    /// A new value, which the op gives.
    fn value(&mut self, noted: &Noted, constant: Option<Vec<f32>>) -> usize {
        self.made.push(Made { len: noted.dims.iter().product(), constant });
        let made = self.made.len() - 1;
        self.known.insert(noted.gives.0, Known { made: Some(made), dims: noted.dims.clone() });
        made
    }

    pub(super) fn step(&mut self, noted: &Noted, kernel: Kernel, reads: Vec<usize>) {
        let made = self.value(noted, None);
        self.steps.push(Step { kernel, reads, writes: vec![made] });
    }

    fn lower(&mut self, model: &Model, noted: &Noted) -> Lowered<()> {
        let said = &Said(noted);
        match noted.op.as_str() {
            "tokens" => drop(self.known.insert(noted.gives.0, Known { made: None, dims: noted.dims.clone() })),
            "rows" | "split_heads" | "merge_heads" | "flatten" | "unflatten" => {
                self.same_numbers(noted, said.tensor(0)?)?
            }
            "transpose" => {
                let dims = self.dims(said, 0)?;
                if !dims.iter().rev().take(2).any(|&d| d == 1) {
                    return Err("transpose has no kernel here".into());
                }
                self.same_numbers(noted, said.tensor(0)?)?
            }
            "logits" => self.logits = Some(self.input(said, 0)?),
            "embed" => {
                let slot = said.slot()?;
                let plain =
                    matches!(model.layer(slot)?, Layer::Embedding(e) if e.adapter.is_none() && multiplies(&e.weight));
                if !plain {
                    return Err("embed of an embedding with an adapter, or of a table of ids".into());
                }
                // The step's ids, or positions, which are numbers.
                let ids = self.find(said.tensor(0)?)?.made;
                self.step(noted, Kernel::Gather(slot), ids.into_iter().collect());
            }
            "linear" | "unembed" => self.product(model, noted, said)?,
            "norm" => {
                let Layer::Norm(norm) = model.layer(said.slot()?)? else { return Err("norm of no norm".into()) };
                let dim = noted.dims.last().copied().unwrap_or_default();
                let (weight, bias) = (numbers(&norm.weight)?, numbers(&norm.bias)?);
                if !norm.centred && bias.is_some() {
                    return Err("an RMS norm with a bias has no kernel here".into());
                }
                let kernel = Kernel::Norm { weight, bias, eps: norm.eps, dim, centred: norm.centred };
                self.step(noted, kernel, vec![self.input(said, 0)?]);
            }
            "rotate" => self.rotate(model, noted, said)?,
            "attend" => self.attend(noted, said)?,
            "positions" => self.step(noted, Kernel::Positions, Vec::new()),
            "parameter" => {
                let Layer::Parameter(t) = model.layer(said.slot()?)? else {
                    return Err("parameter of no tensor".into());
                };
                let constant = numbers(&t.dtype().is_float().then(|| t.clone()))?;
                self.value(noted, Some(constant.ok_or("a parameter that is no number")?));
            }
            "swiglu" | "geglu" => {
                let activation = if noted.op == "swiglu" { Activation::Swiglu } else { Activation::Geglu };
                if self.dims(said, 0)? != self.dims(said, 1)? {
                    return Err(format!("{} of two shapes", noted.op));
                }
                self.step(noted, Kernel::Gate(activation), vec![self.input(said, 0)?, self.input(said, 1)?]);
            }
            "affine" => {
                let map = Map::Affine(said.number(1)? as f32, said.number(2)? as f32);
                self.step(noted, Kernel::Map(map), vec![self.input(said, 0)?]);
            }
            "clamp" => {
                let map = Map::Clamp(said.number(1)? as f32, said.number(2)? as f32);
                self.step(noted, Kernel::Map(map), vec![self.input(said, 0)?]);
            }
            "narrow" => {
                let of = self.dims(said, 0)?.last().copied().unwrap_or_default();
                let kernel = Kernel::Narrow { of, start: said.count(1)?, len: said.count(2)? };
                self.step(noted, kernel, vec![self.input(said, 0)?]);
            }
            "concat" => {
                let inputs = (0..noted.said.len()).map(|i| self.input(said, i)).collect::<Lowered<Vec<_>>>()?;
                let width = |i| Ok(self.dims(said, i)?.last().copied().unwrap_or_default());
                let widths = (0..noted.said.len()).map(width).collect::<Lowered<Vec<_>>>()?;
                self.step(noted, Kernel::Join(widths), inputs);
            }
            "softmax" => self.whole(noted, said, Whole::Softmax, 1)?,
            "softplus" => self.whole(noted, said, Whole::Softplus, 1)?,
            "round" => self.whole(noted, said, Whole::Round, 1)?,
            "sum" => self.whole(noted, said, Whole::Sum, 1)?,
            "mean" => self.whole(noted, said, Whole::Mean, 1)?,
            "max" => self.whole(noted, said, Whole::Max, 1)?,
            "gather" => self.whole(noted, said, Whole::Taken, 2)?,
            "top_mask" => self.whole(noted, said, Whole::TopMask(said.count(1)?), 1)?,
            "topk" => self.largest(noted, said)?,
            "multi_linear" => self.whole(noted, said, Whole::MultiLinear(said.slot()?), 1)?,
            "experts" => self.whole(noted, said, Whole::Experts(said.slot()?), 3)?,
            op => match (Map::named(op), maps::zip_named(op)) {
                _ if Rule::named(op, noted.slot).is_some() => self.recur(noted, said)?,
                (Some(map), _) => self.step(noted, Kernel::Map(map), vec![self.input(said, 0)?]),
                (_, Some(zip)) => {
                    let spread =
                        [Spread::of(self.dims(said, 0)?, &noted.dims), Spread::of(self.dims(said, 1)?, &noted.dims)];
                    self.step(noted, Kernel::Zip(zip, spread), vec![self.input(said, 0)?, self.input(said, 1)?]);
                }
                _ => return Err(format!("{op} has no kernel here")),
            },
        }
        Ok(())
    }

    /// An op of the first `inputs` tensors that it was told.
    fn whole(&mut self, noted: &Noted, said: &Said, op: Whole, inputs: usize) -> Lowered<()> {
        let dims = (0..inputs).map(|i| Ok(self.dims(said, i)?.to_vec())).collect::<Lowered<Vec<_>>>()?;
        let reads = (0..inputs).map(|i| self.input(said, i)).collect::<Lowered<Vec<_>>>()?;
        self.step(noted, Kernel::Whole(op, dims), reads);
        Ok(())
    }

    /// The values, and when it is noted again, their indices: both of one step.
    fn largest(&mut self, noted: &Noted, said: &Said) -> Lowered<()> {
        let again = noted.said.len() > 2;
        match self.steps.last_mut() {
            Some(Step { kernel: Kernel::Largest { .. }, writes, .. }) if again => {
                // The next value, which is made below.
                writes.push(self.made.len());
                self.value(noted, None);
            }
            _ if again => return Err("topk of indices alone".into()),
            _ => {
                let of = self.dims(said, 0)?.last().copied().unwrap_or_default();
                self.step(noted, Kernel::Largest { of, k: said.count(1)? }, vec![self.input(said, 0)?]);
            }
        }
        Ok(())
    }

    /// An op of a cache's number and tensors.
    fn recur(&mut self, noted: &Noted, said: &Said) -> Lowered<()> {
        let rule = Rule::named(&noted.op, noted.slot).ok_or("a recurrence of no layer")?;
        let dims = (1..noted.said.len()).map(|i| Ok(self.dims(said, i)?.to_vec())).collect::<Lowered<Vec<_>>>()?;
        let reads = (1..noted.said.len()).map(|i| self.input(said, i)).collect::<Lowered<Vec<_>>>()?;
        let recurring = Recurring { rule, cache: said.count(0)? as u32, dims };
        self.step(noted, Kernel::Recur(recurring), reads);
        Ok(())
    }

    fn product(&mut self, model: &Model, noted: &Noted, said: &Said) -> Lowered<()> {
        let slot = said.slot()?;
        let plain = match model.layer(slot)? {
            Layer::Linear(l) => l.adapter.is_none() && multiplies(&l.weight),
            Layer::Embedding(e) => e.adapter.is_none() && multiplies(&e.weight),
            _ => false,
        };
        if !plain {
            return Err(format!("{} with an adapter, or of inputs that are rounded", noted.op));
        }
        let x = self.input(said, 0)?;
        match self.products.get(&x).and_then(|&at| self.steps.get_mut(at)) {
            Some(Step { kernel: Kernel::Products(slots), writes, .. }) => {
                slots.push(slot);
                // The next value, which is made below.
                writes.push(self.made.len());
                self.value(noted, None);
            }
            _ => {
                self.products.insert(x, self.steps.len());
                self.step(noted, Kernel::Products(vec![slot]), vec![x]);
            }
        }
        Ok(())
    }

    fn rotate(&mut self, model: &Model, noted: &Noted, said: &Said) -> Lowered<()> {
        let slot = said.slot()?;
        let Wanted::Rope(rope) = model.wanted(slot)? else { return Err("rotate without a rope".into()) };
        let &[_, heads, dim] = &noted.dims[..] else { return Err("rotate of no heads".into()) };
        if rope.dims == 0 {
            return self.same_numbers(noted, said.tensor(0)?);
        }
        let flags = said.count(1)? as u32;
        let turn = Turn {
            neighbours: flags & ROTATE_NEIGHBOURS != 0,
            last: flags & ROTATE_LAST != 0,
            back: flags & ROTATE_BACK != 0,
        };
        let wanted = (slot, (flags >> ROTATE_BLOCK_SHIFT) as usize);
        let angles = self.angles.iter().position(|known| *known == wanted).unwrap_or_else(|| {
            self.angles.push(wanted);
            self.angles.len() - 1
        });
        self.step(noted, Kernel::Rotate { angles, heads, dim, turn }, vec![self.input(said, 0)?]);
        Ok(())
    }
}
