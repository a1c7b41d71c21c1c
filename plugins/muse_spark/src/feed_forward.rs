//! Muse Spark's feed-forward layers: dense ones, and experts at a width of their own. What each expert gives is normalized before the
//! router's weights count, which experts elsewhere know nothing of; so they are run one choice after the other.

use plugin_api::prelude::*;

/// A norm without weights, of numbers that are multiplied before it.
pub struct ScaledUnit {
    pub gain: Parameter,
    pub unit: RmsNorm,
}

impl ScaledUnit {
    pub fn forward(&self, x: &Tensor) -> Tensor {
        self.unit.forward(&(x * self.gain.tensor()))
    }
}

pub struct NarrowMoe {
    pub router: Router,
    pub pre_expert_proj: Linear,
    pub pre_expert_norm: RmsNorm,
    pub experts: Experts,
    pub post_expert_norm: ScaledUnit,
    pub post_expert_proj: Linear,
    pub top_k: usize,
}

impl NarrowMoe {
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let (chosen, weights) = self.router.forward(x);
        let narrow = self.pre_expert_norm.forward(&self.pre_expert_proj.forward(x));
        // Each expert's result is normalized before the weights count, so the choices are run one after the other.
        let of_choice = |i: usize| {
            let weight = weights.narrow(i, 1);
            let alone = self.experts.forward(&narrow, &chosen.narrow(i, 1), &(&weight * 0.0 + 1.0));
            self.post_expert_norm.forward(&alone) * weight
        };
        let sum = (1..self.top_k).fold(of_choice(0), |sum, i| sum + of_choice(i));
        self.post_expert_proj.forward(&sum)
    }
}

pub enum FeedForwardLayer {
    Dense(GatedMlp),
    Sparse(NarrowMoe),
}

impl FeedForwardLayer {
    pub fn forward(&self, x: &Tensor) -> Tensor {
        match self {
            Self::Dense(mlp) => mlp.forward(x),
            Self::Sparse(moe) => moe.forward(x),
        }
    }
}
