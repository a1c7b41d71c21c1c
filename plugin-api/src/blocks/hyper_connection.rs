//! Hyper-connections: several residual streams in place of one. Each sublayer reads a mixture of them and writes to all, while a matrix
//! that hardly lets any stream grow or die mixes what they hold. <https://arxiv.org/abs/2409.19606>, <https://arxiv.org/abs/2512.24880>

use crate::{Linear, Parameter, RmsNorm, Tensor, Weights};

/// What all hyper-connections of a model have in common.
#[derive(Debug, Clone, Copy)]
pub struct HyperShape {
    /// Streams.
    pub streams: usize,
    /// Width of each.
    pub dim: usize,
    /// Under the root of the norm before the projection.
    pub norm_eps: f32,
    /// Rounds of Sinkhorn's normalization.
    pub rounds: usize,
    /// Joins its sums, and every share that is read or passed on.
    pub eps: f32,
}

impl HyperShape {
    /// `[tokens, dim]` -> streams `[tokens, streams, dim]`, all of them the same at first. Thread: step.
    #[track_caller]
    pub fn spread(&self, x: &Tensor) -> Tensor {
        Tensor::concat(&vec![x; self.streams]).unflatten(self.streams)
    }

    /// Where all mixing begins: the streams of a token as one vector, normalized.
    fn projection(&self, w: &Weights, name: &str, outputs: usize) -> (RmsNorm, Linear) {
        let width = self.streams * self.dim;
        let mix = Linear::of(w.source(&format!("{name}fn")), None, width, outputs);
        (RmsNorm::plain(width, self.norm_eps), mix)
    }

    /// Streams summed up by shares `[tokens, streams]`.
    fn collapse(&self, shares: &Tensor, streams: &Tensor) -> Tensor {
        shares.unflatten(1).matmul(streams).flatten()
    }
}

/// The connections around one sublayer F, from the mixing weights `m = RMSNorm(streams) Wᵀ`, n + n + n² a token:
///
/// ```text
/// read = sigmoid(a₁ m₁ + b₁) + eps,  write = 2 sigmoid(a₂ m₂ + b₂),  pass = sinkhorn(softmax(a₃ m₃ + b₃) + eps)
/// streams = write F(Σ read streams) + passᵀ streams
/// ```
#[derive(Debug)]
pub struct HyperConnection {
    shape: HyperShape,
    norm: RmsNorm,
    mix: Linear,
    base: Parameter,
    scale: Parameter,
}

impl HyperConnection {
    /// `name` and `fn` W `[(2 + n) n, n dim]`, `base` b `[(2 + n) n]`, `scale` a `[3]`. Thread: new.
    #[track_caller]
    pub fn new(w: &Weights, name: &str, shape: HyperShape) -> Self {
        let outputs = (2 + shape.streams) * shape.streams;
        let (norm, mix) = shape.projection(w, name, outputs);
        let tensor = |part, len| w.tensor(&format!("{name}{part}"), &[len]);
        Self { shape, norm, mix, base: tensor("base", outputs), scale: tensor("scale", 3) }
    }

    /// Streams `[tokens, n, dim]` -> the same after the sublayer, `[tokens, dim]` -> `[tokens, dim]`. Thread: step.
    #[track_caller]
    pub fn around(&self, streams: &Tensor, sublayer: impl FnOnce(&Tensor) -> Tensor) -> Tensor {
        let (n, eps) = (self.shape.streams, self.shape.eps);
        let (mixed, base, scale) =
            (self.mix.forward(&self.norm.forward(&streams.flatten())), self.base.tensor(), self.scale.tensor());
        let part = |i: usize, from, len| mixed.narrow(from, len) * scale.narrow(i, 1) + base.narrow(from, len);
        let read = part(0, 0, n).sigmoid() + eps;
        let write = part(1, n, n).sigmoid() * 2.0;
        let pass = (part(2, 2 * n, n * n).unflatten(n).softmax() + eps).sinkhorn(self.shape.rounds, eps);
        let y = sublayer(&self.shape.collapse(&read, streams));
        write.unflatten(n).matmul(&y.unflatten(1)) + pass.transpose().matmul(streams)
    }
}

/// The end of the streams: `Σ (sigmoid(a RMSNorm(streams) Wᵀ + b) + eps) streams`.
#[derive(Debug)]
pub struct HyperHead {
    shape: HyperShape,
    norm: RmsNorm,
    mix: Linear,
    base: Parameter,
    scale: Parameter,
}

impl HyperHead {
    /// `name` and `fn` W `[n, n dim]`, `base` b `[n]`, `scale` a `[1]`. Thread: new.
    #[track_caller]
    pub fn new(w: &Weights, name: &str, shape: HyperShape) -> Self {
        let (norm, mix) = shape.projection(w, name, shape.streams);
        let tensor = |part, len| w.tensor(&format!("{name}{part}"), &[len]);
        Self { shape, norm, mix, base: tensor("base", shape.streams), scale: tensor("scale", 1) }
    }

    /// Streams `[tokens, n, dim]` -> `[tokens, dim]`. Thread: step.
    #[track_caller]
    pub fn forward(&self, streams: &Tensor) -> Tensor {
        let mixed = self.mix.forward(&self.norm.forward(&streams.flatten()));
        let shares = (mixed * self.scale.tensor() + self.base.tensor()).sigmoid() + self.shape.eps;
        self.shape.collapse(&shares, streams)
    }
}
