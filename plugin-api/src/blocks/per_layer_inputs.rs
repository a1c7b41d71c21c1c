//! Per-layer embeddings, as in Gemma 3n and Gemma 4: what each layer is told about each token besides the stream itself.
//! <https://ai.google.dev/gemma/docs/gemma-3n>

use crate::{Activation, Embedding, Linear, RmsNorm, Step, Tensor, Weights};

/// `(Norm(x Wmodel / √dim) + Eper_layer[token] · √width) / √2`, `width` numbers for each layer and token.
#[derive(Debug)]
pub struct PerLayerInputs {
    embed_tokens_per_layer: Embedding,
    per_layer_model_projection: Linear,
    per_layer_projection_norm: RmsNorm,
    shape: PerLayerShape,
}

/// The config keys that shape [`PerLayerInputs`].
#[derive(Debug, Clone, Copy)]
pub struct PerLayerShape {
    /// `vocab_size_per_layer_input`
    pub vocab: usize,
    /// `num_hidden_layers`
    pub layers: usize,
    /// `hidden_size`
    pub dim: usize,
    /// `hidden_size_per_layer_input`
    pub width: usize,
    /// `rms_norm_eps`
    pub eps: f32,
}

impl PerLayerInputs {
    /// `embed_tokens_per_layer`, `per_layer_model_projection` and `per_layer_projection_norm`. Thread: new.
    #[track_caller]
    pub fn new(w: &Weights, shape: PerLayerShape) -> Self {
        let PerLayerShape { vocab, layers, dim, width, eps } = shape;
        Self {
            embed_tokens_per_layer: w.embedding("embed_tokens_per_layer", vocab, layers * width),
            per_layer_model_projection: w.linear("per_layer_model_projection", dim, layers * width, false),
            per_layer_projection_norm: w.rms_norm("per_layer_projection_norm", width, eps),
            shape,
        }
    }

    /// ids `[tokens]` and what they embed to, `[tokens, dim]` -> one `[tokens, width]` for each layer. Thread: step.
    #[track_caller]
    pub fn forward(&self, tokens: &Tensor, embedded: &Tensor, step: &Step) -> Vec<Tensor> {
        let PerLayerShape { vocab, layers, dim, width, .. } = self.shape;
        // Ids beyond this table stand for images and sounds, which no text has; any row will do, a missing one would not.
        let ids = step.ngrams(tokens, 1, 1, vocab);
        let of_token = self.embed_tokens_per_layer.forward(&ids) * (width as f32).sqrt();
        let projected = self.per_layer_model_projection.forward(embedded) * (dim as f32).powf(-0.5);
        let projected = self.per_layer_projection_norm.forward(&projected.unflatten(layers)).flatten();
        let inputs = (projected + of_token) * 0.5f32.sqrt();
        (0..layers).map(|layer| inputs.narrow(layer * width, width)).collect()
    }
}

/// What a layer makes of its input: `Norm((act(x Wgate) * input) · Wproj)`, to be added to the stream.
#[derive(Debug)]
pub struct PerLayerGate {
    per_layer_input_gate: Linear,
    per_layer_projection: Linear,
    post_per_layer_input_norm: RmsNorm,
    act: Activation,
}

impl PerLayerGate {
    /// `per_layer_input_gate` `[width, dim]`, `per_layer_projection` `[dim, width]` and `post_per_layer_input_norm`. Thread: new.
    #[track_caller]
    pub fn new(w: &Weights, dim: usize, width: usize, eps: f32, act: Activation) -> Self {
        Self {
            per_layer_input_gate: w.linear("per_layer_input_gate", dim, width, false),
            per_layer_projection: w.linear("per_layer_projection", width, dim, false),
            post_per_layer_input_norm: w.rms_norm("post_per_layer_input_norm", dim, eps),
            act,
        }
    }

    /// x `[tokens, dim]`, input `[tokens, width]` -> `[tokens, dim]`. Thread: step.
    #[track_caller]
    pub fn forward(&self, x: &Tensor, input: &Tensor) -> Tensor {
        let gate = self.act.forward(&self.per_layer_input_gate.forward(x));
        self.post_per_layer_input_norm.forward(&self.per_layer_projection.forward(&(gate * input)))
    }
}
