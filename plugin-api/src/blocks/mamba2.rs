//! The mixer of Mamba 2: one decay a head, so that the scan is a masked attention too, and a norm under the gate's control; which of gate
//! and norm comes first, and over how many groups of lanes it goes, differs from model to model. <https://arxiv.org/abs/2405.21060>

use crate::{
    Activation, Cache, Conv1d, Layer, Linear, Mixer, Parameter, RmsNorm, Tensor, Weights,
    config::{Json, Read},
};

/// config.json's `time_step_limit`: what step widths are held between.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TimeStepLimit(pub f32, pub f32);

impl TimeStepLimit {
    /// No limit: step widths are never negative.
    pub const NONE: Self = TimeStepLimit(0.0, f32::MAX);
}

impl Read for TimeStepLimit {
    const WHAT: &'static str = "two numbers";
    fn read(json: &Json) -> Option<Self> {
        // transformers 5 writes infinity as an object that names it.
        let number = |json: &Json| match json.get("__float__").and_then(Json::as_str) {
            Some(text) => text.parse::<f64>().ok(),
            None => json.as_f64(),
        };
        match json.as_array()?.as_slice() {
            [low, high] => Some(TimeStepLimit(number(low)? as f32, number(high)?.min(f32::MAX.into()) as f32)),
            _ => None,
        }
    }
}

/// An RMS norm and a gate, `act(z)`, of the same tensor.
#[derive(Debug)]
pub struct GatedNorm {
    norm: RmsNorm,
    groups: Option<(usize, Parameter)>,
    gate_first: bool,
}

impl GatedNorm {
    /// `name.weight` `[dim]`: `norm(x * silu(z))`, each of `groups` equal parts of the lanes normalized alone. Thread: new.
    #[track_caller]
    pub fn new(w: &Weights, name: &str, dim: usize, groups: usize, eps: f32) -> Self {
        let (norm, groups) = match groups {
            0 | 1 => (w.rms_norm(name, dim, eps), None),
            n => (RmsNorm::plain(dim / n, eps), Some((n, w.tensor(&format!("{name}.weight"), &[dim])))),
        };
        Self { norm, groups, gate_first: true }
    }

    /// `norm(x) * silu(z)` if so.
    pub fn before_gate(self, yes: bool) -> Self {
        Self { gate_first: !yes, ..self }
    }

    /// x and z `[tokens, dim]` -> `[tokens, dim]`. Thread: step.
    #[track_caller]
    pub fn forward(&self, x: &Tensor, z: &Tensor) -> Tensor {
        if self.gate_first { self.normalized(&z.swiglu(x)) } else { z.swiglu(&self.normalized(x)) }
    }

    #[track_caller]
    fn normalized(&self, x: &Tensor) -> Tensor {
        match &self.groups {
            None => self.norm.forward(x),
            Some((n, weight)) => self.norm.forward(&x.unflatten(*n)).flatten() * weight.tensor(),
        }
    }
}

/// The shape of a mixer.
#[derive(Debug, Clone, Copy)]
pub struct Mamba2Shape {
    /// Width of the model.
    pub dim: usize,
    /// Heads of the scan.
    pub heads: usize,
    /// Lanes of a head.
    pub head_dim: usize,
    /// Heads of B and C, which divide those of x.
    pub groups: usize,
    /// Numbers of state a lane.
    pub state: usize,
    /// Tokens that the convolution reaches over.
    pub kernel: usize,
    /// Whether `in_proj` has a bias.
    pub bias: bool,
    /// Whether `out_proj` has one.
    pub out_bias: bool,
    /// Whether the convolution has one.
    pub conv_bias: bool,
    /// After the convolution.
    pub act: Activation,
    /// Of the step widths.
    pub time_step_limit: TimeStepLimit,
}

impl Mamba2Shape {
    /// Lanes of x.
    pub fn inner(&self) -> usize {
        self.heads * self.head_dim
    }
}

/// `out_proj(norm(ssd(x, dt, B, C) + D x, z))`, with `z, xBC, dt = in_proj(..)`, `x, B, C = act(conv1d(xBC))`,
/// `dt = softplus(dt + dt_bias)`, `A = -exp(A_log)`.
#[derive(Debug)]
pub struct Mamba2 {
    in_proj: Linear,
    conv1d: Conv1d,
    dt_bias: Parameter,
    a_log: Parameter,
    d: Parameter,
    norm: Option<GatedNorm>,
    out_proj: Linear,
    scales: Option<[f32; 5]>,
    shape: Mamba2Shape,
}

