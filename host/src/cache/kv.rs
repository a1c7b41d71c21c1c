//! Keys and values of one layer, in the order of time, with the position that each entry had.
//!
//! Two rules drop entries: a layer's own window or chunk, and `max_kv_size`, which keeps the first few tokens and the last ones. Both are
//! rules about positions ("which keys does the query at p see"), so the result does not depend on how a prompt was cut into chunks.
//! Entries leave in blocks of `SLACK`, which costs little memory, moves little, and leaves room to go back a few tokens.

use super::{CacheOptions, KEEP, rows::Table};
use crate::device::Placement;
#[cfg(feature = "cuda")]
use crate::kernels::cuda::pack::Rows;
use candle_core::{Result, Tensor};
use plugin_api::abi::{CACHE_IN_CHUNKS, CACHE_POOLED, CacheSpec};

/// Entries kept beyond what is needed, so that dropping is rare and speculative decoding can take tokens back.
pub const SLACK: usize = 256;

/// The cache of one layer.
#[derive(Clone)]
pub struct KvCache {
    /// Keys.
    pub keys: Table,
    /// Values; nothing where they are lanes of the keys, or where keys only choose.
    pub values: Table,
    /// Where each entry stood in its sequence.
    pub positions: Vec<u32>,
    /// `[heads, dim]` of a key, `[heads, dim]` of a value; known from the first tokens on. No values: their dim is 0.
    pub shape: Option<[usize; 4]>,
    /// Tokens that an entry stands for: of these the last one has a row, the others have none.
    pub every: usize,
    window: Option<usize>,
    chunk: Option<usize>,
    options: CacheOptions,
}

/// Tokens that an entry of a declared cache stands for.
pub fn pooled_by(spec: &CacheSpec) -> usize {
    if spec.kind == CACHE_POOLED { (spec.dims[0] as usize).max(1) } else { 1 }
}

/// Which keys a query sees, beside "none of the future".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sight {
    /// The last so many, the query's own included.
    pub window: Option<usize>,
    /// Of these, none before the last multiple of this.
    pub chunk: Option<usize>,
    /// And the first so many of the sequence, whatever the window.
    pub keep: usize,
}

impl Sight {
    /// The first position that a query at `p` sees, beside the kept ones.
    pub fn oldest(&self, p: usize) -> usize {
        let in_window = self.window.map_or(0, |window| (p + 1).saturating_sub(window));
        in_window.max(self.chunk.map_or(0, |chunk| p / chunk * chunk))
    }
}

impl KvCache {
    /// An empty cache.
    pub fn new(spec: &CacheSpec, place: &Placement, options: CacheOptions) -> Self {
        let span = (spec.window > 0).then_some(spec.window as usize);
        let in_chunks = spec.flags & CACHE_IN_CHUNKS != 0;
        let (window, chunk) = if in_chunks { (None, span) } else { (span, None) };
        KvCache {
            keys: Table::new(place),
            values: Table::new(place),
            positions: Vec::new(),
            shape: None,
            every: pooled_by(spec),
            window,
            chunk,
            options,
        }
    }

    /// What a query sees, given the window and the chunk of its own attention.
    pub fn sight(&self, window: Option<usize>, chunk: Option<usize>) -> Sight {
        let span = window.into_iter().chain(chunk).min();
        match self.options.max_kv_size {
            Some(max) if span.is_none_or(|span| span > max) => Sight { window: Some(max - KEEP), chunk, keep: KEEP },
            _ => Sight { window, chunk, keep: 0 },
        }
    }

    /// What the layer keeps for its queries.
    pub fn rule(&self) -> Sight {
        self.sight(self.window, self.chunk)
    }

