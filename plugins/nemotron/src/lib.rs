//! Nemotron 3 and 4, Minitron: squared ReLU without a gate, LayerNorms that store w - 1. <https://arxiv.org/abs/2402.16819>
//! And Jais 2, with LayerNorms as usual, biases, and heads that turn as a whole. <https://huggingface.co/inceptionai/Jais-2-8B-Chat>
//!
//! ```text
//! h = x + Attention(Norm(x))               per layer
//! y = h + relu(Norm(h) Wup)² · Wdown
//! logits = Norm(y) · Wlm
//!
//! Norm(x) = (x - mean(x)) / std(x) * (1 + w) + b                      Jais 2: * w + b
//! Attention(x) = softmax(rope(x Wq) · rope(x Wk)ᵀ / √d) · (x Wv) · Wo      the first half of each head turns
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        model_type: String,
        vocab_size: usize = 256_000,
        hidden_size: usize = 6144,
        intermediate_size: usize = 24_576,
        num_hidden_layers: usize = 32,
        num_attention_heads: usize where >= 1 = 48,
        num_key_value_heads: usize = num_attention_heads,
        head_dim: usize = hidden_size / num_attention_heads,
        hidden_act: Activation = Activation::Relu2,
        layer_norm_eps: f32 = 1e-5,
        norm_eps: f32 = layer_norm_eps,
        attention_bias: bool = model_type == "jais2",
        mlp_bias: bool = model_type == "jais2",
        partial_rotary_factor: f32 = if model_type == "jais2" { 1.0 } else { 0.5 },
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        tie_word_embeddings: bool = false,
    }
}

impl Config {
    fn norm(&self, w: &Weights, name: &str) -> LayerNorm {
        let (weight, bias) = (w.source(&format!("{name}.weight")), w.source(&format!("{name}.bias")));
        let weight = if self.model_type == "jais2" { weight } else { weight.plus(1.0) };
        LayerNorm::of(weight, Some(bias), self.hidden_size, self.norm_eps)
    }
}

struct Nemotron;

impl Architecture for Nemotron {
    const MODEL_TYPES: &'static [&'static str] = &["nemotron", "jais2"];
    type Config = Config;
    type Model = Decoder<Block<SelfAttention, Mlp>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        let (model, dim, head_dim) = (w.at("model"), c.hidden_size, c.head_dim);
        let embed_tokens = model.embedding("embed_tokens", c.vocab_size, dim);
        let heads = Heads { dim, heads: c.num_attention_heads, kv_heads: c.num_key_value_heads, head_dim };
        let turned = (head_dim as f32 * c.partial_rotary_factor) as usize;
        let layers = model.at("layers").each(c.num_hidden_layers, |w, _| {
            let attention = SelfAttention::new(&w.at("self_attn"), heads, c.attention_bias, c.attention_bias)
                .rope(w.rope(turned, c.rope_theta, &c.rope_scaling));
            let (names, hidden) = (["up_proj", "down_proj"], c.intermediate_size);
            let mlp = Mlp::new(&w.at("mlp"), names, dim, hidden, c.mlp_bias, c.hidden_act);
            let norms = ["input_layernorm", "post_attention_layernorm"].map(|name| c.norm(w, name));
            Ok(Block::pre_norm(norms, attention, mlp))
        })?;
        let lm_head = LmHead::new(w, &embed_tokens, c.vocab_size, dim, Some(c.tie_word_embeddings));
        Ok(Decoder::of(embed_tokens, layers, c.norm(&model, "norm"), lm_head))
    }
}

export_plugin!(Nemotron, examples = ["../../tests/fixtures/tiny/nemotron/config.json"]);