impl Mamba2 {
    /// Under the names of the paper's code: `in_proj`, `conv1d`, `dt_bias`, `A_log`, `D`, `out_proj`; without a norm only the gate is
    /// left. Thread: new.
    #[track_caller]
    pub fn new(w: &Weights, shape: Mamba2Shape, norm: impl Into<Option<GatedNorm>>) -> Self {
        let Mamba2Shape { dim, heads, groups, state, .. } = shape;
        let (inner, channels) = (shape.inner(), shape.inner() + 2 * groups * state);
        Self {
            in_proj: w.linear("in_proj", dim, inner + channels + heads, shape.bias),
            conv1d: w.conv1d("conv1d", channels, shape.kernel, shape.conv_bias),
            dt_bias: w.tensor("dt_bias", &[heads]),
            a_log: w.tensor("A_log", &[heads]),
            d: Parameter::of(w.source("D").reshape(&[heads, 1]), &[heads, 1]),
            norm: norm.into(),
            out_proj: w.linear("out_proj", inner, dim, shape.out_bias),
            scales: None,
            shape,
        }
    }

    /// Multiplies z, x, B, C and dt as `in_proj` gives them.
    pub fn scales(self, scales: [f32; 5]) -> Self {
        Self { scales: Some(scales), ..self }
    }

    /// z, what the convolution takes, and dt.
    #[track_caller]
    fn project(&self, x: &Tensor) -> [Tensor; 3] {
        let Mamba2Shape { heads, groups, state, .. } = self.shape;
        let (inner, of_groups) = (self.shape.inner(), groups * state);
        let projected = self.in_proj.forward(x);
        let channels = inner + 2 * of_groups;
        let Some([z, x, b, c, dt]) = self.scales else {
            let parts = [(0, inner), (inner, channels), (inner + channels, heads)];
            return parts.map(|(start, len)| projected.narrow(start, len));
        };
        let after_x = 2 * inner;
        let lens = [(z, 0, inner), (x, inner, inner), (b, after_x, of_groups), (c, after_x + of_groups, of_groups)];
        let [z, x, b, c] = lens.map(|(scale, start, len)| projected.narrow(start, len) * scale);
        [z, Tensor::concat(&[&x, &b, &c]), projected.narrow(inner + channels, heads) * dt]
    }
}

impl Mixer for Mamba2 {
    #[track_caller]
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let Mamba2Shape { head_dim, groups, state, act, time_step_limit: TimeStepLimit(low, high), .. } = self.shape;
        let (inner, of_groups) = (self.shape.inner(), groups * state);
        let [z, channels, dt] = self.project(x);
        let channels = act.forward(&layer.conv1d(&self.conv1d, &channels));
        let x = channels.narrow(0, inner).split_heads(head_dim);
        let [b, c] = [inner, inner + of_groups].map(|start| channels.narrow(start, of_groups).unflatten(groups));
        let dt = (dt + self.dt_bias.tensor()).softplus().clamp(low, high);
        let scanned = layer.ssd(&x, &dt, &-self.a_log.tensor().exp(), &b, &c) + x * self.d.tensor();
        let scanned = scanned.merge_heads();
        self.out_proj.forward(&match &self.norm {
            Some(norm) => norm.forward(&scanned, &z),
            None => z.swiglu(&scanned),
        })
    }

    fn cache(&self) -> Cache {
        let Mamba2Shape { heads, head_dim, state, .. } = self.shape;
        self.conv1d.cache().and(Cache::state(&[heads, head_dim, state]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::key;

    #[test]
    fn a_limit_may_be_infinite_in_every_spelling() {
        let limit = |text: &str| {
            let json: Json = serde_json::from_str(text).unwrap();
            key::<TimeStepLimit>(&json, "", "limit")
        };
        assert_eq!(limit(r#"{"limit": [0.5, 2]}"#), Ok(Some(TimeStepLimit(0.5, 2.0))));
        assert_eq!(limit(r#"{"limit": [0.0, 1.7976931348623157e308]}"#), Ok(Some(TimeStepLimit::NONE)));
        assert_eq!(limit(r#"{"limit": [0.0, {"__float__": "Infinity"}]}"#), Ok(Some(TimeStepLimit::NONE)));
        assert!(limit(r#"{"limit": [0.0]}"#).unwrap_err().0.ends_with("it should be two numbers"));
    }
}