    /// Appends keys `[tokens, heads, dim]` and values (or none) given as f32 slices (CPU kernels), for tokens from `offset` on.
    pub fn append(&mut self, keys: &[f32], values: &[f32], offset: usize, tokens: usize) {
        let (k, v) = (keys.len() / tokens.max(1), values.len() / tokens.max(1));
        match self.every {
            1 => {
                self.keys.extend(keys);
                self.values.extend(values);
            }
            _ => self.joining(offset, tokens).for_each(|row| {
                self.keys.extend(&keys[row * k..(row + 1) * k]);
                self.values.extend(&values[row * v..(row + 1) * v]);
            }),
        }
        self.positions.extend(self.joining(offset, tokens).map(|row| (offset + row) as u32));
    }

    /// Those of the rows of `tokens` tokens from `offset` on that are entries.
    fn joining(&self, offset: usize, tokens: usize) -> impl Iterator<Item = usize> + use<> {
        let every = self.every;
        (every - 1 - offset % every..tokens).step_by(every)
    }

    /// The same for candle tensors.
    pub fn append_tensors(
        &mut self,
        keys: &Tensor,
        values: Option<&Tensor>,
        offset: usize,
        tokens: usize,
    ) -> Result<()> {
        let rows: Vec<u32> = self.joining(offset, tokens).map(|row| row as u32).collect();
        if !rows.is_empty() {
            let index = (rows.len() < tokens).then(|| Tensor::new(rows.as_slice(), keys.device())).transpose()?;
            let of = |t: &Tensor| index.as_ref().map_or(Ok(t.clone()), |index| t.index_select(index, 0));
            self.keys.extend_tensor(&of(keys)?)?;
            values.map_or(Ok(()), |values| self.values.extend_tensor(&of(values)?))?;
        }
        self.positions.extend(rows.into_iter().map(|row| offset as u32 + row));
        Ok(())
    }

    /// The same on CUDA, at positions `[tokens]` that lie on the device, the first of which is `offset` now: a step that was recorded writes
    /// its rows where they will stand when it is replayed.
    #[cfg(feature = "cuda")]
    pub fn append_at(
        &mut self,
        keys: &Tensor,
        values: Option<&Tensor>,
        positions: &Tensor,
        offset: usize,
    ) -> Result<()> {
        let (rows, forms) = ([Some(keys), values], [self.keys.form(), self.values.form()]);
        self.append_by(rows, offset, |tables, origin| {
            if let ([Some(keys), Some(values)], [Some(k), Some(v)], [Some(form), of_values]) = (rows, tables, forms)
                && of_values == Some(form)
            {
                return form.pack(&[[keys, k], [values, v]], Rows::At(positions, origin));
            }
            for ((rows, whole), form) in rows.iter().zip(tables).zip(forms) {
                let (Some(rows), Some(whole)) = (rows, whole) else { continue };
                match form {
                    Some(form) => form.pack(&[[rows, whole]], Rows::At(positions, origin))?,
                    None => crate::kernels::cuda::step::append(rows, positions, whole, origin)?,
                }
            }
            Ok(())
        })
    }

    /// The same for rows like these, which `write` brings to the tables it is given: `[capacity, heads, dim]`, and the position of their
    /// first entry.
    #[cfg(feature = "cuda")]
    pub fn append_by(
        &mut self,
        like: [Option<&Tensor>; 2],
        offset: usize,
        write: impl FnOnce([Option<&Tensor>; 2], u32) -> Result<()>,
    ) -> Result<()> {
        let tokens = like.iter().flatten().next().map_or(Ok(0), |rows| rows.dim(0))?;
        let origin = self.origin(offset)?;
        for (rows, table) in like.iter().zip([&mut self.keys, &mut self.values]) {
            rows.map_or(Ok(()), |rows| table.reserve(rows, tokens))?;
        }
        write([self.keys.whole(), self.values.whole()], origin)?;
        for (rows, table) in like.iter().zip([&mut self.keys, &mut self.values]) {
            if rows.is_some() {
                table.grown(tokens);
            }
        }
        self.positions.extend((offset as u32..).take(tokens));
        Ok(())
    }

