//! Qwen3 with routed experts in place of most or all feed-forward layers. <https://arxiv.org/abs/2505.09388>
//!
//! ```text
//! h = x + Attention(RMSNorm(x))            per layer
//! y = h + MoE(RMSNorm(h))
//! logits = RMSNorm(y) · Eᵀ
//!
//! Attention(x) = softmax(q · kᵀ / √d) · (x Wv) · Wo
//!   q = rope(RMSNorm(x Wq)), k = rope(RMSNorm(x Wk))      each head normalized alone
//!
//! MoE(x) = Σ pᵢ SwiGLUᵢ(x)     over the k largest pᵢ of softmax(x Wgate), which may be scaled to a sum of 1
//!          in dense layers: SwiGLU(x)
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
        rms_norm_eps: f32 = 1e-6,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        // All layers slide, or none.
        use_sliding_window: bool = false,
        sliding_window: Option<usize> = Some(4096),
        moe_intermediate_size: usize,
        // transformers 5 writes the first name, everyone before it the second.
        num_local_experts: Option<usize> = None,
        num_experts: usize = num_local_experts.unwrap_or(128),
        num_experts_per_tok: usize where >= 1 = 8,
        norm_topk_prob: bool = false,
        decoder_sparse_step: usize where >= 1 = 1,
        mlp_only_layers: Vec<usize> = vec![],
        attention_bias: bool = false,
        tie_word_embeddings: Option<bool> = None,
    }
}

impl Config {
    fn is_sparse(&self, layer: usize) -> bool {
        self.num_experts > 0
            && (layer + 1).is_multiple_of(self.decoder_sparse_step)
            && !self.mlp_only_layers.contains(&layer)
    }
}

fn attention(c: &Config, w: &Weights) -> SelfAttention {
    let (dim, heads, kv_heads) = (c.hidden_size, c.num_attention_heads, c.num_key_value_heads);
    let shape = Heads { dim, heads, kv_heads, head_dim: c.head_dim };
    let norm = |name| w.rms_norm(name, c.head_dim, c.rms_norm_eps);
    SelfAttention::new(w, shape, c.attention_bias, c.attention_bias)
        .head_norms(norm("q_norm"), norm("k_norm"))
        .rope(w.rope(c.head_dim, c.rope_theta, &c.rope_scaling))
        .window(c.sliding_window.filter(|_| c.use_sliding_window))
}

fn mlp(c: &Config, w: &Weights, layer: usize) -> Ffn {
    if !c.is_sparse(layer) {
        return Ffn::Dense(GatedMlp::new(w, c.hidden_size, c.intermediate_size, false, c.hidden_act));
    }
    let gate = w.linear("gate", c.hidden_size, c.num_experts, false);
    let router = Router::softmax(gate, c.num_experts_per_tok).normalized(c.norm_topk_prob, 0.0);
    Ffn::Sparse(Moe::new(router, w.experts(ExpertsShape::new(c.num_experts, c.hidden_size, c.moe_intermediate_size))))
}

fn block(c: &Config, w: &Weights, layer: usize) -> Block<SelfAttention, Ffn> {
    let norm = |name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps);
    let norms = [norm("input_layernorm"), norm("post_attention_layernorm")];
    Block::pre_norm(norms, attention(c, &w.at("self_attn")), mlp(c, &w.at("mlp"), layer))
}

struct Qwen3Moe;

impl Architecture for Qwen3Moe {
    const MODEL_TYPES: &'static [&'static str] = &["qwen3_moe", "qwen3_vl_moe"];
    type Config = Config;
    type Model = Decoder<Block<SelfAttention, Ffn>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        if c.hidden_act != Activation::Silu {
            return Err("config.json: hidden_act of qwen3_moe should be silu, the experts know no other".into());
        }
        Decoder::new(w, decoder_shape!(c), |w, layer| Ok(block(&c, w, layer)))
    }
}

export_plugin!(Qwen3Moe, examples = ["../../tests/fixtures/tiny/qwen3_moe/config.json"]);
