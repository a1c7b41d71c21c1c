//! Phi-3.5-MoE: two routed experts a token, chosen one after the other by SparseMixer. <https://arxiv.org/abs/2409.12136>
//!
//! ```text
//! h = x + Attention(LayerNorm(x))          per layer
//! y = h + MoE(LayerNorm(h))
//! logits = LayerNorm(y) · Wᵀ + b
//!
//! Attention(x) = softmax(q · kᵀ / √d) · (x Wv) · Wo      q = rope(x Wq), k = rope(x Wk), perhaps with biases and a window
//!
//! MoE(x) = p₁ SwiGLU₁(x) + p₂ SwiGLU₂(x)      s = x Wgate, 1 and 2 its largest entries
//!   pᵢ = softmax(s)ᵢ over those j with (sᵢ - sⱼ) / max(|sⱼ|, sᵢ) ≤ 2ε, and for i = 2 without the first
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize = 32_064,
        hidden_size: usize = 4096,
        intermediate_size: usize = 6400,
        num_hidden_layers: usize = 32,
        num_attention_heads: usize where >= 1 = 32,
        num_key_value_heads: usize = 8,
        head_dim: usize = hidden_size / num_attention_heads,
        hidden_act: SiluOnly = SiluOnly,
        rms_norm_eps: f32 = 1e-5,
        rope_theta: f32 = 1e6,
        rope_scaling: Option<RopeScaling> = None,
        sliding_window: Option<usize> = None,
        attention_bias: bool = false,
        lm_head_bias: bool = false,
        num_local_experts: usize = 16,
        router_jitter_noise: f32 = 0.01,
    }
}

/// Far below any logit, and within the range of every float type.
const OUT: f32 = -3e4;

/// Chooses two experts, each with a probability of its own.
struct SparseMixer {
    gate: Linear,
    jitter_noise: f32,
}

impl SparseMixer {
    /// The largest logit's share among those close to it; experts with a 1 in `gone` are out. `[tokens, 1]`
    fn share(&self, logits: &Tensor, largest: &Tensor, which: &Tensor, gone: &Tensor) -> Tensor {
        let distance = (largest - logits) / logits.abs().maximum(largest);
        let far = (distance - 2.0 * self.jitter_noise).greater(&(largest * 0.0));
        (logits + far.maximum(gone) * OUT).softmax().gather(which)
    }

    fn forward(&self, x: &Tensor) -> (Tensor, Tensor) {
        let logits = self.gate.forward(x);
        let (largest, chosen) = logits.topk(2);
        let first = logits.top_mask(1);
        let [one, two] = [0, 1].map(|i| {
            let gone = if i == 0 { &first * 0.0 } else { first.clone() };
            self.share(&logits, &largest.narrow(i, 1), &chosen.narrow(i, 1), &gone)
        });
        (chosen, Tensor::concat(&[&one, &two]))
    }
}

struct SparseMoe {
    router: SparseMixer,
    experts: Experts,
}

impl FeedForward for SparseMoe {
    fn forward(&self, x: &Tensor) -> Tensor {
        let (chosen, shares) = self.router.forward(x);
        self.experts.forward(x, &chosen, &shares)
    }
}

fn attention(c: &Config, w: &Weights) -> SelfAttention {
    let (dim, heads, kv_heads) = (c.hidden_size, c.num_attention_heads, c.num_key_value_heads);
    SelfAttention::new(w, Heads { dim, heads, kv_heads, head_dim: c.head_dim }, c.attention_bias, c.attention_bias)
        .rope(w.rope(c.head_dim, c.rope_theta, &c.rope_scaling))
        .window(c.sliding_window)
}

fn block(c: &Config, w: &Weights) -> Block<SelfAttention, SparseMoe> {
    let norm = |name| w.layer_norm(name, c.hidden_size, c.rms_norm_eps, true);
    let norms = [norm("input_layernorm"), norm("post_attention_layernorm")];
    let moe = w.at("block_sparse_moe");
    let gate = moe.linear("gate", c.hidden_size, c.num_local_experts, false);
    let router = SparseMixer { gate, jitter_noise: c.router_jitter_noise };
    let experts = moe.experts(ExpertsShape::new(c.num_local_experts, c.hidden_size, c.intermediate_size));
    Block::pre_norm(norms, attention(c, &w.at("self_attn")), SparseMoe { router, experts })
}

struct PhiMoe;

impl Architecture for PhiMoe {
    const MODEL_TYPES: &'static [&'static str] = &["phimoe"];
    type Config = Config;
    type Model = Decoder<Block<SelfAttention, SparseMoe>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        let (model, dim) = (w.at("model"), c.hidden_size);
        let layers = model.at("layers").each(c.num_hidden_layers, |w, _| Ok(block(&c, w)))?;
        let norm = model.layer_norm("norm", dim, c.rms_norm_eps, true);
        let lm_head = LmHead::Own(w.linear("lm_head", dim, c.vocab_size, c.lm_head_bias));
        Ok(Decoder::of(model.embedding("embed_tokens", c.vocab_size, dim), layers, norm, lm_head))
    }
}

export_plugin!(PhiMoe, examples = ["../../tests/fixtures/tiny/phimoe/config.json"]);
