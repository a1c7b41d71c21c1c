//! `x · Wᵀ + b`, whatever W is packed in, with the adapter that somebody laid over it.

use super::{adapted::Adapter, weight::Weight};
use candle_core::Tensor;

/// A linear layer.
pub struct Linear {
    /// `[outputs, inputs]`
    pub weight: Weight,
    /// `[outputs]`
    pub bias: Option<Tensor>,
    /// LoRA or DoRA.
    pub adapter: Option<Adapter>,
}

impl Linear {
    /// `[.., inputs]` -> `[.., outputs]`
    pub fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let (super::weight::Weight::Tiles(tiles), None, Some(bias)) = (&self.weight, &self.adapter, &self.bias) {
            return tiles.matmul(x, Some(bias))?.to_dtype(x.dtype());
        }
        let y = self.weight.matmul(x)?;
        let y = match &self.adapter {
            Some(adapter) => adapter.apply(x, y)?,
            None => y,
        };
        match &self.bias {
            Some(bias) => y.broadcast_add(&bias.to_dtype(y.dtype())?),
            None => Ok(y),
        }
    }
}
