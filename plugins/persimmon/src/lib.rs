//! Persimmon 8B: squared ReLU, LayerNorms on the heads of queries and keys. <https://www.adept.ai/blog/persimmon-8b>
//!
//! ```text
//! h = x + Attention(LayerNorm(x))          per layer
//! y = h + relu(LayerNorm(h) W₁ + b₁)² · W₂ + b₂
//! logits = LayerNorm(y) · Wlm
//!
//! Attention(x) = softmax(rope(LayerNorm(q)) · rope(LayerNorm(k))ᵀ / √d) · v · Wdense
//!   q, k, v: head by head in x Wqkv + b; the first half of each head turns
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize = 262_144,
        hidden_size: usize = 4096,
        intermediate_size: usize = 16_384,
        num_hidden_layers: usize = 36,
        num_attention_heads: usize where >= 1 = 64,
        hidden_act: Activation = Activation::Relu2,
        layer_norm_eps: f32 = 1e-5,
        qk_layernorm: bool = true,
        partial_rotary_factor: f32 = 0.5,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        tie_word_embeddings: bool = false,
    }
}

impl Config {
    fn attention(&self, w: &Weights) -> SelfAttention {
        let (dim, heads) = (self.hidden_size, self.num_attention_heads);
        let shape = Heads { dim, heads, kv_heads: heads, head_dim: dim / heads };
        let turned = (shape.head_dim as f32 * self.partial_rotary_factor) as usize;
        let attention = SelfAttention::grouped(w, "query_key_value", shape, true, w.linear("dense", dim, dim, true))
            .rope(w.rope(turned, self.rope_theta, &self.rope_scaling));
        let norm = |name| w.layer_norm(name, shape.head_dim, self.layer_norm_eps, true);
        match self.qk_layernorm {
            true => attention.head_norms(norm("q_layernorm"), norm("k_layernorm")),
            false => attention,
        }
    }
}

struct Persimmon;

impl Architecture for Persimmon {
    const MODEL_TYPES: &'static [&'static str] = &["persimmon"];
    type Config = Config;
    type Model = Decoder<Block<SelfAttention, Mlp>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        let (model, dim, hidden) = (w.at("model"), c.hidden_size, c.intermediate_size);
        let norm = |w: &Weights, name| w.layer_norm(name, dim, c.layer_norm_eps, true);
        let layers = model.at("layers").each(c.num_hidden_layers, |w, _| {
            let mlp = Mlp::new(&w.at("mlp"), ["dense_h_to_4h", "dense_4h_to_h"], dim, hidden, true, c.hidden_act);
            let norms = ["input_layernorm", "post_attention_layernorm"].map(|name| norm(w, name));
            Ok(Block::pre_norm(norms, c.attention(&w.at("self_attn")), mlp))
        })?;
        let embed_tokens = model.embedding("embed_tokens", c.vocab_size, dim);
        let lm_head = LmHead::new(w, &embed_tokens, c.vocab_size, dim, Some(c.tie_word_embeddings));
        Ok(Decoder::of(embed_tokens, layers, norm(&model, "final_layernorm"), lm_head))
    }
}

export_plugin!(Persimmon, examples = ["../../tests/fixtures/tiny/persimmon/config.json"]);
