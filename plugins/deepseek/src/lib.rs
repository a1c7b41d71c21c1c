//! DeepSeekMoE, DeepSeek's first mixture of experts: grouped-query attention, many small experts, some of them shared.
//! <https://arxiv.org/abs/2401.06066>
//!
//! ```text
//! h = x + Attention(RMSNorm(x))            per layer
//! y = h + F(RMSNorm(h))                    F: SwiGLU in the first layers, then MoE
//! logits = RMSNorm(y) · E
//!
//! MoE(x) = SwiGLUₛ(x) + Σ pᵢ SwiGLUᵢ(x)    over the k largest pᵢ of softmax(x Wgate), which may be scaled to a sum of 1
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
        attention_bias: bool = false,
        hidden_act: Activation = Activation::Silu,
        rms_norm_eps: f32 = 1e-6,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        moe_intermediate_size: usize = 1407,
        // Without experts all layers are dense.
        n_routed_experts: Option<usize> = None,
        n_shared_experts: Option<usize> = None,
        num_experts_per_tok: usize where >= 1 = 6,
        norm_topk_prob: bool = false,
        first_k_dense_replace: usize = 0,
        moe_layer_freq: usize where >= 1 = 1,
        tie_word_embeddings: Option<bool> = None,
    }
}

fn attention(c: &Config, w: &Weights) -> SelfAttention {
    let (heads, kv_heads) = (c.num_attention_heads, c.num_key_value_heads);
    let shape = Heads { dim: c.hidden_size, heads, kv_heads, head_dim: c.head_dim };
    SelfAttention::new(w, shape, c.attention_bias, c.attention_bias).rope(w.rope(
        c.head_dim,
        c.rope_theta,
        &c.rope_scaling,
    ))
}

fn ffn(c: &Config, w: &Weights, layer: usize) -> Ffn {
    let mlp = |w: &Weights, hidden| GatedMlp::new(w, c.hidden_size, hidden, false, c.hidden_act);
    let is_sparse = layer >= c.first_k_dense_replace && layer.is_multiple_of(c.moe_layer_freq);
    let Some(experts) = c.n_routed_experts.filter(|_| is_sparse) else {
        return Ffn::Dense(mlp(w, c.intermediate_size));
    };
    let gate = w.linear("gate", c.hidden_size, experts, false);
    let router = Router::softmax(gate, c.num_experts_per_tok).normalized(c.norm_topk_prob, 1e-20);
    let shared = c.n_shared_experts.map(|n| mlp(&w.at("shared_experts"), n * c.moe_intermediate_size));
    let experts = w.experts(ExpertsShape::new(experts, c.hidden_size, c.moe_intermediate_size));
    Ffn::Sparse(Moe::new(router, experts).shared(shared))
}

fn block(c: &Config, w: &Weights, layer: usize) -> Block<SelfAttention, Ffn> {
    let norm = |name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps);
    let norms = [norm("input_layernorm"), norm("post_attention_layernorm")];
    Block::pre_norm(norms, attention(c, &w.at("self_attn")), ffn(c, &w.at("mlp"), layer))
}

struct Deepseek;

impl Architecture for Deepseek {
    const MODEL_TYPES: &'static [&'static str] = &["deepseek"];
    type Config = Config;
    type Model = Decoder<Block<SelfAttention, Ffn>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        if c.hidden_act != Activation::Silu {
            return Err("config.json: hidden_act of deepseek should be silu, the experts know no other".into());
        }
        Decoder::new(w, decoder_shape!(c), |w, layer| Ok(block(&c, w, layer)))
    }
}

export_plugin!(Deepseek, examples = ["../../tests/fixtures/tiny/deepseek/config.json"]);
