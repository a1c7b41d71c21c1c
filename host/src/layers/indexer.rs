//! The choice of keys in DeepSeek's sparse attention: a small attention of its own scores every key for every query, and only the best
//! ones are attended to. Scores are f32 everywhere, since near ones decide. <https://arxiv.org/abs/2512.02556>

use super::slices::with_f32;
use crate::{
    cache::rows::Table,
    device::Placement,
    kernels::cpu::attention::Attend,
    ops::{attending::memory, running::Part},
};
use candle_core::{D, DType, Result, Tensor, bail};

/// Scores held at once: what does not fit is done for fewer queries at a time.
const MOST_SCORES: usize = 1 << 24;

/// Where a query's list of positions ends before its room does.
pub const NONE: u32 = u32::MAX;

/// q `[tokens, heads, d]`, k `[tokens, 1, d]`, weights `[tokens, heads]` -> positions `[tokens, count]`, padded with [`NONE`].
pub fn index(
    cache: usize,
    q: &Tensor,
    k: &Tensor,
    weights: &Tensor,
    count: usize,
    parts: &mut [Part],
    place: &Placement,
) -> Result<Tensor> {
    let mut chosen = Vec::with_capacity(q.dim(0)? * count);
    for part in parts {
        let (start, tokens, offset) = (part.tokens.start, part.tokens.len(), part.state.offset);
        let kv = memory(part, cache)?;
        kv.shaped([1, k.dim(2)?, 1, 0])?;
        let new = k.narrow(0, start, tokens)?;
        if place.native {
            with_f32(&new, |k| kv.append(k, &[], offset, tokens))?;
        } else {
            kv.append_tensors(&new.to_dtype(place.dtype)?, None, offset, tokens)?;
        }
        let sight = kv.sight(None, None);
        let rule = Attend { window: sight.window, keep: sight.keep, ..Default::default() };
        let visible = |token: usize| {
            let p = (offset + token) as u32;
            kv.positions.iter().enumerate().filter(move |(_, k)| rule.sees(0, 0, p, **k))
        };
        let entries = kv.positions.len();
        if entries <= count {
            for token in 0..tokens {
                pad(&mut chosen, count, visible(token).map(|(_, &k)| k));
            }
            continue;
        }
        let keys = match &kv.keys {
            Table::Tensor(Some(t)) => t.to_dtype(DType::F32)?.squeeze(1)?.t()?.contiguous()?,
            Table::Tensor(None) => bail!("the cache is empty"),
            table => Tensor::from_vec(table.numbers()?, (entries, k.dim(2)?), &place.device)?.t()?.contiguous()?,
        };
        let heads = q.dim(1)?;
        let abreast = (MOST_SCORES / (heads * entries).max(1)).max(1);
        for first in (0..tokens).step_by(abreast) {
            let rows = abreast.min(tokens - first);
            let cut = |t: &Tensor| t.narrow(0, start + first, rows)?.to_dtype(DType::F32);
            let scores = cut(q)?.flatten(0, 1)?.matmul(&keys)?.relu()?.reshape((rows, heads, entries))?;
            let scores = scores.broadcast_mul(&cut(weights)?.unsqueeze(D::Minus1)?)?.sum(1)?.to_vec2::<f32>()?;
            for (token, scores) in (first..).zip(scores) {
                let mut best: Vec<(f32, u32)> = visible(token).map(|(i, &k)| (scores[i], k)).collect();
                // Equal scores: the earlier key.
                best.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
                pad(&mut chosen, count, best.into_iter().map(|(_, k)| k));
            }
        }
    }
    let tokens = chosen.len() / count.max(1);
    Tensor::from_vec(chosen, (tokens, count), &place.device)
}

/// The first `count` positions, and [`NONE`] where there are fewer.
fn pad(to: &mut Vec<u32>, count: usize, positions: impl Iterator<Item = u32>) {
    let end = to.len() + count;
    to.extend(positions.take(count));
    to.resize(end, NONE);
}
