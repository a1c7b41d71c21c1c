//! Which matrices are cut, and along which axis: told from the graph of a dry run, so that no architecture has to say it.
//!
//! A linear layer of an input that all ranks have whole may give each rank a share of its outputs; ops that look at each number or each
//! head alone keep shares; a linear layer of a share takes the rows that belong to it, and its outputs are summed over the ranks. An op
//! that needs all of an axis makes the layers stay whole that its share came from, and then the graph is walked again: what such a layer
//! gives is whole now, so the next one may be cut in its place.

use super::{
    classes::{Class, Classes},
    trace::Node,
};
use crate::weights::plan::Wanted;
use plugin_api::abi::Handle;
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// A matrix of fewer rows for so many columns is not worth a sum over the ranks: the low-rank gates of recurrences.
const LEAST_ROWS: usize = 8;

/// Outputs a number of inputs, beyond which the head's matrix is cut although all of its outputs are needed at once.
const WIDE: usize = 3;

/// What stands in notes between `forward` and `head`.
const ROWS: &str = "rows";

/// What a slot holds on each rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Some outputs of a linear layer.
    Outputs(Class),
    /// Some outputs of a linear layer, brought together after it.
    Gathered(Class),
    /// Some inputs of a linear layer; outputs are summed over the ranks.
    Inputs(Class),
    /// Some lanes between the projections of every expert; outputs are summed over the ranks.
    Hidden(Class),
    /// Some heads of a matrix a head.
    Heads(Class),
    /// Entries of an axis of a tensor.
    Axis(usize, Class),
}

impl Cut {
    fn class(self) -> Class {
        match self {
            Cut::Outputs(class)
            | Cut::Gathered(class)
            | Cut::Inputs(class)
            | Cut::Hidden(class)
            | Cut::Heads(class)
            | Cut::Axis(_, class) => class,
        }
    }
}

/// Where the numbers of a tensor are.
#[derive(Clone, Copy, Debug)]
enum Whereabouts {
    /// On every rank.
    Whole,
    /// Each rank has its part of an axis.
    Share(Class, usize),
    /// A tensor of the checkpoint as it is: on every rank, or its part where it meets a share.
    Parameter(u32),
}
use Whereabouts::{Parameter, Share, Whole};

/// What the walk has to know of the model besides its ops.
pub struct Model<'a> {
    /// Its slots.
    pub wanted: &'a [Wanted],
    /// Ranks.
    pub ranks: usize,
    /// Whether this slot has to stay whole, whatever the ops are.
    pub stays: &'a dyn Fn(u32) -> bool,
    /// Columns of this slot's matrix that cannot be separated; `None` where its columns cannot be cut.
    pub granule: &'a dyn Fn(u32) -> Option<usize>,
}

/// How each slot is cut, those left out being whole; and the classes that this speaks of.
pub fn divide(graph: &[Node], model: &Model) -> (BTreeMap<u32, Cut>, Classes) {
    let (mut stay, mut kept) = (BTreeSet::new(), BTreeSet::new());
    loop {
        let mut walk = Walk {
            model,
            stay: &stay,
            kept: &kept,
            classes: Classes::default(),
            cuts: BTreeMap::new(),
            whole: BTreeSet::new(),
            in_head: false,
        };
        walk.all(graph);
        let Walk { classes, mut cuts, .. } = walk;
        let failed = || cuts.iter().filter(|(_, cut)| classes.atoms(cut.class()) < model.ranks);
        let shares = |(&slot, cut): (&u32, &Cut)| matches!(cut, Cut::Outputs(_) | Cut::Hidden(_)).then_some(slot);
        let more: Vec<u32> = failed().filter_map(shares).collect();
        let gathered: Vec<u32> =
            failed().filter(|(_, cut)| matches!(cut, Cut::Gathered(_))).map(|(&slot, _)| slot).collect();
        if more.is_empty() && gathered.is_empty() {
            // A head alone is not worth several devices.
            if cuts.values().all(|cut| matches!(cut, Cut::Gathered(_))) {
                cuts.clear();
            }
            return (cuts, classes);
        }
        stay.extend(more);
        kept.extend(gathered);
    }
}

