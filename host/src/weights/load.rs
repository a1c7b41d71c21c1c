//! The plan, carried out: each wanted slot becomes a layer with weights, on the device, with its adapter. Slots load in parallel; on the
//! CPU that means little more than slicing maps.

use super::{
    plan::{Projection, Projections, Wanted},
    recipe::{Pantry, Recipe},
};
#[cfg(feature = "cuda")]
use crate::kernels::cuda::experts::Stacked;
use crate::{
    adapter::Adapters,
    device::Placement,
    error::Result,
    layers::{
        Layer,
        adapted::Adapter,
        conv1d::Conv1d,
        embedding::{Embedding, Ids},
        experts::{Expert, Experts, Joined},
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
                let (matrix, rounded) = self.pantry.linear(weight)?;
                let placed = Weight::place(matrix, self.place)?;
                let placed = if rounded { placed.for_inputs_of_eight_bits() } else { placed.in_panels() };
                let bias = bias.as_ref().map(|b| self.tensor(b, self.place.activations())).transpose()?;
                let adapter = self.linear_adapter(weight, &placed)?;
                Layer::Linear(Linear { weight: placed, bias, adapter })
            }
            Wanted::Embedding { weight, dim, .. } => {
                if let Some(numbers) = self.pantry.whole_numbers(weight)? {
                    return Ok(Layer::Ids(Ids { numbers, dim: *dim }));
                }
                let placed = Weight::place(self.pantry.matrix(weight)?, self.place)?.in_panels();
                let adapter = match weight.path() {
                    Some(path) => self.adapters.embedding(path, &placed, self.place)?,
                    None => None,
                };
                Layer::Embedding(Embedding { weight: placed, adapter })
            }
            Wanted::Norm { centred, weight, bias, eps, .. } => {
                let load = |r: &Option<Recipe>| r.as_ref().map(|r| self.tensor(r, DType::F32)).transpose();
                let weight = load(weight)?;
                Layer::Norm(Norm {
                    centred: *centred,
                    #[cfg(feature = "cuda")]
                    narrow: weight.as_ref().map(|w| w.to_dtype(DType::BF16)).transpose()?,
                    weight,
                    bias: load(bias)?,
                    eps: *eps,
                    native: self.place.native,
                })
            }
            Wanted::Experts { projections, experts, kind, .. } => {
                #[cfg(feature = "cuda")]
                if let Some(stacked) = self.stacked(projections, *experts)? {
                    return Ok(Layer::Experts(Experts {
                        experts: Vec::new(),
                        kind: *kind,
                        native: false,
                        stacked: Some(stacked.into()),
                        joined: None,
                    }));
                }
                let Projections { gate, up, down } = &**projections;
                let (up, down) = (self.projection(up, *experts)?, self.projection(down, *experts)?);
                let gate: Vec<Option<Linear>> = match gate {
                    Some(gate) => self.projection(gate, *experts)?.into_iter().map(Some).collect(),
                    None => up.iter().map(|_| None).collect(),
                };
                let join = |((gate, up), down)| Expert { gate, up, down };
                let experts: Vec<Expert> = gate.into_iter().zip(up).zip(down).map(join).collect();
                let joined = (!self.place.native).then(|| Joined::new(&experts, *kind)).transpose()?.flatten();
                Layer::Experts(Experts {
                    experts,
                    kind: *kind,
                    native: self.place.native,
                    #[cfg(feature = "cuda")]
                    stacked: None,
                    joined,
                })
            }
            Wanted::MultiLinear { weight, bias, heads, inputs, outputs } => {
                let placed = Weight::place(self.pantry.matrix(weight)?, self.place)?;
                let bias = bias.as_ref().map(|b| self.tensor(b, self.place.activations())).transpose()?;
                Layer::MultiLinear(MultiLinear::new(placed, bias, [*heads, *outputs, *inputs])?)
            }
            Wanted::Conv1d { weight, bias, channels, .. } => {
                let bias = bias.as_ref().map(|b| self.pantry.floats(b)).transpose()?;
                Layer::Conv1d(Conv1d::new(&self.pantry.floats(weight)?, bias, *channels).on(self.place, *channels)?)
            }
            Wanted::Parameter { source, dims } => {
                Layer::Parameter(self.tensor(source, self.place.activations())?.reshape(dims.as_slice())?)
            }
            Wanted::Rope(rope) => Layer::Rope(rope.clone()),
            Wanted::Own(_) => Layer::Own,
        })
    }

    /// The adapter of a layer that is a stored weight, or some rows of one. Of other transforms an adapter knows nothing.
    fn linear_adapter(&self, recipe: &Recipe, placed: &Weight) -> Result<Option<Adapter>> {
        match self.pantry.rows_of_module(recipe)? {
            Some((path, of, rows)) => self.adapters.linear_rows(path, &rows, of, placed, self.place),
            None => {
                let mut names = Vec::new();
                recipe.names(&mut names);
                names.into_iter().try_for_each(|name| self.adapters.refuse(name)).map(|()| None)
            }
        }
    }

    fn tensor(&self, recipe: &Recipe, dtype: DType) -> Result<Tensor> {
        let numbers = self.pantry.floats(recipe)?;
        let count = numbers.len();
        Ok(Tensor::from_vec(numbers, count, &candle_core::Device::Cpu)?
            .to_dtype(dtype)?
            .to_device(&self.place.device)?)
    }

    /// All experts of a layer for the kernels of an NVIDIA GPU; `None` where there are none for them, or where an adapter lies over layers.
    #[cfg(feature = "cuda")]
    fn stacked(&self, projections: &Projections, count: usize) -> Result<Option<Stacked>> {
        use crate::kernels::cuda::experts::Projection as Placed;
        if self.place.dtype != DType::BF16 || !self.place.device.is_cuda() || self.adapters.lie_over_layers() {
            return Ok(None);
        }
        let load = |projection: &Projection| -> Result<Option<Placed>> {
            let matrices = self.pantry.pages(&projection.weight)?;
            let bias = projection.bias.as_ref().map(|bias| self.tensor(bias, DType::BF16)).transpose()?;
            Ok(Placed::place(&matrices, bias, &self.place.device)?)
        };
        let Projections { gate, up, down } = projections;
        // The last first: what does not fit is known before the others take memory.
        let (Some(down), Some(up)) = (load(down)?, load(up)?) else { return Ok(None) };
        let gate = match gate {
            Some(gate) => match load(gate)? {
                Some(gate) => Some(gate),
                None => return Ok(None),
            },
            None => None,
        };
        let stacked = Stacked { gate, up, down, experts: count };
        Ok(stacked.fits().then_some(stacked))
    }

    /// One projection, as a linear layer for each expert. Checkpoints with single experts are not stacked first: their parts are taken as
    /// they lie.
    fn projection(&self, projection: &Projection, experts: usize) -> Result<Vec<Linear>> {
        let Projection { weight: recipe, bias, modules } = projection;
        let matrices = self.pantry.pages(recipe)?;
        let biases = match bias {
            Some(bias) => {
                let numbers = self.pantry.floats(bias)?;
                let outputs = numbers.len() / experts.max(1);
                let tensor = |row: &[f32]| {
                    Tensor::new(row, &candle_core::Device::Cpu)?
                        .to_dtype(self.place.activations())?
                        .to_device(&self.place.device)
                };
                numbers
                    .chunks(outputs.max(1))
                    .map(|row| tensor(row).map(Some))
                    .collect::<candle_core::Result<Vec<_>>>()?
            }
            None => vec![None; matrices.len()],
        };
        let linear = |(expert, (weight, bias)): (usize, (Weight, Option<Tensor>))| {
            let weight = weight.in_panels();
            let single = match recipe {
                Recipe::Stack(parts) => parts.get(expert).and_then(|part| part.path()),
                stacked => stacked.path(),
            };
            let paths = single.into_iter().chain(modules.iter().map(String::as_str));
            let adapter = self.adapters.expert(paths, (expert, experts), &weight, self.place)?;
            Ok(Linear { weight, bias, adapter })
        };
        let weights = Weight::place_all(matrices, self.place)?;
        weights.into_iter().zip(biases).enumerate().map(linear).collect()
    }
}
