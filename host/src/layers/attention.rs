//! Attention of a step's queries over each sequence's own keys. New keys join the cache first; which of them a query sees is decided by
//! positions alone, so a step may hold many sequences, of any lengths.

use super::slices::{filled, with_f32};
use crate::{
    cache::{kv::Sight, rows::Table},
    device::Placement,
    kernels::cpu::attention::{Attend, attend as attend_on_cpu},
    ops::running::Part,
};
use candle_core::{D, DType, Device, Result, Tensor, bail};

/// How scores are made.
pub struct Scores {
    /// Multiplies q·k.
    pub scale: f32,
    /// `softcap * tanh(score / softcap)`
    pub softcap: Option<f32>,
    /// Keys seen, counting the query's own.
    pub window: Option<usize>,
    /// `[heads]`
    pub sinks: Option<Tensor>,
}

/// q `[tokens, heads, d]`, k `[tokens, kv_heads, d]`, v `[tokens, kv_heads, e]` -> `[tokens, heads, e]`.
pub fn attend(
    cache: usize,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    how: &Scores,
    parts: &mut [Part],
    place: &Placement,
) -> Result<Tensor> {
    let mut outputs = Vec::with_capacity(parts.len());
    for part in parts {
        let rows = |t: &Tensor| t.narrow(0, part.tokens.start, part.tokens.len());
        let (q, k, v) = (rows(q)?, rows(k)?, rows(v)?);
        let (offset, count) = (part.state.offset, part.tokens.len());
        let Some(kv) = part.state.layers.get_mut(cache) else { bail!("cache {cache} is not there") };
        let shape = [k.dim(1)?, k.dim(2)?, v.dim(1)?, v.dim(2)?];
        kv.shaped(shape)?;
        let sight = kv.sight(how.window);
        let queries: Vec<u32> = (offset..offset + count).map(|p| p as u32).collect();
        outputs.push(if place.native {
            with_f32(&k, |k| with_f32(&v, |v| kv.append(k, v, offset, count)))??;
            on_cpu(&q, &queries, &kv.keys, &kv.values, shape, &kv.positions, how, sight)?
        } else {
            let dtype = place.dtype;
            kv.append_tensors(&k.to_dtype(dtype)?, &v.to_dtype(dtype)?, offset, count)?;
            by_candle(&q, &queries, &kv.keys, &kv.values, &kv.positions, how, sight, &place.device)?
        });
    }
    match outputs.len() {
        1 => Ok(outputs.remove(0)),
        _ => Tensor::cat(&outputs, 0),
    }
}

#[allow(clippy::too_many_arguments)] // each is a different thing, and a struct would be built for this one call
fn on_cpu(
    q: &Tensor,
    queries: &[u32],
    keys: &Table,
    values: &Table,
    [kv_heads, d, _, e]: [usize; 4],
    positions: &[u32],
    how: &Scores,
    sight: Sight,
) -> Result<Tensor> {
    let (tokens, heads) = (q.dim(0)?, q.dim(1)?);
    let (Some(keys), Some(values)) = (keys.rows(), values.rows()) else { bail!("the cache is not on the cpu") };
    let sinks = how.sinks.as_ref().map(|s| s.to_dtype(DType::F32)?.to_vec1::<f32>()).transpose()?;
    let attend = Attend {
        scale: how.scale,
        softcap: how.softcap,
        window: sight.window,
        keep: sight.keep,
        sinks: sinks.as_deref(),
    };
    with_f32(q, |q| {
        filled((tokens, heads, e), |out| {
            attend_on_cpu(q, heads, d, queries, keys, values, kv_heads, e, positions, &attend, out);
        })
    })?
}

/// The same by matmul, mask, softmax and matmul, for devices without a kernel of ours.
#[allow(clippy::too_many_arguments)] // as above
fn by_candle(
    q: &Tensor,
    queries: &[u32],
    keys: &Table,
    values: &Table,
    positions: &[u32],
    how: &Scores,
    sight: Sight,
    device: &Device,
) -> Result<Tensor> {
    let (Table::Tensor(Some(keys)), Table::Tensor(Some(values))) = (keys, values) else { bail!("the cache is empty") };
    let (tokens, heads, _) = q.dims3()?;
    let groups = heads / keys.dim(1)?;
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
    let seen = |p: u32, k: u32| k <= p && (sight.window.is_none_or(|w| p - k < w as u32) || (k as usize) < sight.keep);
    let mask = |&p: &u32| positions.iter().map(move |&k| if seen(p, k) { 0.0 } else { f32::NEG_INFINITY });
    let mask: Vec<f32> = queries.iter().flat_map(mask).collect();
    let mut scores = scores.broadcast_add(&Tensor::from_vec(mask, (1, tokens, positions.len()), device)?)?;
    if let Some(sinks) = &how.sinks {
        let column =
            sinks.to_dtype(DType::F32)?.reshape((heads, 1, 1))?.broadcast_as((heads, tokens, 1))?.contiguous()?;
        scores = Tensor::cat(&[&scores, &column], D::Minus1)?;
    }
    let shares = candle_nn::ops::softmax_last_dim(&scores)?.narrow(D::Minus1, 0, positions.len())?;
    let y = shares.to_dtype(values.dtype())?.contiguous()?.matmul(&values)?;
    y.transpose(0, 1)?.contiguous()?.to_dtype(q.dtype())
}
