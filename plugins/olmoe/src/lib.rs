//! OLMoE: many small routed experts in every layer, queries and keys normalized as a whole; FlexOlmo: the same with the norms after
//! attention and experts. <https://arxiv.org/abs/2409.02060>, <https://arxiv.org/abs/2507.07024>
//!
//! ```text
//! OLMoE     h = x + Attention(RMSNorm(x)),  y = h + MoE(RMSNorm(h))      per layer
//! FlexOlmo  h = x + RMSNorm(Attention(x)),  y = h + RMSNorm(MoE(h))
//! logits = RMSNorm(y) · Wᵀ
//!
//! Attention(x) = softmax(q · kᵀ / √d) · (x Wv) · Wo
//!   q = rope(RMSNorm(x Wq)), k = rope(RMSNorm(x Wk))      all heads as one; these and values perhaps clipped
//!
//! MoE(x) = Σ pᵢ SwiGLUᵢ(x)     over the k largest pᵢ of softmax(x Wgate), which may be scaled to a sum of 1
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        model_type: String = "olmoe".into(),
        vocab_size: usize = 50_304,
        hidden_size: usize = 2048,
        intermediate_size: usize = 2048,
        num_hidden_layers: usize = 16,
        num_attention_heads: usize where >= 1 = 16,
        num_key_value_heads: usize = num_attention_heads,
        hidden_act: SiluOnly = SiluOnly,
        head_dim: usize = hidden_size / num_attention_heads,
        rms_norm_eps: f32 = if model_type == "flex_olmo" { 1e-6 } else { 1e-5 },
        rope_theta: f32 = if model_type == "flex_olmo" { 500_000.0 } else { 10_000.0 },
        rope_scaling: Option<RopeScaling> = None,
        attention_bias: bool = false,
        clip_qkv: Option<f32> = None,
        num_experts: usize = 64,
        num_experts_per_tok: usize where >= 1 = 8,
        norm_topk_prob: bool = false,
        tie_word_embeddings: Option<bool> = None,
    }
}

fn attention(c: &Config, w: &Weights) -> SelfAttention {
    let (dim, heads, kv_heads, head_dim) = (c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim);
    let norm = |name, heads| w.rms_norm(name, heads * head_dim, c.rms_norm_eps);
    SelfAttention::new(w, Heads { dim, heads, kv_heads, head_dim }, c.attention_bias, c.attention_bias)
        .whole_norms(norm("q_norm", heads), norm("k_norm", kv_heads))
        .clip(c.clip_qkv)
        .rope(w.rope(head_dim, c.rope_theta, &c.rope_scaling))
}

fn block(c: &Config, w: &Weights) -> Block<SelfAttention, Moe> {
    let norm = |name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps);
    let mlp = w.at("mlp");
    let gate = mlp.linear("gate", c.hidden_size, c.num_experts, false);
    let router = Router::softmax(gate, c.num_experts_per_tok).normalized(c.norm_topk_prob, 0.0);
    let experts = mlp.experts(ExpertsShape::new(c.num_experts, c.hidden_size, c.intermediate_size));
    let (attention, moe) = (attention(c, &w.at("self_attn")), Moe::new(router, experts));
    match &*c.model_type {
        "flex_olmo" => {
            Block::post_norm(["post_attention_layernorm", "post_feedforward_layernorm"].map(norm), attention, moe)
        }
        _ => Block::pre_norm(["input_layernorm", "post_attention_layernorm"].map(norm), attention, moe),
    }
}

struct Olmoe;

impl Architecture for Olmoe {
    const MODEL_TYPES: &'static [&'static str] = &["olmoe", "flex_olmo"];
    type Config = Config;
    type Model = Decoder<Block<SelfAttention, Moe>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        Decoder::new(w, decoder_shape!(c), |w, _| Ok(block(&c, w)))
    }
}

export_plugin!(Olmoe, examples = ["../../tests/fixtures/tiny/olmoe/config.json"]);
