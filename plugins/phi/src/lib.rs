//! Phi 1, 1.5 and 2: attention and feed-forward side by side. <https://arxiv.org/abs/2309.05463>
//!
//! ```text
//! n = LayerNorm(x)                         per layer
//! y = x + Attention(n) + gelu(n W₁) · W₂
//! logits = LayerNorm(y) · Wlm + b
//!
//! Attention(x) = softmax(rope(x Wq) · rope(x Wk)ᵀ / √d) · (x Wv) · Wdense      the first part of each head turns
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize = 51_200,
        hidden_size: usize = 2048,
        intermediate_size: usize = 8192,
        num_hidden_layers: usize = 24,
        num_attention_heads: usize where >= 1 = 32,
        num_key_value_heads: usize = num_attention_heads,
        hidden_act: Activation = Activation::GeluTanh,
        layer_norm_eps: f32 = 1e-5,
        qk_layernorm: bool = false,
        partial_rotary_factor: f32 = 0.5,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
    }
}

impl Config {
    fn attention(&self, w: &Weights) -> SelfAttention {
        let (dim, head_dim) = (self.hidden_size, self.hidden_size / self.num_attention_heads);
        let (q, kv) = (dim, self.num_key_value_heads * head_dim);
        let qkv = w.linears(dim, true, [("q_proj", q), ("k_proj", kv), ("v_proj", kv)]);
        let turned = (head_dim as f32 * self.partial_rotary_factor) as usize;
        let attention = SelfAttention::of(qkv, w.linear("dense", q, dim, true), head_dim).rope(w.rope(
            turned,
            self.rope_theta,
            &self.rope_scaling,
        ));
        let norm = |name| w.layer_norm(name, head_dim, self.layer_norm_eps, true);
        match self.qk_layernorm {
            true => attention.head_norms(norm("q_layernorm"), norm("k_layernorm")),
            false => attention,
        }
    }
}

struct Phi;

impl Architecture for Phi {
    const MODEL_TYPES: &'static [&'static str] = &["phi"];
    type Config = Config;
    type Model = Decoder<Block<SelfAttention, Mlp>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        let (model, dim) = (w.at("model"), c.hidden_size);
        let norm = |w: &Weights, name| w.layer_norm(name, dim, c.layer_norm_eps, true);
        let layers = model.at("layers").each(c.num_hidden_layers, |w, _| {
            let mlp = Mlp::new(&w.at("mlp"), ["fc1", "fc2"], dim, c.intermediate_size, true, c.hidden_act);
            Ok(Block::parallel(norm(w, "input_layernorm"), c.attention(&w.at("self_attn")), mlp))
        })?;
        let embed_tokens = model.embedding("embed_tokens", c.vocab_size, dim);
        let lm_head = LmHead::Own(w.linear("lm_head", dim, c.vocab_size, true));
        Ok(Decoder::of(embed_tokens, layers, norm(&model, "final_layernorm"), lm_head))
    }
}

export_plugin!(Phi, examples = ["../../tests/fixtures/tiny/phi/config.json"]);
