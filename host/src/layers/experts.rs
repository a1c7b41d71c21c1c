//! Routed experts: each token runs through a few of many small feed-forward blocks. Tokens are gathered by expert, so that every chosen
//! expert's weights are read once and no other's are touched.

use super::linear::Linear;
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

/// All experts of one layer.
pub struct Experts {
    /// In the router's order.
    pub experts: Vec<Expert>,
    /// The same for all.
    pub activation: Activation,
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
            let inner = match self.activation {
                Activation::Swiglu => (gate.silu()? * up)?,
                Activation::Geglu => (gate.gelu()? * up)?,
            };
            sum = sum.index_add(&rows, &expert.down.forward(&inner)?.broadcast_mul(&shares)?, 0)?;
        }
        Ok(sum)
    }
}
