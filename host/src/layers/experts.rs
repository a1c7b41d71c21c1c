//! Routed experts: each token runs through a few of many small feed-forward blocks. Tokens are gathered by expert, so that every chosen
//! expert's weights are read once and no other's are touched.

use super::{
    linear::Linear,
    slices::{filled, with_f32},
};
use crate::kernels::cpu;
use candle_core::{DType, Tensor};

/// One expert.
pub struct Expert {
    /// `[hidden, dim]`
    pub gate: Linear,
    /// `[hidden, dim]`
    pub up: Linear,
    /// `[dim, hidden]`
    pub down: Linear,
}

/// How gate and up are joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `silu(gate) * up`
    Swiglu,
    /// `gelu_tanh(gate) * up`
    Geglu,
}

impl Activation {
    /// With dylm's own kernel; both of one shape.
    pub fn on_cpu(self, gate: &Tensor, up: &Tensor) -> candle_core::Result<Tensor> {
        let joined = with_f32(gate, |gate| {
            with_f32(up, |up| {
                filled(gate.len(), |out| match self {
                    Activation::Swiglu => cpu::silu_mul(gate, up, out),
                    Activation::Geglu => cpu::gelu_tanh_mul(gate, up, out),
                })
            })
        })???;
        joined.reshape(gate.shape())
    }

    /// With candle's ops, on any device.
    pub fn by_candle(self, gate: &Tensor, up: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Activation::Swiglu => gate.silu()?.broadcast_mul(up),
            Activation::Geglu => gate.gelu()?.broadcast_mul(up),
        }
    }
}

/// All experts of one layer.
pub struct Experts {
    /// In the router's order.
    pub experts: Vec<Expert>,
    /// The same for all.
    pub activation: Activation,
    /// Whether dylm's own kernel joins gate and up.
    pub native: bool,
}

impl Experts {
    /// x `[tokens, dim]`, chosen (u32) and weights `[tokens, k]` -> the weighted sum `[tokens, dim]`.
    pub fn forward(&self, x: &Tensor, chosen: &Tensor, weights: &Tensor) -> candle_core::Result<Tensor> {
        let chosen = chosen.to_dtype(DType::U32)?.to_vec2::<u32>()?;
        let weights = weights.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        let mut of_expert: Vec<Vec<(u32, f32)>> = vec![Vec::new(); self.experts.len()];
        for (token, (ids, shares)) in chosen.iter().zip(&weights).enumerate() {
            for (&id, &share) in ids.iter().zip(shares) {
                match of_expert.get_mut(id as usize) {
                    Some(tokens) => tokens.push((token as u32, share)),
                    None => candle_core::bail!("expert {id} of {}", self.experts.len()),
                }
            }
        }
        let mut sum = x.zeros_like()?;
        for (expert, tokens) in self.experts.iter().zip(of_expert).filter(|(_, t)| !t.is_empty()) {
            let (rows, shares): (Vec<u32>, Vec<f32>) = tokens.into_iter().unzip();
            let count = rows.len();
            let rows = Tensor::from_vec(rows, count, x.device())?;
            let shares = Tensor::from_vec(shares, (count, 1), x.device())?.to_dtype(x.dtype())?;
            let input = x.index_select(&rows, 0)?;
            let (gate, up) = (expert.gate.forward(&input)?, expert.up.forward(&input)?);
            let inner = if self.native {
                self.activation.on_cpu(&gate, &up)?
            } else {
                self.activation.by_candle(&gate, &up)?
            };
            sum = sum.index_add(&rows, &expert.down.forward(&inner)?.broadcast_mul(&shares)?, 0)?;
        }
        Ok(sum)
    }
}
