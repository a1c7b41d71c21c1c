//! Attention on an NVIDIA GPU: keys join their caches where positions on the device say, and one kernel looks at them. None of it asks the
//! host, so it can be recorded; selections, blocks of keys and pooled keys are not for it.

use super::{New, Scores};
use crate::{
    cache::rows::Table,
    device::Placement,
    kernels::cuda::{
        attend::{self, Seen},
        attention,
        pack::Form,
        turn::{self, Joined, Turned},
    },
    ops::{
        attending::{memory, remembered},
        running::{Part, Places},
    },
};
use candle_core::{DType, Result, Tensor};

/// Queries of a sequence up to which the kernel for any width is faster than a matrix of scores.
const FEW: usize = 16;

/// Attention of queries and keys that are still to be turned, with which they and the values go through one launch if each sequence has one
/// token, and through two if there is one sequence; none, and nothing done, where there is no kernel for it.
pub fn attend_turned(
    cache: usize,
    [q, k]: [&Turned; 2],
    v: &Tensor,
    how: &Scores,
    parts: &mut [Part],
    place: &Placement,
    places: &Places,
) -> Result<Option<Tensor>> {
    let plain = how.selection.is_none() && how.blocks.is_none() && how.pooled.is_none() && how.lanes.is_none();
    let ((tokens, _, d), (_, heads, e)) = (q.x.dims3()?, v.dims3()?);
    let Some(first) = parts.first() else { return Ok(None) };
    let sight = remembered(first, cache)?.sight(how.window, how.chunk);
    let alike = parts.iter().map(|part| {
        let kv = remembered(part, cache)?;
        // Into a packed cache keys go when they have been turned.
        Ok(kv.every == 1 && !kv.keys.is_packed() && kv.sight(how.window, how.chunk) == sight)
    });
    let alike = alike.collect::<Result<Vec<_>>>()?.into_iter().all(|alike| alike);
    let single = parts.iter().all(|part| part.tokens.len() == 1);
    let queries = if single { 1 } else { tokens };
    let fast = attention::covers(place.dtype, d, e, false, sight.keep > 0, queries) && v.dtype() == place.dtype;
    if !(plain && fast && alike && turn::covers(q, k)) || !(single || parts.len() == 1) {
        return Ok(None);
    }
    let single = single && attention::covers_turned(q, heads, parts.len())?;
    if !single && parts.len() != 1 {
        return Ok(None);
    }
    let wide = |t: &Option<Tensor>| t.as_ref().map(|t| t.to_dtype(DType::F32)?.contiguous()).transpose();
    let (sinks, slopes) = (wide(&how.sinks)?, wide(&how.slopes)?);
    // In the order of their tokens.
    parts.sort_by_key(|part| part.tokens.start);
    let mut joined = Vec::with_capacity(parts.len());
    for part in parts.iter_mut() {
        let offset = part.state.offset;
        let kv = memory(part, cache)?;
        kv.shaped([heads, k.x.dim(2)?, heads, e])?;
        let row = |t: &Tensor| t.narrow(0, 0, queries);
        kv.append_by([Some(&row(&k.x)?), Some(&row(v)?)], offset, |tables, origin| match tables {
            [Some(keys), Some(values)] => {
                joined.push((keys.clone(), values.clone(), origin));
                Ok(())
            }
            _ => candle_core::bail!("the cache holds no tensors"),
        })?;
    }
    let caches: Vec<Joined<'_>> =
        joined.iter().map(|(keys, values, origin)| Joined { keys, values, origin: *origin }).collect();
    let Some(Joined { keys, values, origin }) = caches.first() else { return Ok(None) };
    let seen = Seen {
        q: &q.y,
        keys,
        values: Some(values),
        lanes: 0,
        positions: &places.positions,
        origin: *origin,
        window: sight.window,
        chunk: sight.chunk,
        keep: sight.keep,
        scale: how.scale,
        softcap: how.softcap,
        sinks: sinks.as_ref(),
        slopes: slopes.as_ref(),
        packed: None,
        fresh: false,
    };
    if single {
        return attention::attend_turned(&seen, q, k, v, &caches).map(Some);
    }
    turn::turn(q, k, v, &caches[0], &places.positions)?;
    attend::attend(&seen).map(Some)
}