    /// Makes room for `rows` more.
    #[cfg(feature = "cuda")]
    pub fn make_room(&mut self, rows: usize) -> Result<()> {
        for table in [&mut self.keys, &mut self.values] {
            if let Some(like) = table.whole().cloned() {
                table.reserve(&like, rows)?;
            }
        }
        Ok(())
    }

    /// Counts a row that a replayed step has written for the token at `offset`.
    #[cfg(feature = "cuda")]
    pub fn replayed(&mut self, offset: usize) {
        for table in [&mut self.keys, &mut self.values] {
            if table.whole().is_some() {
                table.grown(1);
            }
        }
        self.positions.push(offset as u32);
    }

    /// What to take from the position of a token at `offset` for its place in the table.
    #[cfg(feature = "cuda")]
    pub fn origin(&self, offset: usize) -> Result<u32> {
        match offset.checked_sub(self.positions.len()) {
            Some(origin) => Ok(origin as u32),
            None => candle_core::bail!("{} entries before position {offset}", self.positions.len()),
        }
    }

    /// Row widths of keys and values.
    fn widths(&self) -> [usize; 2] {
        self.shape.map_or([0, 0], |[heads, dim, v_heads, v_dim]| [heads * dim, v_heads * v_dim])
    }

    fn remove(&mut self, from: usize, to: usize) -> Result<()> {
        let [k, v] = self.widths();
        self.keys.remove(from, to, k)?;
        self.values.remove(from, to, v)?;
        self.positions.drain(from..to);
        Ok(())
    }

    /// Fixes the shape of keys and values, `[heads, dim]` each, with the first tokens; later ones must have the same.
    pub fn shaped(&mut self, shape: [usize; 4]) -> Result<()> {
        let [_, dim, _, v_dim] = shape;
        let group = self.options.kv_group_size;
        if self.options.kv_bits.is_some() && !(dim.is_multiple_of(group) && v_dim.is_multiple_of(group)) {
            candle_core::bail!(
                "--kv-bits: heads of {dim} and {v_dim} values do not split into groups of {group}; leave it out, or try another --kv-group-size"
            );
        }
        if *self.shape.get_or_insert(shape) != shape {
            candle_core::bail!("the cache holds keys and values of {:?}, now come {shape:?}", self.shape);
        }
        Ok(())
    }

    /// After a step that ended at `offset`: drops what no later query will see, and packs what is to be packed.
    pub fn settle(&mut self, offset: usize) -> Result<()> {
        let rule = self.rule();
        let pinned = self.positions.partition_point(|&p| (p as usize) < rule.keep);
        let oldest = rule.oldest(offset);
        let stale = self.positions.partition_point(|&p| (p as usize) < oldest);
        if stale >= pinned + 2 * SLACK {
            self.remove(pinned, stale - SLACK)?;
        }
        if let Some(bits) = self.options.kv_bits
            && offset >= self.options.quantized_kv_start
            && !self.keys.is_packed()
        {
            let group = self.options.kv_group_size;
            (self.keys, self.values) = (self.keys.packed(bits, group)?, self.values.packed(bits, group)?);
        }
        Ok(())
    }

    /// Whether everything that a query at `offset` would see is still here.
    pub fn can_trim_to(&self, offset: usize) -> bool {
        let (keep, oldest) = (self.rule().keep, self.rule().oldest(offset));
        // Dropping leaves one gap, between the kept tokens and the rest: the entry after it tells.
        let rest = self.positions.iter().position(|&p| p as usize >= keep.max(1)).map(|i| self.positions[i] as usize);
        rest.is_none_or(|first| first < oldest.max(keep.max(1)) + self.every)
    }

