//! The building ops: a plugin names sources and layers, the host writes them down and checks nothing yet. Problems that make a request
//! senseless are collected, so that one report has them all.

use crate::{
    layers::rope::Rope,
    weights::{
        plan::Wanted,
        recipe::{Pantry, Recipe},
    },
};
use plugin_api::abi::{self, Slot, SourceId};
use serde_json::Value as Json;
use std::{collections::HashMap, sync::Arc};

/// More slots than any model has.
pub(super) const MOST_SLOTS: usize = 1_000_000;

/// A source goes through a handful of transforms; reading one walks through them, with the stack for its limit.
const DEEPEST: usize = 64;

struct Source {
    recipe: Arc<Recipe>,
    depth: usize,
    /// Recipes in it, counted as often as they occur.
    parts: usize,
}

/// Everything a plugin said while it built a model.
pub struct Building<'a> {
    /// The checkpoint, by the names that plugins use.
    pub pantry: &'a Pantry,
    /// config.json.
    pub config: &'a Json,
    sources: Vec<Source>,
    ropes: HashMap<(u64, u64, String), Slot>,
    pub(super) expert_sources: usize,
    /// The slots, in order.
    pub wanted: Vec<Wanted>,
    /// Prefixes of tensors that the architecture leaves alone.
    pub ignored: Vec<String>,
    /// Linear layers of one input, which may run as one.
    pub together: Vec<Vec<Slot>>,
    /// What the plugin, or the host about it, has to say.
    pub complaints: Vec<String>,
}

impl<'a> Building<'a> {
    /// Nothing said yet.
    pub fn new(pantry: &'a Pantry, config: &'a Json) -> Self {
        Building {
            pantry,
            config,
            sources: Vec::new(),
            ropes: HashMap::new(),
            expert_sources: 0,
            wanted: Vec::new(),
            ignored: Vec::new(),
            together: Vec::new(),
            complaints: Vec::new(),
        }
    }

    /// Adds a recipe made of other sources.
    fn put(&mut self, recipe: Recipe, of: &[SourceId]) -> SourceId {
        let of = of.iter().filter_map(|id| self.sources.get((id.0 as usize).checked_sub(1)?));
        let (depth, parts) =
            of.fold((0, 1usize), |(depth, parts), s| (s.depth.max(depth), parts.saturating_add(s.parts)));
        if depth >= DEEPEST || parts > MOST_SLOTS {
            self.complain(format!("{}: the plugin puts too many transforms on one tensor", recipe.name()));
            return SourceId::NONE;
        }
        if self.sources.len() >= MOST_SLOTS {
            self.complain(format!("the plugin asks for more than {MOST_SLOTS} tensors"));
            return SourceId::NONE;
        }
        self.sources.push(Source { recipe: Arc::new(recipe), depth: depth + 1, parts });
        SourceId(self.sources.len() as u32)
    }

    pub(super) fn slot(&mut self, wanted: Wanted) -> Slot {
        if self.wanted.len() >= MOST_SLOTS {
            self.complain(format!("the plugin asks for more than {MOST_SLOTS} layers"));
            return Slot(u32::MAX);
        }
        self.wanted.push(wanted);
        Slot(self.wanted.len() as u32 - 1)
    }

    pub(super) fn recipe(&mut self, id: SourceId) -> Arc<Recipe> {
        match (id.0 as usize).checked_sub(1).and_then(|i| self.sources.get(i)) {
            Some(source) => source.recipe.clone(),
            None => {
                self.complain("the plugin used a source that it was never given".into());
                Arc::new(Recipe::Stored("a source that was never given".into()))
            }
        }
    }

    pub(super) fn some(&mut self, id: SourceId) -> Option<Recipe> {
        (id != SourceId::NONE).then(|| (*self.recipe(id)).clone())
    }

    /// Notes a complaint, once: every layer may have the same one.
    pub fn complain(&mut self, complaint: String) {
        const MOST: usize = 1000;
        if self.complaints.len() < MOST && !self.complaints.contains(&complaint) {
            self.complaints.push(complaint);
        }
    }

    pub fn has(&self, name: &str) -> bool {
        self.pantry.has(name)
    }

    pub fn has_shape(&self, name: &str, dims: &[u64]) -> bool {
        let shape = self.pantry.shape(&Recipe::Stored(name.to_owned()));
        shape.is_ok_and(|shape| shape.iter().map(|&d| d as u64).eq(dims.iter().copied()))
    }

    pub fn numbers(&mut self, values: &[f32]) -> SourceId {
        self.put(Recipe::Numbers(values.into()), &[])
    }

    pub fn source(&mut self, name: &str) -> SourceId {
        self.put(Recipe::Stored(name.to_owned()), &[])
    }

