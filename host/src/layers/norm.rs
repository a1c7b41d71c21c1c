//! RMSNorm and LayerNorm over the last axis, always computed in f32.

use super::slices::{filled, with_f32};
use crate::kernels::{cpu, metal};
use candle_core::{D, DType, Tensor};

/// A norm; the weight is kept in f32.
pub struct Norm {
    /// Subtract the mean first (LayerNorm).
    pub centred: bool,
    /// `[dim]`, on the model's device.
    pub weight: Option<Tensor>,
    /// `[dim]`
    pub bias: Option<Tensor>,
    /// Added under the root.
    pub eps: f32,
    /// Whether dylm's own kernel does it.
    pub native: bool,
    /// The weight in bf16, for products on an NVIDIA GPU that begin with a norm.
    #[cfg(feature = "cuda")]
    pub narrow: Option<Tensor>,
}

impl Norm {
    /// Whether it is an RMSNorm of this width with no bias.
    #[cfg(feature = "cuda")]
    pub fn is_plain(&self, dim: usize) -> bool {
        let fits = |t: &Tensor| t.dtype() == DType::F32 && t.elem_count() == dim;
        !self.centred && self.bias.is_none() && self.weight.as_ref().is_none_or(fits)
    }

    /// The same shape and type.
    pub fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some([y, _]) = crate::kernels::cuda::norm::norm(
            x,
            None,
            [self.weight.as_ref(), self.bias.as_ref()],
            self.eps,
            self.centred,
        )? {
            return Ok(y);
        }
        if self.native {
            return if self.centred || self.bias.is_none() { self.on_cpu(x) } else { self.by_candle(x) };
        }
        let (weight, bias) = (self.weight.as_ref(), self.bias.as_ref());
        match metal::ops::norm(x, weight, bias, self.centred, self.eps)? {
            Some(y) => Ok(y),
            None => self.by_candle(x),
        }
    }

    fn on_cpu(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let dim = x.dim(D::Minus1)?;
        let numbers = |t: &Option<Tensor>| t.as_ref().map(|t| with_f32(t, <[f32]>::to_vec)).transpose();
        let bias = numbers(&self.bias)?;
        let run = |weight: Option<&[f32]>| {
            with_f32(x, |x| {
                filled(x.len(), |out| match self.centred {
                    true => cpu::layer_norm(x, weight, bias.as_deref(), self.eps, dim, out),
                    false => cpu::rms_norm(x, weight, self.eps, dim, out),
                })
            })?
        };
        let y = match &self.weight {
            Some(weight) => with_f32(weight, |w| run(Some(w)))?,
            None => run(None),
        };
        y?.reshape(x.dims())
    }

    fn by_candle(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let mut y = x.to_dtype(DType::F32)?;
        if self.centred {
            y = y.broadcast_sub(&y.mean_keepdim(D::Minus1)?)?;
        }
        let scale = (y.sqr()?.mean_keepdim(D::Minus1)? + self.eps as f64)?.sqrt()?;
        y = y.broadcast_div(&scale)?;
        if let Some(weight) = &self.weight {
            y = y.broadcast_mul(weight)?;
        }
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(bias)?;
        }
        y.to_dtype(x.dtype())
    }
}