    /// Forgets entries at `offset` and later.
    pub fn trim_to(&mut self, offset: usize) {
        let from = self.positions.partition_point(|&p| (p as usize) < offset);
        // The tables and the positions have equal lengths, so this cannot fail.
        let _ = self.remove(from, self.positions.len());
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.keys.bytes() + self.values.bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{DeviceChoice, DtypeChoice};

    /// A cache of one number a token, after `tokens` steps.
    fn after(flags: u32, window: usize, max_kv_size: Option<usize>, tokens: usize) -> KvCache {
        read(CacheSpec { kind: 0, flags, window: window as u64, dims: [0; 6] }, max_kv_size, tokens)
    }

    fn read(spec: CacheSpec, max_kv_size: Option<usize>, tokens: usize) -> KvCache {
        let place = Placement::new(DeviceChoice::Cpu, DtypeChoice::Float32, candle_core::DType::F32).unwrap();
        let mut cache = KvCache::new(&spec, &place, CacheOptions { max_kv_size, ..Default::default() });
        cache.shaped([1, 1, 1, 0]).unwrap();
        for p in 0..tokens {
            cache.append(&[p as f32], &[], p, 1);
            cache.settle(p + 1).unwrap();
        }
        cache
    }

    #[test]
    fn a_chunk_that_is_over_leaves_and_what_a_query_may_see_stays() {
        for tokens in [500, 699, 700, 1399, 1400, 1401, 5000] {
            let cache = after(CACHE_IN_CHUNKS, 700, None, tokens);
            let first = cache.positions[0] as usize;
            assert!(first <= tokens / 700 * 700, "{tokens}: the query of the next token misses keys before {first}");
            assert!(cache.positions.len() <= 700 + 2 * SLACK, "{tokens}: {} keys", cache.positions.len());
            assert_eq!(cache.keys.numbers().unwrap(), cache.positions.iter().map(|&p| p as f32).collect::<Vec<_>>());
            assert!(cache.can_trim_to(tokens));
            assert_eq!(cache.can_trim_to(first.saturating_sub(1)), first == 0, "{tokens}");
        }
        assert!(!after(CACHE_IN_CHUNKS, 700, None, 1500).can_trim_to(1399), "went back into a chunk that has left");
    }

    #[test]
    fn keys_that_stand_for_several_tokens_stay_with_the_last_of_them() {
        let of_four = CacheSpec { kind: CACHE_POOLED, flags: 0, window: 0, dims: [4, 0, 0, 0, 0, 0] };
        let mut cache = read(of_four, None, 18);
        assert_eq!((cache.positions.as_slice(), cache.bytes()), (&[3, 7, 11, 15][..], 16));
        assert_eq!(cache.keys.numbers().unwrap(), [3.0, 7.0, 11.0, 15.0]);
        assert!((0..=18).all(|offset| cache.can_trim_to(offset)));
        cache.trim_to(15);
        assert_eq!(cache.positions, [3, 7, 11]);
        // Tokens 15 to 20 in one step.
        cache.append(&[15.0, 16.0, 17.0, 18.0, 19.0, 20.0], &[], 15, 6);
        assert_eq!(cache.keys.numbers().unwrap(), [3.0, 7.0, 11.0, 15.0, 19.0]);
        let limited = read(of_four, Some(100), 4000);
        let first = limited.positions[1] as usize;
        assert!(limited.positions[0] == 3 && first > 1000 && limited.positions.len() <= 25 + 2 * SLACK);
        assert!(limited.can_trim_to(first + 92) && !limited.can_trim_to(first + 91));
    }

    #[test]
    fn a_limit_below_the_chunk_keeps_the_first_tokens_and_the_last() {
        let cache = after(CACHE_IN_CHUNKS, 5000, Some(100), 3000);
        assert_eq!(cache.rule(), Sight { window: Some(100 - KEEP), chunk: Some(5000), keep: KEEP });
        assert_eq!(cache.positions[..KEEP], [0, 1, 2, 3]);
        assert!(cache.positions.len() <= 100 + 2 * SLACK);
    }
}
