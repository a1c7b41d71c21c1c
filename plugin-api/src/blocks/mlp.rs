//! Feed-forward blocks: with a gate (SwiGLU and its kin) and without.

use crate::{Activation, Linear, Tensor, Weights};

/// The gated feed-forward layer, `(act(x Wgate) * (x Wup)) · Wdown`: SwiGLU, GEGLU and so on. <https://arxiv.org/abs/2002.05202>
#[derive(Debug)]
pub struct GatedMlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
    act: Activation,
    /// Sharpens the gate, where it is one by sigmoid.
    alpha: Option<f32>,
    limit: Option<f32>,
}

impl GatedMlp {
    /// `gate_proj` and `up_proj` `[hidden, dim]`, `down_proj` `[dim, hidden]`, all with `bias` or none. Thread: new.
    #[track_caller]
    pub fn new(w: &Weights, dim: usize, hidden: usize, bias: bool, act: Activation) -> Self {
        Self::named(w, ["gate_proj", "up_proj", "down_proj"], dim, hidden, bias, act)
    }

    /// The same under other names, in the same order. Thread: new.
    #[track_caller]
    pub fn named(w: &Weights, names: [&str; 3], dim: usize, hidden: usize, bias: bool, act: Activation) -> Self {
        let [gate_proj, up_proj] = w.linears(dim, bias, [(names[0], hidden), (names[1], hidden)]);
        Self::of(gate_proj, up_proj, w.linear(names[2], hidden, dim, bias), act)
    }

    /// The block of projections that the author found: two `[hidden, dim]`, one `[dim, hidden]`.
    pub fn of(gate_proj: Linear, up_proj: Linear, down_proj: Linear, act: Activation) -> Self {
        Self { gate_proj, up_proj, down_proj, act, alpha: None, limit: None }
    }

    /// Gate and up stored as one `name.weight` `[2 * hidden, dim]`, gate first, beside `down_proj`; no biases. Thread: new.
    #[track_caller]
    pub fn fused(w: &Weights, name: &str, dim: usize, hidden: usize, act: Activation) -> Self {
        let gate_up = w.source(&format!("{name}.weight"));
        let gate_proj = Linear::of(gate_up.rows(0..hidden), None, dim, hidden);
        let up_proj = Linear::of(gate_up.rows(hidden..2 * hidden), None, dim, hidden);
        Self::of(gate_proj, up_proj, w.linear("down_proj", hidden, dim, false), act)
    }

    /// Holds the gate's input up to `limit`, and what it multiplies within ± `limit`.
    pub fn bounded(self, limit: f32) -> Self {
        Self { limit: Some(limit), ..self }
    }

    /// `g sigmoid(alpha g) * (u + 1)` in place of `act(g) * u`, with g up to `limit` and u within ± `limit`, as in
    /// [`ExpertKind::ClampedSwiglu`](crate::ExpertKind::ClampedSwiglu).
    pub fn clamped(self, alpha: f32, limit: f32) -> Self {
        Self { alpha: Some(alpha), limit: Some(limit), ..self }
    }

    /// `[tokens, dim]` -> `[tokens, dim]`. Thread: step.
    #[track_caller]
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let (gate, up) = (self.gate_proj.forward(x), self.up_proj.forward(x));
        let (gate, up) = match self.limit {
            Some(limit) => (gate.clamp(f32::MIN, limit), up.clamp(-limit, limit)),
            None => (gate, up),
        };
        let gated = match (self.alpha, self.act) {
            (Some(alpha), _) => &gate * (&gate * alpha).sigmoid() * (up + 1.0),
            (None, Activation::Silu) => gate.swiglu(&up),
            (None, Activation::GeluTanh) => gate.geglu(&up),
            (None, other) => other.forward(&gate) * up,
        };
        self.down_proj.forward(&gated)
    }
}

/// The feed-forward layer without a gate, `act(x Wup) · Wdown`.
#[derive(Debug)]
pub struct Mlp {
    up: Linear,
    down: Linear,
    act: Activation,
}

impl Mlp {
    /// The two projections by their names, `[hidden, dim]` and `[dim, hidden]`, both with `bias` or none. Thread: new.
    #[track_caller]
    pub fn new(w: &Weights, names: [&str; 2], dim: usize, hidden: usize, bias: bool, act: Activation) -> Self {
        Self { up: w.linear(names[0], dim, hidden, bias), down: w.linear(names[1], hidden, dim, bias), act }
    }

    /// `[tokens, dim]` -> `[tokens, dim]`. Thread: step.
    #[track_caller]
    pub fn forward(&self, x: &Tensor) -> Tensor {
        self.down.forward(&self.act.forward(&self.up.forward(x)))
    }
}
