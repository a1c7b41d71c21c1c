//! LoRA and DoRA over one linear layer or embedding. <https://arxiv.org/abs/2106.09685>, <https://arxiv.org/abs/2402.09353>
//!
//! ```text
//! LoRA: y = x Wᵀ + (x A) B            A [inputs, rank], B [rank, outputs], B already multiplied by the adapter's scale
//! DoRA: y = m / |Wᵀ + A B| · the same    one m and one norm an output; where a bias is added, it is added after
//! ```
//!
//! An embedding W [vocab, dim] has A [vocab, rank] and B [rank, dim], and becomes W + A B.

use super::weight::Weight;
use candle_core::{D, DType, Tensor};

// A row of nothing but zeros has no direction to scale; the quotient stays finite and the output zero.
const SMALLEST_NORM: f32 = 1e-30;

/// The low-rank part of one layer.
#[derive(Clone)]
pub struct Adapter {
    /// `[inputs, rank]`, or `[vocab, rank]` of an embedding.
    pub a: Tensor,
    /// `[rank, outputs]`, scaled.
    pub b: Tensor,
    /// DoRA's factors.
    pub magnitude: Option<Magnitude>,
    /// Whether an embedding that is also the head is changed there too: mlx-lm does, PEFT does not.
    pub tied: bool,
}

/// DoRA's `m / norm`, in the axis along which the layer has its own factor for each entry.
#[derive(Clone)]
pub enum Magnitude {
    /// `[outputs]`: linear layers, and embeddings as PEFT has them.
    Columns(Tensor),
    /// `[vocab]`: embeddings as mlx-lm has them.
    Rows(Tensor),
}

impl Adapter {
    /// Adds the low-rank part to `y = x Wᵀ`.
    pub fn apply(&self, x: &Tensor, y: Tensor) -> candle_core::Result<Tensor> {
        let flat = x.reshape(((), x.dim(D::Minus1)?))?;
        let low = flat.matmul(&self.a)?.matmul(&self.b)?.reshape(y.dims())?;
        let y = (y + low)?;
        match &self.magnitude {
            Some(Magnitude::Columns(m) | Magnitude::Rows(m)) => y.broadcast_mul(m),
            None => Ok(y),
        }
    }

    /// Adds the low-rank part to embedded rows `y` of `ids`.
    pub fn apply_rows(&self, ids: &Tensor, y: Tensor) -> candle_core::Result<Tensor> {
        let y = (y + self.a.index_select(ids, 0)?.matmul(&self.b)?)?;
        match &self.magnitude {
            Some(Magnitude::Columns(m)) => y.broadcast_mul(m),
            Some(Magnitude::Rows(m)) => y.broadcast_mul(&m.index_select(ids, 0)?.unsqueeze(1)?),
            None => Ok(y),
        }
    }

    /// Adds the low-rank part to logits of a tied embedding: `(x Bᵀ) Aᵀ`.
    pub fn apply_tied(&self, x: &Tensor, y: Tensor) -> candle_core::Result<Tensor> {
        if !self.tied {
            return Ok(y);
        }
        let y = (y + x.matmul(&self.b.t()?)?.matmul(&self.a.t()?)?)?;
        match &self.magnitude {
            Some(Magnitude::Rows(m)) => y.broadcast_mul(m),
            _ => Ok(y),
        }
    }
}

/// DoRA's factors of a linear layer: m `[outputs]`, a `[inputs, rank]` and b `[rank, outputs]` in f32 -> `[outputs]` in f32.
pub fn factors(m: &Tensor, a: &Tensor, b: &Tensor, weight: &Weight) -> candle_core::Result<Tensor> {
    let weight = weight.numbers()?;
    let low = a.matmul(b)?.t()?.to_device(weight.device())?;
    quotient(m, (weight + low)?, 1)
}

/// The same of an embedding: m `[vocab]` by rows, or `[dim]` by columns.
pub fn embedding_factors(
    m: &Tensor,
    a: &Tensor,
    b: &Tensor,
    weight: &Weight,
    by_rows: bool,
) -> candle_core::Result<Tensor> {
    let weight = weight.numbers()?;
    let low = a.matmul(b)?.to_device(weight.device())?;
    quotient(m, (weight + low)?, usize::from(by_rows))
}

fn quotient(m: &Tensor, adapted: Tensor, summed: usize) -> candle_core::Result<Tensor> {
    let norms = adapted.to_dtype(DType::F32)?.sqr()?.sum(summed)?.sqrt()?.maximum(SMALLEST_NORM)?;
    m.to_device(norms.device())? / norms
}