/// As [`super::attend`], where all of it can be done so; else nothing has changed.
pub fn attend(
    cache: usize,
    q: &Tensor,
    new: &New,
    how: &Scores,
    parts: &mut [Part],
    place: &Placement,
    places: &Places,
) -> Result<Option<Tensor>> {
    let plain = how.selection.is_none() && how.blocks.is_none() && how.pooled.is_none();
    if !plain {
        return Ok(None);
    }
    // Values are as wide as those that come, or as those that another layer has put there.
    let covered = |part: &Part| {
        let kv = remembered(part, cache)?;
        let stored = new.v.as_ref().map(|v| v.dim(2)).transpose()?.or(kv.shape.map(|shape| shape[3]));
        let (d, tokens, kept) = (q.dim(2)?, part.tokens.len(), kv.sight(how.window, how.chunk).keep > 0);
        let few = tokens <= FEW && attend::fits(d, how.lanes.or(stored).unwrap_or(0));
        let fast = attention::covers(place.dtype, d, stored.unwrap_or(0), how.lanes.is_some(), kept, tokens);
        Ok(kv.every == 1 && (few || fast))
    };
    if !parts.iter().map(covered).collect::<Result<Vec<_>>>()?.into_iter().all(|covered| covered) {
        return Ok(None);
    }
    let wide = |t: &Option<Tensor>| t.as_ref().map(|t| t.to_dtype(DType::F32)?.contiguous()).transpose();
    let (sinks, slopes) = (wide(&how.sinks)?, wide(&how.slopes)?);
    let mut outputs = Vec::with_capacity(parts.len());
    for part in parts {
        let (start, count, offset) = (part.tokens.start, part.tokens.len(), part.state.offset);
        let rows = |t: &Tensor| t.narrow(0, start, count);
        let stored = |t: &Tensor| rows(t)?.to_dtype(place.dtype)?.contiguous();
        let positions = rows(&places.positions)?;
        let kv = memory(part, cache)?;
        if let Some(k) = &new.k {
            let (k, v) = (stored(k)?, new.v.as_ref().map(stored).transpose()?);
            let (_, heads, dim) = k.dims3()?;
            kv.shaped([heads, dim, heads, v.as_ref().map_or(Ok(0), |v| v.dim(2))?])?;
            kv.append_at(&k, v.as_ref(), &positions, offset)?;
        }
        let sight = kv.sight(how.window, how.chunk);
        // The step's own keys are there already, whoever put them.
        let origin = kv.origin(offset + count)?;
        let q = rows(q)?;
        // Where a kernel reads them so, groups of a few bits stay as they lie.
        let as_it_lies = |form: &Form| {
            let alike = how.lanes.is_none() && kv.values.form().as_ref() == Some(form) && sight.keep == 0;
            Ok::<_, candle_core::Error>(alike && attention::covers_packed(*form, &q)?)
        };
        let packed = match kv.keys.form() {
            Some(form) if as_it_lies(&form)? => Some(form),
            _ => None,
        };
        let table = |table: &Table| match packed {
            Some(_) => Ok(table.whole().cloned()),
            None => table.whole_at(&positions, origin),
        };
        let Some(keys) = table(&kv.keys)? else { candle_core::bail!("the cache is empty") };
        let values = if how.lanes.is_some() { None } else { table(&kv.values)? };
        let seen = Seen {
            q: &q,
            keys: &keys,
            values: values.as_ref(),
            lanes: how.lanes.unwrap_or(0),
            positions: &positions,
            origin,
            window: sight.window,
            chunk: sight.chunk,
            keep: sight.keep,
            scale: how.scale,
            softcap: how.softcap,
            sinks: sinks.as_ref(),
            slopes: slopes.as_ref(),
            packed,
            fresh: kv.keys.is_packed() && packed.is_none(),
        };
        outputs.push(attend::attend(&seen)?);
    }
    Ok(Some(if outputs.len() == 1 { outputs.remove(0) } else { Tensor::cat(&outputs, 0)? }))
}
