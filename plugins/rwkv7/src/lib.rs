//! RWKV 7: no attention; each layer carries a matrix that a gated delta rule keeps, and the token before. <https://arxiv.org/abs/2503.14456>
//!
//! ```text
//! h = x + TimeMix(LayerNorm(x))            per layer, x = LayerNorm(E) at first
//! y = h + relu(mix_k(LayerNorm(h)) Wk)² Wv
//! logits = LayerNorm(y) · Wᵀ
//!
//! mix_i(x) = x + (x₋₁ - x) μᵢ                                       x₋₁ the token before
//! TimeMix(x):  r, k, v = mix(x) Wr, mix(x) Wk, mix(x) Wv
//!   v += (v₀ - v) σ(lora_v(mix_v(x)))                               v₀ the first layer's
//!   log w = -e^(-1/2) σ(lora_w(mix_w(x))),  α = σ(lora_a(mix_a(x)))
//!   κ = k ξ / |k ξ|,  k *= 1 + (α - 1) κₐ
//!   S = S diag(w) - (S κ) (κ α)ᵀ + v kᵀ,  o = S r
//!   ((LayerNorm(o) + (r · (k ρ)) v) * lora_g(mix_g(x))) · Wo         the norm by head
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize,
        hidden_size: usize,
        intermediate_size: usize,
        num_hidden_layers: usize,
        head_dim: usize where >= 1 = 64,
        norm_eps: f32 = 1e-5,
        a_low_rank_dim: usize,
        v_low_rank_dim: usize,
        gate_low_rank_dim: usize,
        decay_low_rank_dim: usize,
        tie_word_embeddings: Option<bool> = None,
    }
}

/// A vector of the checkpoint, which exporters store with axes of length 1 or by head.
fn vector(w: &Weights, name: &str, dims: &[usize]) -> Parameter {
    Parameter::of(w.source(name).reshape(dims), dims)
}

/// `x W₀ᵀ`, then perhaps tanh or sigmoid, then `W₂ᵀ + b`: a matrix of low rank.
struct LowRank {
    down: Linear,
    up: Linear,
}

impl LowRank {
    fn new(w: &Weights, dim: usize, rank: usize, bias: bool) -> Self {
        let w = w.at("lora");
        Self { down: w.linear("0", dim, rank, false), up: w.linear("2", rank, dim, bias) }
    }

    fn forward(&self, x: &Tensor, between: impl Fn(Tensor) -> Tensor) -> Tensor {
        self.up.forward(&between(self.down.forward(x)))
    }
}

struct TimeMix {
    x: [Parameter; 6],
    k_k: Parameter,
    k_a: Parameter,
    r_k: Parameter,
    r_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    w_lora: LowRank,
    a_lora: LowRank,
    g_lora: LowRank,
    v_lora: Option<LowRank>,
    norm: LayerNorm,
    norm_weight: Parameter,
    norm_bias: Parameter,
    head_dim: usize,
}

impl TimeMix {
    fn new(c: &Config, w: &Weights, layer: usize) -> Self {
        let (dim, heads) = (c.hidden_size, [c.hidden_size / c.head_dim, c.head_dim]);
        let proj = |name| w.linear(name, dim, dim, false);
        Self {
            x: ["x_r", "x_w", "x_k", "x_v", "x_a", "x_g"].map(|name| vector(w, name, &[dim])),
            k_k: vector(w, "k_k", &heads),
            k_a: vector(w, "k_a", &heads),
            r_k: vector(w, "r_k", &heads),
            r_proj: proj("r_proj"),
            k_proj: proj("k_proj"),
            v_proj: proj("v_proj"),
            o_proj: proj("o_proj"),
            w_lora: LowRank::new(&w.at("w_lora"), dim, c.decay_low_rank_dim, true),
            a_lora: LowRank::new(&w.at("a_lora"), dim, c.a_low_rank_dim, true),
            g_lora: LowRank::new(&w.at("g_lora"), dim, c.gate_low_rank_dim, false),
            v_lora: (layer > 0).then(|| LowRank::new(&w.at("v_lora"), dim, c.v_low_rank_dim, true)),
            norm: LayerNorm::plain(c.head_dim, c.head_dim as f32 * c.norm_eps),
            norm_weight: vector(w, "g_norm.weight", &heads),
            norm_bias: vector(w, "g_norm.bias", &heads),
            head_dim: c.head_dim,
        }
    }

