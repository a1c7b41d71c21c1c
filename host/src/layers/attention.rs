//! Attention of a step's queries over each sequence's own keys. New keys join the cache first; which of them a query sees is decided by
//! positions alone, so a step may hold many sequences, of any lengths.

use super::{
    indexer,
    slices::{filled, with_f32},
};
use crate::{
    cache::{kv::KvCache, rows::Table},
    device::Placement,
    kernels::cpu::attention::{Attend, Blocks, Selection, attend as attend_on_cpu},
    ops::{attending::memory, running::Part},
};
use candle_core::{D, DType, Device, Result, Tensor, bail};

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
) -> Result<Tensor> {
    let numbers = |t: &Option<Tensor>| t.as_ref().map(|t| t.to_dtype(DType::F32)?.to_vec1::<f32>()).transpose();
    let (sinks, slopes) = (numbers(&how.sinks)?, numbers(&how.slopes)?);
    let heads = q.dim(1)?;
    let mut outputs = Vec::with_capacity(parts.len());
    for part in parts {
        let (start, count, offset) = (part.tokens.start, part.tokens.len(), part.state.offset);
        let rows = |t: &Tensor| t.narrow(0, start, count);
        let kv = memory(part, cache)?;
        if let Some(k) = &new.k {
            join(kv, &rows(k)?, new.v.as_ref().map(rows).transpose()?.as_ref(), offset, place)?;
        }
        let (q, sight) = (rows(q)?, kv.sight(how.window, how.chunk));
        let selection = how.selection.as_ref().map(|s| sorted(&rows(s)?)).transpose()?;
        let selection = selection.as_ref().map(|(lists, groups)| {
            let (groups, block) = (*groups, how.selection_block);
            Selection { lists, groups, heads: heads / groups.max(1), block }
        });
        let attend = Attend {
            scale: how.scale,
            softcap: how.softcap,
            window: sight.window,
            keep: sight.keep,
            chunk: sight.chunk,
            sinks: sinks.as_deref(),
            selection,
            blocks: how.blocks,
            slopes: slopes.as_deref(),
        };
        let queries: Vec<u32> = (offset..offset + count).map(|p| p as u32).collect();
        outputs.push(match place.native {
            true => on_cpu(&q, &queries, kv, how.lanes, &attend)?,
            false => by_candle(&q, &queries, kv, how.lanes, &attend, &place.device)?,
        });
    }
    match outputs.len() {
        1 => Ok(outputs.remove(0)),
        _ => Tensor::cat(&outputs, 0),
    }
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

/// The lists of a selection, each in rising order and without what fills it up, and how many a query has.
fn sorted(selection: &Tensor) -> Result<(Vec<Vec<u32>>, usize)> {
    let groups = if selection.rank() > 2 { selection.dim(1)? } else { 1 };
    let mut rows = selection.to_dtype(DType::U32)?.flatten_to(selection.rank() - 2)?.to_vec2::<u32>()?;
    for row in &mut rows {
        row.retain(|&k| k != indexer::NONE);
        row.sort_unstable();
    }
    Ok((rows, groups))
}

fn on_cpu(q: &Tensor, queries: &[u32], kv: &KvCache, lanes: Option<usize>, how: &Attend) -> Result<Tensor> {
    let (tokens, heads) = (q.dim(0)?, q.dim(1)?);
    let (Some(keys), Some(values), Some([kv_heads, d, _, e])) = (kv.keys.rows(), kv.values.rows(), kv.shape) else {
        bail!("the cache is not on the cpu")
    };
    let (values, e) = lanes.map_or((Some(values), e), |lanes| (None, lanes));
    with_f32(q, |q| {
        filled((tokens, heads, e), |out| {
            attend_on_cpu(q, heads, d, queries, keys, values, kv_heads, e, &kv.positions, how, out);
        })
    })?
}

/// The same by matmul, mask, softmax and matmul, for devices without a kernel of ours.
fn by_candle(
    q: &Tensor,
    queries: &[u32],
    kv: &KvCache,
    lanes: Option<usize>,
    how: &Attend,
    device: &Device,
) -> Result<Tensor> {
    let values = match (&kv.keys, &kv.values, lanes) {
        (Table::Tensor(Some(keys)), _, Some(lanes)) => &keys.narrow(2, 0, lanes)?,
        (_, Table::Tensor(Some(values)), None) => values,
        _ => bail!("the cache is empty"),
    };
    let Table::Tensor(Some(keys)) = &kv.keys else { bail!("the cache is empty") };
    let (tokens, heads, _) = q.dims3()?;
    let (groups, positions) = (heads / keys.dim(1)?, &kv.positions);
    // [entries, kv_heads, d] -> [heads, entries, d], each kv head repeated for its group of query heads
    let spread = |t: &Tensor| -> Result<Tensor> {
        let (entries, kv_heads, dim) = t.dims3()?;
        let t = t.transpose(0, 1)?.unsqueeze(1)?.broadcast_as((kv_heads, groups, entries, dim))?;
        t.contiguous()?.reshape((heads, entries, dim))
    };
    let (keys, values) = (spread(keys)?, spread(values)?);
    let queried = q.to_dtype(keys.dtype())?.transpose(0, 1)?.contiguous()?;
    let mut scores = queried.matmul(&keys.t()?)?.to_dtype(DType::F32)?.affine(how.scale as f64, 0.0)?;
    if let Some(cap) = how.softcap {
        scores = scores.affine(1.0 / cap as f64, 0.0)?.tanh()?.affine(cap as f64, 0.0)?;
    }
    // Heads that see different keys, or weigh distances differently, need a mask each.
    let masks = if how.alike(heads) && how.slopes.is_none() { 1 } else { heads };
    let mut mask = Vec::with_capacity(masks * tokens * positions.len());
    for head in 0..masks {
        for (token, &p) in queries.iter().enumerate() {
            let add = |&k: &u32| if how.sees(token, head, p, k) { how.bias(head, p, k) } else { f32::NEG_INFINITY };
            mask.extend(positions.iter().map(add));
        }
    }
    let mut scores = scores.broadcast_add(&Tensor::from_vec(mask, (masks, tokens, positions.len()), device)?)?;
    if let Some(sinks) = how.sinks {
        let column = Tensor::new(sinks, device)?.reshape((heads, 1, 1))?.broadcast_as((heads, tokens, 1))?;
        scores = Tensor::cat(&[&scores, &column.contiguous()?], D::Minus1)?;
    }
    let shares = candle_nn::ops::softmax_last_dim(&scores)?.narrow(D::Minus1, 0, positions.len())?;
    let y = shares.to_dtype(values.dtype())?.contiguous()?.matmul(&values)?;
    y.transpose(0, 1)?.contiguous()?.to_dtype(q.dtype())
}
