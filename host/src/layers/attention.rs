//! Attention of a step's queries over each sequence's own keys. New keys join the cache first; which of them a query sees is decided by
//! positions alone, so a step may hold many sequences, of any lengths.

use super::{
    indexer,
    slices::{filled, with_f32},
};
use crate::{
    cache::kv::{KvCache, Sight},
    device::Placement,
    kernels::{
        cpu::attention::{Attend, Blocks, Keys, Selection, attend_all},
        metal,
    },
    ops::{
        attending::{memory, remembered},
        running::{Part, Places},
    },
};
use candle_core::{D, DType, Device, Result, Tensor, bail};

#[cfg(feature = "cuda")]
pub(crate) mod on_cuda;
#[cfg(test)]
mod tests;

/// How scores are made, and which keys are seen.
pub struct Scores {
    /// Multiplies q·k.
    pub scale: f32,
    /// `softcap * tanh(score / softcap)`
    pub softcap: Option<f32>,
    /// Keys seen, counting the query's own.
    pub window: Option<usize>,
    /// Keys are seen from the last multiple of this on.
    pub chunk: Option<usize>,
    /// `[heads]`
    pub sinks: Option<Tensor>,
    /// Numbers `[tokens, count]` or `[tokens, groups, count]` of the only blocks of keys that are seen.
    pub selection: Option<Tensor>,
    /// Positions of such a block; 1 where keys are chosen one by one.
    pub selection_block: usize,
    /// Which blocks of keys are seen.
    pub blocks: Option<Blocks>,
    /// The first so many lanes of a key are its value.
    pub lanes: Option<usize>,
    /// `[heads]`: a score falls by so much for each position between query and key.
    pub slopes: Option<Tensor>,
    /// Keys that share the softmax and stand for several tokens each.
    pub pooled: Option<Pooled>,
}

impl Scores {
    /// Whether a kernel of Metal's does this, for few tokens of each sequence.
    fn on_metal(&self, q: &Tensor, parts: &[Part]) -> bool {
        let plain = self.selection.is_none() && self.blocks.is_none() && self.pooled.is_none();
        plain && metal::ops::attends(q) && parts.iter().all(|part| part.tokens.len() <= metal::attention::FEW)
    }
}

/// A cache of such keys.
pub struct Pooled {
    /// Its number.
    pub cache: usize,
    /// What joins it.
    pub new: New,
    /// Positions `[tokens, count]` or `[tokens, groups, count]` of the only ones that are seen.
    pub selection: Option<Tensor>,
}

/// What joins the cache: k `[tokens, kv_heads, d]`, and v `[tokens, kv_heads, e]` unless keys hold the values. Nothing where queries look
/// at what another layer has put there.
pub struct New {
    /// Keys.
    pub k: Option<Tensor>,
    /// Values.
    pub v: Option<Tensor>,
}

