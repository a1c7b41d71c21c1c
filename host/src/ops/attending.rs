//! The running ops over keys and values: attention, and the choice of the keys that it sees. Here shapes are checked and caches are
//! found; the numbers are `layers::attention`'s and `layers::indexer`'s.

use super::{
    running::{Part, Running},
    value::{Outcome, Value, fault},
};
use crate::{
    cache::{kv::KvCache, memory::Memory},
    kernels::cpu::attention::Blocks,
    layers::{attention, indexer},
};
use candle_core::Tensor;
use plugin_api::abi::{AttendSpec, BlockChoiceSpec, CACHE_POOLED, CACHE_STATE, Handle, SpecRef};

/// More blocks than any model looks at; each query keeps room for all that it may choose.
const MOST_BLOCKS: u64 = 1 << 16;

/// The keys and values of a sequence that a cache's number stands for.
pub fn memory<'a>(part: &'a mut Part, cache: usize) -> candle_core::Result<&'a mut KvCache> {
    match part.state.layers.get_mut(cache).and_then(Memory::key_value_mut) {
        Some(kv) => Ok(kv),
        None => candle_core::bail!("cache {cache} holds no keys and values"),
    }
}

/// The same, to be looked at.
pub fn remembered<'a>(part: &'a Part, cache: usize) -> candle_core::Result<&'a KvCache> {
    match part.state.layers.get(cache).and_then(Memory::key_value) {
        Some(kv) => Ok(kv),
        None => candle_core::bail!("cache {cache} holds no keys and values"),
    }
}

/// The tensor behind a value that may be a shape only.
fn real(value: &Option<Value>) -> Option<Tensor> {
    match value {
        Some(Value::Real(t)) => Some(t.clone()),
        _ => None,
    }
}

/// Pooled keys, their values and which of them are seen.
type Pools = [Option<Value>; 3];

fn three(x: &Value) -> Outcome<[usize; 3]> {
    match *x.dims()? {
        [tokens, heads, dim] => Ok([tokens, heads, dim]),
        ref dims => Err(fault!("{dims:?} is not [tokens, heads, dim]")),
    }
}

/// What a cache holds of a token, from keys and values that fit queries `[tokens, heads, d]`.
fn shape_of([tokens, heads, d]: [usize; 3], k: &Value, v: Option<&Value>) -> Outcome<[usize; 4]> {
    let [k_tokens, kv_heads, k_d] = three(k)?;
    let [v_tokens, v_heads, e] = v.map_or(Ok([k_tokens, kv_heads, 0]), three)?;
    if [k_tokens, v_tokens] != [tokens; 2] || v_heads != kv_heads {
        return Err(fault!(
            "q [{tokens}, {heads}, {d}] against k [{k_tokens}, {kv_heads}, {k_d}], v [{v_tokens}, {v_heads}, {e}]"
        ));
    }
    Ok([kv_heads, k_d, v_heads, e])
}

/// Whether a selection has a row for each token, or one for each group of heads.
fn chooses(selection: &Option<Value>, tokens: usize, heads: usize) -> Outcome<()> {
    match selection.as_ref().map(Value::dims).transpose()? {
        Some(&[n, _]) if n == tokens => Ok(()),
        Some(&[n, groups, _]) if n == tokens && groups > 0 && heads.is_multiple_of(groups) => Ok(()),
        Some(dims) => Err(fault!("a selection of {dims:?} for {tokens} tokens, {heads} heads")),
        None => Ok(()),
    }
}

