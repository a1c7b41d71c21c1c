//! Laguna: gated attention with as many heads as each layer wants, a rope for each kind of layer. <https://huggingface.co/poolside>
//!
//! ```text
//! h = x + Attention(RMSNorm(x))            per layer
//! y = h + MoE(RMSNorm(h))
//! logits = RMSNorm(y) · Wᵀ
//!
//! Attention(x) = (softmax(q · kᵀ / √d) · (x Wv) * softplus(x Wg)) · Wo      a gate for each head, or for each lane
//!   q = rope(RMSNorm(x Wq)), k = rope(RMSNorm(x Wk))      each head normalized alone
//!
//! MoE(x) = s Σ pᵢ SwiGLUᵢ(x) + SwiGLUₛ(x)     dense in the first layer: SwiGLU(x)
//!   the k largest sigmoid(x Wr) + b, logits perhaps capped; p their sigmoids, scaled to a sum of 1
//! ```

use plugin_api::{
    config::{Json, Read},
    prelude::*,
};

/// config.json's `gating`: true or "per-head", or the name of gates for single lanes.
struct Gating {
    per_head: bool,
}

impl Read for Gating {
    const WHAT: &'static str = "true, false or a text";
    fn read(json: &Json) -> Option<Self> {
        let per_head = json.as_bool().or(json.as_str().map(|kind| kind == "per-head"))?;
        Some(Self { per_head })
    }
}

config! {
    struct Config {
        vocab_size: usize = 100_352,
        hidden_size: usize = 2048,
        intermediate_size: usize = 8192,
        num_hidden_layers: usize = 40,
        num_attention_heads: usize where >= 1 = 48,
        num_attention_heads_per_layer: Option<Vec<usize>> = None,
        num_key_value_heads: usize = 8,
        head_dim: usize = 128,
        hidden_act: SiluOnly = SiluOnly,
        rms_norm_eps: f32 = 1e-6,
        rope_parameters: Option<LayerRopes> = None,
        attention_bias: bool = false,
        qkv_bias: bool = attention_bias,
        gating: Gating = Gating { per_head: true },
        sliding_window: Option<usize> = Some(512),
        layer_types: Option<LayerTypes> = None,
        mlp_layer_types: Option<Vec<String>> = None,
        moe_intermediate_size: usize = 512,
        shared_expert_intermediate_size: usize = 512,
        num_experts: usize = 256,
        num_experts_per_tok: usize where >= 1 = 8,
        moe_routed_scaling_factor: f32 = 1.0,
        moe_router_logit_softcapping: f32 = 0.0,
        moe_router_score_func: String = "sigmoid".into(),
        tie_word_embeddings: Option<bool> = None,
    }
}

struct Attention {
    inner: SelfAttention,
    /// Some lanes a gate.
    g_proj: Option<(Linear, usize)>,
}

impl Attention {
    fn new(c: &Config, w: &Weights, layer: usize) -> Result<Self> {
        let (dim, kv_heads, head_dim) = (c.hidden_size, c.num_key_value_heads, c.head_dim);
        let heads = c.num_attention_heads_per_layer.as_ref().and_then(|heads| heads.get(layer));
        let heads = heads.copied().unwrap_or(c.num_attention_heads);
        let slides = c.layer_types.as_ref().map_or(Ok(false), |types| types.slides(layer))?;
        let rope = match &c.rope_parameters {
            Some(ropes) => ropes.rope(w, head_dim, slides),
            None if slides => w.rope(head_dim, 10_000.0, &None),
            None => w.rope(head_dim / 2, 500_000.0, &None),
        };
        let norm = |name| w.rms_norm(name, head_dim, c.rms_norm_eps);
        let inner = SelfAttention::new(w, Heads { dim, heads, kv_heads, head_dim }, c.qkv_bias, c.attention_bias)
            .head_norms(norm("q_norm"), norm("k_norm"))
            .rope(rope)
            .window(c.sliding_window.filter(|_| slides));
        let (gates, lanes) = if c.gating.per_head { (heads, head_dim) } else { (heads * head_dim, 1) };
        let g_proj = w.has("g_proj.weight").then(|| (w.linear("g_proj", dim, gates, false), lanes));
        Ok(Self { inner, g_proj })
    }
}

impl Mixer for Attention {
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let attended = self.inner.attend(self.inner.project(x, layer), layer);
        let Some((g_proj, lanes)) = &self.g_proj else { return self.inner.output(&attended) };
        // [tokens, gates, 1], to meet [tokens, gates, lanes].
        let gate = g_proj.forward(x).softplus().split_heads(1);
        self.inner.output(&(attended.split_heads(*lanes) * gate).merge_heads())
    }

    fn cache(&self) -> Cache {
        self.inner.cache()
    }
}

fn router(c: &Config, w: &Weights) -> Router {
    let (dim, experts, k) = (c.hidden_size, c.num_experts, c.num_experts_per_tok);
    // The second names are those that mlx-lm gives.
    let [gate, bias] = match w.has("gate.proj.weight") {
        false => ["gate", "experts.e_score_correction_bias"],
        true => ["gate.proj", "gate.e_score_correction_bias"],
    };
    let bias = if w.has(bias) { bias } else { "gate.e_score_correction_bias" };
    let gate = w.linear(gate, dim, experts, false);
    let router = match c.moe_router_score_func.as_str() {
        "sqrtsoftplus" => Router::sqrt_softplus(gate, k),
        _ => Router::sigmoid(gate, k),
    };
    let cap = c.moe_router_logit_softcapping;
    router
        .softcap((cap > 0.0).then_some(cap))
        .correction(w.tensor(bias, &[experts]))
        .normalized(true, 0.0)
        .scale(c.moe_routed_scaling_factor)
}

fn mlp(c: &Config, w: &Weights, layer: usize) -> Ffn {
    let dense = |w: &Weights, hidden| GatedMlp::new(w, c.hidden_size, hidden, false, Activation::Silu);
    let is_sparse = match &c.mlp_layer_types {
        Some(types) => types.get(layer).is_some_and(|kind| kind == "sparse"),
        None => layer > 0,
    };
    if !is_sparse {
        return Ffn::Dense(dense(w, c.intermediate_size));
    }
    let experts = w.experts(ExpertsShape::new(c.num_experts, c.hidden_size, c.moe_intermediate_size));
    let shared = if w.has("shared_experts.up_proj.weight") { "shared_experts" } else { "shared_expert" };
    Ffn::Sparse(Moe::new(router(c, w), experts).shared(dense(&w.at(shared), c.shared_expert_intermediate_size)))
}

fn block(c: &Config, w: &Weights, layer: usize) -> Result<Block<Attention, Ffn>> {
    let norm = |name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps);
    let norms = [norm("input_layernorm"), norm("post_attention_layernorm")];
    Ok(Block::pre_norm(norms, Attention::new(c, &w.at("self_attn"), layer)?, mlp(c, &w.at("mlp"), layer)))
}

struct Laguna;

impl Architecture for Laguna {
    const MODEL_TYPES: &'static [&'static str] = &["laguna"];
    type Config = Config;
    type Model = Decoder<Block<Attention, Ffn>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        Decoder::new(w, decoder_shape!(c), |w, layer| block(&c, w, layer))
    }
}

export_plugin!(Laguna, examples = ["../../tests/fixtures/tiny/laguna/config.json"]);