    /// The output, and the values of the first layer, which every later one takes.
    fn forward(&self, x: &Tensor, first_v: Option<Tensor>, layer: &mut Layer) -> (Tensor, Tensor) {
        let by_head = |x: Tensor| x.split_heads(self.head_dim);
        let change = layer.shift(x) - x;
        let [xr, xw, xk, xv, xa, xg] = self.x.each_ref().map(|mu| x + &change * mu.tensor());

        let (r, k) = (by_head(self.r_proj.forward(&xr)), by_head(self.k_proj.forward(&xk)));
        let v = by_head(self.v_proj.forward(&xv));
        let (v, first_v) = match (&self.v_lora, first_v) {
            (Some(lora), Some(first)) => {
                let share = by_head(lora.forward(&xv, |x| x).sigmoid());
                (&v + (&first - &v) * share, first)
            }
            _ => (v.clone(), v),
        };
        let log_w = by_head(self.w_lora.forward(&xw, |x| x.tanh()).sigmoid() * -(-0.5f32).exp());
        let alpha = by_head(self.a_lora.forward(&xa, |x| x).sigmoid());
        let kappa = &k * self.k_k.tensor();
        let kappa = &kappa / kappa.square().sum().sqrt().clamp(1e-7, f32::MAX);
        let k = k * ((&alpha - 1.0) * self.k_a.tensor() + 1.0);

        let o = layer.wkv7(&r, &log_w, &k, &v, &-&kappa, &(kappa * alpha));
        let o = self.norm.forward(&o) * self.norm_weight.tensor() + self.norm_bias.tensor();
        let o = o + (r * k * self.r_k.tensor()).sum() * v;
        let gate = self.g_lora.forward(&xg, |x| x.sigmoid());
        (self.o_proj.forward(&(o.merge_heads() * gate)), first_v)
    }
}

/// The feed-forward layer, which sees a token mixed with the one before.
struct ChannelMix {
    x_k: Parameter,
    key: Linear,
    value: Linear,
}

impl ChannelMix {
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let mixed = x + (layer.shift(x) - x) * self.x_k.tensor();
        self.value.forward(&self.key.forward(&mixed).relu().square())
    }
}

struct RwkvBlock {
    pre_norm: Option<LayerNorm>,
    attn_norm: LayerNorm,
    attn: TimeMix,
    ffn_norm: LayerNorm,
    ffn: ChannelMix,
}

impl RwkvBlock {
    fn new(c: &Config, w: &Weights, layer: usize) -> Self {
        let norm = |name| w.layer_norm(name, c.hidden_size, c.norm_eps, true);
        let ffn = w.at("ffn");
        Self {
            pre_norm: (layer == 0).then(|| norm("pre_norm")),
            attn_norm: norm("attn_norm"),
            attn: TimeMix::new(c, &w.at("attn"), layer),
            ffn_norm: norm("ffn_norm"),
            ffn: ChannelMix {
                x_k: vector(&ffn, "x_k", &[c.hidden_size]),
                key: ffn.linear("key", c.hidden_size, c.intermediate_size, false),
                value: ffn.linear("value", c.intermediate_size, c.hidden_size, false),
            },
        }
    }
}

struct Rwkv7 {
    embeddings: Embedding,
    layers: Vec<RwkvBlock>,
    norm: LayerNorm,
    lm_head: LmHead,
    /// Heads and their lanes.
    heads: [usize; 2],
}

impl Architecture for Rwkv7 {
    const MODEL_TYPES: &'static [&'static str] = &["rwkv7"];
    type Config = Config;
    type Model = Self;

    fn new(c: Config, w: &Weights) -> Result<Self> {
        let model = w.at("model");
        let embeddings = model.embedding("embeddings", c.vocab_size, c.hidden_size);
        Ok(Self {
            layers: model.at("layers").each(c.num_hidden_layers, |w, i| Ok(RwkvBlock::new(&c, w, i)))?,
            norm: model.layer_norm("norm", c.hidden_size, c.norm_eps, true),
            lm_head: LmHead::new(w, &embeddings, c.vocab_size, c.hidden_size, c.tie_word_embeddings),
            heads: [c.hidden_size / c.head_dim, c.head_dim],
            embeddings,
        })
    }
}

impl Model for Rwkv7 {
    fn caches(&self) -> Vec<Cache> {
        let [heads, d] = self.heads;
        let before = Cache::state(&[1, heads * d]);
        vec![before.clone().and(Cache::state(&[heads, d, d])).and(before); self.layers.len()]
    }

    fn forward(&self, tokens: &Tensor, step: &mut Step) -> Tensor {
        let (mut x, mut first_v) = (self.embeddings.forward(tokens), None);
        for (block, mut layer) in self.layers.iter().zip(step.layers()) {
            if let Some(norm) = &block.pre_norm {
                x = norm.forward(&x);
            }
            let (mixed, v) = block.attn.forward(&block.attn_norm.forward(&x), first_v, &mut layer);
            let h = x + mixed;
            (x, first_v) = (&h + block.ffn.forward(&block.ffn_norm.forward(&h), &mut layer), Some(v));
        }
        self.norm.forward(&x)
    }

    fn head(&self, hidden: &Tensor) -> Tensor {
        self.lm_head.forward(hidden)
    }
}

export_plugin!(Rwkv7, examples = ["../../tests/fixtures/tiny/rwkv7/config.json"]);
