//! What stands around the blocks of nearly every language model: the embedding before them, the norm and the output head after them.

use crate::{Block, Cache, Embedding, Layer, Linear, Mixer, Model, Norm, Result, Step, Tensor, Weights};

/// The output head: a layer of its own, or the embedding table once more. <https://arxiv.org/abs/1608.05859>
#[derive(Debug)]
pub enum LmHead {
    /// `lm_head.weight` `[vocab, dim]`
    Own(Linear),
    /// The embedding's table.
    Tied(Embedding),
}

impl LmHead {
    /// `tied` is config.json's `tie_word_embeddings`; where it is silent, the head is tied if the checkpoint has no other. A tied
    /// checkpoint may store the table under `lm_head` too; that copy is not read. Thread: new.
    #[track_caller]
    pub fn new(w: &Weights, embedding: &Embedding, vocab: usize, dim: usize, tied: Option<bool>) -> Self {
        Self::named(w, "lm_head", embedding, vocab, dim, tied)
    }

    /// The same under another name than `lm_head`. Thread: new.
    #[track_caller]
    pub fn named(w: &Weights, name: &str, embedding: &Embedding, vocab: usize, dim: usize, tied: Option<bool>) -> Self {
        if tied.unwrap_or_else(|| !w.has(&format!("{name}.weight"))) {
            w.ignore(&format!("{name}."));
            return Self::Tied(Embedding(embedding.0));
        }
        Self::Own(w.linear(name, dim, vocab, false))
    }

    /// Hidden `[rows, dim]` -> logits `[rows, vocab]`. Thread: step.
    #[track_caller]
    pub fn forward(&self, hidden: &Tensor) -> Tensor {
        match self {
            Self::Own(linear) => linear.forward(hidden),
            Self::Tied(embedding) => embedding.as_linear(hidden),
        }
    }
}

/// The shell of a decoder: `head(norm(blocks(embed_tokens(ids))))`.
#[derive(Debug)]
pub struct Decoder<B = Block> {
    /// ids -> `[tokens, dim]`
    pub embed_tokens: Embedding,
    /// The blocks, first to last.
    pub layers: Vec<B>,
    /// After the last block.
    pub norm: Norm,
    /// `[rows, dim]` -> logits
    pub lm_head: LmHead,
    embed_scale: f32,
    logit_scale: f32,
    softcap: Option<f32>,
}

/// The config keys that shape a [`Decoder`].
#[derive(Debug, Clone, Copy)]
pub struct DecoderShape {
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Width.
    pub hidden_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Under the root of the last norm.
    pub rms_norm_eps: f32,
    /// Whether the head is the embedding table; where config.json is silent, the checkpoint tells.
    pub tie_word_embeddings: Option<bool>,
}

/// The keys of a [`DecoderShape`] out of a config that has them under these names.
#[macro_export]
macro_rules! decoder_shape {
    ($config:expr) => {
        $crate::DecoderShape {
            vocab_size: $config.vocab_size,
            hidden_size: $config.hidden_size,
            num_hidden_layers: $config.num_hidden_layers,
            rms_norm_eps: $config.rms_norm_eps,
            tie_word_embeddings: $config.tie_word_embeddings,
        }
    };
}

impl<B> Decoder<B> {
    /// Under the usual names: `model.embed_tokens`, `model.layers.N` (each made by `block`), `model.norm` (RMS), `lm_head`. Thread: new.
    #[track_caller]
    pub fn new(w: &Weights, shape: DecoderShape, block: impl FnMut(&Weights, usize) -> Result<B>) -> Result<Self> {
        let (model, dim) = (w.at("model"), shape.hidden_size);
        let embed_tokens = model.embedding("embed_tokens", shape.vocab_size, dim);
        let layers = model.at("layers").each(shape.num_hidden_layers, block)?;
        let norm = model.rms_norm("norm", dim, shape.rms_norm_eps);
        let lm_head = LmHead::new(w, &embed_tokens, shape.vocab_size, dim, shape.tie_word_embeddings);
        Ok(Self::of(embed_tokens, layers, norm, lm_head))
    }

    /// The shell around what the author found under other names.
    pub fn of(embed_tokens: Embedding, layers: Vec<B>, norm: impl Into<Norm>, lm_head: LmHead) -> Self {
        let norm = norm.into();
        Self { embed_tokens, layers, norm, lm_head, embed_scale: 1.0, logit_scale: 1.0, softcap: None }
    }

    /// Multiplies the embeddings.
    pub fn embed_scale(self, embed_scale: f32) -> Self {
        Self { embed_scale, ..self }
    }

    /// Multiplies the logits.
    pub fn logit_scale(self, logit_scale: f32) -> Self {
        Self { logit_scale, ..self }
    }

    /// `softcap * tanh(logits / softcap)`, after any scale.
    pub fn softcap(self, softcap: Option<f32>) -> Self {
        Self { softcap, ..self }
    }

    /// ids `[tokens]` -> `[tokens, dim]`, what the first block sees. Thread: step.
    #[track_caller]
    pub fn embed(&self, tokens: &Tensor) -> Tensor {
        scaled(self.embed_tokens.forward(tokens), self.embed_scale)
    }

    /// ids `[tokens]` -> hidden `[tokens, dim]`, the last norm included. Thread: step.
    #[track_caller]
    pub fn forward(
        &self,
        tokens: &Tensor,
        step: &mut Step,
        block: impl Fn(&B, &Tensor, &mut Layer) -> Tensor,
    ) -> Tensor {
        self.forward_from(self.embed(tokens), step, block)
    }

    /// The same from embeddings `[tokens, dim]` that the author has normalized or added to. Thread: step.
    #[track_caller]
    pub fn forward_from(
        &self,
        embedded: Tensor,
        step: &mut Step,
        block: impl Fn(&B, &Tensor, &mut Layer) -> Tensor,
    ) -> Tensor {
        self.norm.forward(&step.through(&self.layers, embedded, block))
    }

    /// Hidden `[rows, dim]` -> logits `[rows, vocab]`. Thread: step.
    #[track_caller]
    pub fn head(&self, hidden: &Tensor) -> Tensor {
        let logits = scaled(self.lm_head.forward(hidden), self.logit_scale);
        match self.softcap {
            Some(cap) => (logits / cap).tanh() * cap,
            None => logits,
        }
    }
}

fn scaled(x: Tensor, by: f32) -> Tensor {
    if by == 1.0 { x } else { x * by }
}

impl<B: Mixer + Send + 'static> Model for Decoder<B> {
    fn caches(&self) -> Vec<Cache> {
        self.layers.iter().map(Mixer::cache).collect()
    }

    fn forward(&self, tokens: &Tensor, step: &mut Step) -> Tensor {
        self.forward(tokens, step, B::forward)
    }

    fn head(&self, hidden: &Tensor) -> Tensor {
        self.head(hidden)
    }
}

impl Step {
    /// Sends x through one block after the other, each with the memory that stands in its place in
    /// [`Model::caches`]: `step.through(&self.layers, x, Block::forward)`. Thread: step.
    #[track_caller]
    pub fn through<B>(
        &mut self,
        blocks: &[B],
        x: Tensor,
        forward: impl Fn(&B, &Tensor, &mut Layer) -> Tensor,
    ) -> Tensor {
        if blocks.len() != self.places.layers() {
            let declared = self.places.layers();
            return Tensor::failed(&format!("{} blocks, but caches() declares {declared}", blocks.len()));
        }
        blocks.iter().zip(self.layers()).fold(x, |x, (block, mut layer)| forward(block, &x, &mut layer))
    }
}
