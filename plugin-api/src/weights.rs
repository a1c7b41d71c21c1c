//! The checkpoint, seen from one name prefix. An author names tensors and states their shapes; the host finds, checks and loads them.
//! Nothing here fails for a missing or misshapen tensor: the host collects every such difference and reports them together.

use crate::{
    Conv1d, Embedding, LayerNorm, Linear, MultiLinear, Parameter, Result, RmsNorm, Rope,
    abi::{self, At, Slot, SourceId},
    config::RopeScaling,
    tensor::Call,
};
use abi_stable::std_types::{RSlice, RStr};

/// More layers than any model has: a config that asks for more is broken, and would keep the host busy for hours.
pub(crate) const MOST_LAYERS: usize = 10_000;

/// The checkpoint below one prefix; `at` goes down, the rest name what lies there.
#[derive(Clone, Debug, Default)]
pub struct Weights {
    prefix: String,
}

impl Weights {
    /// What the names here begin with: empty, or ending in a dot.
    pub(crate) fn prefix(&self) -> &str {
        &self.prefix
    }

    fn full(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// The part of the checkpoint whose names begin with `name` and a dot. Thread: any.
    pub fn at(&self, name: &str) -> Weights {
        Weights { prefix: format!("{}{name}.", self.prefix) }
    }

    /// `n` blocks of one kind, named 0, 1, 2 .. Thread: any.
    pub fn each<T>(&self, n: usize, mut block: impl FnMut(&Weights, usize) -> Result<T>) -> Result<Vec<T>> {
        if n > MOST_LAYERS {
            return Err(
                format!("{}*: config.json asks for {n} blocks; at most {MOST_LAYERS} make sense", self.prefix).into()
            );
        }
        (0..n).map(|i| block(&self.at(&i.to_string()), i)).collect()
    }

    /// Whether the checkpoint has this tensor, for checkpoints that come in several layouts. Thread: new.
    #[track_caller]
    pub fn has(&self, name: &str) -> bool {
        let call = Call::current();
        call.ops.has()(call.ctx, RStr::from_str(&self.full(name)), At::caller()) != 0
    }

    /// Whether the checkpoint has this tensor in just this shape, for layouts whose names are alike. Thread: new.
    #[track_caller]
    pub fn has_shape(&self, name: &str, dims: &[usize]) -> bool {
        let (call, dims) = (Call::current(), dims.iter().map(|&d| d as u64).collect::<Vec<_>>());
        call.ops.has_shape()(call.ctx, RStr::from_str(&self.full(name)), RSlice::from_slice(&dims), At::caller()) != 0
    }

    /// The stored tensor of this name, to be transformed before use: `w.source("qkv_proj.weight").rows(0..64)`. Thread: new.
    #[track_caller]
    pub fn source(&self, name: &str) -> Source {
        let call = Call::current();
        Source(call.ops.source()(call.ctx, RStr::from_str(&self.full(name)), At::caller()))
    }

    /// `name.weight` `[outputs, inputs]` and, with `bias`, `name.bias` `[outputs]`. Thread: new.
    #[track_caller]
    pub fn linear(&self, name: &str, inputs: usize, outputs: usize, bias: bool) -> Linear {
        let weight = self.source(&format!("{name}.weight"));
        let bias = bias.then(|| self.source(&format!("{name}.bias")));
        Linear::of(weight, bias, inputs, outputs)
    }

    /// Several projections of one input, each with its outputs; the host may run them as one. Thread: new.
    #[track_caller]
    pub fn linears<const N: usize>(&self, inputs: usize, bias: bool, named: [(&str, usize); N]) -> [Linear; N] {
        let layers = named.map(|(name, outputs)| self.linear(name, inputs, outputs, bias));
        let (call, slots) = (Call::current(), layers.each_ref().map(|l| l.0));
        call.ops.fuse()(call.ctx, RSlice::from_slice(&slots), At::caller());
        layers
    }

    /// `name.weight` `[vocab, dim]`. Thread: new.
    #[track_caller]
    pub fn embedding(&self, name: &str, vocab: usize, dim: usize) -> Embedding {
        Embedding::of(self.source(&format!("{name}.weight")), vocab, dim)
    }

    /// `name.weight` `[dim]`. Thread: new.
    #[track_caller]
    pub fn rms_norm(&self, name: &str, dim: usize, eps: f32) -> RmsNorm {
        RmsNorm::of(self.source(&format!("{name}.weight")), dim, eps)
    }

    /// `name.weight` and, with `bias`, `name.bias`, both `[dim]`. Thread: new.
    #[track_caller]
    pub fn layer_norm(&self, name: &str, dim: usize, eps: f32, bias: bool) -> LayerNorm {
        let weight = self.source(&format!("{name}.weight"));
        let bias = if bias { self.source(&format!("{name}.bias")).0 } else { SourceId::NONE };
        LayerNorm(norm(abi::NORM_LAYER, weight.0, bias, dim, eps))
    }

    /// `name.weight` `[heads, outputs, inputs]`: one linear layer a head. Thread: new.
    #[track_caller]
    pub fn multi_linear(&self, name: &str, heads: usize, inputs: usize, outputs: usize) -> MultiLinear {
        MultiLinear::of(self.source(&format!("{name}.weight")), None, heads, inputs, outputs)
    }

    /// `name.weight` of `channels * kernel` numbers (`[channels, 1, kernel]` or `[channels, kernel, 1]`) and, with `bias`, `name.bias`
    /// `[channels]`. Thread: new.
    #[track_caller]
    pub fn conv1d(&self, name: &str, channels: usize, kernel: usize, bias: bool) -> Conv1d {
        let bias = bias.then(|| self.source(&format!("{name}.bias")));
        Conv1d::of(self.source(&format!("{name}.weight")), bias, channels, kernel)
    }

    /// A tensor used as it is. Thread: new.
    #[track_caller]
    pub fn tensor(&self, name: &str, dims: &[usize]) -> Parameter {
        Parameter::of(self.source(name), dims)
    }

    /// Rotary angles for the first `dims` lanes of a head. `scaling` is config.json's `rope_scaling`, of any type the host knows.
    /// Thread: new.
    #[track_caller]
    pub fn rope(&self, dims: usize, theta: f32, scaling: &Option<RopeScaling>) -> Rope {
        let (call, scaling) = (Call::current(), scaling.as_ref().map_or("", |s| &s.0));
        let slot = call.ops.rope_layer()(call.ctx, dims as u64, theta as f64, RStr::from_str(scaling), At::caller());
        Rope { slot, flags: 0 }
    }

    /// Tensors below this prefix that the architecture does not use: a vision tower, a training head. Thread: new.
    #[track_caller]
    pub fn ignore(&self, prefix: &str) {
        let call = Call::current();
        call.ops.ignore()(call.ctx, RStr::from_str(&self.full(prefix)), At::caller());
    }
}

/// A stored tensor with transforms, which the host applies when it reads the bytes, so that no copy is made for nothing.
#[derive(Debug, Clone, Copy)]
pub struct Source(pub(crate) SourceId);

impl Source {
    #[track_caller]
    fn transform(self, kind: u32, ints: &[u64], factor: f64) -> Source {
        let call = Call::current();
        Source(call.ops.transform()(call.ctx, self.0, kind, RSlice::from_slice(ints), factor, At::caller()))
    }

