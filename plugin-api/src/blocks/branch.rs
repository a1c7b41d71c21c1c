//! Blocks of models that mix in more than one way: a block of a single branch, and mixers whose kind differs from layer to layer.

use crate::{Cache, FeedForward, Layer, Mixer, Norm, Tensor};

/// A mixer of any kind.
pub type AnyMixer = Box<dyn Mixer + Send>;

/// A feed-forward layer that stands where others have a mixer; it remembers nothing.
#[derive(Debug)]
pub struct Unmixed<F>(pub F);

impl<F: FeedForward> Mixer for Unmixed<F> {
    #[track_caller]
    fn forward(&self, x: &Tensor, _: &mut Layer) -> Tensor {
        self.0.forward(x)
    }

    fn cache(&self) -> Cache {
        Cache::none()
    }
}

/// `x + mixer(norm(x))`
#[derive(Debug)]
pub struct Branch<M = AnyMixer> {
    norm: Norm,
    mixer: M,
}

impl<M: Mixer> Branch<M> {
    /// The block of the two.
    pub fn new(norm: impl Into<Norm>, mixer: M) -> Self {
        Self { norm: norm.into(), mixer }
    }
}

impl<M: Mixer> Mixer for Branch<M> {
    #[track_caller]
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        x + self.mixer.forward(&self.norm.forward(x), layer)
    }

    fn cache(&self) -> Cache {
        self.mixer.cache()
    }
}
