//! What the hybrids have in place of softmax and linear attention: Ling 2.5 and 3 latent attention at the end of each group of layers,
//! Ling 3 also Kimi delta attention in the other layers. <https://arxiv.org/abs/2510.26692>
//!
//! ```text
//! Latent(x):  as in `plugin_api::Mla`, in Ling 3 with a factor sigmoid(x Wg) for each head
//! Delta(x):  q, k, v = silu(conv(x Wq, x Wk, x Wv)),   q and k of length 1, q / √d
//!   S = diag(exp(g)) S,  S += k (β (v - kᵀ S))ᵀ,  o = qᵀ S
//!   g = b sigmoid(exp(A_log) (x Wf + dt_bias)), one for each key lane, within the bound b < 0,   β = sigmoid(x Wb)
//!   (RMSNorm(o) * sigmoid(x Wg)) · Wo
//! ```

use super::Config;
use plugin_api::prelude::*;

/// Latent attention; its gate where the checkpoint has one.
pub fn latent_attention(c: &Config, w: &Weights) -> Mla {
    let rope = w.rope(c.qk_rope_head_dim, c.rope_theta, &c.rope_scaling);
    let rope = if c.rope_interleave { rope.interleaved() } else { rope };
    let shape = MlaShape {
        hidden_size: c.hidden_size,
        num_attention_heads: c.num_attention_heads,
        q_lora_rank: c.q_lora_rank,
        kv_lora_rank: c.kv_lora_rank,
        qk_nope_head_dim: c.qk_nope_head_dim,
        qk_rope_head_dim: c.qk_rope_head_dim,
        v_head_dim: c.v_head_dim,
        attention_bias: c.use_qkv_bias,
    };
    let attention = Mla::named(w, "dense", shape, rope).mscale(&c.rope_scaling);
    match w.has("g_proj.weight") {
        true => attention.head_gate(w.linear("g_proj", c.hidden_size, c.num_attention_heads, false)),
        false => attention,
    }
}

/// Kimi delta attention with gates of full rank.
pub struct Delta {
    qkv: [Linear; 3],
    conv: Conv1d,
    f_proj: Linear,
    b_proj: Linear,
    g_proj: Linear,
    a_log: Parameter,
    dt_bias: Parameter,
    /// None: the forgetting is not bounded.
    lower_bound: Option<f32>,
    unit: RmsNorm,
    o_norm: RmsNorm,
    o_proj: Linear,
    heads: usize,
    d: usize,
}

impl Delta {
    pub fn new(c: &Config, w: &Weights) -> Self {
        let (dim, heads, d) = (c.hidden_size, c.num_attention_heads, c.head_dim);
        let width = heads * d;
        let convs = ["q", "k", "v"].map(|part| w.source(&format!("{part}_conv1d.weight")));
        Self {
            qkv: w.linears(dim, false, [("q_proj", width), ("k_proj", width), ("v_proj", width)]),
            conv: Conv1d::of(Source::join(&convs, 0), None, 3 * width, c.short_conv_kernel_size),
            f_proj: w.linear("f_proj", dim, width, false),
            b_proj: w.linear("b_proj", dim, heads, false),
            g_proj: w.linear("g_proj", dim, width, false),
            a_log: Parameter::of(w.source("A_log").reshape(&[heads, 1]), &[heads, 1]),
            dt_bias: Parameter::of(w.source("dt_bias").reshape(&[heads, d]), &[heads, d]),
            lower_bound: c.kda_safe_gate.then_some(c.kda_lower_bound),
            // x / √(Σ x² + 1e-6), but for a factor of √d.
            unit: RmsNorm::plain(d, 1e-6 / d as f32),
            o_norm: w.rms_norm("o_norm", d, c.rms_norm_eps),
            o_proj: w.linear("o_proj", width, dim, false),
            heads,
            d,
        }
    }

    fn log_decay(&self, x: &Tensor) -> Tensor {
        let forget = self.f_proj.forward(x).split_heads(self.d) + self.dt_bias.tensor();
        let rate = self.a_log.tensor().exp();
        match self.lower_bound {
            Some(bound) => (rate * forget).sigmoid() * bound,
            None => -(rate * forget.softplus()),
        }
    }
}

impl Mixer for Delta {
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let (d, width) = (self.d, self.heads * self.d);
        let [q, k, v] = self.qkv.each_ref().map(|proj| proj.forward(x));
        let qkv = layer.conv1d(&self.conv, &Tensor::concat(&[&q, &k, &v])).silu();
        let [q, k, v] = [0, width, 2 * width].map(|start| qkv.narrow(start, width).split_heads(d));
        let (q, k) = (self.unit.forward(&q) / d as f32, self.unit.forward(&k) * (d as f32).powf(-0.5));
        let o = layer.gated_delta(&q, &k, &v, &self.log_decay(x), &self.b_proj.forward(x).sigmoid());
        self.o_proj.forward(&(self.o_norm.forward(&o).merge_heads() * self.g_proj.forward(x).sigmoid()))
    }

    fn cache(&self) -> Cache {
        self.conv.cache().and(Cache::state(&[self.heads, self.d, self.d]))
    }
}
