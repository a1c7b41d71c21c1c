//! Klear: routed experts and a shared one, which every token mixes in its own proportion.
//! <https://huggingface.co/Kwai-Klear/Klear-46B-A2.5B-Instruct>
//!
//! ```text
//! h = x + Attention(RMSNorm(x))            per layer
//! y = h + MoE(RMSNorm(h))
//! logits = RMSNorm(y) · Wᵀ
//!
//! Attention(x) = softmax(q · kᵀ / √d) · (x Wv) · Wo
//!   q = rope(RMSNorm(x Wq)), k = rope(RMSNorm(x Wk))      each head normalized alone
//!
//! MoE(x) = r Σ pᵢ SwiGLUᵢ(x) + s SwiGLUₛ(x)      (r, s) = softmax(x Wc + bc); in dense layers: SwiGLU(x)
//!   the k largest sigmoid(x Wgate) + b; p their sigmoids, which may be scaled to a sum of 1
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
        hidden_act: SiluOnly = SiluOnly,
        rms_norm_eps: f32 = 1e-5,
        rope_theta: f32 = 10_000.0,
        attention_bias: bool = false,
        num_experts: usize,
        num_experts_per_tok: usize where >= 1,
        n_shared_experts: usize = 1,
        moe_intermediate_size: usize,
        norm_topk_prob: bool = true,
        decoder_sparse_step: usize where >= 1 = 1,
        mlp_only_layers: Vec<usize> = vec![],
        tie_word_embeddings: Option<bool> = None,
    }
}

struct KlearMoe {
    router: Router,
    experts: Experts,
    shared_experts: GatedMlp,
    coefficient: Linear,
}

enum Mlp {
    Dense(GatedMlp),
    Sparse(KlearMoe),
}

impl Mlp {
    fn new(c: &Config, w: &Weights, layer: usize) -> Self {
        let (dim, experts, hidden) = (c.hidden_size, c.num_experts, c.moe_intermediate_size);
        let dense = |w: &Weights, hidden| GatedMlp::new(w, dim, hidden, false, Activation::Silu);
        let is_sparse = experts > 0 && (layer + 1).is_multiple_of(c.decoder_sparse_step);
        if !is_sparse || c.mlp_only_layers.contains(&layer) {
            return Self::Dense(dense(w, c.intermediate_size));
        }
        let router = Router::sigmoid(w.linear("gate", dim, experts, false), c.num_experts_per_tok)
            .correction(w.tensor("expert_bias", &[experts]))
            .normalized(c.norm_topk_prob, 0.0);
        Self::Sparse(KlearMoe {
            router,
            experts: w.experts(ExpertsShape::new(experts, dim, hidden)),
            shared_experts: dense(&w.at("shared_experts"), hidden * c.n_shared_experts),
            coefficient: w.linear("coefficient", dim, 2, true),
        })
    }
}

impl FeedForward for Mlp {
    fn forward(&self, x: &Tensor) -> Tensor {
        match self {
            Self::Dense(mlp) => mlp.forward(x),
            Self::Sparse(moe) => {
                let (chosen, weights) = moe.router.forward(x);
                let shares = moe.coefficient.forward(x).softmax();
                let routed = moe.experts.forward(x, &chosen, &weights) * shares.narrow(0, 1);
                routed + moe.shared_experts.forward(x) * shares.narrow(1, 1)
            }
        }
    }
}

fn attention(c: &Config, w: &Weights) -> SelfAttention {
    let (dim, heads, kv_heads) = (c.hidden_size, c.num_attention_heads, c.num_key_value_heads);
    let head_dim = dim / heads;
    let norm = |name| w.rms_norm(name, head_dim, c.rms_norm_eps);
    SelfAttention::new(w, Heads { dim, heads, kv_heads, head_dim }, c.attention_bias, c.attention_bias)
        .head_norms(norm("q_norm"), norm("k_norm"))
        .rope(w.rope(head_dim, c.rope_theta, &None))
}

fn block(c: &Config, w: &Weights, layer: usize) -> Block<SelfAttention, Mlp> {
    let norm = |name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps);
    let norms = [norm("input_layernorm"), norm("post_attention_layernorm")];
    Block::pre_norm(norms, attention(c, &w.at("self_attn")), Mlp::new(c, &w.at("mlp"), layer))
}

struct Klear;

impl Architecture for Klear {
    const MODEL_TYPES: &'static [&'static str] = &["Klear"];
    type Config = Config;
    type Model = Decoder<Block<SelfAttention, Mlp>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        Decoder::new(w, decoder_shape!(c), |w, layer| Ok(block(&c, w, layer)))
    }
}

export_plugin!(Klear, examples = ["../../tests/fixtures/tiny/Klear/config.json"]);
