//! A layer of Gemma 3n: attention beside Laurel, a feed-forward layer that may keep the largest gates only, and the per-layer input.

use crate::{Config, altup::AltUp};
use plugin_api::prelude::*;

fn attention(c: &Config, w: &Weights, layer: usize) -> Result<SharingAttention> {
    let (dim, head_dim, slides) = (c.hidden_size, c.head_dim, c.layer_types.slides(layer)?);
    let heads = Heads { dim, heads: c.num_attention_heads, kv_heads: c.num_key_value_heads, head_dim };
    let rope = match slides {
        true => w.rope(head_dim, c.rope_local_base_freq, &None),
        false => w.rope(head_dim, c.rope_theta, &c.rope_scaling),
    };
    let attention = SharingAttention::new(w, heads, (c.attention_bias, false), c.rms_norm_eps, rope, c.keys_of(layer)?);
    Ok(attention.window(slides.then_some(c.sliding_window)))
}

struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
    act: Activation,
    /// How many standard deviations above the mean a gate must lie.
    cutoff: Option<f32>,
}

impl Mlp {
    fn new(c: &Config, w: &Weights, layer: usize) -> Result<Self> {
        let (dim, hidden) = (c.hidden_size, c.intermediate_size.at(layer, "intermediate_size")?);
        let [gate_proj, up_proj] = w.linears(dim, false, [("gate_proj", hidden), ("up_proj", hidden)]);
        let (sparsity, down_proj) = (c.sparsity(layer)?, w.linear("down_proj", hidden, dim, false));
        let cutoff = (sparsity > 0.0).then(|| normal_quantile(sparsity as f64) as f32);
        Ok(Self { gate_proj, up_proj, down_proj, act: c.hidden_activation, cutoff })
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let mut gate = self.gate_proj.forward(x);
        if let Some(cutoff) = self.cutoff {
            let centered = &gate - gate.mean();
            let deviation = centered.square().mean().sqrt();
            gate = (centered - deviation * cutoff).relu();
        }
        self.down_proj.forward(&(self.act.forward(&gate) * self.up_proj.forward(x)))
    }
}

/// Where the standard normal distribution has left the share `p` behind, by bisection of its distribution function.
fn normal_quantile(p: f64) -> f64 {
    let (mut low, mut high) = (-10.0, 10.0);
    for _ in 0..80 {
        let middle = (low + high) / 2.0;
        if normal_share(middle) < p { low = middle } else { high = middle }
    }
    (low + high) / 2.0
}

/// Φ(x) = 1/2 + φ(x) Σ x^(2n+1) / (2n+1)!!, whose terms all have one sign. <https://dlmf.nist.gov/7.6>
fn normal_share(x: f64) -> f64 {
    let (mut term, mut sum, mut n) = (x, x, 1.0);
    while term.abs() > 1e-17 * sum.abs() {
        n += 2.0;
        term *= x * x / n;
        sum += term;
    }
    0.5 + sum * (-x * x / 2.0).exp() / std::f64::consts::TAU.sqrt()
}

/// A low-rank path beside attention. <https://arxiv.org/abs/2411.07501>
struct Laurel {
    linear_left: Linear,
    linear_right: Linear,
    post_laurel_norm: RmsNorm,
}

impl Laurel {
    fn forward(&self, x: &Tensor) -> Tensor {
        x + self.post_laurel_norm.forward(&self.linear_right.forward(&self.linear_left.forward(x)))
    }
}

pub struct Block {
    altup: AltUp,
    laurel: Laurel,
    input_layernorm: RmsNorm,
    self_attn: SharingAttention,
    post_attention_layernorm: RmsNorm,
    pre_feedforward_layernorm: RmsNorm,
    mlp: Mlp,
    post_feedforward_layernorm: RmsNorm,
    input_gate: PerLayerGate,
}

impl Block {
    pub fn new(c: &Config, w: &Weights, layer: usize) -> Result<Self> {
        let (dim, width, laurel) = (c.hidden_size, c.hidden_size_per_layer_input, w.at("laurel"));
        Ok(Self {
            altup: AltUp::new(c, &w.at("altup")),
            laurel: Laurel {
                linear_left: laurel.linear("linear_left", dim, c.laurel_rank, false),
                linear_right: laurel.linear("linear_right", c.laurel_rank, dim, false),
                post_laurel_norm: c.norm(&laurel, "post_laurel_norm"),
            },
            input_layernorm: c.norm(w, "input_layernorm"),
            self_attn: attention(c, &w.at("self_attn"), layer)?,
            post_attention_layernorm: c.norm(w, "post_attention_layernorm"),
            pre_feedforward_layernorm: c.norm(w, "pre_feedforward_layernorm"),
            mlp: Mlp::new(c, &w.at("mlp"), layer)?,
            post_feedforward_layernorm: c.norm(w, "post_feedforward_layernorm"),
            input_gate: PerLayerGate::new(w, dim, width, c.rms_norm_eps, c.hidden_activation),
        })
    }

    pub fn cache(&self) -> Cache {
        self.self_attn.cache()
    }

    /// x `[tokens, K, dim]`, input `[tokens, width]` -> `[tokens, K, dim]`
    pub fn forward(&self, x: &Tensor, input: &Tensor, layer: &mut Layer) -> Tensor {
        let predictions = self.altup.predict(x);
        let active = self.altup.active(&predictions);
        let normed = self.input_layernorm.forward(&active);
        let attended = self.post_attention_layernorm.forward(&self.self_attn.forward(&normed, layer));
        let h = (active + attended + self.laurel.forward(&normed)) * 0.5f32.sqrt();
        let fed = self.mlp.forward(&self.pre_feedforward_layernorm.forward(&h));
        let y = &h + self.post_feedforward_layernorm.forward(&fed);

        let corrected = self.altup.correct(&predictions, &y);
        let told = self.input_gate.forward(&self.altup.scaled(&corrected), input);
        self.altup.add_to_others(&corrected, &told)
    }
}
