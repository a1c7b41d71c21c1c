//! What every mixer of the gated delta rule has at its core: one convolution over queries, keys and values, queries and keys of length 1,
//! and the rule itself. Where its decays and shares come from, and what becomes of its outputs, differs. <https://arxiv.org/abs/2412.06464>

use crate::{Cache, Conv1d, Layer, RmsNorm, Source, Tensor, Weights};

/// The sizes of a [`DeltaRule`].
#[derive(Debug, Clone, Copy)]
pub struct DeltaShape {
    /// Heads of queries and keys, which divide `heads`.
    pub k_heads: usize,
    /// Lanes of a key.
    pub d: usize,
    /// Heads of values.
    pub heads: usize,
    /// Lanes of a value.
    pub e: usize,
    /// Tokens that the convolution sees.
    pub kernel: usize,
}

impl DeltaShape {
    /// All heads of queries, or of keys, next to each other.
    pub fn key_dim(&self) -> usize {
        self.k_heads * self.d
    }

    /// All heads of values next to each other.
    pub fn value_dim(&self) -> usize {
        self.heads * self.e
    }

    /// Queries, keys and values next to each other.
    pub fn channels(&self) -> usize {
        2 * self.key_dim() + self.value_dim()
    }
}

/// `q, k, v = split(silu(conv(qkv)))`, `S = exp(g) S`, `S += k̂ (β (v - k̂ᵀ S))ᵀ`, `y = q̂ᵀ S / √d`, with q̂ and k̂ of length 1.
#[derive(Debug)]
pub struct DeltaRule {
    conv: Conv1d,
    unit: RmsNorm,
    shape: DeltaShape,
}

impl DeltaRule {
    /// One convolution `name.weight` over all channels. Thread: new.
    #[track_caller]
    pub fn new(w: &Weights, name: &str, shape: DeltaShape) -> Self {
        Self::of(w.conv1d(name, shape.channels(), shape.kernel, false), shape)
    }

    /// A convolution each for queries, keys and values, `name.weight` of these names. Thread: new.
    #[track_caller]
    pub fn apart(w: &Weights, names: [&str; 3], shape: DeltaShape) -> Self {
        let weights = names.map(|name| w.source(&format!("{name}.weight")));
        Self::of(Conv1d::of(Source::join(&weights, 0), None, shape.channels(), shape.kernel), shape)
    }

    #[track_caller]
    fn of(conv: Conv1d, shape: DeltaShape) -> Self {
        // x / √(Σ x² + 1e-6), but for a factor of √d.
        Self { conv, unit: RmsNorm::plain(shape.d, 1e-6 / shape.d as f32), shape }
    }

    /// qkv `[tokens, channels]`, g (log decay) `[tokens, heads]` or `[tokens, heads, d]`, beta `[tokens, heads]` ->
    /// `[tokens, heads, e]`. Thread: step.
    #[track_caller]
    pub fn forward(&self, qkv: &Tensor, g: &Tensor, beta: &Tensor, layer: &mut Layer) -> Tensor {
        let DeltaShape { d, e, .. } = self.shape;
        let (keys, values) = (self.shape.key_dim(), self.shape.value_dim());
        let qkv = layer.conv1d(&self.conv, qkv).silu();
        let q = self.unit.forward(&qkv.narrow(0, keys).split_heads(d)) / d as f32;
        let k = self.unit.forward(&qkv.narrow(keys, keys).split_heads(d)) * (d as f32).powf(-0.5);
        layer.gated_delta(&q, &k, &qkv.narrow(2 * keys, values).split_heads(e), g, beta)
    }

    /// The convolution's last inputs, then the map from keys to values.
    pub fn cache(&self) -> Cache {
        let DeltaShape { d, heads, e, .. } = self.shape;
        self.conv.cache().and(Cache::state(&[heads, d, e]))
    }
}
