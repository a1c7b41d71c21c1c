//! GLM-4, dense: rope turns neighbouring lanes of the first half of each head. <https://arxiv.org/abs/2406.12793>
//!
//! ```text
//! glm:    h = x + Attention(RMSNorm(x))                glm4:    h = x + RMSNorm(Attention(RMSNorm(x)))            per layer
//!         y = h + SwiGLU(RMSNorm(h))                            y = h + RMSNorm(SwiGLU(RMSNorm(h)))
//! logits = RMSNorm(y) · Eᵀ
//!
//! Attention(x) = softmax(rope(x Wq + bq) · rope(x Wk + bk)ᵀ / √d) · (x Wv + bv) · Wo
//! SwiGLU(x) = (silu(g) * u) · Wdown,      [g u] = x Wgate_up
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        model_type: String = "glm".into(),
        vocab_size: usize,
        hidden_size: usize,
        intermediate_size: usize,
        num_hidden_layers: usize,
        num_attention_heads: usize,
        num_key_value_heads: usize = num_attention_heads,
        head_dim: usize = 128,
        hidden_act: Activation = Activation::Silu,
        rms_norm_eps: f32 = 1.5625e-7,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        partial_rotary_factor: f32 = 0.5,
        attention_bias: bool = true,
        tie_word_embeddings: Option<bool> = None,
    }
}

fn attention(c: &Config, w: &Weights) -> SelfAttention {
    let (dim, heads, kv_heads) = (c.hidden_size, c.num_attention_heads, c.num_key_value_heads);
    let turning = (c.head_dim as f32 * c.partial_rotary_factor) as usize;
    SelfAttention::new(w, Heads { dim, heads, kv_heads, head_dim: c.head_dim }, c.attention_bias, false)
        .rope(w.rope(turning, c.rope_theta, &c.rope_scaling).interleaved())
}

fn block(c: &Config, w: &Weights) -> Block {
    let norm = |name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps);
    let attention = attention(c, &w.at("self_attn"));
    let mlp = GatedMlp::fused(&w.at("mlp"), "gate_up_proj", c.hidden_size, c.intermediate_size, c.hidden_act);
    if c.model_type == "glm" {
        return Block::pre_norm(["input_layernorm", "post_attention_layernorm"].map(norm), attention, mlp);
    }
    let names = ["input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"];
    Block::both_norms(names.map(norm), attention, mlp)
}

struct Glm;

impl Architecture for Glm {
    const MODEL_TYPES: &'static [&'static str] = &["glm", "glm4"];
    type Config = Config;
    type Model = Decoder;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        Decoder::new(w, decoder_shape!(c), |w, _| Ok(block(&c, w)))
    }
}

export_plugin!(Glm, examples = ["../../tests/fixtures/tiny/glm/config.json"]);
