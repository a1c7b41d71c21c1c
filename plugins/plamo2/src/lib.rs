//! PLaMo 2: Mamba with heads and attention in turns, norms before and after each. <https://arxiv.org/abs/2509.04897>
//!
//! ```text
//! h = x + RMSNorm(Mixer(RMSNorm(x)))       per layer; the norms after mixer and FFN start from 1/5 and 1/5^1.5
//! y = h + RMSNorm(SwiGLU(RMSNorm(h)))
//! logits = RMSNorm(y) · Eᵀ
//!
//! Mixer: attention with q and k normalized per head where layer mod mamba_step = mamba_step / 2, elsewhere
//!   z, x = x Win, head by head;  x = silu(conv1d(x));  B, C, Δ = x Wbcdt, each normalized;  Δ = softplus(Δ WΔ + b)
//!   h = exp(Δ A) h + Δ x Bᵀ, y = h C + D x     per head, A = -exp(A_log)
//!   (silu(z) * y) Wout
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize = 32_000,
        hidden_size: usize = 4096,
        intermediate_size: usize = 13_312,
        num_hidden_layers: usize = 32,
        num_attention_heads: usize where >= 1 = 32,
        num_key_value_heads: usize where >= 1 = 4,
        hidden_size_per_head: usize = 128,
        rms_norm_eps: f32 = 1e-6,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        mamba_enabled: bool = true,
        mamba_d_state: usize where >= 1 = 64,
        mamba_d_conv: usize where >= 1 = 4,
        mamba_num_heads: usize where >= 1 = 64,
        mamba_step: usize where >= 2 = 2,
        tie_word_embeddings: Option<bool> = None,
    }
}

impl Config {
    fn recurs(&self, layer: usize) -> bool {
        let half = self.mamba_step / 2;
        match self.num_hidden_layers <= half {
            true => self.mamba_enabled && layer + 1 != self.num_hidden_layers,
            false => self.mamba_enabled && layer % self.mamba_step != half,
        }
    }
}

struct Mixture {
    in_proj: Linear,
    conv1d: Conv1d,
    bcdt_proj: Linear,
    norms: [RmsNorm; 3],
    dt_proj: Linear,
    dt_bias: Parameter,
    a_log: Parameter,
    d: Parameter,
    out_proj: Linear,
    head_dim: usize,
    shape: [usize; 3],
}

impl Mixture {
    fn new(c: &Config, w: &Weights) -> Self {
        let (dim, heads, head_dim, state) = (c.hidden_size, c.mamba_num_heads, c.hidden_size_per_head, c.mamba_d_state);
        let (inner, rank) = (heads * head_dim, (dim / 16).max(64));
        let norm = |name, lanes| RmsNorm::of(w.source(name), lanes, c.rms_norm_eps);
        Self {
            in_proj: w.linear("in_proj", dim, 2 * inner, false),
            conv1d: w.conv1d("conv1d", inner, c.mamba_d_conv, false),
            bcdt_proj: w.linear("bcdt_proj", inner, rank + 2 * state, false),
            norms: [norm("B_norm_weight", state), norm("C_norm_weight", state), norm("dt_norm_weight", rank)],
            dt_proj: w.linear("dt_proj", rank, heads, false),
            dt_bias: w.tensor("dt_bias", &[heads]),
            a_log: w.tensor("A_log", &[heads]),
            d: Parameter::of(w.source("D").reshape(&[heads, 1]), &[heads, 1]),
            out_proj: w.linear("out_proj", inner, dim, false),
            head_dim,
            shape: [heads, state, rank],
        }
    }
}

impl Mixer for Mixture {
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let [heads, state, rank] = self.shape;
        let zx = self.in_proj.forward(x).unflatten(heads);
        let [z, x] = [0, self.head_dim].map(|start| zx.narrow(start, self.head_dim).flatten());
        let x = layer.conv1d(&self.conv1d, &x).silu();
        let bcdt = self.bcdt_proj.forward(&x);
        let parts = [(0, state), (state, state), (2 * state, rank)].map(|(start, len)| bcdt.narrow(start, len));
        let [b, c, dt] = std::array::from_fn(|i| self.norms[i].forward(&parts[i]));
        let dt = (self.dt_proj.forward(&dt) + self.dt_bias.tensor()).softplus();
        let (x, a) = (x.split_heads(self.head_dim), -self.a_log.tensor().exp());
        let y = layer.ssd(&x, &dt, &a, &b.unflatten(1), &c.unflatten(1)) + x * self.d.tensor();
        self.out_proj.forward(&z.swiglu(&y.merge_heads()))
    }

    fn cache(&self) -> Cache {
        let [heads, state, _] = self.shape;
        self.conv1d.cache().and(Cache::state(&[heads, self.head_dim, state]))
    }
}

fn attention(c: &Config, w: &Weights) -> SelfAttention {
    let (dim, head_dim) = (c.hidden_size, c.hidden_size_per_head);
    let (heads, kv_heads) = (c.num_attention_heads, c.num_key_value_heads);
    let o_proj = w.linear("o_proj", heads * head_dim, dim, false);
    SelfAttention::fused(w, "qkv_proj", Heads { dim, heads, kv_heads, head_dim }, false, o_proj)
        .weighted_norms(
            RmsNorm::plain(head_dim, 1e-6),
            w.tensor("q_weight", &[heads, head_dim]),
            w.tensor("k_weight", &[kv_heads, head_dim]),
        )
        .rope(w.rope(head_dim, c.rope_theta, &c.rope_scaling))
}

fn block(c: &Config, w: &Weights, layer: usize) -> Block<AnyMixer> {
    // The checkpoint stores what the norms' weights have learnt beyond their start.
    let starts = [
        ("pre_mixer_norm", 1.0),
        ("post_mixer_norm", 1.0 / 5.0),
        ("pre_mlp_norm", 1.0),
        ("post_mlp_norm", 1.0 / 5f32.powf(1.5)),
    ];
    let norm =
        |(name, start)| RmsNorm::of(w.source(&format!("{name}.weight")).plus(start), c.hidden_size, c.rms_norm_eps);
    let mixer: AnyMixer = match c.recurs(layer) {
        true => Box::new(Mixture::new(c, &w.at("mixer"))),
        false => Box::new(attention(c, &w.at("mixer"))),
    };
    let mlp = GatedMlp::fused(&w.at("mlp"), "gate_up_proj", c.hidden_size, c.intermediate_size, Activation::Silu);
    Block::both_norms(starts.map(norm), mixer, mlp)
}

struct Plamo2;

impl Architecture for Plamo2 {
    const MODEL_TYPES: &'static [&'static str] = &["plamo2"];
    type Config = Config;
    type Model = Decoder<Block<AnyMixer>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        let (model, dim) = (w.at("model"), c.hidden_size);
        let embed_tokens = model.embedding("embed_tokens", c.vocab_size, dim);
        let lm_head = LmHead::new(w, &embed_tokens, c.vocab_size, dim, c.tie_word_embeddings);
        let layers = model.at("layers.layers").each(c.num_hidden_layers, |w, layer| Ok(block(&c, w, layer)))?;
        let norm = RmsNorm::of(model.source("norm.weight").plus(1.0), dim, c.rms_norm_eps);
        Ok(Decoder::of(embed_tokens, layers, norm, lm_head))
    }
}

export_plugin!(Plamo2, examples = ["../../tests/fixtures/tiny/plamo2/config.json"]);
