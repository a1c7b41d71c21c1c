//! Granite's mixture of experts: Granite with routed experts in every layer. <https://huggingface.co/ibm-granite/granite-3.1-3b-a800m-base>
//!
//! ```text
//! x₀ = mₑ embed(ids)                       four multipliers from the config
//! h = x + mᵣ Attention(RMSNorm(x))         per layer
//! y = h + mᵣ MoE(RMSNorm(h))
//! logits = RMSNorm(y) · Eᵀ / mₗ
//!
//! Attention(x) = softmax(mₐ q · kᵀ) · (x Wv) · Wo      q = rope(x Wq), k = rope(x Wk)
//! MoE(x) = Σ pᵢ SwiGLUᵢ(x)     over the k largest logits of x Wr, p their softmax
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize = 32_000,
        hidden_size: usize = 4096,
        intermediate_size: usize = 11_008,
        num_hidden_layers: usize = 32,
        num_attention_heads: usize where >= 1 = 32,
        num_key_value_heads: usize = num_attention_heads,
        head_dim: usize = hidden_size / num_attention_heads,
        hidden_act: SiluOnly = SiluOnly,
        rms_norm_eps: f32 = 1e-6,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        attention_bias: bool = false,
        embedding_multiplier: f32 = 1.0,
        logits_scaling: f32 = 1.0,
        residual_multiplier: f32 = 1.0,
        attention_multiplier: f32 = 1.0,
        num_local_experts: usize = 8,
        num_experts_per_tok: usize where >= 1 = 2,
        tie_word_embeddings: Option<bool> = None,
    }
}

fn attention(c: &Config, w: &Weights) -> SelfAttention {
    let (dim, heads, kv_heads) = (c.hidden_size, c.num_attention_heads, c.num_key_value_heads);
    SelfAttention::new(w, Heads { dim, heads, kv_heads, head_dim: c.head_dim }, c.attention_bias, c.attention_bias)
        .rope(w.rope(c.head_dim, c.rope_theta, &c.rope_scaling))
        .scale(c.attention_multiplier)
}

fn block(c: &Config, w: &Weights) -> Block<SelfAttention, Moe> {
    let norm = |name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps);
    let norms = [norm("input_layernorm"), norm("post_attention_layernorm")];
    let moe = w.at("block_sparse_moe");
    let logits = moe.at("router").linear("layer", c.hidden_size, c.num_local_experts, false);
    let experts = moe.experts(ExpertsShape::new(c.num_local_experts, c.hidden_size, c.intermediate_size));
    let moe = Moe::new(Router::chosen_softmax(logits, c.num_experts_per_tok), experts);
    Block::pre_norm(norms, attention(c, &w.at("self_attn")), moe).branch_scale(c.residual_multiplier)
}

struct GraniteMoe;

impl Architecture for GraniteMoe {
    const MODEL_TYPES: &'static [&'static str] = &["granitemoe"];
    type Config = Config;
    type Model = Decoder<Block<SelfAttention, Moe>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        Ok(Decoder::new(w, decoder_shape!(c), |w, _| Ok(block(&c, w)))?
            .embed_scale(c.embedding_multiplier)
            .logit_scale(1.0 / c.logits_scaling))
    }
}

export_plugin!(GraniteMoe);
