//! Routed experts in a checkpoint: the layouts in which files come, found by their names below a prefix. A fused tensor is cut by a
//! recipe, which copies nothing where its halves lie one below the other.

use super::building::{Building, MOST_SLOTS};
use crate::{
    layers::experts::{Activation, Kind},
    weights::{
        plan::{Projection, Wanted},
        recipe::Recipe,
    },
};
use plugin_api::abi::{self, ExpertsSpec, Slot, SourceId, SpecRef};
use std::sync::Arc;

/// Modules that hold all experts of a layer, one stack a projection.
const STACKS: [&str; 4] = ["switch_mlp", "experts", "switch_glu", "experts.switch_glu"];
/// gate, up and down, as stacks have them.
const NAMES: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];
/// Up and down of stacks without a gate.
const PLAIN_NAMES: [[&str; 2]; 2] = [["up_proj", "down_proj"], ["fc1", "fc2"]];
/// Where single experts lie, and what gate, up and down are called there.
const SINGLE: [(&str, [&str; 3]); 3] =
    [("experts", NAMES), ("experts", ["w1", "w3", "w2"]), ("experts", ["w1", "v1", "w2"])];
/// The same without a gate.
const SINGLE_PLAIN: [(&str, [&str; 2]); 3] =
    [("experts", ["up_proj", "down_proj"]), ("experts", ["fc1", "fc2"]), ("mlp", ["fc1", "fc2"])];
/// Gate and up in one tensor, and down; and their biases.
const FUSED: [[&str; 4]; 3] = [
    ["experts.gate_up_proj", "experts.down_proj", "experts.gate_up_proj_bias", "experts.down_proj_bias"],
    ["experts.gate_up_proj.weight", "experts.down_proj.weight", "experts.gate_up_proj.bias", "experts.down_proj.bias"],
    ["input_linear.weight", "output_linear.weight", "input_linear.bias", "output_linear.bias"],
];

/// gate, where there is one, up and down.
type Found = (Option<Projection>, Projection, Projection);

fn stored(name: String) -> Arc<Recipe> {
    Arc::new(Recipe::Stored(name))
}