/// q `[tokens, heads, d]` -> `[tokens, heads, e]`.
pub fn attend(
    cache: usize,
    q: &Tensor,
    new: &New,
    how: &Scores,
    parts: &mut [Part],
    place: &Placement,
    places: Option<&Places>,
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(places) = places
        && let Some(output) = on_cuda::attend(cache, q, new, how, parts, place, places)?
    {
        return Ok(output);
    }
    if places.is_some_and(|places| places.recorded) {
        bail!("attention of a kind that has no kernel for this GPU");
    }
    // What stays on the GPU need not be waited for.
    let away = !place.native && how.on_metal(q, parts);
    let numbers = |t: &Option<Tensor>| match t {
        Some(t) if !away => t.to_dtype(DType::F32)?.to_vec1::<f32>().map(Some),
        _ => Ok(None),
    };
    let (sinks, slopes) = (numbers(&how.sinks)?, numbers(&how.slopes)?);
    let heads = q.dim(1)?;
    let mut outputs = Vec::with_capacity(parts.len());
    for part in parts {
        let (start, count, offset) = (part.tokens.start, part.tokens.len(), part.state.offset);
        let rows = |t: &Tensor| t.narrow(0, start, count);
        let pooled = how.pooled.as_ref();
        for (cache, New { k, v }) in [(cache, new)].into_iter().chain(pooled.map(|p| (p.cache, &p.new))) {
            if let Some(k) = k {
                let kv = memory(part, cache)?;
                join(kv, &rows(k)?, v.as_ref().map(rows).transpose()?.as_ref(), offset, place)?;
            }
        }
        let sorted = |s: &Option<Tensor>| s.as_ref().map(|s| sorted(&rows(s)?)).transpose();
        let (chosen, pooled_chosen) = (sorted(&how.selection)?, sorted(&pooled.and_then(|p| p.selection.clone()))?);
        let attend = |sight: Sight| Attend {
            scale: how.scale,
            softcap: how.softcap,
            window: sight.window,
            keep: sight.keep,
            chunk: sight.chunk,
            sinks: sinks.as_deref(),
            selection: None,
            blocks: None,
            slopes: slopes.as_deref(),
        };
        let kv = remembered(part, cache)?;
        let own = Attend {
            blocks: how.blocks,
            selection: shared(&chosen, heads, how.selection_block),
            ..attend(kv.sight(how.window, how.chunk))
        };
        let mut seen = vec![(kv, own)];
        if let Some(pooled) = pooled {
            let kv = remembered(part, pooled.cache)?;
            seen.push((kv, Attend { selection: shared(&pooled_chosen, heads, 1), ..attend(kv.sight(None, None)) }));
        }
        if away && let [(kv, own)] = seen.as_slice() {
            let beside = [how.slopes.as_ref(), how.sinks.as_ref()];
            if let Some(y) = metal::ops::few_attend(&rows(q)?, offset, kv, own, how.lanes, beside)? {
                outputs.push(y);
                continue;
            }
            bail!("the cache is not on the GPU");
        }
        let (q, queries) = (rows(q)?, (offset..offset + count).map(|p| p as u32).collect::<Vec<_>>());
        outputs.push(match place.native {
            true => on_cpu(&q, &queries, &seen, how.lanes)?,
            false => by_candle(&q, &queries, &seen, how.lanes, &place.device)?,
        });
    }
    match outputs.len() {
        1 => Ok(outputs.remove(0)),
        _ => Tensor::cat(&outputs, 0),
    }
}

/// Who sees which of the blocks of `size` that lists name: `heads` query heads share a query's lists evenly.
fn shared(lists: &Option<Lists>, heads: usize, size: usize) -> Option<Selection<'_>> {
    let (lists, groups) = lists.as_ref()?;
    Some(Selection { lists, groups: *groups, heads: heads / (*groups).max(1), block: size })
}

fn join(kv: &mut KvCache, k: &Tensor, v: Option<&Tensor>, offset: usize, place: &Placement) -> Result<()> {
    let (tokens, heads, dim) = k.dims3()?;
    kv.shaped([heads, dim, heads, v.map_or(Ok(0), |v| v.dim(2))?])?;
    match (place.native, v) {
        (true, Some(v)) => with_f32(k, |k| with_f32(v, |v| kv.append(k, v, offset, tokens)))?,
        (true, None) => with_f32(k, |k| kv.append(k, &[], offset, tokens)),
        (false, v) => {
            let v = v.map(|v| v.to_dtype(place.dtype)).transpose()?;
            kv.append_tensors(&k.to_dtype(place.dtype)?, v.as_ref(), offset, tokens)
        }
    }
}

/// Lists of positions or blocks, and how many of them a query has.
type Lists = (Vec<Vec<u32>>, usize);

/// The lists of a selection, each in rising order and without what fills it up, and how many a query has.
fn sorted(selection: &Tensor) -> Result<Lists> {
    let groups = if selection.rank() > 2 { selection.dim(1)? } else { 1 };
    let mut rows = selection.to_dtype(DType::U32)?.flatten_to(selection.rank() - 2)?.to_vec2::<u32>()?;
    for row in &mut rows {
        row.retain(|&k| k != indexer::NONE);
        row.sort_unstable();
    }
    Ok((rows, groups))
}

