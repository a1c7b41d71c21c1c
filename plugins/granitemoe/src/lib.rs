//! Granite's mixtures of experts, and its models with windows and sinks. <https://huggingface.co/ibm-granite/granite-3.1-3b-a800m-base>
//!
//! ```text
//! x₀ = mₑ embed(ids)                       four multipliers from the config
//! h = x + mᵣ Attention(RMSNorm(x))         per layer
//! y = h + mᵣ FFN(RMSNorm(h))
//! logits = RMSNorm(y) · Eᵀ / mₗ
//!
//! Attention(x) = softmax(mₐ q · kᵀ) · (x Wv) · Wo      q = rope(x Wq), k = rope(x Wk)
//! FFN(x) = Σ pᵢ SwiGLUᵢ(x)     over the k largest logits of x Wr, p their softmax
//!
//! granitemoeshared   + SwiGLUₛ(x), where shared_intermediate_size is not 0
//! granitemoe_swa     the same; three of four layers see a window, each head has a sink, each layer its theta (0: no rope)
//! granite_swa        with one SwiGLU(x) for FFN
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        model_type: String = "granitemoe".into(),
        vocab_size: usize = 32_000,
        hidden_size: usize = 4096,
        intermediate_size: usize = 11_008,
        num_hidden_layers: usize = 32,
        num_attention_heads: usize where >= 1 = 32,
        num_key_value_heads: usize = num_attention_heads,
        hidden_act: SiluOnly = SiluOnly,
        head_dim: usize = hidden_size / num_attention_heads,
        rms_norm_eps: f32 = 1e-6,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        attention_bias: bool = false,
        embedding_multiplier: f32 = 1.0,
        logits_scaling: f32 = 1.0,
        residual_multiplier: f32 = 1.0,
        attention_multiplier: f32 = 1.0,
        sliding_window: usize = 128,
        layer_types: Option<LayerTypes> = None,
        layer_rope_theta: Option<Vec<f32>> = None,
        mlp_bias: bool = false,
        shared_intermediate_size: usize = 0,
        num_local_experts: usize = 8,
        num_experts_per_tok: usize where >= 1 = 2,
        tie_word_embeddings: Option<bool> = None,
    }
}

impl Config {
    fn has_windows(&self) -> bool {
        self.model_type.ends_with("_swa")
    }

    fn slides(&self, layer: usize) -> Result<bool> {
        match &self.layer_types {
            _ if !self.has_windows() => Ok(false),
            Some(types) => types.slides(layer),
            None => Ok(!layer.is_multiple_of(4)),
        }
    }

    /// 0 where a layer knows no positions.
    fn theta(&self, layer: usize) -> f32 {
        self.layer_rope_theta.as_ref().and_then(|list| list.get(layer)).copied().unwrap_or(self.rope_theta)
    }
}

fn attention(c: &Config, w: &Weights, layer: usize) -> Result<SelfAttention> {
    let (dim, heads, kv_heads, theta) = (c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.theta(layer));
    let shape = Heads { dim, heads, kv_heads, head_dim: c.head_dim };
    Ok(SelfAttention::new(w, shape, c.attention_bias, c.attention_bias)
        .rope((theta != 0.0).then(|| w.rope(c.head_dim, theta, &c.rope_scaling)))
        .window(c.slides(layer)?.then_some(c.sliding_window))
        .sinks(c.has_windows().then(|| w.tensor("sinks", &[heads])))
        .scale(c.attention_multiplier))
}

fn ffn(c: &Config, w: &Weights) -> Ffn {
    let (dim, experts, hidden) = (c.hidden_size, c.num_local_experts, c.shared_intermediate_size);
    if c.model_type == "granite_swa" {
        return Ffn::Dense(GatedMlp::new(&w.at("mlp"), dim, c.intermediate_size, c.mlp_bias, Activation::Silu));
    }
    let shared = (c.model_type != "granitemoe" && hidden > 0).then(|| {
        let both = w.source("shared_mlp.input_linear.weight");
        let [gate, up] = [0..hidden, hidden..2 * hidden].map(|rows| Linear::of(both.rows(rows), None, dim, hidden));
        GatedMlp::of(gate, up, w.linear("shared_mlp.output_linear", hidden, dim, false), Activation::Silu)
    });
    let moe = w.at("block_sparse_moe");
    // granitemoe_swa has it plain.
    let name = if moe.has("router.weight") { "router" } else { "router.layer" };
    let router = Router::chosen_softmax(moe.linear(name, dim, experts, false), c.num_experts_per_tok);
    Ffn::Sparse(Moe::new(router, moe.experts(ExpertsShape::new(experts, dim, c.intermediate_size))).shared(shared))
}

fn block(c: &Config, w: &Weights, layer: usize) -> Result<Block<SelfAttention, Ffn>> {
    let norms = ["input_layernorm", "post_attention_layernorm"];
    let norms = norms.map(|name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps));
    let block = Block::pre_norm(norms, attention(c, &w.at("self_attn"), layer)?, ffn(c, w));
    Ok(block.branch_scale(c.residual_multiplier))
}

struct GraniteMoe;

impl Architecture for GraniteMoe {
    const MODEL_TYPES: &'static [&'static str] = &["granitemoe", "granitemoeshared", "granitemoe_swa", "granite_swa"];
    type Config = Config;
    type Model = Decoder<Block<SelfAttention, Ffn>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        Ok(Decoder::new(w, decoder_shape!(c), |w, layer| block(&c, w, layer))?
            .embed_scale(c.embedding_multiplier)
            .logit_scale(1.0 / c.logits_scaling))
    }
}

export_plugin!(GraniteMoe, examples = ["../../tests/fixtures/tiny/granitemoe/config.json"]);
