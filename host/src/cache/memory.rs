//! What one layer remembers, of either kind: keys and values, one row a token, or the state of a recurrence, which has the same size
//! however long the text is, is replaced by every step, and so cannot go back by itself (see [`State`](super::State)).

use super::{kv::KvCache, numbers::Numbers};
use plugin_api::abi::{CACHE_STATE, CacheSpec};

/// One declared cache of one sequence.
#[derive(Clone)]
#[allow(clippy::large_enum_variant)] // one a layer: a box would save little and cost a hop
pub enum Memory {
    /// Keys and values.
    KeyValue(KvCache),
    /// A recurrence's state.
    State(Recurrent),
}

impl Memory {
    /// Keys and values, if it is that.
    pub fn key_value(&self) -> Option<&KvCache> {
        if let Memory::KeyValue(kv) = self { Some(kv) } else { None }
    }

    /// The same, to be changed.
    pub fn key_value_mut(&mut self) -> Option<&mut KvCache> {
        if let Memory::KeyValue(kv) = self { Some(kv) } else { None }
    }

    /// A recurrence's state, if it is that.
    pub fn state(&self) -> Option<&Recurrent> {
        if let Memory::State(state) = self { Some(state) } else { None }
    }

    /// The same, to be changed.
    pub fn state_mut(&mut self) -> Option<&mut Recurrent> {
        if let Memory::State(state) = self { Some(state) } else { None }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        match self {
            Memory::KeyValue(kv) => kv.bytes(),
            Memory::State(state) => 4 * state.numbers.count(),
        }
    }
}

/// The state of a recurrence. Always f32: errors in it would add up from token to token.
#[derive(Clone, Debug, PartialEq)]
pub struct Recurrent {
    /// Its shape.
    pub dims: Vec<usize>,
    /// Its numbers, 0 before the first token.
    pub numbers: Numbers,
    /// The numbers as they were between the running step's replayed tokens and its new ones.
    pub(crate) midway: Option<Numbers>,
}

impl Recurrent {
    /// The state before the first token.
    pub fn new(spec: &CacheSpec) -> Self {
        let dims = dims(spec);
        Recurrent { numbers: Numbers::zeros(count(&dims)), dims, midway: None }
    }
}

/// The shape of a declared state: its dims up to the first 0; none of what is no state.
pub fn dims(spec: &CacheSpec) -> Vec<usize> {
    if spec.kind != CACHE_STATE {
        return Vec::new();
    }
    spec.dims.iter().take_while(|&&d| d > 0).map(|&d| usize::try_from(d).unwrap_or(usize::MAX)).collect()
}

/// Numbers in a state of this shape; one without axes is empty (a convolution over a single token).
pub fn count(dims: &[usize]) -> usize {
    if dims.is_empty() { 0 } else { dims.iter().fold(1, |n: usize, &d| n.saturating_mul(d)) }
}
