//! Feed-forward experts, of which each token uses a few. Checkpoints store them in half a dozen layouts (one by one, stacked, gate and up
//! fused, packed); the host knows these by their names, so an author states only the shape.

use crate::{
    Source, Weights,
    abi::{self, At, ExpertsSpec, Slot, SourceId, SpecRef},
    tensor::{Call, Tensor},
};
use abi_stable::std_types::{RSlice, RStr};

/// What an expert computes between its projections; g = gate x, u = up x.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ExpertKind {
    /// `down(silu(g) * u)`
    Swiglu,
    /// `down(gelu_tanh(g) * u)`
    Geglu,
    /// `down(g sigmoid(alpha g) * (u + 1))`, with g up to `limit` and u within ± `limit`
    ClampedSwiglu {
        /// Sharpens the gate.
        alpha: f32,
        /// Bounds both.
        limit: f32,
    },
    /// `down(min(silu(g), limit) * clamp(u, ± limit))`
    LimitedSwiglu {
        /// Bounds both.
        limit: f32,
    },
    /// `down(silu(g) * u)`, with g up to `limit` and u within ± `limit`
    BoundedSwiglu {
        /// Bounds both.
        limit: f32,
    },
    /// `down(beta tanh(g / beta) sigmoid(g) * linear_beta tanh(u / linear_beta))`; without `linear_beta`, u as it is
    Situ {
        /// Bounds the gate.
        beta: f32,
        /// Bounds what it lets through.
        linear_beta: Option<f32>,
    },
    /// `down(relu(u)²)`, no gate
    Relu2,
    /// `down(gelu_tanh(u))`, no gate
    GeluTanh,
    /// `down(silu(u))`, no gate
    Silu,
}

/// The shape of a block of routed experts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ExpertsShape {
    /// How many experts have weights.
    pub experts: usize,
    /// Width of the model.
    pub dim: usize,
    /// Width inside an expert.
    pub hidden: usize,
    /// What an expert computes.
    pub kind: ExpertKind,
    /// Whether every projection has a bias.
    pub bias: bool,
    /// Choices from `experts` on, so many, give back their input: experts without weights.
    pub identity: usize,
    /// The router's weight multiplies an expert's input, not its output.
    pub scaled_input: bool,
    /// Where gate and up are stored as one tensor, their rows take turns.
    pub in_turns: bool,
}

impl ExpertsShape {
    /// SwiGLU experts without biases.
    pub fn new(experts: usize, dim: usize, hidden: usize) -> Self {
        let kind = ExpertKind::Swiglu;
        ExpertsShape { experts, dim, hidden, kind, bias: false, identity: 0, scaled_input: false, in_turns: false }
    }

    /// The same of another kind.
    pub fn kind(self, kind: ExpertKind) -> Self {
        ExpertsShape { kind, ..self }
    }

    fn spec(&self) -> ExpertsSpec {
        let (activation, alpha, limit) = match self.kind {
            ExpertKind::Swiglu => (abi::EXPERTS_SWIGLU, 0.0, 0.0),
            ExpertKind::Geglu => (abi::EXPERTS_GEGLU, 0.0, 0.0),
            ExpertKind::ClampedSwiglu { alpha, limit } => (abi::EXPERTS_CLAMPED_SWIGLU, alpha, limit),
            ExpertKind::LimitedSwiglu { limit } => (abi::EXPERTS_LIMITED_SWIGLU, 0.0, limit),
            ExpertKind::BoundedSwiglu { limit } => (abi::EXPERTS_BOUNDED_SWIGLU, 0.0, limit),
            ExpertKind::Situ { beta, linear_beta } => (abi::EXPERTS_SITU, beta, linear_beta.unwrap_or(0.0)),
            ExpertKind::Relu2 => (abi::EXPERTS_RELU2, 0.0, 0.0),
            ExpertKind::GeluTanh => (abi::EXPERTS_GELU_TANH, 0.0, 0.0),
            ExpertKind::Silu => (abi::EXPERTS_SILU, 0.0, 0.0),
        };
        let flag = |is: bool, flag: u32| if is { flag } else { 0 };
        ExpertsSpec {
            activation,
            flags: flag(self.bias, abi::EXPERTS_WITH_BIAS)
                | flag(self.scaled_input, abi::EXPERTS_WITH_SCALED_INPUT)
                | flag(self.in_turns, abi::EXPERTS_IN_TURNS),
            experts: self.experts as u64,
            dim: self.dim as u64,
            hidden: self.hidden as u64,
            identity: self.identity as u64,
            limit,
            alpha,
        }
    }
}

/// Feed-forward experts, of which each token uses a few.
#[derive(Debug)]
pub struct Experts(pub(crate) Slot);

impl Experts {
    /// Experts from sources that the author found: gate (none for kinds without one), up and down, stacked
    /// `[experts, hidden, dim]` and `[experts, dim, hidden]`, and with `shape.bias` their biases `[experts, hidden]` and `[experts, dim]`.
    /// Thread: new.
    #[track_caller]
    pub fn of(
        shape: ExpertsShape,
        gate: Option<Source>,
        up: Source,
        down: Source,
        biases: [Option<Source>; 3],
    ) -> Self {
        let call = Call::current();
        let id = |source: Option<Source>| source.map_or(SourceId::NONE, |s| s.0);
        let [gate_bias, up_bias, down_bias] = biases.map(id);
        let sources = [id(gate), up.0, down.0, gate_bias, up_bias, down_bias];
        let spec = shape.spec();
        Experts(call.ops.experts_from()(call.ctx, RSlice::from_slice(&sources), SpecRef::new(&spec), At::caller()))
    }

    /// Runs the chosen experts and adds up their results by weight: x `[tokens, dim]`, chosen and weights `[tokens, k]` -> `[tokens, dim]`.
    /// Thread: step.
    #[track_caller]
    pub fn forward(&self, x: &Tensor, chosen: &Tensor, weights: &Tensor) -> Tensor {
        let call = Call::current();
        Tensor::own(call.ops.experts()(call.ctx, self.0, x.handle(), chosen.handle(), weights.handle(), At::caller()))
    }
}

impl Weights {
    /// Routed experts below this prefix, in whichever layout the checkpoint has: `switch_mlp.gate_proj.weight` (stacked),
    /// `experts.0.gate_proj.weight` or `experts.0.w1.weight` (one by one), `experts.gate_up_proj` (stacked and fused) and so on.
    /// Thread: new.
    #[track_caller]
    pub fn experts(&self, shape: ExpertsShape) -> Experts {
        let (call, spec) = (Call::current(), shape.spec());
        let prefix = RStr::from_str(self.prefix());
        Experts(call.ops.experts_layer()(call.ctx, prefix, SpecRef::new(&spec), At::caller()))
    }
}
