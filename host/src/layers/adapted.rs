//! LoRA and DoRA over one linear layer or embedding. <https://arxiv.org/abs/2106.09685>, <https://arxiv.org/abs/2402.09353>
//!
//! ```text
//! LoRA: y = x Wᵀ + scale · (x A) B                      A [inputs, rank], B [rank, outputs]
//! DoRA: y = m / |W + scale · (A B)ᵀ| · (the same)       norms row by row, m [outputs]
//! ```

use super::weight::Weight;
use candle_core::{D, Tensor};

/// The low-rank part of one layer.
#[derive(Clone)]
pub struct Adapter {
    /// `[inputs, rank]`, or `[vocab, rank]` of an embedding.
    pub a: Tensor,
    /// `[rank, outputs]`
    pub b: Tensor,
    /// Multiplies the low-rank product; mlx-lm's `scale`, PEFT's `alpha / rank`.
    pub scale: f64,
    /// DoRA: `m / |W + scale (A B)ᵀ|`, `[outputs]`.
    pub magnitude: Option<Tensor>,
}

impl Adapter {
    /// Adds the low-rank part to `y = x Wᵀ`.
    pub fn apply(&self, x: &Tensor, y: Tensor) -> candle_core::Result<Tensor> {
        let flat = x.reshape(((), x.dim(D::Minus1)?))?;
        let low = flat.matmul(&self.a)?.matmul(&self.b)?.affine(self.scale, 0.0)?.reshape(y.dims())?;
        self.rescale((y + low)?)
    }

    /// Adds the low-rank part to embedded rows `y` of `ids`.
    pub fn apply_rows(&self, ids: &Tensor, y: Tensor) -> candle_core::Result<Tensor> {
        let low = self.a.index_select(ids, 0)?.matmul(&self.b)?.affine(self.scale, 0.0)?;
        self.rescale((y + low)?)
    }

    /// Adds the low-rank part to logits of a tied embedding: `(x Bᵀ) Aᵀ`.
    pub fn apply_tied(&self, x: &Tensor, y: Tensor) -> candle_core::Result<Tensor> {
        let low = x.matmul(&self.b.t()?)?.matmul(&self.a.t()?)?.affine(self.scale, 0.0)?;
        y + low
    }

    fn rescale(&self, y: Tensor) -> candle_core::Result<Tensor> {
        match &self.magnitude {
            Some(m) => y.broadcast_mul(m),
            None => Ok(y),
        }
    }

    /// Turns DoRA's `m` into the factor of each output, which needs the base weight once.
    pub fn with_magnitude(mut self, m: &Tensor, weight: &Weight) -> candle_core::Result<Self> {
        let low = self.a.matmul(&self.b)?.t()?.affine(self.scale, 0.0)?;
        let norms =
            (weight.numbers()?.to_device(low.device())?.to_dtype(low.dtype())? + low)?.sqr()?.sum(D::Minus1)?.sqrt()?;
        self.magnitude = Some((m / norms)?);
        Ok(self)
    }
}
