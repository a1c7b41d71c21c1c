//! gpt-oss: routed experts in every layer, every second layer with a window, attention that may look at nothing.
//! <https://arxiv.org/abs/2508.10925>
//!
//! ```text
//! h = x + Attention(RMSNorm(x))            per layer
//! y = h + MoE(RMSNorm(h))
//! logits = RMSNorm(y) · Wᵀ
//!
//! Attention(x) = softmax(q · kᵀ / √d, sinks) · (x Wv) · Wo      q = rope(x Wq), k = rope(x Wk), all with biases
//!   one logit a head joins the softmax and is dropped; layers take turns with a window and without
//!
//! MoE(x) = Σ pᵢ Expertᵢ(x)     over the k largest logits of x Wr + br, p their softmax
//! Expert(x) = down((u + 1) · g sigmoid(α g))     g = gate x up to a limit, u = up x within ± the limit, all with biases
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize = 201_088,
        hidden_size: usize = 2880,
        intermediate_size: usize = 2880,
        num_hidden_layers: usize = 36,
        num_attention_heads: usize where >= 1 = 64,
        num_key_value_heads: usize = 8,
        head_dim: usize = 64,
        hidden_act: SiluOnly = SiluOnly,
        rms_norm_eps: f32 = 1e-5,
        rope_theta: f32 = 150_000.0,
        rope_scaling: Option<RopeScaling> = None,
        sliding_window: usize = 128,
        layer_types: Option<LayerTypes> = None,
        attention_bias: bool = true,
        num_local_experts: usize = 128,
        num_experts_per_tok: usize where >= 1 = 4,
        swiglu_alpha: f32 = 1.702,
        swiglu_limit: f32 = 7.0,
        tie_word_embeddings: Option<bool> = None,
    }
}

impl Config {
    fn window(&self, layer: usize) -> Result<Option<usize>> {
        let slides = match &self.layer_types {
            Some(types) => types.slides(layer)?,
            None => layer.is_multiple_of(2),
        };
        Ok(slides.then_some(self.sliding_window))
    }

    fn experts(&self) -> ExpertsShape {
        let kind = ExpertKind::ClampedSwiglu { alpha: self.swiglu_alpha, limit: self.swiglu_limit };
        let shape = ExpertsShape::new(self.num_local_experts, self.hidden_size, self.intermediate_size);
        ExpertsShape { kind, bias: true, in_turns: true, ..shape }
    }
}

fn attention(c: &Config, w: &Weights, window: Option<usize>) -> SelfAttention {
    let (dim, heads, kv_heads) = (c.hidden_size, c.num_attention_heads, c.num_key_value_heads);
    SelfAttention::new(w, Heads { dim, heads, kv_heads, head_dim: c.head_dim }, c.attention_bias, c.attention_bias)
        .rope(w.rope(c.head_dim, c.rope_theta, &c.rope_scaling))
        .sinks(w.tensor("sinks", &[heads]))
        .window(window)
}

fn block(c: &Config, w: &Weights, layer: usize) -> Result<Block<SelfAttention, Moe>> {
    let norm = |name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps);
    let norms = [norm("input_layernorm"), norm("post_attention_layernorm")];
    let mlp = w.at("mlp");
    let router = mlp.linear("router", c.hidden_size, c.num_local_experts, true);
    let moe = Moe::new(Router::chosen_softmax(router, c.num_experts_per_tok), mlp.experts(c.experts()));
    Ok(Block::pre_norm(norms, attention(c, &w.at("self_attn"), c.window(layer)?), moe))
}

struct GptOss;

impl Architecture for GptOss {
    const MODEL_TYPES: &'static [&'static str] = &["gpt_oss"];
    type Config = Config;
    type Model = Decoder<Block<SelfAttention, Moe>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        Decoder::new(w, decoder_shape!(c), |w, layer| block(&c, w, layer))
    }
}

export_plugin!(GptOss, examples = ["../../tests/fixtures/tiny/gpt_oss/config.json"]);
