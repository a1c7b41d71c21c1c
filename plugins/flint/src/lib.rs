//! Flint: routed experts by sigmoid, windows with rope between layers that see all keys and know no positions, and a sink for each head.
//! <https://huggingface.co/RecursiveSI/flint>
//!
//! ```text
//! h = x + Attention(RMSNorm(x))            per layer
//! y = h + FFN(RMSNorm(h))
//! logits = RMSNorm(y) · Wᵀ
//!
//! Attention(x) = softmax(q · kᵀ / √d, sink) · (x Wv) · Wo
//!   q = RMSNorm(x Wq), k = RMSNorm(x Wk), by head, and turned in layers with a window
//! FFN(x) = Σ pᵢ SwiGLUᵢ(x) + SwiGLUₛ(x)     over the k largest of p = sigmoid(x Wgate), scaled to a sum of 1
//!   in the first layers SwiGLU(x)
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize = 150_144,
        hidden_size: usize = 2048,
        intermediate_size: usize = 6144,
        num_hidden_layers: usize = 49,
        num_attention_heads: usize where >= 1 = 32,
        num_key_value_heads: usize = 4,
        head_dim: usize = 128,
        hidden_act: Activation = Activation::Silu,
        rms_norm_eps: f32 = 1e-6,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        attention_bias: bool = false,
        sliding_window: usize = 513,
        layer_types: Option<LayerTypes> = None,
        moe_intermediate_size: usize = 512,
        shared_expert_intermediate_size: usize = 1024,
        num_experts: usize = 256,
        num_experts_per_tok: usize where >= 1 = 6,
        norm_topk_prob: bool = true,
        decoder_sparse_step: usize where >= 1 = 1,
        mlp_only_layers: Vec<usize> = vec![0, 1],
        tie_word_embeddings: Option<bool> = None,
    }
}

impl Config {
    fn slides(&self, layer: usize) -> Result<bool> {
        match &self.layer_types {
            Some(types) => types.slides(layer),
            None => Ok(layer >= 2 && layer % 4 != 1 && layer + 1 != self.num_hidden_layers),
        }
    }

    fn is_sparse(&self, layer: usize) -> bool {
        let due = (layer + 1).is_multiple_of(self.decoder_sparse_step);
        self.num_experts > 0 && due && !self.mlp_only_layers.contains(&layer)
    }
}

fn attention(c: &Config, w: &Weights, slides: bool) -> SelfAttention {
    let (dim, heads, kv_heads, head_dim) = (c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim);
    let norm = |name| w.rms_norm(name, head_dim, c.rms_norm_eps);
    // Their name in the first files.
    let sinks = if w.has("softmax_offset") { "softmax_offset" } else { "sinks" };
    SelfAttention::new(w, Heads { dim, heads, kv_heads, head_dim }, c.attention_bias, c.attention_bias)
        .head_norms(norm("q_norm"), norm("k_norm"))
        .rope(slides.then(|| w.rope(head_dim, c.rope_theta, &c.rope_scaling)))
        .window(slides.then_some(c.sliding_window))
        .sinks(w.tensor(sinks, &[heads]))
}

fn ffn(c: &Config, w: &Weights, layer: usize) -> Ffn {
    let dense = |w: &Weights, hidden| GatedMlp::new(w, c.hidden_size, hidden, false, c.hidden_act);
    if !c.is_sparse(layer) {
        return Ffn::Dense(dense(w, c.intermediate_size));
    }
    let gate = w.linear("gate", c.hidden_size, c.num_experts, false);
    let router = Router::sigmoid(gate, c.num_experts_per_tok).normalized(c.norm_topk_prob, 0.0);
    let experts = w.experts(ExpertsShape::new(c.num_experts, c.hidden_size, c.moe_intermediate_size));
    let shared = dense(&w.at("shared_expert"), c.shared_expert_intermediate_size);
    Ffn::Sparse(Moe::new(router, experts).shared(shared))
}

fn block(c: &Config, w: &Weights, layer: usize) -> Result<Block<SelfAttention, Ffn>> {
    let norms = ["input_layernorm", "post_attention_layernorm"];
    let norms = norms.map(|name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps));
    Ok(Block::pre_norm(norms, attention(c, &w.at("self_attn"), c.slides(layer)?), ffn(c, &w.at("mlp"), layer)))
}

struct Flint;

impl Architecture for Flint {
    const MODEL_TYPES: &'static [&'static str] = &["flint"];
    type Config = Config;
    type Model = Decoder<Block<SelfAttention, Ffn>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        if c.hidden_act != Activation::Silu {
            return Err("config.json: hidden_act should be silu, the experts know no other".into());
        }
        Decoder::new(w, decoder_shape!(c), |w, layer| block(&c, w, layer))
    }
}

export_plugin!(Flint, examples = ["../../tests/fixtures/tiny/flint/config.json"]);
