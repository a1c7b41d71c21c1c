//! What multiplies the attended values before the output projection. <https://arxiv.org/abs/2505.06708>

use crate::{Linear, Tensor};

/// `sigmoid(x W)`, one number a lane or one a head.
#[derive(Debug)]
pub(super) enum OutputGate {
    /// W `[heads * head_dim, dim]`
    Lanes(Linear),
    /// W `[heads, dim]`
    Heads(Linear),
}

impl OutputGate {
    /// x `[tokens, dim]` is what attention saw, attended `[tokens, heads * head_dim]` what it gave. Thread: step.
    #[track_caller]
    pub fn forward(&self, x: &Tensor, attended: Tensor, head_dim: usize) -> Tensor {
        match self {
            Self::Lanes(gate) => attended * gate.forward(x).sigmoid(),
            Self::Heads(gate) => {
                // [tokens, heads, 1], to meet [tokens, heads, head_dim].
                let shares = gate.forward(x).sigmoid().split_heads(1);
                (attended.split_heads(head_dim) * shares).merge_heads()
            }
        }
    }
}