    /// Numbers `[len]` that a formula gives and no checkpoint stores. Thread: new.
    #[track_caller]
    pub fn numbers(values: &[f32]) -> Source {
        let call = Call::current();
        Source(call.ops.numbers()(call.ctx, RSlice::from_slice(values), At::caller()))
    }

    /// Some rows (entries of the first axis). Thread: new.
    #[track_caller]
    pub fn rows(self, range: std::ops::Range<usize>) -> Source {
        self.transform(abi::TRANSFORM_ROWS, &[range.start as u64, range.end as u64], 0.0)
    }

    /// Every element plus `number`: norms whose checkpoint stores `w - 1`. Thread: new.
    #[track_caller]
    pub fn plus(self, number: f32) -> Source {
        self.transform(abi::TRANSFORM_PLUS, &[], number.into())
    }

    /// Every element times `number`. Thread: new.
    #[track_caller]
    pub fn times(self, number: f32) -> Source {
        self.transform(abi::TRANSFORM_SCALE, &[], number.into())
    }

    /// The last two axes exchanged. Thread: new.
    #[track_caller]
    pub fn transpose(self) -> Source {
        self.transform(abi::TRANSFORM_TRANSPOSE, &[], 0.0)
    }

    /// The same elements in another shape. Thread: new.
    #[track_caller]
    pub fn reshape(self, dims: &[usize]) -> Source {
        self.transform(abi::TRANSFORM_RESHAPE, &dims.iter().map(|&d| d as u64).collect::<Vec<_>>(), 0.0)
    }

    /// Some entries of an axis. Thread: new.
    #[track_caller]
    pub fn narrow(self, axis: usize, range: std::ops::Range<usize>) -> Source {
        self.transform(abi::TRANSFORM_NARROW, &[axis as u64, range.start as u64, range.end as u64], 0.0)
    }

    /// Every `step`-th entry of an axis, from `start` on: one of several tensors that are stored in turns. Thread: new.
    #[track_caller]
    pub fn every(self, axis: usize, start: usize, step: usize) -> Source {
        self.transform(abi::TRANSFORM_EVERY, &[axis as u64, start as u64, step as u64], 0.0)
    }

    /// Each row (last axis) divided by its length, which counts as `least` at least. Thread: new.
    #[track_caller]
    pub fn unit_rows(self, least: f32) -> Source {
        self.transform(abi::TRANSFORM_UNIT_ROWS, &[], least.into())
    }

