//! Phi-3 and Phi-4: LLaMA whose projections are stored as two, over contexts stretched by LongRoPE. <https://arxiv.org/abs/2404.14219>
//!
//! ```text
//! h = x + Attention(RMSNorm(x))            per layer
//! y = h + SwiGLU(RMSNorm(h))
//! logits = RMSNorm(y) · Eᵀ
//!
//! Attention(x) = softmax(rope(q) · rope(k)ᵀ / √d) · v · Wo,      [q k v] = x Wqkv; the first lanes of a head turn, or all
//! SwiGLU(x) = (silu(g) * u) · Wdown,      [g u] = x Wgate_up
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize,
        hidden_size: usize,
        intermediate_size: usize,
        num_hidden_layers: usize,
        num_attention_heads: usize where >= 1,
        num_key_value_heads: usize = num_attention_heads,
        head_dim: usize = hidden_size / num_attention_heads,
        hidden_act: Activation = Activation::Silu,
        rms_norm_eps: f32 = 1e-5,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        partial_rotary_factor: f32 = 1.0,
        sliding_window: Option<usize> = None,
        tie_word_embeddings: Option<bool> = None,
    }
}

fn attention(c: &Config, w: &Weights) -> SelfAttention {
    let (dim, heads, kv_heads) = (c.hidden_size, c.num_attention_heads, c.num_key_value_heads);
    let o_proj = w.linear("o_proj", heads * c.head_dim, dim, false);
    let turning = (c.head_dim as f32 * c.partial_rotary_factor) as usize;
    SelfAttention::fused(w, "qkv_proj", Heads { dim, heads, kv_heads, head_dim: c.head_dim }, false, o_proj)
        .rope(w.rope(turning, c.rope_theta, &c.rope_scaling))
        .window(c.sliding_window)
}

fn block(c: &Config, w: &Weights) -> Block {
    let norm = |name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps);
    let norms = [norm("input_layernorm"), norm("post_attention_layernorm")];
    let mlp = GatedMlp::fused(&w.at("mlp"), "gate_up_proj", c.hidden_size, c.intermediate_size, c.hidden_act);
    Block::pre_norm(norms, attention(c, &w.at("self_attn")), mlp)
}

struct Phi3;

impl Architecture for Phi3 {
    const MODEL_TYPES: &'static [&'static str] = &["phi3"];
    type Config = Config;
    type Model = Decoder;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        Decoder::new(w, decoder_shape!(c), |w, _| Ok(block(&c, w)))
    }
}

export_plugin!(Phi3, examples = ["../../tests/fixtures/tiny/phi3/config.json"]);
