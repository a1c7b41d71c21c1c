//! AFMoE (Trinity): gated attention, norms on both sides of attention and experts. <https://huggingface.co/arcee-ai/Trinity-Mini>
//!
//! ```text
//! x₀ = √dim embed(ids), where the config says so
//! h = x + RMSNorm(Attention(RMSNorm(x)))   per layer
//! y = h + RMSNorm(MoE(RMSNorm(h)))
//! logits = RMSNorm(y) · Wᵀ
//!
//! Attention(x) = (softmax(q · kᵀ / √d) · (x Wv) * sigmoid(x Wg)) · Wo
//!   q = RMSNorm(x Wq), k = RMSNorm(x Wk), heads alone; turned and within a window, but for every fourth layer
//!
//! MoE(x) = s Σ pᵢ SwiGLUᵢ(x) + SwiGLUₛ(x)     dense in the first layers: SwiGLU(x)
//!   the k largest sigmoid(x Wr) + b; p their sigmoids, scaled to a sum of 1
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize = 200_192,
        hidden_size: usize = 2048,
        intermediate_size: usize = 6144,
        num_hidden_layers: usize = 32,
        num_attention_heads: usize where >= 1 = 16,
        num_key_value_heads: usize = num_attention_heads,
        head_dim: usize = 128,
        hidden_act: SiluOnly = SiluOnly,
        rms_norm_eps: f32 = 1e-5,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        attention_bias: bool = false,
        sliding_window: Option<usize> = Some(1024),
        global_attn_every_n_layers: usize where >= 1 = 4,
        layer_types: Option<LayerTypes> = None,
        mup_enabled: bool = false,
        moe_intermediate_size: usize = 1408,
        num_dense_layers: usize = 1,
        num_experts: usize = 64,
        num_experts_per_tok: usize where >= 1 = 6,
        num_shared_experts: usize = 2,
        score_func: String = "sigmoid".into(),
        route_norm: bool = true,
        route_scale: f32 = 1.0,
        n_group: usize = 1,
        topk_group: usize = 1,
        tie_word_embeddings: Option<bool> = None,
    }
}

fn attention(c: &Config, w: &Weights, layer: usize) -> Result<SelfAttention> {
    let (dim, heads, kv_heads, head_dim) = (c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim);
    let slides = match &c.layer_types {
        Some(types) => types.slides(layer)?,
        None => !(layer + 1).is_multiple_of(c.global_attn_every_n_layers),
    };
    let norm = |name| w.rms_norm(name, head_dim, c.rms_norm_eps);
    Ok(SelfAttention::new(w, Heads { dim, heads, kv_heads, head_dim }, c.attention_bias, c.attention_bias)
        .head_norms(norm("q_norm"), norm("k_norm"))
        .rope(slides.then(|| w.rope(head_dim, c.rope_theta, &c.rope_scaling)))
        .window(c.sliding_window.filter(|_| slides))
        .gate(w.linear("gate_proj", dim, heads * head_dim, false)))
}

fn mlp(c: &Config, w: &Weights, layer: usize) -> Ffn {
    let (dim, hidden) = (c.hidden_size, c.moe_intermediate_size);
    let dense = |w: &Weights, hidden| GatedMlp::new(w, dim, hidden, false, Activation::Silu);
    if layer < c.num_dense_layers {
        return Ffn::Dense(dense(w, c.intermediate_size));
    }
    let (gate, k) = (w.at("router").linear("gate", dim, c.num_experts, false), c.num_experts_per_tok);
    let router = if c.score_func == "sigmoid" { Router::sigmoid(gate, k) } else { Router::softmax(gate, k) };
    let router = router
        .correction(w.tensor("expert_bias", &[c.num_experts]))
        .groups(c.n_group, c.topk_group, GroupScore::BestTwo)
        .normalized(c.route_norm, 1e-20)
        .scale(c.route_scale);
    let shared = (c.num_shared_experts > 0).then(|| dense(&w.at("shared_experts"), hidden * c.num_shared_experts));
    Ffn::Sparse(Moe::new(router, w.experts(ExpertsShape::new(c.num_experts, dim, hidden))).shared(shared))
}

fn block(c: &Config, w: &Weights, layer: usize) -> Result<Block<SelfAttention, Ffn>> {
    let norms = ["input_layernorm", "post_attention_layernorm", "pre_mlp_layernorm", "post_mlp_layernorm"];
    let norms = norms.map(|name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps));
    Ok(Block::both_norms(norms, attention(c, &w.at("self_attn"), layer)?, mlp(c, &w.at("mlp"), layer)))
}

struct AfMoe;

impl Architecture for AfMoe {
    const MODEL_TYPES: &'static [&'static str] = &["afmoe"];
    type Config = Config;
    type Model = Decoder<Block<SelfAttention, Ffn>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        Ok(Decoder::new(w, decoder_shape!(c), |w, layer| block(&c, w, layer))?.embed_scale(if c.mup_enabled {
            (c.hidden_size as f32).sqrt()
        } else {
            1.0
        }))
    }
}

export_plugin!(AfMoe, examples = ["../../tests/fixtures/tiny/afmoe/config.json"]);