    pub fn transform(&mut self, source: SourceId, kind: u32, ints: &[u64], factor: f64) -> SourceId {
        let inner = self.recipe(source);
        let ints: Vec<usize> = ints.iter().map(|&i| i as usize).collect();
        let recipe = match (kind, ints.as_slice()) {
            (abi::TRANSFORM_ROWS, &[from, to]) => Recipe::Rows(inner, from, to),
            (abi::TRANSFORM_PLUS, []) => Recipe::Affine(inner, 1.0, factor as f32),
            (abi::TRANSFORM_SCALE, []) => Recipe::Affine(inner, factor as f32, 0.0),
            (abi::TRANSFORM_TRANSPOSE, []) => Recipe::Transpose(inner),
            (abi::TRANSFORM_NARROW, &[axis, from, to]) => Recipe::Narrow(inner, axis, from, to),
            (abi::TRANSFORM_EVERY, &[axis, start, step]) => Recipe::Every(inner, axis, start, step),
            (abi::TRANSFORM_UNIT_ROWS, []) => Recipe::UnitRows(inner, factor as f32),
            (abi::TRANSFORM_RESHAPE, dims) => Recipe::Reshape(inner, dims.to_vec()),
            _ => {
                self.complain(format!(
                    "{}: the plugin asks for transform {kind}, which this dylm does not have",
                    inner.name()
                ));
                return source;
            }
        };
        self.put(recipe, &[source])
    }

    pub fn stack(&mut self, sources: &[SourceId]) -> SourceId {
        let parts = sources.iter().map(|&s| self.recipe(s)).collect();
        self.put(Recipe::Stack(parts), sources)
    }

    pub fn join(&mut self, sources: &[SourceId], axis: u64) -> SourceId {
        let parts = sources.iter().map(|&s| self.recipe(s)).collect();
        self.put(Recipe::Join(parts, axis as usize), sources)
    }

    pub fn multi_linear_layer(
        &mut self,
        weight: SourceId,
        bias: SourceId,
        heads: u64,
        inputs: u64,
        outputs: u64,
    ) -> Slot {
        let (weight, bias) = ((*self.recipe(weight)).clone(), self.some(bias));
        let (heads, inputs, outputs) = (heads as usize, inputs as usize, outputs as usize);
        self.slot(Wanted::MultiLinear { weight, bias, heads, inputs, outputs })
    }

    pub fn conv1d_layer(&mut self, weight: SourceId, bias: SourceId, channels: u64, kernel: u64) -> Slot {
        let (weight, bias) = ((*self.recipe(weight)).clone(), self.some(bias));
        self.slot(Wanted::Conv1d { weight, bias, channels: channels as usize, kernel: kernel as usize })
    }

    pub fn linear_layer(&mut self, weight: SourceId, bias: SourceId, inputs: u64, outputs: u64) -> Slot {
        let (weight, bias) = ((*self.recipe(weight)).clone(), self.some(bias));
        self.slot(Wanted::Linear { weight, bias, inputs: inputs as usize, outputs: outputs as usize })
    }

    pub fn embedding_layer(&mut self, weight: SourceId, vocab: u64, dim: u64) -> Slot {
        let weight = (*self.recipe(weight)).clone();
        self.slot(Wanted::Embedding { weight, vocab: vocab as usize, dim: dim as usize })
    }

    pub fn norm_layer(&mut self, kind: u32, weight: SourceId, bias: SourceId, dim: u64, eps: f64) -> Slot {
        if !matches!(kind, abi::NORM_RMS | abi::NORM_LAYER) {
            self.complain(format!("the plugin asks for norm {kind}, which this dylm does not have"));
        }
        let (weight, bias) = (self.some(weight), self.some(bias));
        self.slot(Wanted::Norm { centred: kind == abi::NORM_LAYER, weight, bias, dim: dim as usize, eps: eps as f32 })
    }

    pub fn parameter_layer(&mut self, source: SourceId, dims: &[u64]) -> Slot {
        let source = (*self.recipe(source)).clone();
        self.slot(Wanted::Parameter { source, dims: dims.iter().map(|&d| d as usize).collect() })
    }

    /// Layers that ask for the same rope share it, and with it a step's angles.
    pub fn rope_layer(&mut self, dims: u64, base: f64, scaling: &str) -> Slot {
        let key = (dims, base.to_bits(), scaling.to_owned());
        if let Some(slot) = self.ropes.get(&key) {
            return *slot;
        }
        let scaling = if scaling.is_empty() { Ok(Json::Null) } else { serde_json::from_str(scaling) };
        let rope = scaling
            .map_err(|e| format!("config.json: rope_scaling: {e}"))
            .and_then(|scaling| Rope::new(dims.min(1 << 20) as usize, base, &scaling, self.config));
        let rope = rope.unwrap_or_else(|complaint| {
            self.complain(complaint);
            Rope::none()
        });
        let slot = self.slot(Wanted::Rope(rope));
        self.ropes.insert(key, slot);
        slot
    }
}
