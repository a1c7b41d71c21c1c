//! ERNIE 4.5 with routed experts beside shared ones. <https://ernie.baidu.com/blog/publication/ERNIE_Technical_Report.pdf>
//!
//! ```text
//! h = x + Attention(RMSNorm(x))            per layer
//! y = h + MoE(RMSNorm(h))
//! logits = RMSNorm(y) · Wᵀ
//!
//! Attention(x) = softmax(q · kᵀ / √d) · (x Wv) · Wo      q = rope(x Wq), k = rope(x Wk), neighbouring lanes turn
//!
//! MoE(x) = Σ pᵢ SwiGLUᵢ(x) + SwiGLUₛ(x)      the k largest softmax(x Wgate) + b; p their probabilities, scaled to a sum of 1
//!          in dense layers: SwiGLU(x)
//! ```

use plugin_api::{
    config::{Json, Read},
    prelude::*,
};

/// A layer's index, or a list of them with one for each modality.
struct Indices(Vec<i64>);

impl Read for Indices {
    const WHAT: &'static str = "a whole number or a list of such";
    fn read(json: &Json) -> Option<Self> {
        match json.as_array() {
            Some(list) => list.iter().map(Json::as_i64).collect::<Option<_>>().map(Self),
            None => json.as_i64().map(|index| Self(vec![index])),
        }
    }
}

config! {
    struct Config {
        vocab_size: usize = 103_424,
        hidden_size: usize = 2560,
        intermediate_size: usize = 12_288,
        num_hidden_layers: usize = 28,
        num_attention_heads: usize where >= 1 = 20,
        num_key_value_heads: usize = 4,
        head_dim: usize = hidden_size / num_attention_heads,
        hidden_act: SiluOnly = SiluOnly,
        rms_norm_eps: f32 = 1e-5,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        use_bias: bool = false,
        moe_intermediate_size: usize = 1536,
        moe_num_experts: usize = 64,
        moe_num_shared_experts: usize = 2,
        moe_k: usize where >= 1 = 6,
        moe_gate_act: String = "softmax".into(),
        moe_layer_start_index: Indices = Indices(vec![1]),
        moe_layer_end_index: Indices = Indices(vec![-1]),
        moe_layer_interval: usize where >= 1 = 1,
        tie_word_embeddings: Option<bool> = None,
    }
}

impl Config {
    fn is_sparse(&self, layer: usize) -> bool {
        let first = self.moe_layer_start_index.0.iter().min().copied().unwrap_or(0);
        let last = self.moe_layer_end_index.0.iter().max().copied().filter(|&last| last >= 0).unwrap_or(i64::MAX);
        (layer + 1).is_multiple_of(self.moe_layer_interval) && (first..=last).contains(&(layer as i64))
    }
}

fn attention(c: &Config, w: &Weights) -> SelfAttention {
    let (dim, heads, kv_heads) = (c.hidden_size, c.num_attention_heads, c.num_key_value_heads);
    SelfAttention::new(w, Heads { dim, heads, kv_heads, head_dim: c.head_dim }, c.use_bias, c.use_bias)
        .rope(w.rope(c.head_dim, c.rope_theta, &c.rope_scaling).interleaved())
}

fn mlp(c: &Config, w: &Weights, layer: usize) -> Ffn {
    let (dim, experts, hidden) = (c.hidden_size, c.moe_num_experts, c.moe_intermediate_size);
    let dense = |w: &Weights, hidden| GatedMlp::new(w, dim, hidden, c.use_bias, Activation::Silu);
    if !c.is_sparse(layer) {
        return Ffn::Dense(dense(w, c.intermediate_size));
    }
    let gate = w.linear("gate", dim, experts, false);
    let is_sigmoid = c.moe_gate_act == "sigmoid";
    let router = if is_sigmoid { Router::sigmoid(gate, c.moe_k) } else { Router::softmax(gate, c.moe_k) };
    // [1, experts]; mlx-lm's conversions leave it out.
    let bias = "moe_statics.e_score_correction_bias";
    let bias = w.has(bias).then(|| Parameter::of(w.source(bias).reshape(&[experts]), &[experts]));
    let shape = ExpertsShape { bias: c.use_bias, ..ExpertsShape::new(experts, dim, hidden) };
    let shared = c.moe_num_shared_experts;
    let shared = (shared > 0).then(|| dense(&w.at("shared_experts"), hidden * shared));
    Ffn::Sparse(Moe::new(router.correction(bias).normalized(true, 0.0), w.experts(shape)).shared(shared))
}

fn block(c: &Config, w: &Weights, layer: usize) -> Block<SelfAttention, Ffn> {
    let norm = |name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps);
    let norms = [norm("input_layernorm"), norm("post_attention_layernorm")];
    Block::pre_norm(norms, attention(c, &w.at("self_attn")), mlp(c, &w.at("mlp"), layer))
}

struct Ernie45Moe;

impl Architecture for Ernie45Moe {
    const MODEL_TYPES: &'static [&'static str] = &["ernie4_5_moe"];
    type Config = Config;
    type Model = Decoder<Block<SelfAttention, Ffn>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        // Layers that predict further tokens.
        w.ignore("model.mtp_");
        Decoder::new(w, decoder_shape!(c), |w, layer| Ok(block(&c, w, layer)))
    }
}

export_plugin!(Ernie45Moe, examples = ["../../tests/fixtures/tiny/ernie4_5_moe/config.json"]);
