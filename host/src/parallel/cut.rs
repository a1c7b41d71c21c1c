//! A division of a model -> what each rank asks the checkpoint for. A share is a recipe like any other: rows of a matrix, columns of a
//! matrix, some heads; so a rank maps or copies its own part of the files and never more.

use super::{
    classes::{Classes, part},
    ranks::Join,
    shares::{self, Cut, divide},
    trace::Node,
};
use crate::weights::{
    plan::{Projection, Projections, Wanted},
    recipe::{Pantry, Recipe},
};
use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    ops::Range,
    sync::Arc,
};

/// How a model is shared out.
pub struct Division {
    cuts: BTreeMap<u32, Cut>,
    classes: Classes,
    ranks: usize,
}

impl Division {
    /// From the ops of a dry run. `changed` names the modules that an adapter changes: those stay whole.
    pub fn new(graph: &[Node], wanted: &[Wanted], pantry: &Pantry, ranks: usize, changed: &[&str]) -> Self {
        let known: RefCell<HashMap<(String, usize), Option<usize>>> = RefCell::default();
        let matrix = |slot: u32| match wanted.get(slot as usize) {
            Some(Wanted::Linear { weight, inputs, .. }) => Some((weight, *inputs)),
            Some(Wanted::Experts { projections, hidden, .. }) => Some((&projections.down.weight, *hidden)),
            _ => None,
        };
        let granule = |slot: u32| {
            let (recipe, inputs) = matrix(slot)?;
            // To know it, some forms are unpacked; a projection is alike in all layers. Where it is not, columns are cut all the same, only
            // unpacked.
            let name = recipe.name();
            let kind = name.rsplit('.').take(2).collect::<Vec<_>>().join(".");
            *known.borrow_mut().entry((kind, inputs)).or_insert_with(|| pantry.granule(recipe))
        };
        let stays = |slot: u32| {
            let Some(slot) = wanted.get(slot as usize) else { return true };
            let mut names = Vec::new();
            slot.recipes().iter().for_each(|(recipe, _)| recipe.names(&mut names));
            let touched = |name: &&str| changed.contains(&name.strip_suffix(".weight").unwrap_or(name));
            !changed.is_empty() && (matches!(slot, Wanted::Experts { .. }) || names.iter().any(touched))
        };
        let (cuts, classes) = divide(graph, &shares::Model { wanted, ranks, stays: &stays, granule: &granule });
        Division { cuts, classes, ranks }
    }

    /// How many slots of matrices are cut, and of how many.
    pub fn count(&self, wanted: &[Wanted]) -> (usize, usize) {
        let is_matrix = |slot: &Wanted| {
            matches!(
                slot,
                Wanted::Linear { .. } | Wanted::Experts { .. } | Wanted::MultiLinear { .. } | Wanted::Embedding { .. }
            )
        };
        let matrices = (0u32..).zip(wanted).filter(|(_, slot)| is_matrix(slot));
        matrices.fold((0, 0), |(cut, all), (slot, _)| (cut + usize::from(self.cuts.contains_key(&slot)), all + 1))
    }

    /// The names of the slots that are cut.
    pub fn names(&self, wanted: &[Wanted]) -> Vec<String> {
        self.cuts.keys().filter_map(|&slot| wanted.get(slot as usize)).map(|slot| slot.name().to_owned()).collect()
    }

    /// What a rank wants, and how the outputs of each of its layers become whole.
    pub fn of_rank(&self, wanted: &[Wanted], rank: usize) -> (Vec<Wanted>, Vec<Join>) {
        let share = |(slot, whole): (u32, &Wanted)| match self.cuts.get(&slot) {
            None => (whole.clone(), Join::None),
            Some(&cut) => {
                let range = |class, len| part(len, self.classes.atoms(class), rank, self.ranks);
                let join = match (cut, whole) {
                    (Cut::Inputs(_) | Cut::Hidden(_), _) => Join::Sum,
                    (Cut::Gathered(class), Wanted::Linear { outputs, .. }) => {
                        Join::Gather { start: range(class, *outputs).start, of: *outputs }
                    }
                    _ => Join::None,
                };
                (share(whole, cut, rank, range), join)
            }
        };
        (0u32..).zip(wanted).map(share).unzip()
    }
}

/// A bias is added by the first rank alone where outputs are summed.
fn once(bias: &Option<Recipe>, rank: usize) -> Option<Recipe> {
    bias.clone().filter(|_| rank == 0)
}

fn share(whole: &Wanted, cut: Cut, rank: usize, range: impl Fn(usize, usize) -> Range<usize>) -> Wanted {
    let rows = |recipe: &Recipe, r: &Range<usize>| Recipe::Rows(Arc::new(recipe.clone()), r.start, r.end);
    let narrow =
        |recipe: &Recipe, axis, r: &Range<usize>| Recipe::Narrow(Arc::new(recipe.clone()), axis, r.start, r.end);
    match (whole, cut) {
        (Wanted::Linear { weight, bias, inputs, outputs }, Cut::Outputs(class) | Cut::Gathered(class)) => {
            let r = range(class, *outputs);
            let bias = bias.as_ref().map(|bias| rows(bias, &r));
            Wanted::Linear { weight: rows(weight, &r), bias, inputs: *inputs, outputs: r.len() }
        }
        (Wanted::Linear { weight, bias, inputs, outputs }, Cut::Inputs(class)) => {
            let r = range(class, *inputs);
            Wanted::Linear { weight: narrow(weight, 1, &r), bias: once(bias, rank), inputs: r.len(), outputs: *outputs }
        }
        (Wanted::MultiLinear { weight, bias, heads, inputs, outputs }, Cut::Heads(class)) => {
            let r = range(class, *heads);
            let bias = bias.as_ref().map(|bias| rows(bias, &r));
            Wanted::MultiLinear { weight: rows(weight, &r), bias, heads: r.len(), inputs: *inputs, outputs: *outputs }
        }
        (Wanted::Experts { projections, experts, dim, hidden, kind }, Cut::Hidden(class)) => {
            let r = range(class, *hidden);
            let into = |p: &Projection| Projection {
                weight: narrow(&p.weight, 1, &r),
                bias: p.bias.as_ref().map(|bias| narrow(bias, 1, &r)),
                modules: p.modules.clone(),
            };
            let Projections { gate, up, down } = &**projections;
            let back = Projection {
                weight: narrow(&down.weight, 2, &r),
                bias: once(&down.bias, rank),
                modules: down.modules.clone(),
            };
            let projections = Projections { gate: gate.as_ref().map(into), up: into(up), down: back };
            Wanted::Experts {
                projections: projections.into(),
                experts: *experts,
                dim: *dim,
                hidden: r.len(),
                kind: *kind,
            }
        }
        (Wanted::Parameter { source, dims }, Cut::Axis(axis, class)) => {
            let mut dims = dims.clone();
            let r = range(class, dims.get(axis).copied().unwrap_or(0));
            if let Some(len) = dims.get_mut(axis) {
                *len = r.len();
            }
            Wanted::Parameter { source: narrow(source, axis, &r), dims }
        }
        (other, _) => other.clone(),
    }
}
