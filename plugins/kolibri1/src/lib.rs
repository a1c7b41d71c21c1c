//! Kolibri 1: four layers with a window and rope to one that sees all keys and knows no positions, norms on both sides of each branch,
//! and a router that corrects logits. <https://huggingface.co/Aleph-Alpha/Kolibri-1>
//!
//! ```text
//! h = x + RMSNorm(Attention(RMSNorm(x)))   per layer
//! y = h + RMSNorm(MoE(RMSNorm(h)))
//! logits = RMSNorm(y) · Wᵀ
//!
//! Attention(x) = softmax(q · kᵀ / √d) · (x Wv) · Wo
//!   q = RMSNorm(x Wq), k = RMSNorm(x Wk), by head, and turned in layers with a window
//! MoE(x) = Σ pᵢ SwiGLUᵢ(x) + SwiGLUₛ(x)     over the k largest of x Wgate + b, p = sigmoid(x Wgate), perhaps scaled to a sum of 1
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize = 128_000,
        hidden_size: usize = 2560,
        num_hidden_layers: usize = 50,
        num_attention_heads: usize where >= 1 = 48,
        num_key_value_heads: usize where >= 1 = 4,
        head_dim: usize = 128,
        rms_norm_eps: f32 = 1e-6,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        sliding_window: usize = 513,
        layer_types: LayerTypes = LayerTypes::every(5, num_hidden_layers),
        moe_intermediate_size: usize = 512,
        shared_expert_intermediate_size: usize = 512,
        num_experts: usize = 384,
        num_experts_per_tok: usize where >= 1 = 6,
        norm_topk_prob: bool = false,
        tie_word_embeddings: Option<bool> = None,
    }
}

fn attention(c: &Config, w: &Weights, slides: bool) -> SelfAttention {
    let (dim, heads, kv_heads, head_dim) = (c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim);
    let norm = |name| w.rms_norm(name, head_dim, c.rms_norm_eps);
    SelfAttention::new(w, Heads { dim, heads, kv_heads, head_dim }, false, false)
        .head_norms(norm("q_norm"), norm("k_norm"))
        .rope(slides.then(|| w.rope(head_dim, c.rope_theta, &c.rope_scaling)))
        .window(slides.then_some(c.sliding_window))
}

/// Experts chosen by corrected logits, where other routers correct the sigmoids.
struct Mixture {
    gate: Linear,
    correction: Parameter,
    experts: Experts,
    shared: GatedMlp,
    top_k: usize,
    norm_topk_prob: bool,
}

impl Mixture {
    fn new(c: &Config, w: &Weights) -> Self {
        let (mlp, dim, experts, hidden) =
            (w.at("mlp"), c.hidden_size, c.num_experts, c.shared_expert_intermediate_size);
        let correction = either(w, "moe.router.expert_bias", "mlp.gate.e_score_correction_bias");
        Self {
            gate: mlp.linear("gate", dim, experts, false),
            correction: w.tensor(correction, &[experts]),
            experts: mlp.experts(ExpertsShape::new(experts, dim, c.moe_intermediate_size)),
            shared: GatedMlp::new(&mlp.at("shared_experts"), dim, hidden, false, Activation::Silu),
            top_k: c.num_experts_per_tok,
            norm_topk_prob: c.norm_topk_prob,
        }
    }
}

/// The released files have the first name, transformers' model the second.
fn either<'a>(w: &Weights, released: &'a str, name: &'a str) -> &'a str {
    if w.has(released) { released } else { name }
}

impl FeedForward for Mixture {
    fn forward(&self, x: &Tensor) -> Tensor {
        let logits = self.gate.forward(x);
        let (_, chosen) = (&logits + self.correction.tensor()).topk(self.top_k);
        let weights = logits.gather(&chosen).sigmoid();
        let weights = if self.norm_topk_prob { &weights / weights.sum() } else { weights };
        self.experts.forward(x, &chosen, &weights) + self.shared.forward(x)
    }
}

fn block(c: &Config, w: &Weights, layer: usize) -> Result<Block<SelfAttention, Mixture>> {
    let norm = |name: &str| RmsNorm::of(w.source(name), c.hidden_size, c.rms_norm_eps);
    let norms = [
        norm("input_layernorm.weight"),
        norm(either(w, "post_attn_norm.weight", "post_self_attn_layernorm.weight")),
        norm("post_attention_layernorm.weight"),
        norm(either(w, "post_ffn_norm.weight", "post_mlp_layernorm.weight")),
    ];
    let attention = attention(c, &w.at("self_attn"), c.layer_types.slides(layer)?);
    Ok(Block::both_norms(norms, attention, Mixture::new(c, w)))
}

struct Kolibri;

impl Architecture for Kolibri {
    const MODEL_TYPES: &'static [&'static str] = &["kolibri1"];
    type Config = Config;
    type Model = Decoder<Block<SelfAttention, Mixture>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        Decoder::new(w, decoder_shape!(c), |w, layer| block(&c, w, layer))
    }
}

export_plugin!(Kolibri, examples = ["../../tests/fixtures/tiny/kolibri1/config.json"]);
