//! Mellum 2: routed experts, and a rope for layers with a window beside that of layers without. <https://huggingface.co/JetBrains>
//!
//! ```text
//! h = x + Attention(RMSNorm(x))            per layer
//! y = h + MoE(RMSNorm(h))
//! logits = RMSNorm(y) · Wᵀ
//!
//! Attention(x) = softmax(q · kᵀ / √d) · (x Wv) · Wo
//!   q = rope(RMSNorm(x Wq)), k = rope(RMSNorm(x Wk))      each head normalized alone
//!
//! MoE(x) = Σ pᵢ SwiGLUᵢ(x)     over the k largest pᵢ of softmax(x Wgate), which may be scaled to a sum of 1
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize = 98_304,
        hidden_size: usize = 2304,
        intermediate_size: usize = 7168,
        num_hidden_layers: usize = 28,
        num_attention_heads: usize where >= 1 = 32,
        num_key_value_heads: usize = 4,
        head_dim: usize = 128,
        hidden_act: SiluOnly = SiluOnly,
        rms_norm_eps: f32 = 1e-6,
        attention_bias: bool = false,
        rope_parameters: Option<LayerRopes> = None,
        sliding_window: Option<usize> = Some(1024),
        layer_types: Option<LayerTypes> = None,
        moe_intermediate_size: usize = 896,
        num_experts: usize = 64,
        num_experts_per_tok: usize where >= 1 = 8,
        norm_topk_prob: bool = true,
        mlp_layer_types: Option<Vec<String>> = None,
        tie_word_embeddings: Option<bool> = None,
    }
}

fn attention(c: &Config, w: &Weights, slides: bool) -> SelfAttention {
    let (dim, heads, kv_heads, head_dim) = (c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim);
    let norm = |name| w.rms_norm(name, head_dim, c.rms_norm_eps);
    let rope = match &c.rope_parameters {
        Some(ropes) => ropes.rope(w, head_dim, slides),
        None => w.rope(head_dim, if slides { 10_000.0 } else { 500_000.0 }, &None),
    };
    SelfAttention::new(w, Heads { dim, heads, kv_heads, head_dim }, c.attention_bias, c.attention_bias)
        .head_norms(norm("q_norm"), norm("k_norm"))
        .rope(rope)
        .window(c.sliding_window.filter(|_| slides))
}

fn mlp(c: &Config, w: &Weights, layer: usize) -> Ffn {
    let is_dense = |types: &Vec<String>| types.get(layer).is_some_and(|kind| kind == "dense");
    if c.mlp_layer_types.as_ref().is_some_and(is_dense) {
        return Ffn::Dense(GatedMlp::new(w, c.hidden_size, c.intermediate_size, false, Activation::Silu));
    }
    let gate = w.linear("gate", c.hidden_size, c.num_experts, false);
    let router = Router::softmax(gate, c.num_experts_per_tok).normalized(c.norm_topk_prob, 0.0);
    Ffn::Sparse(Moe::new(router, w.experts(ExpertsShape::new(c.num_experts, c.hidden_size, c.moe_intermediate_size))))
}

fn block(c: &Config, w: &Weights, layer: usize) -> Result<Block<SelfAttention, Ffn>> {
    let norm = |name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps);
    let norms = [norm("input_layernorm"), norm("post_attention_layernorm")];
    let slides = c.layer_types.as_ref().map_or(Ok(false), |types| types.slides(layer))?;
    Ok(Block::pre_norm(norms, attention(c, &w.at("self_attn"), slides), mlp(c, &w.at("mlp"), layer)))
}

struct Mellum;

impl Architecture for Mellum {
    const MODEL_TYPES: &'static [&'static str] = &["mellum"];
    type Config = Config;
    type Model = Decoder<Block<SelfAttention, Ffn>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        Decoder::new(w, decoder_shape!(c), |w, layer| block(&c, w, layer))
    }
}

export_plugin!(Mellum, examples = ["../../tests/fixtures/tiny/mellum/config.json"]);
