//! Ling and Ring: routed experts beside shared ones, in the flavours of their versions. <https://arxiv.org/abs/2503.05139>
//!
//! ```text
//! h = x + Attention(RMSNorm(x))            per layer
//! y = h + MoE(RMSNorm(h))
//! logits = RMSNorm(y) · Wᵀ                 the columns of W perhaps scaled to length 1
//!
//! Attention(x) = softmax(q · kᵀ / √d) · v · Wo      q, k, v = x Wqkv; q and k perhaps normalized by head, then turned
//!
//! MoE(x) = s Σ pᵢ SwiGLUᵢ(x) + SwiGLUₛ(x)      dense in the first layers: SwiGLU(x)
//!   the k largest of softmax(x Wgate), or of sigmoid(x Wgate) + b within the best groups; p may be scaled to a sum of 1
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
        hidden_act: SiluOnly = SiluOnly,
        rms_norm_eps: f32 = 1e-6,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        partial_rotary_factor: f32 = 1.0,
        rotary_dim: usize = (head_dim as f32 * partial_rotary_factor) as usize,
        use_bias: bool = false,
        use_qkv_bias: bool = false,
        use_qk_norm: bool = false,
        norm_head: bool = false,
        moe_intermediate_size: usize,
        num_experts: usize,
        num_shared_experts: usize = 0,
        moe_shared_expert_intermediate_size: usize = moe_intermediate_size,
        moe_router_enable_shared_expert: bool = true,
        num_experts_per_tok: usize where >= 1,
        norm_topk_prob: bool = true,
        score_function: String = "softmax".into(),
        moe_router_enable_expert_bias: bool = false,
        routed_scaling_factor: f32 = 1.0,
        n_group: usize = 1,
        topk_group: usize = 4,
        first_k_dense_replace: usize = 0,
        num_nextn_predict_layers: usize = 0,
        tie_word_embeddings: Option<bool> = None,
    }
}

fn attention(c: &Config, w: &Weights) -> SelfAttention {
    let (dim, heads, kv_heads, head_dim) = (c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim);
    let dense = w.linear("dense", heads * head_dim, dim, c.use_bias);
    let attention =
        SelfAttention::fused(w, "query_key_value", Heads { dim, heads, kv_heads, head_dim }, c.use_qkv_bias, dense)
            .rope(w.rope(c.rotary_dim, c.rope_theta, &c.rope_scaling));
    let norm = |name| w.rms_norm(name, head_dim, c.rms_norm_eps);
    match c.use_qk_norm {
        true => attention.head_norms(norm("query_layernorm"), norm("key_layernorm")),
        false => attention,
    }
}

fn router(c: &Config, w: &Weights) -> Router {
    // mlx-lm calls the matrix `gate.gate_proj`.
    let gate = if w.has("gate.gate_proj.weight") { "gate.gate_proj" } else { "gate" };
    let gate = w.linear(gate, c.hidden_size, c.num_experts, false);
    let k = c.num_experts_per_tok;
    let router = if c.score_function == "sigmoid" { Router::sigmoid(gate, k) } else { Router::softmax(gate, k) };
    router
        .correction(c.moe_router_enable_expert_bias.then(|| w.tensor("gate.expert_bias", &[c.num_experts])))
        .groups(c.n_group, c.topk_group, GroupScore::BestTwo)
        .normalized(c.norm_topk_prob && k > 1, 1e-20)
        .scale(c.routed_scaling_factor)
}

fn mlp(c: &Config, w: &Weights, layer: usize) -> Ffn {
    let (dim, hidden) = (c.hidden_size, c.moe_intermediate_size);
    let dense = |w: &Weights, hidden| GatedMlp::new(w, dim, hidden, c.use_bias, Activation::Silu);
    if layer < c.first_k_dense_replace {
        return Ffn::Dense(dense(w, c.intermediate_size));
    }
    let shape = ExpertsShape { bias: c.use_bias, ..ExpertsShape::new(c.num_experts, dim, hidden) };
    let shared = (c.num_shared_experts > 0 && c.moe_router_enable_shared_expert)
        .then(|| dense(&w.at("shared_experts"), c.moe_shared_expert_intermediate_size * c.num_shared_experts));
    Ffn::Sparse(Moe::new(router(c, w), w.experts(shape)).shared(shared))
}

fn block(c: &Config, w: &Weights, layer: usize) -> Block<SelfAttention, Ffn> {
    let norm = |name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps);
    let norms = [norm("input_layernorm"), norm("post_attention_layernorm")];
    Block::pre_norm(norms, attention(c, &w.at("attention")), mlp(c, &w.at("mlp"), layer))
}

struct BailingMoe;

impl Architecture for BailingMoe {
    const MODEL_TYPES: &'static [&'static str] = &["bailing_moe"];
    type Config = Config;
    type Model = Decoder<Block<SelfAttention, Ffn>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        let (model, dim) = (w.at("model"), c.hidden_size);
        let word_embeddings = model.embedding("word_embeddings", c.vocab_size, dim);
        let layers = model.at("layers").each(c.num_hidden_layers, |w, layer| Ok(block(&c, w, layer)))?;
        let norm = model.rms_norm("norm", dim, c.rms_norm_eps);
        // Once more where a conversion has done so: that changes nothing.
        let lm_head = match c.norm_head {
            true => {
                let weight = w.source("lm_head.weight").transpose().unit_rows(1e-7).transpose();
                LmHead::Own(Linear::of(weight, None, dim, c.vocab_size))
            }
            false => LmHead::new(w, &word_embeddings, c.vocab_size, dim, c.tie_word_embeddings),
        };
        for layer in 0..c.num_nextn_predict_layers {
            w.ignore(&format!("model.layers.{}.", c.num_hidden_layers + layer));
        }
        Ok(Decoder::of(word_embeddings, layers, norm, lm_head))
    }
}

export_plugin!(BailingMoe, examples = ["../../tests/fixtures/tiny/bailing_moe/config.json"]);
