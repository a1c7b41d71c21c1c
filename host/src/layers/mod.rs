//! The layers with weights, as they run: what a plugin's slots stand for once the checkpoint is read.

pub mod adapted;
pub mod attention;
pub mod conv1d;
pub mod embedding;
pub mod experts;
pub mod indexer;
pub mod linear;
pub mod multi_linear;
pub mod norm;
pub mod rope;
pub mod slices;
pub mod weight;

use candle_core::Tensor;

/// One slot of a model.
pub enum Layer {
    /// `x · Wᵀ + b`
    Linear(linear::Linear),
    /// A table of vectors.
    Embedding(embedding::Embedding),
    /// A table of ids.
    Ids(embedding::Ids),
    /// RMSNorm or LayerNorm.
    Norm(norm::Norm),
    /// Routed experts.
    Experts(experts::Experts),
    /// A matrix a head.
    MultiLinear(multi_linear::MultiLinear),
    /// A convolution over the last tokens.
    Conv1d(conv1d::Conv1d),
    /// A tensor as it is.
    Parameter(Tensor),
    /// Rotary angles.
    Rope(rope::Rope),
    /// An op of the plugin, which its `Wanted` has.
    Own,
}
