//! Mixtral: Mistral with routed experts in every layer. <https://arxiv.org/abs/2401.04088>
//!
//! ```text
//! h = x + Attention(RMSNorm(x))            per layer
//! y = h + MoE(RMSNorm(h))
//! logits = RMSNorm(y) · Wᵀ
//!
//! Attention(x) = softmax(q · kᵀ / √d) · (x Wv) · Wo      q = rope(x Wq), k = rope(x Wk), perhaps within a window
//! MoE(x) = Σ pᵢ SwiGLUᵢ(x)     over the k largest logits of x Wgate, p their softmax
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize = 32_000,
        hidden_size: usize = 4096,
        intermediate_size: usize = 14_336,
        num_hidden_layers: usize = 32,
        num_attention_heads: usize where >= 1 = 32,
        num_key_value_heads: usize = 8,
        head_dim: usize = hidden_size / num_attention_heads,
        hidden_act: SiluOnly = SiluOnly,
        rms_norm_eps: f32 = 1e-5,
        rope_theta: f32 = 1e6,
        rope_scaling: Option<RopeScaling> = None,
        sliding_window: Option<usize> = None,
        num_local_experts: usize = 8,
        num_experts_per_tok: usize where >= 1 = 2,
        tie_word_embeddings: Option<bool> = None,
    }
}

fn block(c: &Config, w: &Weights) -> Block<SelfAttention, Moe> {
    let (dim, heads, kv_heads) = (c.hidden_size, c.num_attention_heads, c.num_key_value_heads);
    let norm = |name| w.rms_norm(name, dim, c.rms_norm_eps);
    let norms = [norm("input_layernorm"), norm("post_attention_layernorm")];
    let attention =
        SelfAttention::new(&w.at("self_attn"), Heads { dim, heads, kv_heads, head_dim: c.head_dim }, false, false)
            .rope(w.rope(c.head_dim, c.rope_theta, &c.rope_scaling))
            .window(c.sliding_window);
    let w = w.at("block_sparse_moe");
    let router = Router::chosen_softmax(w.linear("gate", dim, c.num_local_experts, false), c.num_experts_per_tok);
    let experts = w.experts(ExpertsShape::new(c.num_local_experts, dim, c.intermediate_size));
    Block::pre_norm(norms, attention, Moe::new(router, experts))
}

struct Mixtral;

impl Architecture for Mixtral {
    const MODEL_TYPES: &'static [&'static str] = &["mixtral"];
    type Config = Config;
    type Model = Decoder<Block<SelfAttention, Moe>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        Decoder::new(w, decoder_shape!(c), |w, _| Ok(block(&c, w)))
    }
}

export_plugin!(Mixtral, examples = ["../../tests/fixtures/tiny/mixtral/config.json"]);
