//! Blocks of models that mix in more than one way: a block of a single branch, and mixers whose kind differs from layer to layer.

use crate::{Cache, Decoder, DecoderShape, FeedForward, Layer, LmHead, Mixer, Norm, Result, Tensor, Weights};

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

impl<M: Mixer> Decoder<Branch<M>> {
    /// Under the names of Mamba's models: `backbone.embeddings`, `backbone.layers.N.norm` and `.mixer` (made by `mixer`),
    /// `backbone.norm_f`, `lm_head`. Thread: new.
    #[track_caller]
    pub fn backbone(
        w: &Weights,
        shape: DecoderShape,
        mut mixer: impl FnMut(&Weights, usize) -> Result<M>,
    ) -> Result<Self> {
        let (backbone, dim, eps) = (w.at("backbone"), shape.hidden_size, shape.rms_norm_eps);
        let embeddings = backbone.embedding("embeddings", shape.vocab_size, dim);
        let lm_head = LmHead::new(w, &embeddings, shape.vocab_size, dim, shape.tie_word_embeddings);
        let layers = backbone.at("layers").each(shape.num_hidden_layers, |w, layer| {
            Ok(Branch::new(w.rms_norm("norm", dim, eps), mixer(&w.at("mixer"), layer)?))
        })?;
        Ok(Self::of(embeddings, layers, backbone.rms_norm("norm_f", dim, eps), lm_head))
    }
}
