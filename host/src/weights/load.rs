//! The plan, carried out: each wanted slot becomes a layer with weights, on the device, with its adapter. Slots load in parallel; on the
//! CPU that means little more than slicing maps.

use super::{
    plan::Wanted,
    recipe::{Pantry, Recipe},
};
use crate::{
    adapter::Adapters,
    device::Placement,
    error::Result,
    kernels::cpu::Matrix,
    layers::{
        Layer,
        adapted::Adapter,
        embedding::Embedding,
        experts::{Expert, Experts},
        linear::Linear,
        multi_linear::MultiLinear,
        norm::Norm,
        weight::Weight,
    },
};
use candle_core::{DType, Tensor};

/// Turns slots into layers.
pub struct Loader<'a> {
    /// Where the numbers come from.
    pub pantry: &'a Pantry,
    /// Where they go.
    pub place: &'a Placement,
    /// What is laid over them.
    pub adapters: &'a Adapters,
}

impl Loader<'_> {
    /// One slot.
    pub fn load(&self, wanted: &Wanted) -> Result<Layer> {
        Ok(match wanted {
            Wanted::Linear { weight, bias, .. } => {
                let placed = Weight::place(self.pantry.matrix(weight)?, self.place)?;
                let bias = bias.as_ref().map(|b| self.tensor(b, self.place.activations())).transpose()?;
                let adapter = self.linear_adapter(weight, &placed)?;
                Layer::Linear(Linear { weight: placed, bias, adapter })
            }
            Wanted::Embedding { weight, .. } => {
                let placed = Weight::place(self.pantry.matrix(weight)?, self.place)?;
                let adapter = match weight.path() {
                    Some(path) => self.adapters.embedding(path, &placed, self.place)?,
                    None => None,
                };
                Layer::Embedding(Embedding { weight: placed, adapter })
            }
            Wanted::Norm { centred, weight, bias, eps, .. } => {
                let load = |r: &Option<Recipe>| r.as_ref().map(|r| self.tensor(r, DType::F32)).transpose();
                Layer::Norm(Norm {
                    centred: *centred,
                    weight: load(weight)?,
                    bias: load(bias)?,
                    eps: *eps,
                    native: self.place.native,
                })
            }
            Wanted::Experts { gate, up, down, experts, activation, .. } => {
                let (gate, up, down) =
                    (self.split(gate, *experts)?, self.split(up, *experts)?, self.split(down, *experts)?);
                let join = |((gate, up), down)| Expert { gate, up, down };
                let experts = gate.into_iter().zip(up).zip(down).map(join).collect();
                Layer::Experts(Experts { experts, activation: *activation, native: self.place.native })
            }
            Wanted::MultiLinear { weight, bias, heads, inputs, outputs } => {
                let placed = Weight::place(self.pantry.matrix(weight)?, self.place)?;
                let bias = bias.as_ref().map(|b| self.tensor(b, self.place.activations())).transpose()?;
                Layer::MultiLinear(MultiLinear::new(placed, bias, [*heads, *outputs, *inputs])?)
            }
            Wanted::Conv1d { .. } => {
                return Err(crate::error::Error::Weights(format!(
                    "{}: this dylm cannot load such a layer yet",
                    wanted.name()
                )));
            }
            Wanted::Parameter { source, dims } => {
                Layer::Parameter(self.tensor(source, self.place.activations())?.reshape(dims.as_slice())?)
            }
            Wanted::Rope(rope) => Layer::Rope(rope.clone()),
        })
    }

    /// The adapter of a layer that is a stored weight, or rows of one. Of other transforms an adapter knows nothing.
    fn linear_adapter(&self, recipe: &Recipe, placed: &Weight) -> Result<Option<Adapter>> {
        match recipe {
            Recipe::Rows(whole, from, to) => match (whole.path(), self.pantry.shape(whole)?.first()) {
                (Some(path), Some(&of)) => self.adapters.linear_rows(path, *from..*to, of, placed, self.place),
                _ => Ok(None),
            },
            recipe => match recipe.path() {
                Some(path) => self.adapters.linear(path, placed, self.place),
                None => Ok(None),
            },
        }
    }

    fn tensor(&self, recipe: &Recipe, dtype: DType) -> Result<Tensor> {
        let numbers = self.pantry.floats(recipe)?;
        let count = numbers.len();
        Ok(Tensor::from_vec(numbers, count, &candle_core::Device::Cpu)?
            .to_dtype(dtype)?
            .to_device(&self.place.device)?)
    }

    /// A stack of matrices, one linear layer each. Per-expert checkpoints are not stacked first: their parts are taken as they lie.
    fn split(&self, recipe: &Recipe, experts: usize) -> Result<Vec<Linear>> {
        let matrices = match recipe {
            Recipe::Stack(parts) => parts.iter().map(|p| self.pantry.matrix(p)).collect::<Result<Vec<_>>>()?,
            stacked => {
                let all = self.pantry.matrix(stacked)?;
                let rows = all.rows() / experts.max(1);
                (0..experts).filter_map(|e| all.slice_rows(e * rows..(e + 1) * rows)).collect()
            }
        };
        let linear = |(expert, matrix): (usize, Matrix)| {
            let weight = Weight::place(matrix, self.place)?;
            let path = match recipe {
                Recipe::Stack(parts) => parts.get(expert).and_then(|part| part.path()),
                stacked => stacked.path(),
            };
            let adapter = match path {
                Some(path) => self.adapters.expert(path, (expert, experts), &weight, self.place)?,
                None => None,
            };
            Ok(Linear { weight, bias: None, adapter })
        };
        matrices.into_iter().enumerate().map(linear).collect()
    }
}
