//! A table of vectors: ids in, vectors out; and, for tied models, the other way round as the output head.

use super::{adapted::Adapter, weight::Weight};
use candle_core::Tensor;

/// An embedding `[vocab, dim]`.
pub struct Embedding {
    /// The table.
    pub weight: Weight,
    /// LoRA.
    pub adapter: Option<Adapter>,
}

impl Embedding {
    /// ids `[tokens]` -> `[tokens, dim]`
    pub fn forward(&self, ids: &Tensor) -> candle_core::Result<Tensor> {
        let y = self.weight.gather(ids)?;
        match &self.adapter {
            Some(adapter) => adapter.apply_rows(ids, y),
            None => Ok(y),
        }
    }

    /// `[tokens, dim]` -> `[tokens, vocab]`
    pub fn as_linear(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let y = self.weight.matmul(x)?;
        match &self.adapter {
            Some(adapter) => adapter.apply_tied(x, y),
            None => Ok(y),
        }
    }
}
