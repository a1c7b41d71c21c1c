//! Blocks that papers cite rather than define, and the config keys that pick between them. Each is a composition of the words in the
//! other files and issues no op of its own, so an author whose model differs in one line writes that block anew.

use crate::{
    Embedding, Layer, Linear, Result, Step, Tensor, Weights,
    config::{Json, Read},
};

/// config.json's `hidden_act`, under the names that transformers gives to activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `silu`, also called `swish`
    Silu,
    /// `gelu`
    Gelu,
    /// `gelu_pytorch_tanh`, also called `gelu_new` and `gelu_fast`
    GeluTanh,
    /// `relu`
    Relu,
}

impl Read for Activation {
    const WHAT: &'static str = "silu, gelu, gelu_pytorch_tanh or relu";
    fn read(json: &Json) -> Option<Self> {
        match json.as_str()? {
            "silu" | "swish" => Some(Self::Silu),
            "gelu" => Some(Self::Gelu),
            "gelu_pytorch_tanh" | "gelu_new" | "gelu_fast" => Some(Self::GeluTanh),
            "relu" => Some(Self::Relu),
            _ => None,
        }
    }
}

/// config.json's `layer_types`: which layers see all keys, and which only a window of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerTypes(Vec<bool>);

impl Read for LayerTypes {
    const WHAT: &'static str = "a list of full_attention and sliding_attention";
    fn read(json: &Json) -> Option<Self> {
        let slides = |kind: &Json| match kind.as_str()? {
            "full_attention" => Some(false),
            "sliding_attention" => Some(true),
            _ => None,
        };
        json.as_array()?.iter().map(slides).collect::<Option<_>>().map(Self)
    }
}

impl LayerTypes {
    /// Whether this layer, from 0, sees a window only. An error where the list ends before it.
    pub fn slides(&self, layer: usize) -> Result<bool> {
        let short = || {
            format!("config.json: layer_types has no entry for layer {layer}, it ends after {}", self.0.len()).into()
        };
        self.0.get(layer).copied().ok_or_else(short)
    }
}

/// The gated feed-forward layer, `(act(x Wgate) * (x Wup)) · Wdown`: SwiGLU, GEGLU and so on. <https://arxiv.org/abs/2002.05202>
#[derive(Debug)]
pub struct GatedMlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
    act: Activation,
}

impl GatedMlp {
    /// `gate_proj` and `up_proj` `[hidden, dim]`, `down_proj` `[dim, hidden]`, all with `bias` or none.
    #[track_caller]
    pub fn new(w: &Weights, dim: usize, hidden: usize, bias: bool, act: Activation) -> Self {
        let [gate_proj, up_proj] = w.linears(dim, bias, [("gate_proj", hidden), ("up_proj", hidden)]);
        Self { gate_proj, up_proj, down_proj: w.linear("down_proj", hidden, dim, bias), act }
    }

    /// `[tokens, dim]` -> `[tokens, dim]`
    #[track_caller]
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let (gate, up) = (self.gate_proj.forward(x), self.up_proj.forward(x));
        let gated = match self.act {
            Activation::Silu => gate.swiglu(&up),
            Activation::GeluTanh => gate.geglu(&up),
            Activation::Gelu => gate.gelu() * up,
            Activation::Relu => gate.relu() * up,
        };
        self.down_proj.forward(&gated)
    }
}

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

impl Step {
    /// Sends x through one block after the other, each with the cache that stands in its place in
    /// [`Architecture::caches`](crate::Architecture::caches): `step.through(&self.layers, x, Block::forward)`.
    #[track_caller]
    pub fn through<B>(
        &mut self,
        blocks: &[B],
        x: Tensor,
        forward: impl Fn(&B, &Tensor, &mut Layer) -> Tensor,
    ) -> Tensor {
        if blocks.len() != self.caches as usize {
            return Tensor::failed(&format!("{} blocks, but caches() declares {}", blocks.len(), self.caches));
        }
        blocks.iter().zip(self.layers()).fold(x, |x, (block, mut layer)| forward(block, &x, &mut layer))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::key;

    fn layer_types(list: Json) -> Result<Option<LayerTypes>> {
        key(&Json::from_iter([("layer_types", list)]), "", "layer_types")
    }

    #[test]
    fn a_layer_slides_where_its_type_says_so() {
        let types = layer_types(["full_attention", "sliding_attention"].into_iter().collect()).unwrap().unwrap();
        assert_eq!((types.slides(0), types.slides(1)), (Ok(false), Ok(true)));
        assert_eq!(
            types.slides(2).unwrap_err().0,
            "config.json: layer_types has no entry for layer 2, it ends after 2"
        );
    }

    #[test]
    fn an_unknown_layer_type_or_activation_is_refused_with_the_known_ones() {
        let error = layer_types(["chunked_attention"].into_iter().collect()).unwrap_err().0;
        assert!(error.ends_with("it should be a list of full_attention and sliding_attention"), "{error}");
        let error = key::<Activation>(&Json::from_iter([("hidden_act", "mish")]), "", "hidden_act").unwrap_err().0;
        assert_eq!(error, "config.json: hidden_act is \"mish\", it should be silu, gelu, gelu_pytorch_tanh or relu");
    }
}
