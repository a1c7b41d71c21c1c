//! MiniMax M2: routed experts in every layer, queries and keys normalized as a whole, half of a head's lanes turned.
//! <https://huggingface.co/MiniMaxAI/MiniMax-M2>
//!
//! ```text
//! h = x + Attention(RMSNorm(x))            per layer
//! y = h + MoE(RMSNorm(h))
//! logits = RMSNorm(y) · Wᵀ
//!
//! Attention(x) = softmax(q · kᵀ / √d) · (x Wv) · Wo
//!   q = rope(RMSNorm(x Wq)), k = rope(RMSNorm(x Wk))      all heads as one
//!
//! MoE(x) = Σ pᵢ SwiGLUᵢ(x)     the k largest sigmoid(x Wgate) + b; p their sigmoids, scaled to a sum of 1
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize = 200_064,
        hidden_size: usize = 3072,
        intermediate_size: usize = 1536,
        num_hidden_layers: usize = 62,
        num_attention_heads: usize where >= 1 = 48,
        num_key_value_heads: usize = 8,
        head_dim: usize = hidden_size / num_attention_heads,
        hidden_act: SiluOnly = SiluOnly,
        rms_norm_eps: f32 = 1e-6,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        partial_rotary_factor: f32 = 1.0,
        rotary_dim: usize = (head_dim as f32 * partial_rotary_factor) as usize,
        use_qk_norm: bool = true,
        num_local_experts: usize = 256,
        num_experts_per_tok: usize where >= 1 = 8,
        tie_word_embeddings: Option<bool> = None,
    }
}

fn attention(c: &Config, w: &Weights) -> SelfAttention {
    let (dim, heads, kv_heads, head_dim) = (c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim);
    let attention = SelfAttention::new(w, Heads { dim, heads, kv_heads, head_dim }, false, false).rope(w.rope(
        c.rotary_dim,
        c.rope_theta,
        &c.rope_scaling,
    ));
    let norm = |name, heads| w.rms_norm(name, heads * head_dim, c.rms_norm_eps);
    match c.use_qk_norm {
        true => attention.whole_norms(norm("q_norm", heads), norm("k_norm", kv_heads)),
        false => attention,
    }
}

fn block(c: &Config, w: &Weights) -> Block<SelfAttention, Moe> {
    let norm = |name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps);
    let norms = [norm("input_layernorm"), norm("post_attention_layernorm")];
    let (moe, experts) = (w.at("block_sparse_moe"), c.num_local_experts);
    let router = Router::sigmoid(moe.linear("gate", c.hidden_size, experts, false), c.num_experts_per_tok)
        .correction(moe.tensor("e_score_correction_bias", &[experts]))
        .normalized(true, 1e-20);
    let experts = moe.experts(ExpertsShape::new(experts, c.hidden_size, c.intermediate_size));
    Block::pre_norm(norms, attention(c, &w.at("self_attn")), Moe::new(router, experts))
}

struct MiniMax(Decoder<Block<SelfAttention, Moe>>);

impl Architecture for MiniMax {
    const MODEL_TYPES: &'static [&'static str] = &["minimax", "minimax_m2"];
    type Config = Config;

    fn new(c: Config, w: &Weights) -> Result<Self> {
        let shape = DecoderShape {
            vocab_size: c.vocab_size,
            hidden_size: c.hidden_size,
            num_hidden_layers: c.num_hidden_layers,
            rms_norm_eps: c.rms_norm_eps,
            tie_word_embeddings: c.tie_word_embeddings,
        };
        Ok(Self(Decoder::new(w, shape, |w, _| Ok(block(&c, w)))?))
    }

    fn caches(&self) -> Vec<Cache> {
        self.0.caches()
    }

    fn forward(&self, tokens: &Tensor, step: &mut Step) -> Tensor {
        self.0.run(tokens, step)
    }

    fn head(&self, hidden: &Tensor) -> Tensor {
        self.0.head(hidden)
    }
}

export_plugin!(MiniMax);