impl Running<'_> {
    fn given(&mut self, handle: Handle) -> Outcome<Option<Value>> {
        (handle != Handle::NONE).then(|| self.arena.get(handle)).transpose()
    }

    /// Refuses to be written down for later: what follows is decided on the host.
    fn not_recorded(&self) -> Outcome<()> {
        match &self.places {
            Some(places) if places.recorded => Err(fault!("keys are chosen on the host")),
            _ => Ok(()),
        }
    }

    /// Notes that this step feeds a cache, which holds so much of a token.
    fn feed(&mut self, cache: u32, shape: [usize; 4]) -> Outcome<()> {
        if self.caches.get(cache as usize).is_some_and(|spec| spec.kind == CACHE_STATE) {
            return Err(fault!("cache {cache} is a state, not keys and values"));
        }
        match self.fed.get_mut(cache as usize) {
            Some(fed) if !*fed => *fed = true,
            Some(_) => return Err(fault!("cache {cache} is fed twice in one step")),
            None => return Err(fault!("the layer declares no further keys and values in caches()")),
        }
        self.shapes.insert(cache, shape);
        Ok(())
    }

    /// What a cache holds that this step has fed.
    fn looked_at(&self, cache: u32) -> Outcome<[usize; 4]> {
        let shape = self.shapes.get(&cache).copied();
        shape.ok_or_else(|| fault!("cache {cache} has not been fed in this step; attend_to an earlier layer"))
    }

    /// Softmax attention of q over a cache, which k and v join first.
    pub fn attend(&mut self, cache: u32, q: Handle, k: Handle, v: Handle, spec: SpecRef<'_>) -> Outcome {
        let spec = spec.read::<AttendSpec>().filter(|spec| spec.flags == 0);
        let spec =
            spec.ok_or_else(|| fault!("the plugin asks for a kind of attention that this dylm does not know"))?;
        let handles = [q, k];
        // Queries and keys may still be on their way.
        let waits = self.may_wait();
        let q = self.arena.look_later(q, waits)?.clone();
        let k = (k != Handle::NONE).then(|| self.arena.look_later(k, waits).cloned()).transpose()?;
        let v = self.given(v)?;
        let (sinks, selection, slopes) =
            (self.given(spec.sinks)?, self.given(spec.selection)?, self.given(spec.slopes)?);
        let lanes = spec.value_lanes as usize;
        let [tokens, heads, d] = three(&q)?;
        let shape = match (&k, &v) {
            (None, None) => self.looked_at(cache)?,
            (None, Some(_)) => return Err(fault!("values without keys")),
            (Some(k), v) => shape_of([tokens, heads, d], k, v.as_ref())?,
        };
        let [kv_heads, k_d, _, stored] = shape;
        if k_d != d || kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(fault!("q [{tokens}, {heads}, {d}] against k [{tokens}, {kv_heads}, {k_d}]"));
        }
        if lanes > d || (lanes > 0) == (stored > 0) {
            return Err(fault!(
                "values of {stored} lanes and of the first {lanes} of a key's {d}: it takes one of them"
            ));
        }
        for (what, numbers) in [("sinks", &sinks), ("slopes", &slopes)] {
            if let Some(numbers) = numbers
                && numbers.dims()? != [heads]
            {
                return Err(fault!("{what} {:?} for {heads} heads", numbers.dims()?));
            }
        }
        chooses(&selection, tokens, heads)?;
        let pooled = self.pooled(&spec, [tokens, heads, d], shape)?;
        if cache as usize >= self.fed.len() {
            return Err(fault!("the layer declares no further keys and values in caches()"));
        }
        if tokens != self.tokens {
            return Err(fault!("{tokens} tokens in a step of {}", self.tokens));
        }
        if k.is_some() {
            self.feed(cache, shape)?;
        }
        let Value::Real(q) = &q else {
            return Ok(Value::planned(&[tokens, heads, if lanes > 0 { lanes } else { stored }]));
        };
        let some = |n: u64| (n > 0).then_some(n as usize);
        let how = attention::Scores {
            scale: spec.scale,
            softcap: (spec.softcap > 0.0).then_some(spec.softcap),
            window: some(spec.window),
            chunk: some(spec.chunk),
            sinks: real(&sinks),
            selection: real(&selection),
            selection_block: u32::try_from(spec.selection_block).map_or(u32::MAX, |block| block.max(1)) as usize,
            blocks: some(spec.block).map(|size| Blocks {
                size,
                local: spec.local_blocks as usize,
                stride: spec.stride as usize,
            }),
            lanes: some(spec.value_lanes),
            slopes: real(&slopes),
            pooled: pooled.map(|(cache, [k, v, selection])| attention::Pooled {
                cache,
                new: attention::New { k: real(&k), v: real(&v) },
                selection: real(&selection),
            }),
        };
        let new = attention::New { k: real(&k), v: real(&v) };
        #[cfg(feature = "cuda")]
        if let Some(y) = self.attend_later(cache as usize, q, &new, &how)? {
            return Ok(y);
        }
        for handle in handles.into_iter().filter(|handle| waits && *handle != Handle::NONE) {
            self.arena.look(handle)?;
        }
        Ok(Value::Real(attention::attend(
            cache as usize,
            q,
            &new,
            &how,
            &mut self.parts,
            self.place,
            self.places.as_ref(),
        )?))
    }

    /// The cache of pooled keys that an `attend` names, fed with keys and values of the same shape as its own; and their selection.
    fn pooled(&mut self, spec: &AttendSpec, q: [usize; 3], own: [usize; 4]) -> Outcome<Option<(usize, Pools)>> {
        let pools = [spec.pooled_keys, spec.pooled_values, spec.pooled_selection];
        let [k, v, selection] = [self.given(pools[0])?, self.given(pools[1])?, self.given(pools[2])?];
        let (cache, k) = match (spec.pooled_cache.checked_sub(1), k) {
            (None, None) => return Ok(None),
            (Some(cache), Some(k)) => (cache as u32, k),
            _ => return Err(fault!("pooled keys and a cache for them: it takes both")),
        };
        if self.caches.get(cache as usize).is_none_or(|declared| declared.kind != CACHE_POOLED) {
            return Err(fault!("the layer declares no further pooled keys in caches()"));
        }
        let shape = shape_of(q, &k, v.as_ref())?;
        if shape != own {
            return Err(fault!("pooled keys and values {shape:?} beside {own:?}"));
        }
        chooses(&selection, q[0], q[1])?;
        self.feed(cache, shape)?;
        Ok(Some((cache as usize, [Some(k), v, selection])))
    }

    /// The positions `[tokens, count]` of the keys that an indexer scores best.
    pub fn index(&mut self, cache: u32, q: Handle, k: Handle, weights: Handle, count: usize) -> Outcome {
        let (q, k, weights) = (self.arena.get(q)?, self.arena.get(k)?, self.arena.get(weights)?);
        let (&[tokens, heads, d], k_dims, w_dims) = (q.dims()?, k.dims()?, weights.dims()?) else {
            return Err(fault!("q {:?} is not [tokens, heads, dim]", q.dims()?));
        };
        if k_dims != [tokens, 1, d] || w_dims != [tokens, heads] || count == 0 {
            return Err(fault!("the best {count} by q [{tokens}, {heads}, {d}], k {k_dims:?}, weights {w_dims:?}"));
        }
        if tokens != self.tokens {
            return Err(fault!("{tokens} tokens in a step of {}", self.tokens));
        }
        self.feed(cache, [1, d, 1, 0])?;
        self.not_recorded()?;
        match (&q, &k, &weights) {
            (Value::Real(q), Value::Real(k), Value::Real(weights)) => {
                let chosen = indexer::index(cache as usize, q, k, weights, count, &mut self.parts, self.place)?;
                Ok(Value::Real(chosen))
            }
            _ => Ok(Value::planned(&[tokens, count])),
        }
    }

    /// The numbers `[tokens, heads, count]` of the blocks of keys that each head of an indexer scores best.
    pub fn index_blocks(&mut self, cache: u32, q: Handle, k: Handle, spec: SpecRef<'_>) -> Outcome {
        let spec = spec.read::<BlockChoiceSpec>().filter(|spec| spec.flags == 0 && spec.reserved == 0);
        let spec = spec.ok_or_else(|| fault!("the plugin asks for a choice of blocks that this dylm does not know"))?;
        let (q, k) = (self.arena.get(q)?, self.arena.get(k)?);
        let (&[tokens, heads, d], k_dims) = (q.dims()?, k.dims()?) else {
            return Err(fault!("q {:?} is not [tokens, heads, dim]", q.dims()?));
        };
        if k_dims != [tokens, 1, d] || heads == 0 {
            return Err(fault!("the best blocks by q [{tokens}, {heads}, {d}], k {k_dims:?}"));
        }
        let number = |what, n: u64, most: u64| match n {
            n if (1..=most).contains(&n) => Ok(n as usize),
            n => Err(fault!("{what} {n}: it should be from 1 to {most}")),
        };
        let size = number("blocks of", spec.block, u32::MAX.into())?;
        let count = number("a choice of blocks,", spec.count, MOST_BLOCKS)?;
        if tokens != self.tokens {
            return Err(fault!("{tokens} tokens in a step of {}", self.tokens));
        }
        self.feed(cache, [1, d, 1, 0])?;
        self.not_recorded()?;
        match (&q, &k) {
            (Value::Real(q), Value::Real(k)) => {
                let how = indexer::Choice { size, count, local: spec.local as usize };
                let chosen = indexer::index_blocks(cache as usize, q, k, how, &mut self.parts, self.place)?;
                Ok(Value::Real(chosen))
            }
            _ => Ok(Value::planned(&[tokens, heads, count])),
        }
    }
}
