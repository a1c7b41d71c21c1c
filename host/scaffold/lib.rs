//! {{name}}. So far it is LLaMA: <https://arxiv.org/abs/2302.13971>
//!
//! ```text
//! h = x + Attention(RMSNorm(x))            per layer
//! y = h + SwiGLU(RMSNorm(h))
//! logits = RMSNorm(y) · Eᵀ
//!
//! Attention(x) = softmax(rope(x Wq) · rope(x Wk)ᵀ / √d) · (x Wv) · Wo
//! SwiGLU(x) = (silu(x Wgate) * (x Wup)) · Wdown
//! ```

use plugin_api::prelude::*;

// The keys of config.json that are read; those without a default must be there.
config! {
    struct Config {
        vocab_size: usize,
        hidden_size: usize,
        intermediate_size: usize,
        num_hidden_layers: usize,
        num_attention_heads: usize where >= 1,
        num_key_value_heads: usize = num_attention_heads,
        head_dim: usize = hidden_size / num_attention_heads,
        rms_norm_eps: f32 = 1e-6,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        tie_word_embeddings: Option<bool> = None,
    }
}

/// One layer. A name is that of a tensor in the checkpoint: `w.at("self_attn")` holds `model.layers.0.self_attn.q_proj.weight`.
fn block(c: &Config, w: &Weights) -> Block {
    let (dim, heads, kv_heads, head_dim) = (c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim);
    let attention = SelfAttention::new(&w.at("self_attn"), Heads { dim, heads, kv_heads, head_dim }, false, false)
        .rope(w.rope(head_dim, c.rope_theta, &c.rope_scaling));
    let mlp = GatedMlp::new(&w.at("mlp"), dim, c.intermediate_size, false, Activation::Silu);
    let norms = ["input_layernorm", "post_attention_layernorm"].map(|name| w.rms_norm(name, dim, c.rms_norm_eps));
    Block::pre_norm(norms, attention, mlp)
}

struct {{Type}};

impl Architecture for {{Type}} {
    const MODEL_TYPES: &'static [&'static str] = &["{{name}}"];
    type Config = Config;
    type Model = Decoder;

    fn new(c: Config, w: &Weights) -> Result<Decoder> {
        Decoder::new(w, decoder_shape!(c), |w, _| Ok(block(&c, w)))
    }
}

// `dylm check` tries the plugin on the configurations named here.
export_plugin!({{Type}}, examples = ["tiny/config.json"]);