fn on_cpu(q: &Tensor, queries: &[u32], seen: &[(&KvCache, Attend)], lanes: Option<usize>) -> Result<Tensor> {
    let (tokens, heads, d) = q.dims3()?;
    let Some([kv_heads, _, _, e]) = seen.first().and_then(|(kv, _)| kv.shape) else { bail!("the cache is empty") };
    let mut caches = Vec::with_capacity(seen.len());
    for (kv, how) in seen {
        let (Some(keys), Some(values)) = (kv.keys.rows(), kv.values.rows()) else {
            bail!("the cache is not on the cpu")
        };
        let values = if lanes.is_some() { None } else { Some(values) };
        caches.push(Keys { keys, values, positions: &kv.positions, how });
    }
    let e = lanes.unwrap_or(e);
    with_f32(q, |q| filled((tokens, heads, e), |out| attend_all(q, heads, d, queries, &caches, kv_heads, e, out)))?
}

/// The same by matmul, mask, softmax and matmul, for devices without a kernel of ours.
fn by_candle(
    q: &Tensor,
    queries: &[u32],
    seen: &[(&KvCache, Attend)],
    lanes: Option<usize>,
    device: &Device,
) -> Result<Tensor> {
    let (tokens, heads, _) = q.dims3()?;
    // [entries, kv_heads, d] -> [heads, entries, d], each kv head repeated for its group of query heads
    let spread = |t: &Tensor| -> Result<Tensor> {
        let (entries, kv_heads, dim) = t.dims3()?;
        let t = t.transpose(0, 1)?.unsqueeze(1)?.broadcast_as((kv_heads, heads / kv_heads, entries, dim))?;
        t.contiguous()?.reshape((heads, entries, dim))
    };
    let (mut keys, mut values) = (Vec::with_capacity(seen.len()), Vec::with_capacity(seen.len()));
    for (kv, _) in seen {
        // Of pooled keys there may be none yet.
        let Some(k) = kv.keys.tensor()? else { continue };
        values.push(match (kv.values.tensor()?, lanes) {
            (_, Some(lanes)) => spread(&k.narrow(2, 0, lanes)?)?,
            (Some(v), None) => spread(&v)?,
            _ => bail!("the cache is empty"),
        });
        keys.push(spread(&k)?);
    }
    let (Some((_, how)), false) = (seen.first(), keys.is_empty()) else { bail!("the cache is empty") };
    let (keys, values) = (Tensor::cat(&keys, 1)?, Tensor::cat(&values, 1)?);
    let queried = q.to_dtype(keys.dtype())?.transpose(0, 1)?.contiguous()?;
    let mut scores = queried.matmul(&keys.t()?)?.to_dtype(DType::F32)?.affine(how.scale as f64, 0.0)?;
    if let Some(cap) = how.softcap {
        scores = scores.affine(1.0 / cap as f64, 0.0)?.tanh()?.affine(cap as f64, 0.0)?;
    }
    // Heads that see different keys, or weigh distances differently, need a mask each.
    let masks = if seen.iter().all(|(_, how)| how.alike(heads) && how.slopes.is_none()) { 1 } else { heads };
    let entries = keys.dim(1)?;
    let mut mask = Vec::with_capacity(masks * tokens * entries);
    for head in 0..masks {
        for (token, &p) in queries.iter().enumerate() {
            for (kv, how) in seen {
                let add = |&k: &u32| if how.sees(token, head, p, k) { how.bias(head, p, k) } else { f32::NEG_INFINITY };
                mask.extend(kv.positions.iter().map(add));
            }
        }
    }
    let mut scores = scores.broadcast_add(&Tensor::from_vec(mask, (masks, tokens, entries), device)?)?;
    if let Some(sinks) = how.sinks {
        let column = Tensor::new(sinks, device)?.reshape((heads, 1, 1))?.broadcast_as((heads, tokens, 1))?;
        scores = Tensor::cat(&[&scores, &column.contiguous()?], D::Minus1)?;
    }
    let shares = candle_nn::ops::softmax_last_dim(&scores)?.narrow(D::Minus1, 0, entries)?;
    let y = shares.to_dtype(values.dtype())?.contiguous()?.matmul(&values)?;
    y.transpose(0, 1)?.contiguous()?.to_dtype(q.dtype())
}
