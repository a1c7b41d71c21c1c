//! Falcon-H1: attention and Mamba 2 side by side in every layer, with a scale on nearly every projection. <https://arxiv.org/abs/2507.22448>
//!
//! ```text
//! h = x + s₁ Mamba2(s₂ u) + s₃ Attention(s₄ u), u = RMSNorm(x)         per layer
//! y = h + s₅ (silu(s₆ v Wgate) * (v Wup)) Wdown, v = RMSNorm(h)
//! logits = s₈ RMSNorm(y) · Eᵀ, the embeddings times s₇
//!
//! Attention's keys are scaled before they turn; z, x, B, C and Δ of Mamba 2 by one number each. Its norm may stand before the gate, after
//! it, or be missing.
//! ```
//!
//! mlx-lm multiplies the scales into the weights, but for those of values, keys and tied heads; that its convolutions lie turned tells.

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize = 128_000,
        hidden_size: usize = 4096,
        intermediate_size: usize = 14_336,
        num_hidden_layers: usize = 32,
        num_attention_heads: usize where >= 1 = 32,
        num_key_value_heads: usize = 8,
        head_dim: usize = hidden_size / num_attention_heads,
        rms_norm_eps: f32 = 1e-5,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        attention_bias: bool = false,
        mlp_bias: bool = false,
        projectors_bias: bool = false,
        mamba_expand: usize = 2,
        mamba_d_ssm: usize = mamba_expand * hidden_size,
        mamba_n_heads: usize where >= 1 = 128,
        mamba_d_head: OrAuto = OrAuto::AUTO,
        mamba_n_groups: usize where >= 1 = 1,
        mamba_d_state: usize where >= 1 = 256,
        mamba_d_conv: usize where >= 1 = 4,
        mamba_conv_bias: bool = true,
        mamba_proj_bias: bool = false,
        mamba_rms_norm: bool = false,
        mamba_norm_before_gate: bool = true,
        time_step_limit: TimeStepLimit = TimeStepLimit::NONE,
        embedding_multiplier: f32 = 1.0,
        lm_head_multiplier: f32 = 1.0,
        key_multiplier: f32 = 1.0,
        attention_in_multiplier: f32 = 1.0,
        attention_out_multiplier: f32 = 1.0,
        ssm_in_multiplier: f32 = 1.0,
        ssm_out_multiplier: f32 = 1.0,
        ssm_multipliers: Vec<f32> = vec![1.0; 5],
        mlp_multipliers: Vec<f32> = vec![1.0; 2],
        tie_word_embeddings: Option<bool> = None,
    }
}

/// What multiplies which activation.
#[derive(Clone, Copy)]
struct Scales {
    embedding: f32,
    head: f32,
    attention_in: f32,
    keys: f32,
    values: f32,
    attention_out: f32,
    ssm_in: f32,
    ssm: [f32; 5],
    ssm_out: f32,
    gate: f32,
    down: f32,
}

impl Scales {
    /// By the config, less what a checkpoint `folded` by mlx-lm has in its weights.
    fn new(c: &Config, folded: bool, tied: bool) -> Result<Self> {
        let (Ok(ssm), &[gate, down]) = (<[f32; 5]>::try_from(&*c.ssm_multipliers), &*c.mlp_multipliers) else {
            return Err("config.json: ssm_multipliers should be five numbers, mlp_multipliers two".into());
        };
        let rest = |scale: f32| if folded { 1.0 } else { scale };
        Ok(Self {
            embedding: rest(c.embedding_multiplier),
            head: if folded && tied {
                c.lm_head_multiplier / c.embedding_multiplier
            } else {
                rest(c.lm_head_multiplier)
            },
            attention_in: rest(c.attention_in_multiplier),
            keys: c.key_multiplier,
            values: if folded { c.attention_in_multiplier } else { 1.0 },
            attention_out: rest(c.attention_out_multiplier),
            ssm_in: rest(c.ssm_in_multiplier),
            ssm: ssm.map(rest),
            ssm_out: rest(c.ssm_out_multiplier),
            gate: rest(gate),
            down: rest(down),
        })
    }
}

struct FalconBlock {
    norms: [RmsNorm; 2],
    mamba: Mamba2,
    attention: SelfAttention,
    mlp: [Linear; 3],
    scales: Scales,
}

