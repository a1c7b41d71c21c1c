//! What a plugin asked for, against what the checkpoint has: every missing, unused and misshapen tensor in one report, before a byte of
//! weights is read.

use super::recipe::{Pantry, Recipe};
use crate::error::{Error, Result};
use std::collections::BTreeSet;

/// A slot, as the plugin described it.
#[derive(Debug, Clone)]
pub enum Wanted {
    /// weight `[outputs, inputs]`, bias `[outputs]`
    Linear {
        /// The matrix.
        weight: Recipe,
        /// Added to each row.
        bias: Option<Recipe>,
        /// Columns.
        inputs: usize,
        /// Rows.
        outputs: usize,
    },
    /// `[vocab, dim]`
    Embedding {
        /// The table.
        weight: Recipe,
        /// Rows.
        vocab: usize,
        /// Columns.
        dim: usize,
    },
    /// weight and bias `[dim]`
    Norm {
        /// LayerNorm.
        centred: bool,
        /// The factor.
        weight: Option<Recipe>,
        /// The summand.
        bias: Option<Recipe>,
        /// Length of the last axis.
        dim: usize,
        /// Under the root.
        eps: f32,
    },
    /// gate, up `[experts, hidden, dim]` and down `[experts, dim, hidden]`
    Experts {
        /// Their weights.
        projections: Box<Projections>,
        /// How many.
        experts: usize,
        /// Outer width.
        dim: usize,
        /// Inner width.
        hidden: usize,
        /// How they compute.
        kind: crate::layers::experts::Kind,
    },
    /// weight `[heads, outputs, inputs]`, bias `[heads, outputs]`
    MultiLinear {
        /// A matrix a head.
        weight: Recipe,
        /// A row a head.
        bias: Option<Recipe>,
        /// How many heads.
        heads: usize,
        /// Columns.
        inputs: usize,
        /// Rows.
        outputs: usize,
    },
    /// weight of `channels * kernel` numbers, bias `[channels]`
    Conv1d {
        /// A kernel a channel.
        weight: Recipe,
        /// One a channel.
        bias: Option<Recipe>,
        /// How many channels.
        channels: usize,
        /// Tokens that it reaches over.
        kernel: usize,
    },
    /// A tensor as it is.
    Parameter {
        /// What.
        source: Recipe,
        /// Its shape.
        dims: Vec<usize>,
    },
    /// Rotary angles; nothing of the checkpoint.
    Rope(crate::layers::rope::Rope),
    /// An op of the plugin; nothing of the checkpoint.
    Own(std::sync::Arc<crate::ops::own_op::OwnOp>),
}

/// The projections of all experts of a layer.
#[derive(Debug, Clone)]
pub struct Projections {
    /// In the kinds that have one.
    pub gate: Option<Projection>,
    /// Like `gate`.
    pub up: Projection,
    /// The way back.
    pub down: Projection,
}

/// One projection of all experts of a layer.
#[derive(Debug, Clone)]
pub struct Projection {
    /// `[experts, outputs, inputs]`: stacked, or a stack of single ones.
    pub weight: Recipe,
    /// `[experts, outputs]`
    pub bias: Option<Recipe>,
    /// Module paths under which adapters may have the stack.
    pub modules: Vec<String>,
}

impl Wanted {
    /// The recipes of the slot with the shapes that the plugin stated.
    pub fn recipes(&self) -> Vec<(&Recipe, Vec<usize>)> {
        match self {
            Wanted::Linear { weight, bias, inputs, outputs } => [(weight, vec![*outputs, *inputs])]
                .into_iter()
                .chain(bias.iter().map(|b| (b, vec![*outputs])))
                .collect(),
            Wanted::Embedding { weight, vocab, dim } => vec![(weight, vec![*vocab, *dim])],
            Wanted::Norm { weight, bias, dim, .. } => weight.iter().chain(bias).map(|r| (r, vec![*dim])).collect(),
            Wanted::Experts { projections, experts, dim, hidden, .. } => {
                let Projections { gate, up, down } = &**projections;
                let into = gate.iter().chain([up]).map(|p| (p, [*hidden, *dim]));
                let all = into.chain([(down, [*dim, *hidden])]).flat_map(|(p, [outputs, inputs])| {
                    let weight = (&p.weight, vec![*experts, outputs, inputs]);
                    [weight].into_iter().chain(p.bias.iter().map(move |b| (b, vec![*experts, outputs])))
                });
                all.collect()
            }
            Wanted::MultiLinear { weight, bias, heads, inputs, outputs } => {
                let weight = (weight, vec![*heads, *outputs, *inputs]);
                [weight].into_iter().chain(bias.iter().map(|b| (b, vec![*heads, *outputs]))).collect()
            }
            Wanted::Conv1d { weight, bias, channels, kernel } => {
                let weight = (weight, vec![*channels, 1, *kernel]);
                [weight].into_iter().chain(bias.iter().map(|b| (b, vec![*channels]))).collect()
            }
            Wanted::Parameter { source, dims } => vec![(source, dims.clone())],
            Wanted::Rope(_) | Wanted::Own(_) => Vec::new(),
        }
    }