impl Building<'_> {
    /// Experts below `prefix`, in the layout that is there; where none is, the report names single ones.
    pub fn experts_layer(&mut self, prefix: &str, spec: SpecRef<'_>) -> Slot {
        let Some((spec, kind)) = self.experts_spec(prefix, spec) else { return Slot(u32::MAX) };
        let projections = self.find_experts(prefix, &spec, kind.activation.is_gated());
        self.experts_slot(&spec, kind, projections)
    }

    /// Experts of sources that the plugin named.
    pub fn experts_from(&mut self, sources: &[SourceId], spec: SpecRef<'_>) -> Slot {
        let Some((spec, kind)) = self.experts_spec("experts", spec) else { return Slot(u32::MAX) };
        let &[gate, up, down, gate_bias, up_bias, down_bias] = sources else {
            self.complain(format!("experts of {} sources: there are 6, some of them none", sources.len()));
            return Slot(u32::MAX);
        };
        if (gate == SourceId::NONE) == kind.activation.is_gated() {
            let name = self.recipe(up).name().to_owned();
            self.complain(format!("{name}: experts with {:?} are given a gate or lack one", kind.activation));
            return Slot(u32::MAX);
        }
        let mut projection = |weight: SourceId, bias: SourceId| {
            let weight = (*self.recipe(weight)).clone();
            Projection { weight, bias: self.some(bias), modules: Vec::new() }
        };
        let gate = kind.activation.is_gated().then(|| projection(gate, gate_bias));
        let (up, down) = (projection(up, up_bias), projection(down, down_bias));
        self.experts_slot(&spec, kind, (gate, up, down))
    }

    fn experts_slot(&mut self, spec: &ExpertsSpec, kind: Kind, (gate, up, down): Found) -> Slot {
        let (experts, dim, hidden) = (spec.experts as usize, spec.dim as usize, spec.hidden as usize);
        self.slot(Wanted::Experts { gate, up, down, experts, dim, hidden, kind })
    }

    fn experts_spec(&mut self, at: &str, spec: SpecRef<'_>) -> Option<(ExpertsSpec, Kind)> {
        let known = abi::EXPERTS_WITH_BIAS | abi::EXPERTS_WITH_SCALED_INPUT | abi::EXPERTS_IN_TURNS;
        let Some(spec) = spec.read::<ExpertsSpec>().filter(|spec| spec.flags & !known == 0) else {
            self.complain(format!(
                "{at}: the plugin asks for experts in a way that this dylm does not know; update dylm"
            ));
            return None;
        };
        let limit = if spec.limit > 0.0 { spec.limit } else { f32::INFINITY };
        let activation = match spec.activation {
            abi::EXPERTS_SWIGLU => Activation::Swiglu,
            abi::EXPERTS_GEGLU => Activation::Geglu,
            abi::EXPERTS_CLAMPED_SWIGLU => Activation::ClampedSwiglu { alpha: spec.alpha, limit },
            abi::EXPERTS_LIMITED_SWIGLU => Activation::LimitedSwiglu { limit },
            abi::EXPERTS_RELU2 => Activation::Relu2,
            abi::EXPERTS_GELU_TANH => Activation::GeluTanh,
            abi::EXPERTS_SILU => Activation::Silu,
            other => {
                self.complain(format!(
                    "{at}: the plugin asks for experts of kind {other}, which this dylm does not have"
                ));
                return None;
            }
        };
        // Each expert is some sources, which count like all others.
        let experts = usize::try_from(spec.experts).unwrap_or(usize::MAX);
        self.expert_sources = self.expert_sources.saturating_add(experts.saturating_mul(3));
        if self.expert_sources > MOST_SLOTS {
            self.complain(format!("{at}: {experts} experts are more than any model has"));
            return None;
        }
        let scaled_input = spec.flags & abi::EXPERTS_WITH_SCALED_INPUT != 0;
        let identity = usize::try_from(spec.identity).unwrap_or(usize::MAX).min(MOST_SLOTS);
        Some((spec, Kind { activation, identity, scaled_input }))
    }

    fn find_experts(&self, prefix: &str, spec: &ExpertsSpec, gated: bool) -> Found {
        let has = |name: &str| self.has(&format!("{prefix}{name}"));
        let biased = spec.flags & abi::EXPERTS_WITH_BIAS != 0;
        if gated {
            let is_fused = |names: &&[&str; 4]| has(names[0]) || has(&format!("{}_blocks", names[0]));
            if let Some(names) = FUSED.iter().find(is_fused) {
                return self.fused(prefix, names, spec, biased);
            }
        }
        let modules = |name: &str| STACKS.map(|stack| format!("{prefix}{stack}.{name}")).to_vec();
        let stack_of = |names: &[&'static str]| -> Option<Vec<Projection>> {
            let stack = STACKS.iter().find(|stack| names.iter().all(|n| has(&format!("{stack}.{n}.weight"))))?;
            let recipe = |name: &str, part: &str| Recipe::Stored(format!("{prefix}{stack}.{name}.{part}"));
            let projection = |name: &&str| Projection {
                weight: recipe(name, "weight"),
                bias: biased.then(|| recipe(name, "bias")),
                modules: modules(name),
            };
            Some(names.iter().map(projection).collect())
        };
        let single = |place: &str, names: &[&'static str], stacked: &[&'static str]| -> Vec<Projection> {
            let recipe = |name: &str, part: &str| {
                let one = |e| stored(format!("{prefix}{place}.{e}.{name}.{part}"));
                Recipe::Stack((0..spec.experts).map(one).collect())
            };
            let projection = |(name, stacked): (&&str, &&str)| Projection {
                weight: recipe(name, "weight"),
                bias: biased.then(|| recipe(name, "bias")),
                modules: modules(stacked),
            };
            names.iter().zip(stacked).map(projection).collect()
        };
        let is_there = |place: &str, names: &[&str]| names.iter().all(|n| has(&format!("{place}.0.{n}.weight")));
        let found = if gated {
            stack_of(&NAMES).unwrap_or_else(|| {
                let layout = SINGLE.iter().find(|(place, names)| is_there(place, names)).unwrap_or(&SINGLE[0]);
                single(layout.0, &layout.1, &NAMES)
            })
        } else {
            PLAIN_NAMES.iter().find_map(|names| stack_of(names)).unwrap_or_else(|| {
                let layout = SINGLE_PLAIN.iter().find(|(place, names)| is_there(place, names));
                let (place, names) = layout.unwrap_or(&SINGLE_PLAIN[0]);
                single(place, names, &PLAIN_NAMES[1])
            })
        };
        let mut found = found.into_iter();
        let gate = if gated { found.next() } else { None };
        let mut next = || {
            found.next().unwrap_or_else(|| Projection { weight: Recipe::Stack(vec![]), bias: None, modules: vec![] })
        };
        (gate, next(), next())
    }

    /// gate_up `[experts, 2 hidden, dim]` and down `[experts, dim, hidden]`, or both turned (`[experts, dim, 2 hidden]`,
    /// `[experts, hidden, dim]`), which the two shapes always tell apart: at most one of them can be square.
    fn fused(&self, prefix: &str, names: &[&str; 4], spec: &ExpertsSpec, biased: bool) -> Found {
        let [gate_up, down, gate_up_bias, down_bias] = names.map(|name| stored(format!("{prefix}{name}")));
        let (experts, dim, hidden) = (spec.experts as usize, spec.dim as usize, spec.hidden as usize);
        let is = |recipe: &Recipe, shape: [usize; 3]| self.pantry.shape(recipe).is_ok_and(|found| found == shape);
        let is_turned = is(&gate_up, [experts, dim, hidden.saturating_mul(2)]) && is(&down, [experts, hidden, dim]);
        let turn = |recipe: Arc<Recipe>| if is_turned { Arc::new(Recipe::Transpose(recipe)) } else { recipe };
        let half = |of: &Arc<Recipe>, half: usize| match spec.flags & abi::EXPERTS_IN_TURNS {
            0 => Recipe::Narrow(of.clone(), 1, half * hidden, half.saturating_add(1).saturating_mul(hidden)),
            _ => Recipe::Every(of.clone(), 1, half, 2),
        };
        let gate_up = turn(gate_up);
        let modules = |name: &str| STACKS.map(|stack| format!("{prefix}{stack}.{name}")).to_vec();
        let inner = |i: usize| Projection {
            weight: half(&gate_up, i),
            bias: biased.then(|| half(&gate_up_bias, i)),
            modules: modules(NAMES[i]),
        };
        let down = Projection {
            weight: (*turn(down)).clone(),
            bias: biased.then(|| (*down_bias).clone()),
            modules: modules(NAMES[2]),
        };
        (Some(inner(0)), inner(1), down)
    }
}
