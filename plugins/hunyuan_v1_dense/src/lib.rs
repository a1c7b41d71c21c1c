//! Hunyuan, dense: heads of queries and keys are normalized after they were turned.
//! <https://github.com/Tencent-Hunyuan/Hunyuan-7B>
//!
//! ```text
//! h = x + Attention(RMSNorm(x))            per layer
//! y = h + SwiGLU(RMSNorm(h))
//! logits = RMSNorm(y) · Eᵀ
//!
//! Attention(x) = softmax(q · kᵀ / √d) · (x Wv) · Wo
//!   q = RMSNorm(rope(x Wq)), k = RMSNorm(rope(x Wk)),      rope with base θ · α^(d / (d - 2))
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
        head_dim: usize where >= 4 = hidden_size / num_attention_heads,
        hidden_act: Activation = Activation::Silu,
        rms_norm_eps: f32 = 1e-5,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        use_qk_norm: bool = true,
        attention_bias: bool = false,
        tie_word_embeddings: Option<bool> = None,
    }
}

fn attention(c: &Config, w: &Weights) -> SelfAttention {
    let (dim, heads, kv_heads) = (c.hidden_size, c.num_attention_heads, c.num_key_value_heads);
    let shape = Heads { dim, heads, kv_heads, head_dim: c.head_dim };
    let rope = match c.rope_scaling.as_ref().and_then(|scaling| scaling.number("alpha")).filter(|&alpha| alpha != 0.0) {
        // Called "dynamic" in checkpoints, but the length of the text plays no part.
        Some(alpha) => {
            let d = c.head_dim as f32;
            w.rope(c.head_dim, c.rope_theta * alpha.powf(d / (d - 2.0)), &None)
        }
        None => w.rope(c.head_dim, c.rope_theta, &c.rope_scaling),
    };
    let attention = SelfAttention::new(w, shape, c.attention_bias, c.attention_bias).rope(rope);
    if !c.use_qk_norm {
        return attention;
    }
    let norm = |name| w.rms_norm(name, c.head_dim, c.rms_norm_eps);
    attention.turned_norms(norm("query_layernorm"), norm("key_layernorm"))
}

fn block(c: &Config, w: &Weights) -> Block {
    let norm = |name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps);
    let norms = [norm("input_layernorm"), norm("post_attention_layernorm")];
    let mlp = GatedMlp::new(&w.at("mlp"), c.hidden_size, c.intermediate_size, false, c.hidden_act);
    Block::pre_norm(norms, attention(c, &w.at("self_attn")), mlp)
}

struct Hunyuan;

impl Architecture for Hunyuan {
    const MODEL_TYPES: &'static [&'static str] = &["hunyuan_v1_dense"];
    type Config = Config;
    type Model = Decoder;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        Decoder::new(w, decoder_shape!(c), |w, _| Ok(block(&c, w)))
    }
}

export_plugin!(Hunyuan, examples = ["../../tests/fixtures/tiny/hunyuan_v1_dense/config.json"]);
