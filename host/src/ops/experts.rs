//! Routed experts in a checkpoint: the layouts in which files come, found by their names below a prefix. A fused tensor is cut by a
//! recipe, which copies nothing where its halves lie one below the other.

use super::building::{Building, MOST_SLOTS};
use crate::{
    layers::experts::{Activation, Kind},
    weights::{
        plan::{Projection, Projections, Wanted},
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
        self.experts_slot(&spec, kind, Projections { gate, up, down })
    }

    fn experts_slot(&mut self, spec: &ExpertsSpec, kind: Kind, projections: Projections) -> Slot {
        let (experts, dim, hidden) = (spec.experts as usize, spec.dim as usize, spec.hidden as usize);
        self.slot(Wanted::Experts { projections: projections.into(), experts, dim, hidden, kind })
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
            abi::EXPERTS_BOUNDED_SWIGLU => Activation::BoundedSwiglu { limit },
            abi::EXPERTS_SITU => Activation::Situ { beta: spec.alpha, linear_beta: limit },
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

    fn find_experts(&self, prefix: &str, spec: &ExpertsSpec, gated: bool) -> Projections {
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
        Projections { gate, up: next(), down: next() }
    }

    /// gate_up `[experts, 2 hidden, dim]` and down `[experts, dim, hidden]`, or both turned (`[experts, dim, 2 hidden]`,
    /// `[experts, hidden, dim]`), which the two shapes always tell apart: at most one of them can be square.
    fn fused(&self, prefix: &str, names: &[&str; 4], spec: &ExpertsSpec, biased: bool) -> Projections {
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
        Projections { gate: Some(inner(0)), up: inner(1), down }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::{Checkpoint, Dtype, Stored, plan::Report, recipe::Pantry};

    const SPEC: ExpertsSpec = ExpertsSpec {
        activation: abi::EXPERTS_SWIGLU,
        flags: 0,
        experts: 2,
        dim: 4,
        hidden: 3,
        identity: 0,
        limit: 0.0,
        alpha: 0.0,
    };

    fn report(spec: ExpertsSpec, names: &[(&str, &[usize])]) -> Report {
        let mut checkpoint = Checkpoint::default();
        for (name, shape) in names {
            let bytes = vec![0u8; shape.iter().product::<usize>() * 4].into();
            let stored = Stored::new(Dtype::F32, shape.to_vec(), bytes, std::path::Path::new("made").into()).unwrap();
            checkpoint.insert(format!("mlp.{name}"), stored).unwrap();
        }
        let (pantry, config) = (Pantry { checkpoint, quantization: None }, serde_json::Value::Null);
        let mut building = Building::new(&pantry, &config);
        building.experts_layer("mlp.", SpecRef::new(&spec));
        let (wanted, complaints) = (std::mem::take(&mut building.wanted), std::mem::take(&mut building.complaints));
        Report::new(&wanted, &pantry, &[], complaints)
    }

    #[test]
    fn gated_experts_are_found_in_every_layout() {
        let (into, back): (&[usize], &[usize]) = (&[2, 3, 4], &[2, 4, 3]);
        for stack in STACKS {
            let names = NAMES.map(|name| format!("{stack}.{name}.weight"));
            let tensors = [(&*names[0], into), (&*names[1], into), (&*names[2], back)];
            assert_eq!(report(SPEC, &tensors), Report::default(), "{stack}");
        }
        for (place, parts) in SINGLE {
            let names = [0, 1].map(|e| parts.map(|part| format!("{place}.{e}.{part}.weight")));
            let one = |[gate, up, down]: &'_ [String; 3]| {
                [(gate.clone(), [3, 4]), (up.clone(), [3, 4]), (down.clone(), [4, 3])]
            };
            let tensors = names.iter().flat_map(one).collect::<Vec<_>>();
            let tensors = tensors.iter().map(|(name, shape)| (&**name, &shape[..])).collect::<Vec<_>>();
            assert_eq!(report(SPEC, &tensors), Report::default(), "{parts:?}");
        }
        let turns = ExpertsSpec { flags: abi::EXPERTS_IN_TURNS, ..SPEC };
        for ([gate_up, down, ..], spec) in FUSED.iter().flat_map(|names| [(names, SPEC), (names, turns)]) {
            assert_eq!(report(spec, &[(gate_up, &[2, 6, 4]), (down, &[2, 4, 3])]), Report::default(), "{gate_up}");
            assert_eq!(
                report(spec, &[(gate_up, &[2, 4, 6]), (down, &[2, 3, 4])]),
                Report::default(),
                "{gate_up} turned"
            );
        }
    }

    #[test]
    fn a_square_projection_is_told_from_a_turned_one_by_the_other() {
        for (dim, hidden) in [(6, 3), (4, 4)] {
            let spec = ExpertsSpec { dim: dim as u64, hidden: hidden as u64, ..SPEC };
            let [gate_up, down, ..] = FUSED[0];
            let lying = report(spec, &[(gate_up, &[2, 2 * hidden, dim]), (down, &[2, dim, hidden])]);
            let turned = report(spec, &[(gate_up, &[2, dim, 2 * hidden]), (down, &[2, hidden, dim])]);
            assert_eq!((lying, turned), Default::default());
        }
    }

    #[test]
    fn experts_without_a_gate_and_their_biases_are_found() {
        let spec = ExpertsSpec { activation: abi::EXPERTS_GELU_TANH, flags: abi::EXPERTS_WITH_BIAS, ..SPEC };
        let stacked: [(&str, &[usize]); 4] = [
            ("switch_mlp.fc1.weight", &[2, 3, 4]),
            ("switch_mlp.fc1.bias", &[2, 3]),
            ("switch_mlp.fc2.weight", &[2, 4, 3]),
            ("switch_mlp.fc2.bias", &[2, 4]),
        ];
        assert_eq!(report(spec, &stacked), Report::default());
        let relu2 = ExpertsSpec { activation: abi::EXPERTS_RELU2, ..SPEC };
        let single: [(&str, &[usize]); 4] = [
            ("experts.0.up_proj.weight", &[3, 4]),
            ("experts.0.down_proj.weight", &[4, 3]),
            ("experts.1.up_proj.weight", &[3, 4]),
            ("experts.1.down_proj.weight", &[4, 3]),
        ];
        assert_eq!(report(relu2, &single), Report::default());
    }

    #[test]
    fn where_no_layout_is_there_the_report_names_single_experts() {
        let found = report(SPEC, &[]);
        assert_eq!(found.missing.len(), 6);
        assert_eq!(found.missing[0], "mlp.experts.0.down_proj.weight");
        let unknown = report(ExpertsSpec { activation: 99, ..SPEC }, &[]);
        assert!(unknown.complaints[0].contains("experts of kind 99"), "{unknown}");
        let flags = report(ExpertsSpec { flags: 1 << 30, ..SPEC }, &[]);
        assert!(flags.complaints[0].ends_with("update dylm"), "{flags}");
    }
}