impl FalconBlock {
    fn new(c: &Config, w: &Weights, scales: Scales) -> Self {
        let (dim, hidden) = (c.hidden_size, c.intermediate_size);
        let shape = Heads { dim, heads: c.num_attention_heads, kv_heads: c.num_key_value_heads, head_dim: c.head_dim };
        let attention = SelfAttention::new(&w.at("self_attn"), shape, c.attention_bias, c.attention_bias);
        let mlp = w.at("feed_forward");
        let [gate, up] = mlp.linears(dim, c.mlp_bias, [("gate_proj", hidden), ("up_proj", hidden)]);
        Self {
            norms: ["input_layernorm", "pre_ff_layernorm"].map(|name| w.rms_norm(name, dim, c.rms_norm_eps)),
            mamba: mamba(c, &w.at("mamba")).scales(scales.ssm),
            attention: attention.rope(w.rope(c.head_dim, c.rope_theta, &c.rope_scaling)),
            mlp: [gate, up, mlp.linear("down_proj", hidden, dim, c.mlp_bias)],
            scales,
        }
    }

    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let (scales, [input_layernorm, pre_ff_layernorm]) = (self.scales, &self.norms);
        let normed = input_layernorm.forward(x);
        let recurred = self.mamba.forward(&(&normed * scales.ssm_in), layer) * scales.ssm_out;
        let [q, k, v] = self.attention.project(&(&normed * scales.attention_in), layer);
        let attended = self.attention.attend([q, k * scales.keys, v * scales.values], layer);
        let h = x + recurred + self.attention.output(&attended) * scales.attention_out;

        let (normed, [gate, up, down]) = (pre_ff_layernorm.forward(&h), &self.mlp);
        let gate = gate.forward(&normed) * scales.gate;
        h + down.forward(&gate.swiglu(&up.forward(&normed))) * scales.down
    }
}

fn mamba(c: &Config, w: &Weights) -> Mamba2 {
    let shape = Mamba2Shape {
        dim: c.hidden_size,
        heads: c.mamba_n_heads,
        head_dim: c.mamba_d_head.or(c.mamba_d_ssm / c.mamba_n_heads),
        groups: c.mamba_n_groups,
        state: c.mamba_d_state,
        kernel: c.mamba_d_conv,
        bias: c.mamba_proj_bias,
        out_bias: c.projectors_bias,
        conv_bias: c.mamba_conv_bias,
        act: Activation::Silu,
        time_step_limit: c.time_step_limit,
    };
    let norm = || {
        let norm = GatedNorm::new(w, "norm", shape.inner(), c.mamba_n_groups, c.rms_norm_eps);
        norm.before_gate(c.mamba_norm_before_gate)
    };
    Mamba2::new(w, shape, c.mamba_rms_norm.then(norm))
}

struct FalconH1(Decoder<FalconBlock>);

impl Architecture for FalconH1 {
    const MODEL_TYPES: &'static [&'static str] = &["falcon_h1"];
    type Config = Config;
    type Model = Self;

    fn new(c: Config, w: &Weights) -> Result<Self> {
        let (model, dim) = (w.at("model"), c.hidden_size);
        let channels = c.mamba_d_ssm + 2 * c.mamba_n_groups * c.mamba_d_state;
        let folded = w.has_shape("model.layers.0.mamba.conv1d.weight", &[channels, c.mamba_d_conv, 1]);
        let embed_tokens = model.embedding("embed_tokens", c.vocab_size, dim);
        let lm_head = LmHead::new(w, &embed_tokens, c.vocab_size, dim, c.tie_word_embeddings);
        let scales = Scales::new(&c, folded, matches!(lm_head, LmHead::Tied(_)))?;
        let layers = model.at("layers").each(c.num_hidden_layers, |w, _| Ok(FalconBlock::new(&c, w, scales)))?;
        let norm = model.rms_norm("final_layernorm", dim, c.rms_norm_eps);
        let decoder = Decoder::of(embed_tokens, layers, norm, lm_head);
        Ok(Self(decoder.embed_scale(scales.embedding).logit_scale(scales.head)))
    }
}

impl Model for FalconH1 {
    fn caches(&self) -> Vec<Cache> {
        self.0.layers.iter().map(|block| block.mamba.cache().and(block.attention.cache())).collect()
    }

    fn forward(&self, tokens: &Tensor, step: &mut Step) -> Tensor {
        self.0.forward(tokens, step, FalconBlock::forward)
    }

    fn head(&self, hidden: &Tensor) -> Tensor {
        self.0.head(hidden)
    }
}

export_plugin!(FalconH1, examples = ["../../tests/fixtures/tiny/falcon_h1/config.json"]);
