//! DiffLlama: LLaMA with differential attention, which takes one softmax from another. <https://arxiv.org/abs/2410.05258>
//!
//! ```text
//! h = x + Attention(RMSNorm(x))            per layer
//! y = h + SwiGLU(RMSNorm(h))
//! logits = RMSNorm(y) · Wᵀ
//!
//! Attention(x) = ((1 - λ₀) RMSNorm(A - λ B)) · Wo
//!   A and B: softmax(q · kᵀ / √d) · v of the first and of the second half of the heads, with rope
//!   v: a head of the first half of value heads beside the same one of the second half, 2 d lanes
//!   λ = exp(λq₁ · λk₁) - exp(λq₂ · λk₂) + λ₀,  λ₀ = 0.8 - 0.6 exp(-0.3 layer)
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize = 32_000,
        hidden_size: usize = 2048,
        intermediate_size: usize = 8192,
        num_hidden_layers: usize = 16,
        num_attention_heads: usize where >= 2 = 32,
        num_key_value_heads: usize where >= 2 = num_attention_heads,
        head_dim: usize = hidden_size / num_attention_heads,
        hidden_act: Activation = Activation::Silu,
        rms_norm_eps: f32 = 1e-5,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        attention_bias: bool = false,
        tie_word_embeddings: Option<bool> = None,
    }
}

struct Differential {
    attention: SelfAttention,
    lambdas: [Parameter; 4],
    groupnorm: RmsNorm,
    lambda_init: f32,
    heads: Heads,
}

impl Differential {
    fn new(c: &Config, w: &Weights, layer: usize) -> Self {
        let (dim, head_dim) = (c.hidden_size, c.head_dim);
        let heads = Heads { dim, heads: c.num_attention_heads, kv_heads: c.num_key_value_heads, head_dim };
        Self {
            attention: SelfAttention::new(w, heads, c.attention_bias, c.attention_bias).rope(w.rope(
                head_dim,
                c.rope_theta,
                &c.rope_scaling,
            )),
            lambdas: ["lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"].map(|name| w.tensor(name, &[head_dim])),
            groupnorm: RmsNorm::plain(2 * head_dim, c.rms_norm_eps),
            lambda_init: 0.8 - 0.6 * (-0.3 * layer as f32).exp(),
            heads,
        }
    }

    /// v `[tokens, kv_heads, d]` -> `[tokens, kv_heads, 2 d]`, each head of the second half beside its fellow of the first, twice.
    fn paired(&self, v: &Tensor) -> Tensor {
        let (v, d, half) = (v.merge_heads(), self.heads.head_dim, self.heads.kv_heads / 2 * self.heads.head_dim);
        let [first, second] = [0, half].map(|start| v.narrow(start, half).split_heads(d));
        let pairs = Tensor::concat(&[&first, &second]).merge_heads();
        Tensor::concat(&[&pairs, &pairs]).split_heads(2 * d)
    }
}

impl Mixer for Differential {
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let [q, k, v] = self.attention.project(x, layer);
        let attended = self.attention.attend([q, k, self.paired(&v)], layer);
        let width = self.heads.heads * self.heads.head_dim;
        let [a, b] = [0, width].map(|start| attended.narrow(start, width));
        let [q1, k1, q2, k2] = self.lambdas.each_ref().map(Parameter::tensor);
        let lambda = (q1 * k1).sum().exp() - (q2 * k2).sum().exp() + self.lambda_init;
        let difference = self.groupnorm.forward(&(a - b * lambda).split_heads(2 * self.heads.head_dim));
        self.attention.output(&(difference * (1.0 - self.lambda_init)).merge_heads())
    }

    fn cache(&self) -> Cache {
        self.attention.cache()
    }
}

fn block(c: &Config, w: &Weights, layer: usize) -> Block<Differential> {
    let norms = ["input_layernorm", "post_attention_layernorm"];
    let norms = norms.map(|name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps));
    let mlp = GatedMlp::new(&w.at("mlp"), c.hidden_size, c.intermediate_size, false, c.hidden_act);
    Block::pre_norm(norms, Differential::new(c, &w.at("self_attn"), layer), mlp)
}

struct DiffLlama;

impl Architecture for DiffLlama {
    const MODEL_TYPES: &'static [&'static str] = &["diffllama"];
    type Config = Config;
    type Model = Decoder<Block<Differential>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        if !c.num_key_value_heads.is_multiple_of(2) || !c.num_attention_heads.is_multiple_of(2) {
            return Err(
                "config.json: num_attention_heads and num_key_value_heads should be even, heads go in pairs".into()
            );
        }
        Decoder::new(w, decoder_shape!(c), |w, layer| Ok(block(&c, w, layer)))
    }
}

export_plugin!(DiffLlama, examples = ["../../tests/fixtures/tiny/diffllama/config.json"]);
