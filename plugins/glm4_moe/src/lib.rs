//! GLM 4.5 and other decoders with grouped heads and DeepSeek's routing: Solar Open, dots.llm1, K-EXAONE, Hunyuan 3. <https://arxiv.org/abs/2508.06471>
//!
//! ```text
//! h = x + Attention(RMSNorm(x))            per layer
//! y = h + MoE(RMSNorm(h))
//! logits = RMSNorm(y) · Wᵀ
//!
//! Attention(x) = softmax(q · kᵀ / √d) · (x Wv) · Wo
//!   q = rope(RMSNorm(x Wq)), k = rope(RMSNorm(x Wk))      heads normalized alone or not at all; GLM turns half of their lanes
//!   K-EXAONE: every fourth layer sees all keys and has no rope, the others a window
//!
//! MoE(x) = s Σ pᵢ SwiGLUᵢ(x) + SwiGLUₛ(x)      dense in the first layers: SwiGLU(x)
//!   the k largest sigmoid(x Wgate) + b within the best groups of experts; p their sigmoids, which may be scaled to a sum of 1
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        model_type: String,
        vocab_size: usize,
        hidden_size: usize,
        intermediate_size: usize = 10_944,
        num_hidden_layers: usize,
        num_attention_heads: usize where >= 1,
        num_key_value_heads: usize = num_attention_heads,
        head_dim: usize = hidden_size / num_attention_heads,
        hidden_act: SiluOnly = SiluOnly,
        rms_norm_eps: f32 = if model_type == "dots1" { 1e-6 } else { 1e-5 },
        rope_theta: f32 = match &*model_type {
            "solar_open" => 1e6,
            "hy_v3" => 11_158_840.0,
            _ => 10_000.0,
        },
        rope_scaling: Option<RopeScaling> = None,
        partial_rotary_factor: f32 = if model_type == "glm4_moe" { 0.5 } else { 1.0 },
        attention_bias: bool = false,
        use_qk_norm: bool = matches!(model_type.as_str(), "dots1" | "exaone_moe" | "hy_v3"),
        sliding_window: Option<usize> = None,
        layer_types: Option<LayerTypes> = None,
        moe_intermediate_size: usize,
        num_experts: Option<usize> = None,
        n_routed_experts: usize = num_experts.unwrap_or(128),
        num_shared_experts: Option<usize> = None,
        n_shared_experts: usize = num_shared_experts.unwrap_or(if model_type == "dots1" { 0 } else { 1 }),
        num_experts_per_tok: usize where >= 1 = 8,
        n_group: usize = 1,
        topk_group: usize = 1,
        norm_topk_prob: bool = model_type != "dots1",
        router_scaling_factor: Option<f32> = None,
        routed_scaling_factor: f32 = router_scaling_factor.unwrap_or(match &*model_type {
            "exaone_moe" => 2.5,
            "hy_v3" => 2.826,
            _ => 1.0,
        }),
        first_k_dense_replace: usize = matches!(model_type.as_str(), "glm4_moe" | "exaone_moe" | "hy_v3").into(),
        mlp_layer_types: Option<Vec<String>> = None,
        num_nextn_predict_layers: usize = 1,
        tie_word_embeddings: Option<bool> = None,
    }
}

impl Config {
    fn is_sparse(&self, layer: usize) -> bool {
        match &self.mlp_layer_types {
            Some(types) => types.get(layer).is_some_and(|kind| kind == "sparse"),
            None => layer >= self.first_k_dense_replace,
        }
    }

    /// Whether a layer sees a window only, and whether it turns queries and keys.
    fn sight(&self, layer: usize) -> Result<(Option<usize>, bool)> {
        let is_exaone = self.model_type == "exaone_moe";
        let slides = match &self.layer_types {
            Some(types) => types.slides(layer)?,
            None => is_exaone && !(layer + 1).is_multiple_of(4),
        };
        let window = self.sliding_window.filter(|_| slides);
        Ok((window, !is_exaone || window.is_some() || self.sliding_window.is_none()))
    }
}

fn attention(c: &Config, w: &Weights, layer: usize) -> Result<SelfAttention> {
    let (dim, heads, kv_heads, head_dim) = (c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim);
    let (window, turns) = c.sight(layer)?;
    let turned = (head_dim as f32 * c.partial_rotary_factor) as usize;
    let o_bias = c.attention_bias && matches!(&*c.model_type, "dots1" | "hy_v3");
    let attention = SelfAttention::new(w, Heads { dim, heads, kv_heads, head_dim }, c.attention_bias, o_bias)
        .rope(turns.then(|| w.rope(turned, c.rope_theta, &c.rope_scaling)))
        .window(window);
    let norm = |name| w.rms_norm(name, head_dim, c.rms_norm_eps);
    Ok(if c.use_qk_norm { attention.head_norms(norm("q_norm"), norm("k_norm")) } else { attention })
}

fn mlp(c: &Config, w: &Weights, layer: usize) -> Ffn {
    let (dim, experts) = (c.hidden_size, c.n_routed_experts);
    let dense = |w: &Weights, hidden| GatedMlp::new(w, dim, hidden, false, Activation::Silu);
    if !c.is_sparse(layer) {
        return Ffn::Dense(dense(w, c.intermediate_size));
    }
    // K-EXAONE's first files have the correction one level higher; Hunyuan has names of its own.
    let bias = ["expert_bias", "e_score_correction_bias"].into_iter().find(|name| w.has(name));
    let bias = bias.unwrap_or("gate.e_score_correction_bias");
    let gate = if w.has("router.gate.weight") { "router.gate" } else { "gate" };
    let router = Router::sigmoid(w.linear(gate, dim, experts, false), c.num_experts_per_tok)
        .correction(w.tensor(bias, &[experts]))
        .groups(c.n_group, c.topk_group, GroupScore::BestTwo)
        .normalized(c.norm_topk_prob, 1e-20)
        .scale(c.routed_scaling_factor);
    let hidden = c.moe_intermediate_size;
    let shared = if w.has("shared_mlp.up_proj.weight") { "shared_mlp" } else { "shared_experts" };
    let shared = (c.n_shared_experts > 0).then(|| dense(&w.at(shared), hidden * c.n_shared_experts));
    Ffn::Sparse(Moe::new(router, w.experts(ExpertsShape::new(experts, dim, hidden))).shared(shared))
}

fn block(c: &Config, w: &Weights, layer: usize) -> Result<Block<SelfAttention, Ffn>> {
    let norm = |name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps);
    let norms = [norm("input_layernorm"), norm("post_attention_layernorm")];
    Ok(Block::pre_norm(norms, attention(c, &w.at("self_attn"), layer)?, mlp(c, &w.at("mlp"), layer)))
}

/// Layers that predict further tokens, for training and speculation.
fn ignore_further_layers(c: &Config, w: &Weights) {
    w.ignore("mtp.");
    (0..c.num_nextn_predict_layers).for_each(|i| w.ignore(&format!("model.layers.{}.", c.num_hidden_layers + i)));
}

struct Glm4Moe;

impl Architecture for Glm4Moe {
    const MODEL_TYPES: &'static [&'static str] = &["glm4_moe", "solar_open", "dots1", "exaone_moe", "hy_v3"];
    type Config = Config;
    type Model = Decoder<Block<SelfAttention, Ffn>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        ignore_further_layers(&c, w);
        Decoder::new(w, decoder_shape!(c), |w, layer| block(&c, w, layer))
    }
}

export_plugin!(Glm4Moe, examples = ["../../tests/fixtures/tiny/glm4_moe/config.json"]);
