//! One linear layer a head: multi-head latent attention takes each head into and out of the latent space by a matrix of its own.
//! On the CPU and on Metal the matrices stay as they lie in the checkpoint, rows of one; elsewhere they are one batched product.

use super::{
    slices::{filled, with_f32},
    weight::Weight,
};
use crate::{
    error::Error,
    kernels::{
        cpu::{Matrix, multiply_each},
        metal::{self, matmul::Choice},
    },
};
use candle_core::{Result, Tensor, bail};

/// The matrices, `[heads, outputs, inputs]`, and biases `[heads, outputs]`.
pub struct MultiLinear {
    weight: Heads,
    bias: Option<Tensor>,
    outputs: usize,
}

fn cannot_be_cut(m: &impl std::fmt::Debug) -> Error {
    Error::Weights(format!("{m:?} cannot be cut by heads; leave its rows as they are"))
}

enum Heads {
    Packed(Vec<Matrix>),
    /// `[heads, inputs, outputs]`
    Dense(Tensor),
    /// All heads' rows.
    Metal(metal::Packed),
}

impl MultiLinear {
    /// From a matrix `[heads * outputs, inputs]`, head after head, and a bias of `heads * outputs`.
    pub fn new(
        weight: Weight,
        bias: Option<Tensor>,
        [heads, outputs, inputs]: [usize; 3],
    ) -> crate::error::Result<Self> {
        let weight = match weight {
            Weight::Rounded(weight) => return Self::new(*weight, bias, [heads, outputs, inputs]),
            Weight::Panels(m) => return Err(cannot_be_cut(&m)),
            Weight::Coded(m) => return Err(cannot_be_cut(&m)),
            Weight::Packed(m) => {
                Heads::Packed((0..heads).filter_map(|h| m.slice_rows(h * outputs..(h + 1) * outputs)).collect())
            }
            #[cfg(feature = "cuda")]
            Weight::Tiles(t) => return Self::new(Weight::Dense(t.dense()?), bias, [heads, outputs, inputs]),
            Weight::Metal(p) => Heads::Metal(p),
            Weight::Dense(t) => Heads::Dense(t.reshape((heads, outputs, inputs))?.transpose(1, 2)?.contiguous()?),
        };
        let bias = bias.map(|b| b.reshape((heads, outputs))).transpose()?;
        Ok(MultiLinear { weight, bias, outputs })
    }

    /// `[tokens, heads, inputs]` -> `[tokens, heads, outputs]`
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (tokens, heads, inputs) = x.dims3()?;
        let by_head = x.transpose(0, 1)?.contiguous()?;
        let y = match &self.weight {
            Heads::Dense(w) => by_head.matmul(w)?,
            Heads::Packed(matrices) if matrices.len() == heads => with_f32(&by_head, |x| {
                filled((heads, tokens, self.outputs), |out| {
                    multiply_each(matrices, x, out);
                })
            })??,
            // Heads are experts, and every token goes through all of them.
            Heads::Metal(packed) if tokens <= metal::matmul::FEW => {
                let chosen = (0..heads as u32).flat_map(|head| vec![head; tokens]).collect::<Vec<_>>();
                let chosen = Tensor::new(chosen, x.device())?;
                let rows = by_head.reshape((heads * tokens, inputs))?;
                let y = packed.chosen(&rows, &chosen, Choice { experts: heads, each: 1 })?;
                y.reshape((heads, tokens, self.outputs))?
            }
            Heads::Metal(packed) => {
                let head = |h: usize| match packed.slice_rows(h * self.outputs..(h + 1) * self.outputs) {
                    Some(head) => head.matmul(&by_head.get(h)?),
                    None => bail!("{heads} heads, it has {}", packed.rows() / self.outputs.max(1)),
                };
                Tensor::stack(&(0..heads).map(head).collect::<Result<Vec<_>>>()?, 0)?
            }
            Heads::Packed(matrices) => bail!("{heads} heads, it has {}", matrices.len()),
        };
        let y = y.transpose(0, 1)?.contiguous()?;
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}
