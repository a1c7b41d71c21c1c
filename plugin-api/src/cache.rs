//! What a layer remembers between steps, as an author declares it. The host stores, trims, shares, quantizes and saves it; the ops of a
//! running layer take these memories in the order of their declaration, each kind on its own.

use crate::abi::{CACHE_IN_CHUNKS, CACHE_KEY_VALUE, CACHE_POOLED, CACHE_STATE, CacheSpec};
use std::sync::Arc;

/// What one layer remembers: nothing, keys and values, states of recurrences, or several of these.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cache(Vec<CacheSpec>);

impl Cache {
    /// Nothing: a layer that sees each token alone.
    pub fn none() -> Self {
        Cache(Vec::new())
    }

    /// Keys and values; with a window, only the last `window` of them (the query's own included) ever matter.
    pub fn key_value(window: Option<usize>) -> Self {
        let window = window.unwrap_or(0) as u64;
        Cache(vec![CacheSpec { kind: CACHE_KEY_VALUE, flags: 0, window, dims: [0; 6] }])
    }

    /// Keys and values that matter within their chunk only: the tokens from one multiple of `size` to the next.
    pub fn chunked(size: usize) -> Self {
        Cache(vec![CacheSpec { kind: CACHE_KEY_VALUE, flags: CACHE_IN_CHUNKS, window: size as u64, dims: [0; 6] }])
    }

    /// Keys and values of which each stands for `rate` tokens: of what an op brings, the rows of tokens that end such a window.
    pub fn pooled(rate: usize) -> Self {
        Cache(vec![CacheSpec { kind: CACHE_POOLED, flags: 0, window: 0, dims: [rate as u64, 0, 0, 0, 0, 0] }])
    }

    /// The state of [`Layer::pool`](crate::Layer::pool): entries of `dim` lanes, each made of this many windows.
    pub fn pooling(windows: usize, dim: usize) -> Self {
        Self::state(&[windows, 3, dim])
    }

    /// Numbers of this shape, at most six axes: what an op with a state asks for.
    pub fn state(dims: &[usize]) -> Self {
        let mut shape = [0; 6];
        shape.iter_mut().zip(dims).for_each(|(to, &from)| *to = from as u64);
        Cache(vec![CacheSpec { kind: CACHE_STATE, flags: 0, window: 0, dims: shape }])
    }

    /// This and another one.
    pub fn and(mut self, other: Cache) -> Self {
        self.0.extend(other.0);
        self
    }
}

/// Where the layers' memories lie in the one list that crosses to the host.
#[derive(Debug, Clone, Default)]
pub(crate) struct Places {
    layers: Arc<[[Vec<u32>; 2]]>,
}

/// No memory of that kind; the host says so when an op asks for it.
pub(crate) const NOWHERE: u32 = u32::MAX;

impl Places {
    /// The list, and where each layer's part of it lies.
    pub fn of(caches: Vec<Cache>) -> (Vec<CacheSpec>, Self) {
        let mut list = Vec::new();
        let layers = caches.into_iter().map(|Cache(specs)| {
            let mut places = [Vec::new(), Vec::new()];
            for spec in specs {
                places[(spec.kind == CACHE_STATE) as usize].push(list.len() as u32);
                list.push(spec);
            }
            places
        });
        let layers = layers.collect();
        (list, Places { layers })
    }

    /// How many layers there are.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// The `nth` memory of a layer: keys and values, or a state.
    pub fn place(&self, layer: usize, state: bool, nth: usize) -> u32 {
        self.layers.get(layer).and_then(|l| l[state as usize].get(nth)).copied().unwrap_or(NOWHERE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_layer_finds_its_memories_by_kind_in_the_order_of_declaration() {
        let hybrid = Cache::state(&[3, 8]).and(Cache::key_value(None)).and(Cache::state(&[2, 4, 4]));
        let (list, places) = Places::of(vec![Cache::key_value(Some(7)), Cache::none(), hybrid]);
        assert_eq!(list.iter().map(|c| (c.kind, c.window)).collect::<Vec<_>>(), [(0, 7), (1, 0), (0, 0), (1, 0)]);
        assert_eq!(list[3].dims, [2, 4, 4, 0, 0, 0]);
        assert_eq!((places.layers(), places.place(0, false, 0), places.place(1, false, 0)), (3, 0, NOWHERE));
        assert_eq!((places.place(2, true, 0), places.place(2, false, 0), places.place(2, true, 1)), (1, 2, 3));
        assert_eq!(places.place(2, true, 2), NOWHERE);
    }
}
