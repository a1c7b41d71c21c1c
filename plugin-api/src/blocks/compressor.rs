//! Entries that stand for windows of tokens, as compressed attention keeps them: each lane of an entry is the tokens' average by a gate
//! of its own. <https://huggingface.co/deepseek-ai/DeepSeek-V4-Flash>

use crate::{Cache, Layer, Linear, Parameter, RmsNorm, Rope, Tensor, Weights};

/// The sizes of a [`Compressor`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Compression {
    /// Tokens of a window.
    pub rate: usize,
    /// Windows that an entry is made of: its own and those before it.
    pub windows: usize,
}

/// `entry = rope(RMSNorm(Σ softmax(x Wgate + b) x Wkv))`, lane by lane over the tokens of its windows, at the position of the first token of
/// its own window.
#[derive(Debug)]
pub struct Compressor {
    wkv: Linear,
    wgate: Linear,
    ape: Parameter,
    norm: RmsNorm,
    rope: Rope,
    of: Compression,
    dim: usize,
}

impl Compressor {
    /// Entries of `dim` lanes: `wkv` and `wgate` `[windows * dim, inputs]`, `ape` `[rate, windows * dim]`, `norm` `[dim]`. Thread: new.
    #[track_caller]
    pub fn new(w: &Weights, of: Compression, [inputs, dim]: [usize; 2], norm_eps: f32, rope: Rope) -> Self {
        let lanes = of.windows * dim;
        let [wkv, wgate] = w.linears(inputs, false, [("wkv", lanes), ("wgate", lanes)]);
        let (ape, norm) = (w.tensor("ape", &[of.rate, lanes]), w.rms_norm("norm", dim, norm_eps));
        Self { wkv, wgate, ape, norm, rope: rope.in_blocks(of.rate), of, dim }
    }

    /// What it remembers: the open windows, and the entries as keys.
    pub fn cache(&self) -> Cache {
        Cache::pooling(self.of.windows, self.dim).and(Cache::pooled(self.of.rate))
    }

    /// x `[tokens, inputs]` -> `[tokens, 1, dim]`, an entry in the row of a window's last token: what [`Pooled`](crate::Pooled) and
    /// [`Layer::index`] take. Thread: step.
    #[track_caller]
    pub fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let pooled = layer.pool(&self.wkv.forward(x), &self.wgate.forward(x), &self.ape.tensor());
        layer.rotate(&self.rope, self.norm.forward(&pooled).split_heads(self.dim))
    }
}
