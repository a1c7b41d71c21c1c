//! A table of vectors: ids in, vectors out; and, for tied models, the other way round as the output head. Or a table of ids, for what a
//! model fixes for each token of its vocabulary.

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

/// A table of ids `[vocab, dim]`.
pub struct Ids {
    /// Row after row.
    pub numbers: Vec<u32>,
    /// Columns.
    pub dim: usize,
}

impl Ids {
    /// ids `[tokens]` -> `[tokens, dim]`
    pub fn forward(&self, ids: &Tensor) -> candle_core::Result<Tensor> {
        let mut rows = Vec::with_capacity(ids.elem_count() * self.dim);
        for id in ids.to_vec1::<u32>()? {
            match self.numbers.chunks(self.dim.max(1)).nth(id as usize) {
                Some(row) => rows.extend_from_slice(row),
                None => candle_core::bail!("id {id} in a table of {}", self.numbers.len() / self.dim.max(1)),
            }
        }
        Tensor::from_vec(rows, (ids.elem_count(), self.dim), ids.device())
    }
}
