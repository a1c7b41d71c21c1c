//! Qwen 1.5 and 2 with routed experts, and beside them one that every token visits. <https://arxiv.org/abs/2407.10671>
//!
//! ```text
//! h = x + Attention(RMSNorm(x))            per layer
//! y = h + MoE(RMSNorm(h))
//! logits = RMSNorm(y) · Wᵀ
//!
//! Attention(x) = softmax(q · kᵀ / √d) · (x Wv + bv) · Wo      q = rope(x Wq + bq), k = rope(x Wk + bk)
//!
//! MoE(x) = Σ pᵢ SwiGLUᵢ(x) + sigmoid(x ws) SwiGLUₛ(x)     over the k largest pᵢ of softmax(x Wgate)
//!          in dense layers: SwiGLU(x)
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize = 151_936,
        hidden_size: usize = 2048,
        intermediate_size: usize = 5632,
        num_hidden_layers: usize = 24,
        num_attention_heads: usize where >= 1 = 16,
        num_key_value_heads: usize = 16,
        head_dim: usize = hidden_size / num_attention_heads,
        hidden_act: SiluOnly = SiluOnly,
        rms_norm_eps: f32 = 1e-6,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        qkv_bias: bool = true,
        use_sliding_window: bool = false,
        sliding_window: Option<usize> = Some(4096),
        max_window_layers: usize = 28,
        layer_types: Option<LayerTypes> = None,
        moe_intermediate_size: usize = 1408,
        shared_expert_intermediate_size: usize = 5632,
        num_experts: usize = 60,
        num_experts_per_tok: usize where >= 1 = 4,
        norm_topk_prob: bool = false,
        decoder_sparse_step: usize where >= 1 = 1,
        mlp_only_layers: Vec<usize> = vec![],
        tie_word_embeddings: Option<bool> = None,
    }
}

impl Config {
    fn is_sparse(&self, layer: usize) -> bool {
        self.num_experts > 0
            && (layer + 1).is_multiple_of(self.decoder_sparse_step)
            && !self.mlp_only_layers.contains(&layer)
    }

    fn window(&self, layer: usize) -> Result<Option<usize>> {
        let slides = match &self.layer_types {
            Some(types) => types.slides(layer)?,
            None => layer.is_multiple_of(2) && layer < self.max_window_layers,
        };
        Ok(self.sliding_window.filter(|_| self.use_sliding_window && slides))
    }
}

fn attention(c: &Config, w: &Weights, window: Option<usize>) -> SelfAttention {
    let (dim, heads, kv_heads) = (c.hidden_size, c.num_attention_heads, c.num_key_value_heads);
    SelfAttention::new(w, Heads { dim, heads, kv_heads, head_dim: c.head_dim }, c.qkv_bias, false)
        .rope(w.rope(c.head_dim, c.rope_theta, &c.rope_scaling))
        .window(window)
}

fn mlp(c: &Config, w: &Weights, layer: usize) -> Ffn {
    let dim = c.hidden_size;
    if !c.is_sparse(layer) {
        return Ffn::Dense(GatedMlp::new(w, dim, c.intermediate_size, false, Activation::Silu));
    }
    let gate = w.linear("gate", dim, c.num_experts, false);
    let router = Router::softmax(gate, c.num_experts_per_tok).normalized(c.norm_topk_prob, 0.0);
    let experts = w.experts(ExpertsShape::new(c.num_experts, dim, c.moe_intermediate_size));
    let hidden = c.shared_expert_intermediate_size;
    let shared = GatedMlp::new(&w.at("shared_expert"), dim, hidden, false, Activation::Silu);
    Ffn::Sparse(Moe::new(router, experts).shared(shared).shared_gate(w.linear("shared_expert_gate", dim, 1, false)))
}

fn block(c: &Config, w: &Weights, layer: usize) -> Result<Block<SelfAttention, Ffn>> {
    let norm = |name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps);
    let norms = [norm("input_layernorm"), norm("post_attention_layernorm")];
    let attention = attention(c, &w.at("self_attn"), c.window(layer)?);
    Ok(Block::pre_norm(norms, attention, mlp(c, &w.at("mlp"), layer)))
}

struct Qwen2Moe;

impl Architecture for Qwen2Moe {
    const MODEL_TYPES: &'static [&'static str] = &["qwen2_moe"];
    type Config = Config;
    type Model = Decoder<Block<SelfAttention, Ffn>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        Decoder::new(w, decoder_shape!(c), |w, layer| block(&c, w, layer))
    }
}

export_plugin!(Qwen2Moe, examples = ["../../tests/fixtures/tiny/qwen2_moe/config.json"]);
