//! Kimi delta attention: the gated delta rule whose state forgets each key lane at its own pace. Checkpoints have the forget gate and the
//! output gate as one matrix each or as two of low rank, which their names tell. <https://arxiv.org/abs/2510.26692>

use crate::{Cache, DeltaRule, DeltaShape, Layer, Linear, Mixer, Parameter, RmsNorm, Tensor, Weights};

/// The shape of [`KimiDelta`].
#[derive(Debug, Clone, Copy)]
pub struct KimiDeltaShape {
    /// Width of the model.
    pub dim: usize,
    /// Heads of queries, keys and values alike.
    pub heads: usize,
    /// Lanes of a head.
    pub head_dim: usize,
    /// Tokens that the convolutions see.
    pub kernel: usize,
    /// Under the root of the norm of the outputs.
    pub eps: f32,
}

/// ```text
/// q, k, v = silu(conv(x Wq, x Wk, x Wv))         q and k of length 1, q / √d
/// S = diag(exp(g)) S,  S += k (β (v - kᵀ S))ᵀ,  o = qᵀ S
/// g = -exp(A_log) softplus(x Wf + dt_bias), or b sigmoid(exp(A_log) (x Wf + dt_bias)) where it has a bound b,   β = sigmoid(x Wb)
/// y = (RMSNorm(o) * sigmoid(x Wg)) · Wo
/// ```
#[derive(Debug)]
pub struct KimiDelta {
    qkv: Vec<Linear>,
    rule: DeltaRule,
    forget: Vec<Linear>,
    gate: Vec<Linear>,
    b_proj: Linear,
    a_log: Parameter,
    dt_bias: Parameter,
    bound: Option<f32>,
    o_norm: RmsNorm,
    o_proj: Linear,
    head_dim: usize,
}

impl KimiDelta {
    /// `q_proj` and so on or `qkv_proj`; `q_conv1d` or MLX's `q_conv.conv` and so on or its `qkv_conv.conv`; `f_proj` or `f_a_proj` and `f_b_proj`, likewise `g`. `bound` is the lowest
    /// log decay, below 0, of models that have one. Thread: new.
    #[track_caller]
    pub fn new(w: &Weights, s: KimiDeltaShape, bound: Option<f32>) -> Self {
        let KimiDeltaShape { dim, heads, head_dim: d, kernel, eps } = s;
        let width = heads * d;
        let shape = DeltaShape { k_heads: heads, d, heads, e: d, kernel };
        let rule = if w.has("qkv_conv.conv.weight") {
            DeltaRule::new(w, "qkv_conv.conv", shape)
        } else if w.has("q_conv.conv.weight") {
            DeltaRule::apart(w, ["q_conv.conv", "k_conv.conv", "v_conv.conv"], shape)
        } else {
            DeltaRule::apart(w, ["q_conv1d", "k_conv1d", "v_conv1d"], shape)
        };
        let qkv = match w.has("qkv_proj.weight") {
            true => vec![w.linear("qkv_proj", dim, 3 * width, false)],
            false => w.linears(dim, false, [("q_proj", width), ("k_proj", width), ("v_proj", width)]).into(),
        };
        let one_or_two = |name: &str| match w.has(&format!("{name}_proj.weight")) {
            true => vec![w.linear(&format!("{name}_proj"), dim, width, false)],
            false => vec![
                w.linear(&format!("{name}_a_proj"), dim, d, false),
                w.linear(&format!("{name}_b_proj"), d, width, false),
            ],
        };
        Self {
            qkv,
            rule,
            forget: one_or_two("f"),
            gate: one_or_two("g"),
            b_proj: w.linear("b_proj", dim, heads, false),
            a_log: Parameter::of(w.source("A_log").reshape(&[heads, 1]), &[heads, 1]),
            dt_bias: Parameter::of(w.source("dt_bias").reshape(&[heads, d]), &[heads, d]),
            bound,
            o_norm: w.rms_norm("o_norm", d, eps),
            o_proj: w.linear("o_proj", width, dim, false),
            head_dim: d,
        }
    }
}

fn through(layers: &[Linear], x: &Tensor) -> Tensor {
    layers.iter().fold(x.clone(), |x, layer| layer.forward(&x))
}

impl Mixer for KimiDelta {
    #[track_caller]
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let qkv: Vec<Tensor> = self.qkv.iter().map(|proj| proj.forward(x)).collect();
        let qkv = Tensor::concat(&qkv.iter().collect::<Vec<_>>());
        let (forget, pace) = (through(&self.forget, x).split_heads(self.head_dim), self.a_log.tensor().exp());
        let forget = forget + self.dt_bias.tensor();
        let g = match self.bound {
            Some(bound) => (pace * forget).sigmoid() * bound,
            None => -(pace * forget.softplus()),
        };
        let beta = self.b_proj.forward(x).sigmoid();
        let o = self.o_norm.forward(&self.rule.forward(&qkv, &g, &beta, layer));
        self.o_proj.forward(&(o.merge_heads() * through(&self.gate, x).sigmoid()))
    }

    fn cache(&self) -> Cache {
        self.rule.cache()
    }
}