    /// What to call the slot in messages.
    pub fn name(&self) -> &str {
        match self {
            Wanted::Own(op) => &op.name,
            _ => self.recipes().first().map_or("rope", |(recipe, _)| recipe.path().unwrap_or(recipe.name())),
        }
    }
}

/// MLX keeps a convolution's kernel as `[channels, kernel, 1]`, PyTorch as `[channels, 1, kernel]`: the same numbers in the same order.
fn is_turned_kernel(slot: &Wanted, shape: &[usize], dims: &[usize]) -> bool {
    matches!((slot, shape, dims), (Wanted::Conv1d { .. }, &[a, k, 1], &[channels, 1, kernel]) if a == channels && k == kernel)
}

/// What was found, sorted by kind.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Report {
    /// Asked for, not there.
    pub missing: Vec<String>,
    /// There, with another shape or in a form that cannot be read.
    pub misshapen: Vec<String>,
    /// There, asked for by nobody.
    pub unused: Vec<String>,
    /// What the plugin itself complained of.
    pub complaints: Vec<String>,
}

/// Differences listed per kind before the rest is only counted.
const LISTED: usize = 8;

impl Report {
    /// Compares every slot with the checkpoint. `ignored` are prefixes that the architecture leaves alone.
    pub fn new(wanted: &[Wanted], pantry: &Pantry, ignored: &[String], complaints: Vec<String>) -> Self {
        let mut report = Report { complaints, ..Report::default() };
        let mut used = BTreeSet::new();
        let mut missing = BTreeSet::new();
        for (slot, (recipe, dims)) in wanted.iter().flat_map(|w| w.recipes().into_iter().map(move |r| (w, r))) {
            used.extend(pantry.uses(recipe));
            let mut names = Vec::new();
            recipe.names(&mut names);
            let absent: Vec<_> = names.into_iter().filter(|n| !pantry.has(n)).collect();
            if !absent.is_empty() {
                missing.extend(absent.into_iter().map(str::to_owned));
                continue;
            }
            match pantry.shape(recipe) {
                Ok(shape) if shape == dims || is_turned_kernel(slot, &shape, &dims) => {}
                Ok(shape) => {
                    report.misshapen.push(format!("{}: config says {dims:?}, file has {shape:?}", recipe.name()))
                }
                Err(e) => report.misshapen.push(e.to_string()),
            }
        }
        report.missing = missing.into_iter().collect();
        let unused = pantry.checkpoint.names().filter(|n| {
            !used.contains(*n) && !pantry.is_for_an_fp8_cache(n) && !ignored.iter().any(|p| n.starts_with(p))
        });
        report.unused = unused.map(str::to_owned).collect();
        report
    }

    /// Whether files and architecture agree exactly.
    pub fn agrees(&self) -> bool {
        *self == Report::default()
    }

    /// An error that lists every difference, or nothing.
    pub fn into_result(self, model: &str) -> Result<()> {
        if self.agrees() { Ok(()) } else { Err(Error::Weights(format!("{model}: {self}"))) }
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.agrees() {
            return write!(f, "all tensors agree with the architecture");
        }
        write!(f, "the checkpoint does not fit the architecture")?;
        let kinds = [
            ("not in the checkpoint", &self.missing),
            ("", &self.misshapen),
            ("not used by the architecture", &self.unused),
            ("", &self.complaints),
        ];
        for (what, names) in kinds {
            for name in names.iter().take(LISTED) {
                let colon = if what.is_empty() { "" } else { ": " };
                write!(f, "\n  {name}{colon}{what}")?;
            }
            if names.len() > LISTED {
                let what = if what.is_empty() { "of another shape" } else { what };
                write!(f, "\n  and {} more {what}", names.len() - LISTED)?;
            }
        }
        Ok(())
    }
}
