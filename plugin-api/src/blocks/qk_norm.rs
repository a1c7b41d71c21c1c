//! Norms of queries and keys, and the three places on their way to attention where architectures put them.

use crate::{Norm, Parameter, Tensor};

/// Where queries and keys are normalized.
#[derive(Debug)]
pub(super) enum QkNorm {
    /// Nowhere.
    None,
    /// All heads as one, as the projection gives them.
    Whole(Norm, Norm),
    /// Each head alone.
    Heads(Norm, Norm),
    /// Each head alone by one norm, then times weights that differ from head to head.
    Weighted(Norm, Parameter, Parameter),
    /// Each head alone, after its rope.
    Turned(Norm, Norm),
}

impl QkNorm {
    /// `[tokens, heads * head_dim]`, before the heads are told apart. Thread: step.
    #[track_caller]
    pub fn of_whole(&self, q: Tensor, k: Tensor) -> (Tensor, Tensor) {
        match self {
            Self::Whole(q_norm, k_norm) => (q_norm.forward(&q), k_norm.forward(&k)),
            _ => (q, k),
        }
    }

    /// `[tokens, heads, head_dim]`, before the rope. Thread: step.
    #[track_caller]
    pub fn of_heads(&self, q: Tensor, k: Tensor) -> (Tensor, Tensor) {
        match self {
            Self::Heads(q_norm, k_norm) => (q_norm.forward(&q), k_norm.forward(&k)),
            Self::Weighted(norm, q_weight, k_weight) => {
                (norm.forward(&q) * q_weight.tensor(), norm.forward(&k) * k_weight.tensor())
            }
            _ => (q, k),
        }
    }

    /// `[tokens, heads, head_dim]`, after the rope. Thread: step.
    #[track_caller]
    pub fn of_turned(&self, q: Tensor, k: Tensor) -> (Tensor, Tensor) {
        match self {
            Self::Turned(q_norm, k_norm) => (q_norm.forward(&q), k_norm.forward(&k)),
            _ => (q, k),
        }
    }
}