    /// Sources joined along an axis that they have. Thread: new.
    #[track_caller]
    pub fn join(parts: &[Source], axis: usize) -> Source {
        let (call, ids) = (Call::current(), parts.iter().map(|s| s.0).collect::<Vec<_>>());
        Source(call.ops.join()(call.ctx, RSlice::from_slice(&ids), axis as u64, At::caller()))
    }

    /// Sources of one shape along a new first axis. Thread: new.
    #[track_caller]
    pub fn stack(parts: &[Source]) -> Source {
        let (call, ids) = (Call::current(), parts.iter().map(|s| s.0).collect::<Vec<_>>());
        Source(call.ops.stack()(call.ctx, RSlice::from_slice(&ids), At::caller()))
    }
}

#[track_caller]
fn norm(kind: u32, weight: SourceId, bias: SourceId, dim: usize, eps: f32) -> Slot {
    let call = Call::current();
    // An eps printed as 1e-6 is meant as the decimal, which f32 cannot hold; the host computes with the nearest f32 either way.
    call.ops.norm_layer()(call.ctx, kind, weight, bias, dim as u64, eps as f64, At::caller())
}

impl Linear {
    /// A linear layer over transformed sources: weight `[outputs, inputs]`, bias `[outputs]`. Thread: new.
    #[track_caller]
    pub fn of(weight: Source, bias: Option<Source>, inputs: usize, outputs: usize) -> Linear {
        let (call, bias) = (Call::current(), bias.map_or(SourceId::NONE, |b| b.0));
        Linear(call.ops.linear_layer()(call.ctx, weight.0, bias, inputs as u64, outputs as u64, At::caller()))
    }
}

impl MultiLinear {
    /// One linear layer a head over transformed sources: weight `[heads, outputs, inputs]`, bias `[heads, outputs]`. Thread: new.
    #[track_caller]
    pub fn of(weight: Source, bias: Option<Source>, heads: usize, inputs: usize, outputs: usize) -> MultiLinear {
        let (call, bias) = (Call::current(), bias.map_or(SourceId::NONE, |b| b.0));
        let layer = call.ops.multi_linear_layer();
        MultiLinear(layer(call.ctx, weight.0, bias, heads as u64, inputs as u64, outputs as u64, At::caller()))
    }
}

impl Conv1d {
    /// A convolution over transformed sources: weight of `channels * kernel` numbers, channel by channel, bias `[channels]`. Thread: new.
    #[track_caller]
    pub fn of(weight: Source, bias: Option<Source>, channels: usize, kernel: usize) -> Conv1d {
        let (call, bias) = (Call::current(), bias.map_or(SourceId::NONE, |b| b.0));
        let layer = call.ops.conv1d_layer();
        Conv1d { slot: layer(call.ctx, weight.0, bias, channels as u64, kernel as u64, At::caller()), channels, kernel }
    }
}

impl Embedding {
    /// A table over a transformed source `[vocab, dim]`. Thread: new.
    #[track_caller]
    pub fn of(weight: Source, vocab: usize, dim: usize) -> Embedding {
        let call = Call::current();
        Embedding(call.ops.embedding_layer()(call.ctx, weight.0, vocab as u64, dim as u64, At::caller()))
    }
}

impl LayerNorm {
    /// A norm over transformed sources `[dim]`. Thread: new.
    #[track_caller]
    pub fn of(weight: Source, bias: Option<Source>, dim: usize, eps: f32) -> LayerNorm {
        LayerNorm(norm(abi::NORM_LAYER, weight.0, bias.map_or(SourceId::NONE, |b| b.0), dim, eps))
    }

    /// A norm without weight and bias.
    #[track_caller]
    pub fn plain(dim: usize, eps: f32) -> LayerNorm {
        LayerNorm(norm(abi::NORM_LAYER, SourceId::NONE, SourceId::NONE, dim, eps))
    }
}

impl RmsNorm {
    /// A norm over a transformed weight `[dim]`. Thread: new.
    #[track_caller]
    pub fn of(weight: Source, dim: usize, eps: f32) -> RmsNorm {
        RmsNorm(norm(abi::NORM_RMS, weight.0, SourceId::NONE, dim, eps))
    }

    /// A norm without weight.
    #[track_caller]
    pub fn plain(dim: usize, eps: f32) -> RmsNorm {
        RmsNorm(norm(abi::NORM_RMS, SourceId::NONE, SourceId::NONE, dim, eps))
    }
}

impl Parameter {
    /// A transformed source as a tensor of this shape. Thread: new.
    #[track_caller]
    pub fn of(source: Source, dims: &[usize]) -> Parameter {
        let (call, dims) = (Call::current(), dims.iter().map(|&d| d as u64).collect::<Vec<_>>());
        Parameter(call.ops.parameter_layer()(call.ctx, source.0, RSlice::from_slice(&dims), At::caller()))
    }
}
