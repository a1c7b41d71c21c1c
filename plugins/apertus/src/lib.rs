//! Apertus: a feed-forward layer without gate, whose activation xIELU has learned slopes. <https://arxiv.org/abs/2509.14233>
//!
//! ```text
//! h = x + Attention(RMSNorm(x))            per layer
//! y = h + xIELU(RMSNorm(h) Wup) · Wdown
//! logits = RMSNorm(y) · Eᵀ
//!
//! Attention(x) = softmax(q · kᵀ / √d) · (x Wv) · Wo
//!   q = rope(RMSNorm(x Wq)), k = rope(RMSNorm(x Wk))      each head normalized alone
//! xIELU(x) = αp r² + (β + αn) (eⁿ - 1 - n) + β x,      r = max(x, 0), n = min(x, 0), <https://arxiv.org/abs/2411.13010>
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
        rms_norm_eps: f32 = 1e-5,
        rope_theta: f32 = 12_000_000.0,
        rope_scaling: Option<RopeScaling> = None,
        attention_bias: bool = false,
        tie_word_embeddings: Option<bool> = None,
    }
}

/// The slopes are softplus of what is stored.
struct Xielu {
    alpha_p: Parameter,
    alpha_n: Parameter,
    beta: Parameter,
}

impl Xielu {
    fn new(w: &Weights) -> Self {
        // The exponential's upper end, -1e-6 in all checkpoints; 0, in its place, makes no difference above that.
        w.ignore("eps");
        // Some store numbers as [1], some as [].
        let number = |name| Parameter::of(w.source(name).reshape(&[1]), &[1]);
        Self { alpha_p: number("alpha_p"), alpha_n: number("alpha_n"), beta: number("beta") }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let (alpha_p, alpha_n) = (self.alpha_p.tensor().softplus(), self.alpha_n.tensor().softplus());
        let beta = self.beta.tensor();
        let (r, n) = (x.relu(), -(-x).relu());
        r.square() * alpha_p + (n.exp() - 1.0 - n) * (&beta + alpha_n) + x * beta
    }
}

struct ApertusMlp {
    up_proj: Linear,
    down_proj: Linear,
    act_fn: Xielu,
}

impl FeedForward for ApertusMlp {
    fn forward(&self, x: &Tensor) -> Tensor {
        self.down_proj.forward(&self.act_fn.forward(&self.up_proj.forward(x)))
    }
}

fn attention(c: &Config, w: &Weights) -> SelfAttention {
    let (dim, heads, kv_heads) = (c.hidden_size, c.num_attention_heads, c.num_key_value_heads);
    let shape = Heads { dim, heads, kv_heads, head_dim: c.head_dim };
    let norm = |name| w.rms_norm(name, c.head_dim, c.rms_norm_eps);
    SelfAttention::new(w, shape, c.attention_bias, c.attention_bias)
        .head_norms(norm("q_norm"), norm("k_norm"))
        .rope(w.rope(c.head_dim, c.rope_theta, &c.rope_scaling))
}

fn block(c: &Config, w: &Weights) -> Block<SelfAttention, ApertusMlp> {
    let norm = |name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps);
    let mlp = w.at("mlp");
    let mlp = ApertusMlp {
        up_proj: mlp.linear("up_proj", c.hidden_size, c.intermediate_size, false),
        down_proj: mlp.linear("down_proj", c.intermediate_size, c.hidden_size, false),
        act_fn: Xielu::new(&mlp.at("act_fn")),
    };
    Block::pre_norm(["attention_layernorm", "feedforward_layernorm"].map(norm), attention(c, &w.at("self_attn")), mlp)
}

struct Apertus;

impl Architecture for Apertus {
    const MODEL_TYPES: &'static [&'static str] = &["apertus"];
    type Config = Config;
    type Model = Decoder<Block<SelfAttention, ApertusMlp>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        Decoder::new(w, decoder_shape!(c), |w, _| Ok(block(&c, w)))
    }
}

export_plugin!(Apertus, examples = ["../../tests/fixtures/tiny/apertus/config.json"]);
