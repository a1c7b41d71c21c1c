//! What stands around the blocks of nearly every language model: the embedding before them, the norm and the output head after them.

use crate::{Embedding, Layer, Linear, Norm, Result, Step, Tensor, Weights};

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
    /// checkpoint may store the table under `lm_head` too; that copy is not read.
    #[track_caller]
    pub fn new(w: &Weights, embedding: &Embedding, vocab: usize, dim: usize, tied: Option<bool>) -> Self {
        if tied.unwrap_or_else(|| !w.has("lm_head.weight")) {
            w.ignore("lm_head.");
            return Self::Tied(Embedding(embedding.0));
        }
        Self::Own(w.linear("lm_head", dim, vocab, false))
    }

    /// Hidden `[rows, dim]` -> logits `[rows, vocab]`
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
pub struct Decoder<B> {
    /// ids -> `[tokens, dim]`
    pub embed_tokens: Embedding,
    /// The blocks, first to last.
    pub layers: Vec<B>,
    /// After the last block.
    pub norm: Norm,
    /// `[rows, dim]` -> logits
    pub lm_head: LmHead,
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

impl<B> Decoder<B> {
    /// Under the usual names: `model.embed_tokens`, `model.layers.N` (each made by `block`), `model.norm` (RMS), `lm_head`.
    #[track_caller]
    pub fn new(w: &Weights, shape: DecoderShape, block: impl FnMut(&Weights, usize) -> Result<B>) -> Result<Self> {
        let (model, dim) = (w.at("model"), shape.hidden_size);
        let embed_tokens = model.embedding("embed_tokens", shape.vocab_size, dim);
        Ok(Self {
            layers: model.at("layers").each(shape.num_hidden_layers, block)?,
            norm: model.rms_norm("norm", dim, shape.rms_norm_eps).into(),
            lm_head: LmHead::new(w, &embed_tokens, shape.vocab_size, dim, shape.tie_word_embeddings),
            embed_tokens,
        })
    }

    /// ids `[tokens]` -> hidden `[tokens, dim]`, the last norm included.
    #[track_caller]
    pub fn forward(
        &self,
        tokens: &Tensor,
        step: &mut Step,
        block: impl Fn(&B, &Tensor, &mut Layer) -> Tensor,
    ) -> Tensor {
        self.forward_from(self.embed_tokens.forward(tokens), step, block)
    }

    /// The same from embeddings `[tokens, dim]` that the author has scaled or added to.
    #[track_caller]
    pub fn forward_from(
        &self,
        embedded: Tensor,
        step: &mut Step,
        block: impl Fn(&B, &Tensor, &mut Layer) -> Tensor,
    ) -> Tensor {
        self.norm.forward(&step.through(&self.layers, embedded, block))
    }

    /// Hidden `[rows, dim]` -> logits `[rows, vocab]`
    #[track_caller]
    pub fn head(&self, hidden: &Tensor) -> Tensor {
        self.lm_head.forward(hidden)
    }
}

impl Step {
    /// Sends x through one block after the other, each with the memory that stands in its place in
    /// [`Architecture::caches`](crate::Architecture::caches): `step.through(&self.layers, x, Block::forward)`.
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