/// One walk through the graph.
struct Walk<'a> {
    model: &'a Model<'a>,
    /// Slots whose outputs have to be whole.
    stay: &'a BTreeSet<u32>,
    /// Those among them that cannot be brought together either.
    kept: &'a BTreeSet<u32>,
    classes: Classes,
    cuts: BTreeMap<u32, Cut>,
    /// Slots that were used whole in this walk.
    whole: BTreeSet<u32>,
    /// Whether `forward` is over.
    in_head: bool,
}

/// Where the keys of caches are, and how many heads they have on all ranks together.
type Caches = HashMap<u32, (Whereabouts, usize)>;

/// A tensor that an op takes.
type Taken<'d> = (Whereabouts, &'d [usize]);

impl Walk<'_> {
    fn all(&mut self, graph: &[Node]) {
        let (mut values, mut caches): (HashMap<u64, Whereabouts>, Caches) = Default::default();
        for node in graph {
            let place = |(handle, dims): &'_ (Handle, Vec<usize>)| {
                let there = values.get(&handle.0).copied().unwrap_or(Whole);
                (there, dims.clone())
            };
            let inputs: Vec<Option<(Whereabouts, Vec<usize>)>> =
                node.inputs.iter().map(|i| i.as_ref().map(place)).collect();
            let taken: Vec<Option<Taken>> = inputs.iter().map(|i| i.as_ref().map(|(w, d)| (*w, &d[..]))).collect();
            self.in_head |= node.op == ROWS;
            let output = match node.op.as_str() {
                "attend" => self.attend(node, &taken, &mut caches),
                _ => self.op(node, &taken.into_iter().flatten().collect::<Vec<_>>()),
            };
            values.insert(node.output.0, output);
        }
    }

    /// The share has to be whole after all.
    fn refuse(&mut self, whereabouts: Whereabouts) {
        match whereabouts {
            Share(class, _) => self.classes.restrict(class, 1),
            Parameter(slot) => self.use_whole(slot),
            Whole => {}
        }
    }

    fn refuse_all(&mut self, inputs: &[Taken]) -> Whereabouts {
        inputs.iter().for_each(|(whereabouts, _)| self.refuse(*whereabouts));
        Whole
    }

    fn use_whole(&mut self, slot: u32) {
        self.whole.insert(slot);
        if let Some(cut) = self.cuts.get(&slot) {
            self.classes.restrict(cut.class(), 1);
        }
    }

    /// The slot is cut so, in every use of it.
    fn cut(&mut self, slot: u32, cut: Cut) {
        let before = *self.cuts.entry(slot).or_insert(cut);
        let alike = match (before, cut) {
            (Cut::Axis(a, _), Cut::Axis(b, _)) => a == b,
            _ => std::mem::discriminant(&before) == std::mem::discriminant(&cut),
        };
        self.classes.join(before.class(), cut.class());
        if !alike || self.whole.contains(&slot) {
            self.classes.restrict(cut.class(), 1);
        }
    }

    fn op(&mut self, node: &Node, inputs: &[Taken]) -> Whereabouts {
        let slot = node.slot.unwrap_or(u32::MAX);
        match (node.op.as_str(), inputs) {
            ("parameter", []) => Parameter(slot),
            ("linear", &[x]) => self.linear(slot, x),
            ("multi_linear", &[(Share(class, 1), dims)]) => {
                self.classes.restrict(class, dims[1]);
                self.cut(slot, Cut::Heads(class));
                Share(class, 1)
            }
            ("multi_linear", _) => {
                self.use_whole(slot);
                self.refuse_all(inputs)
            }
            ("experts", _) => {
                self.refuse_all(inputs);
                self.experts(slot)
            }
            (
                "neg" | "floor" | "round" | "abs" | "exp" | "log" | "sqrt" | "rsqrt" | "square" | "sigmoid" | "tanh"
                | "relu" | "silu" | "gelu" | "gelu_tanh" | "softplus" | "affine" | "clamp",
                &[(x, _)],
            ) => x,
            ("add" | "sub" | "mul" | "div" | "maximum" | "minimum" | "greater" | "swiglu" | "geglu", &[a, b]) => {
                self.meet(a, b, node.dims.len())
            }
            // Along the last axis, each row by itself.
            ("norm" | "softmax" | "sum" | "mean" | "max" | "narrow" | "top_mask" | "unflatten", &[x]) => {
                self.along_last(x)
            }
            ("rotate", &[x @ (Share(_, 1), _)]) => self.along_last(x),
            ("split_heads", &[(Share(class, 1), _)]) => {
                self.classes.restrict(class, node.dims.get(1).copied().unwrap_or(1));
                Share(class, 1)
            }
            ("merge_heads", &[(Share(class, 1), _)]) => Share(class, 1),
            ("flatten", &[(Share(class, axis), dims)]) if axis + 1 < dims.len() => Share(class, axis),
            ("transpose", &[(Share(class, axis), dims)]) => match dims.len() - axis {
                1 => Share(class, axis - 1),
                2 => Share(class, axis + 1),
                _ => Share(class, axis),
            },
            ("concat", [first @ (Share(class, axis), dims), others @ ..]) if axis + 1 < dims.len() => {
                let alike = |(other, _): &Taken| matches!(other, Share(_, b) if b == axis);
                if !others.iter().all(alike) {
                    return self.refuse_all(inputs);
                }
                others.iter().chain([first]).for_each(|(other, _)| {
                    if let Share(other, _) = other {
                        self.classes.join(*class, *other);
                    }
                });
                Share(*class, *axis)
            }
            ("gather", &[(Share(a, axis), dims), (Share(b, other), _)]) if axis == other && axis + 1 < dims.len() => {
                self.classes.join(a, b);
                Share(a, axis)
            }
            _ => self.refuse_all(inputs),
        }
    }

    /// An op that needs all of the last axis, and nothing else.
    fn along_last(&mut self, x: Taken) -> Whereabouts {
        match x {
            (Share(class, axis), dims) if axis + 1 < dims.len() => Share(class, axis),
            (other, _) => self.refuse_all(&[(other, x.1)]),
        }
    }

    fn linear(&mut self, slot: u32, (x, dims): Taken) -> Whereabouts {
        let Some(Wanted::Linear { inputs, outputs, .. }) = self.model.wanted.get(slot as usize) else {
            return self.refuse_all(&[(x, dims)]);
        };
        let last = dims.len().saturating_sub(1);
        match x {
            Share(class, axis) if axis == last => {
                self.cut(slot, Cut::Inputs(class));
                // Adding up so wide a sum would take longer than so few rows of it save.
                let pays = inputs.saturating_mul(LEAST_ROWS) >= *outputs;
                let parts = self.parts(slot, *inputs).filter(|_| pays);
                self.classes.restrict(class, parts.unwrap_or(1));
                Whole
            }
            Share(..) => {
                self.use_whole(slot);
                x
            }
            _ => {
                self.refuse(x);
                let stays = self.stay.contains(&slot);
                let wide = self.in_head && *outputs > inputs.saturating_mul(WIDE);
                let wide = wide && stays && !self.kept.contains(&slot);
                if (self.model.stays)(slot) || *outputs < self.model.ranks || (stays && !wide) {
                    self.use_whole(slot);
                    return Whole;
                }
                let class = self.classes.of(*outputs);
                if wide {
                    self.cut(slot, Cut::Gathered(class));
                    return Whole;
                }
                self.cut(slot, Cut::Outputs(class));
                Share(class, last)
            }
        }
    }

    fn experts(&mut self, slot: u32) -> Whereabouts {
        let Some(Wanted::Experts { hidden, kind, .. }) = self.model.wanted.get(slot as usize) else { return Whole };
        // Choices that give back their input would give it back once a rank.
        if !self.stays(slot) && kind.identity == 0 {
            let parts = self.parts(slot, *hidden);
            let class = self.classes.of(parts.unwrap_or(1));
            self.cut(slot, Cut::Hidden(class));
        }
        Whole
    }

    fn stays(&self, slot: u32) -> bool {
        self.stay.contains(&slot) || (self.model.stays)(slot)
    }

    /// How many parts the columns of a slot's matrix can be cut into at most.
    fn parts(&self, slot: u32, columns: usize) -> Option<usize> {
        let granule = (self.model.granule)(slot).filter(|_| !(self.model.stays)(slot))?;
        (granule > 0 && columns.is_multiple_of(granule)).then(|| columns / granule)
    }

    /// Two tensors, broadcast against each other.
    fn meet(&mut self, a: Taken, b: Taken, axes: usize) -> Whereabouts {
        let ((Share(class, axis), dims), other) = (match (a.0, b.0) {
            (Share(..), _) => (a, b),
            (_, Share(..)) => (b, a),
            _ => return self.refuse_all(&[a, b]),
        }) else {
            return Whole;
        };
        let from_right = dims.len() - axis;
        let there = other.1.len().checked_sub(from_right).map(|i| (i, other.1[i])).filter(|&(_, len)| len != 1);
        match (other.0, there) {
            (Share(second, at), Some((i, _))) if at == i => self.classes.join(class, second),
            (Share(..), _) => {
                self.refuse_all(&[a, b]);
            }
            (Parameter(slot), Some((i, len))) => self.parameter(slot, i, len, class),
            (Whole, Some(_)) => self.classes.restrict(class, 1),
            (whereabouts, None) => self.refuse(whereabouts),
        }
        Share(class, axes.saturating_sub(from_right))
    }

    /// A parameter whose axis goes with a share.
    fn parameter(&mut self, slot: u32, axis: usize, len: usize, class: Class) {
        self.classes.restrict(class, len);
        self.cut(slot, Cut::Axis(axis, class));
    }

    /// q `[tokens, heads, d]` with keys and values `[tokens, kv_heads, d]` of its own, or those that a cache was fed before.
    fn attend(&mut self, node: &Node, inputs: &[Option<Taken>], caches: &mut Caches) -> Whereabouts {
        let all: Vec<Taken> = inputs.iter().flatten().copied().collect();
        let &[Some(q), k, v, sinks, selection, slopes, ref pooled @ ..] = inputs else { return self.refuse_all(&all) };
        let (cache, alike) = node.cache.unwrap_or((u32::MAX, false));
        let (keys, heads) = match k {
            Some((k, dims)) => (k, dims.get(1).copied().unwrap_or(0)),
            None => caches.get(&cache).copied().unwrap_or((Whole, 0)),
        };
        let by_head = !alike || selection.is_some_and(|(_, dims)| dims.len() > 2) || pooled.iter().any(Option::is_some);
        let class = match (q.0, keys, v.map(|(v, _)| v)) {
            _ if by_head => None,
            // One key head serves the query heads of all ranks.
            (Share(class, 1), _, _) if heads == 1 => {
                self.refuse_all(
                    all.get(1..1 + usize::from(k.is_some()) + usize::from(v.is_some())).unwrap_or_default(),
                );
                caches.insert(cache, (Whole, 1));
                Some(class)
            }
            (Share(class, 1), Share(keys, 1), None | Some(Share(_, 1))) => {
                self.classes.join(class, keys);
                self.classes.restrict(class, heads);
                if let Some((Share(values, _), _)) = v {
                    self.classes.join(class, values);
                }
                caches.insert(cache, (Share(class, 1), heads));
                Some(class)
            }
            _ => None,
        };
        let Some(class) = class else {
            // Whoever looks at this cache later finds it whole.
            self.refuse(keys);
            return self.refuse_all(&all);
        };
        self.classes.restrict(class, q.1[1]);
        for given in [sinks, slopes].into_iter().flatten() {
            match given {
                (Parameter(slot), dims) => self.parameter(slot, 0, dims[0], class),
                (Share(other, 0), _) => self.classes.join(class, other),
                (other, _) => {
                    self.refuse(other);
                    self.classes.restrict(class, 1);
                }
            }
        }
        if let Some((whereabouts, _)) = selection {
            self.refuse(whereabouts);
        }
        Share(class, 1)
    }
}
