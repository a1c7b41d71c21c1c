//! What a planned model will take of memory, as it is stored and repacked, told from headers and shapes alone.
//!
//! Weights and caches are counted; what a step works with beside them is an estimate. It was held to the peaks that SmolLM2-135M has with
//! 72, 2050 and 4002 tokens (197, 335 and 416 MB; told are 199, 359 and 421).

use crate::{
    cache::kv::SLACK,
    model::{CacheShape, Plan},
    weights::plan::Wanted,
};
use std::collections::BTreeSet;

/// Tokens of a prompt that are read at once.
const CHUNK: usize = 2048;

/// Code, thread stacks: what a model of no size takes.
const PROCESS: u64 = 30 << 20;

/// A token in a tokenizer's maps, and what it takes to read them.
const PER_TOKEN_OF_VOCABULARY: u64 = 1300;

/// How weights lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// As the files have them: dylm's CPU kernels read packed weights as they are.
    Stored,
    /// Two bytes a number: a GPU's form, whatever the files have.
    Half,
    /// MLX's affine packing in groups of 64, each with two half-width numbers; norms and other small ones in two bytes.
    Packed(u64),
}

/// Bytes, by what they are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Need {
    /// The model.
    pub weights: u64,
    /// Keys, values and states of one sequence.
    pub cache: u64,
    /// Activations, and the process itself: about.
    pub work: u64,
}

impl Need {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights.saturating_add(self.cache).saturating_add(self.work)
    }
}

/// Bytes of keys, values and states of one sequence of `tokens` tokens, `width` bytes a number of the former.
pub fn cache_bytes(shapes: &[CacheShape], tokens: usize, width: usize) -> (u64, u64) {
    let kept = |shape: &CacheShape| shape.window.map_or(tokens, |w| tokens.min(w.saturating_add(2 * SLACK)));
    let product = |a: usize, b: usize, c: usize| (a as u64).saturating_mul(b as u64).saturating_mul(c as u64);
    let keys = shapes.iter().map(|shape| product(shape.values, width, kept(shape))).fold(0, u64::saturating_add);
    let states = shapes.iter().map(|shape| product(shape.state, size_of::<f32>(), 1)).fold(0, u64::saturating_add);
    (keys, states)
}

impl Plan {
    /// What the model takes with a context of `tokens`.
    pub fn need(&self, form: Form, shapes: &[CacheShape], tokens: usize, width: usize) -> Need {
        let (keys, states) = cache_bytes(shapes, tokens, width);
        // Keys and values that outgrow their place are copied into a larger one.
        let work = self.work(tokens).saturating_add(keys / 3);
        Need { weights: self.weights_in(form), cache: keys.saturating_add(states), work }
    }

    fn weights_in(&self, form: Form) -> u64 {
        let Form::Packed(bits) = form else {
            return match form {
                Form::Half => self.parameters().saturating_mul(2),
                _ => self.used_bytes(),
            };
        };
        let bytes = |(slot, dims): (&Wanted, Vec<usize>)| {
            let count = dims.iter().fold(1, |n: u64, &d| n.saturating_mul(d as u64));
            let is_matrix = !matches!(slot, Wanted::Norm { .. } | Wanted::Conv1d { .. } | Wanted::Parameter { .. });
            match is_matrix && dims.len() > 1 && dims.last().is_some_and(|last| last % 64 == 0) {
                true => (count / 8).saturating_mul(bits).saturating_add(count / 64 * 4),
                false => count.saturating_mul(2),
            }
        };
        let slots = self.wanted.iter().flat_map(|slot| slot.recipes().into_iter().map(move |(_, dims)| (slot, dims)));
        slots.map(bytes).fold(0, u64::saturating_add)
    }

    /// Bytes of the stored tensors that the architecture uses; a vision tower beside it, say, is not read.
    fn used_bytes(&self) -> u64 {
        let recipes = self.wanted.iter().flat_map(Wanted::recipes);
        let names: BTreeSet<String> = recipes.flat_map(|(recipe, _)| self.pantry.uses(recipe)).collect();
        let bytes = names.iter().filter_map(|name| self.checkpoint().get(name)).map(|tensor| tensor.len() as u64);
        bytes.fold(0, u64::saturating_add)
    }

    /// Bytes of weights that one more token of a single sequence has to read: of the experts those that are chosen, of a table of
    /// embeddings everything if it makes the logits too and nothing otherwise (a row is nothing). `None` where config.json does not tell
    /// how many experts a token has.
    pub fn bytes_a_token(&self) -> Option<u64> {
        let number = |key: &str| self.config.get(key).and_then(|v| v.as_u64());
        let vocab = number("vocab_size").unwrap_or(0);
        let mut tied =
            !self.wanted.iter().any(|w| matches!(w, Wanted::Linear { outputs, .. } if *outputs as u64 == vocab));
        let mut counted = BTreeSet::new();
        let mut all: u64 = 0;
        for slot in &self.wanted {
            let names = slot.recipes().into_iter().flat_map(|(recipe, _)| self.pantry.uses(recipe));
            let fresh = names.filter(|name| counted.insert(name.clone())).collect::<Vec<_>>();
            let stored = fresh.iter().filter_map(|name| self.checkpoint().get(name)).map(|tensor| tensor.len() as u64);
            let bytes = stored.fold(0, u64::saturating_add);
            all = all.saturating_add(match slot {
                Wanted::Embedding { vocab: rows, .. } if *rows as u64 == vocab && tied => {
                    tied = false;
                    bytes
                }
                Wanted::Embedding { .. } => 0,
                Wanted::Experts { experts, .. } => {
                    let chosen = number("num_experts_per_tok")?.min(*experts as u64);
                    (u128::from(bytes) * u128::from(chosen) / (*experts).max(1) as u128) as u64
                }
                _ => bytes,
            });
        }
        Some(all)
    }

    /// The process, and of a chunk the residual stream, queries, keys and values, and the widest rows of a layer, all in f32.
    fn work(&self, tokens: usize) -> u64 {
        let vocab = self.config.get("vocab_size").and_then(|v| v.as_u64()).unwrap_or(0);
        let rows = |slot: &Wanted| match slot {
            Wanted::Linear { inputs, outputs, .. } => Some((*inputs as u64, *outputs as u64)),
            Wanted::Experts { dim, hidden, .. } => Some((*dim as u64, *hidden as u64)),
            _ => None,
        };
        // Only the last token's logits are computed.
        let widths: Vec<(u64, u64)> = self.wanted.iter().filter_map(rows).filter(|(_, o)| *o != vocab).collect();
        let inner = widths.iter().map(|(inputs, _)| *inputs).min().unwrap_or(0);
        let widest = widths.iter().map(|(inputs, outputs)| *inputs.max(outputs)).max().unwrap_or(0);
        let row = inner.saturating_mul(8).saturating_add(widest.saturating_mul(5));
        let chunk = row.saturating_mul(4).saturating_mul(tokens.min(CHUNK) as u64);
        PROCESS.saturating_add(vocab.saturating_mul(PER_TOKEN_OF_VOCABULARY)).saturating_add(chunk)
    }
}
