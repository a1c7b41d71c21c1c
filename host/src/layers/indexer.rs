//! The choice of keys in sparse attention: a small attention of its own scores every key for every query, and only the best ones are
//! attended to; one by one, for all heads together (DeepSeek), or in blocks, for each head apart (MiniMax). Scores are f32 everywhere,
//! since near ones decide. <https://arxiv.org/abs/2512.02556>, <https://arxiv.org/abs/2502.11089>

use super::slices::with_f32;
use crate::{
    cache::{kv::KvCache, rows::Table},
    device::Placement,
    kernels::cpu::attention::Attend,
    ops::{attending::memory, running::Part},
};
use candle_core::{D, DType, Result, Tensor, bail};

/// Scores held at once: what does not fit is done for fewer queries at a time.
const MOST_SCORES: usize = 1 << 24;

/// Where a query's list of positions or blocks ends before its room does.
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
        let tokens = part.tokens.len();
        let keys = Keys::joined(cache, k, part, place)?;
        if keys.kv.positions.len() <= count {
            for token in 0..tokens {
                pad(&mut chosen, count, keys.visible(token).map(|(_, k)| k));
            }
            continue;
        }
        keys.score(q, |rows, scores| {
            let weights = rows.of(weights)?.unsqueeze(D::Minus1)?;
            let scores = scores.relu()?.broadcast_mul(&weights)?.sum(1)?.to_vec2::<f32>()?;
            for (token, scores) in (rows.first..).zip(scores) {
                // Equal scores: the earlier key.
                let best = keys.visible(token).map(|(i, k)| (scores[i], k)).collect();
                pad(&mut chosen, count, best_first(best, |a, b| a.cmp(&b)));
            }
            Ok(())
        })?;
    }
    let tokens = chosen.len() / count.max(1);
    Tensor::from_vec(chosen, (tokens, count), &place.device)
}

/// How blocks are chosen.
#[derive(Clone, Copy)]
pub struct Choice {
    /// Positions of a block, the first of which starts at 0; at least 1.
    pub size: usize,
    /// Blocks chosen.
    pub count: usize,
    /// Of these, the last so many, counting the query's own, whatever their scores.
    pub local: usize,
}

/// q `[tokens, heads, d]`, k `[tokens, 1, d]` -> block numbers `[tokens, heads, count]`, padded with [`NONE`]. A block is judged by its best
/// key that the query may see.
pub fn index_blocks(
    cache: usize,
    q: &Tensor,
    k: &Tensor,
    how: Choice,
    parts: &mut [Part],
    place: &Placement,
) -> Result<Tensor> {
    let (tokens, heads, _) = q.dims3()?;
    let mut chosen = Vec::with_capacity(tokens * heads * how.count);
    for part in parts {
        let (offset, count) = (part.state.offset, part.tokens.len());
        let keys = Keys::joined(cache, k, part, place)?;
        if keys.kv.positions.is_empty() {
            pad(&mut chosen, count * heads * how.count, std::iter::empty());
            continue;
        }
        keys.score(q, |rows, scores| {
            for (token, scores) in (rows.first..).zip(scores.to_vec3::<f32>()?) {
                let own = (offset + token) / how.size;
                for scores in scores {
                    let mut best: Vec<(f32, u32)> = Vec::new();
                    for (i, k) in keys.visible(token) {
                        let block = k as usize / how.size;
                        let score = if own - block < how.local { f32::INFINITY } else { scores[i] };
                        // Positions rise, and so do blocks.
                        match best.last_mut() {
                            Some((most, last)) if *last as usize == block => *most = most.max(score),
                            _ => best.push((score, block as u32)),
                        }
                    }
                    // Equal scores, which the last blocks have by rule: the nearer one.
                    pad(&mut chosen, how.count, best_first(best, |a, b| b.cmp(&a)));
                }
            }
            Ok(())
        })?;
    }
    Tensor::from_vec(chosen, (tokens, heads, how.count), &place.device)
}

/// All keys of a sequence, the step's own among them.
struct Keys<'a> {
    kv: &'a KvCache,
    place: &'a Placement,
    /// Where the sequence's tokens stand in the step, and in the sequence.
    start: usize,
    offset: usize,
    tokens: usize,
}

/// Some of a sequence's tokens in this step.
struct Rows {
    start: usize,
    first: usize,
    count: usize,
}

impl Rows {
    /// Their part of a tensor that has a row for each token of the step, in f32.
    fn of(&self, t: &Tensor) -> Result<Tensor> {
        t.narrow(0, self.start + self.first, self.count)?.to_dtype(DType::F32)
    }
}

impl<'a> Keys<'a> {
    /// k `[tokens, 1, d]` of the whole step joins the cache of one sequence.
    fn joined(cache: usize, k: &Tensor, part: &'a mut Part, place: &'a Placement) -> Result<Self> {
        let (start, tokens, offset) = (part.tokens.start, part.tokens.len(), part.state.offset);
        let kv = memory(part, cache)?;
        kv.shaped([1, k.dim(2)?, 1, 0])?;
        let new = k.narrow(0, start, tokens)?;
        if place.native {
            with_f32(&new, |k| kv.append(k, &[], offset, tokens))?;
        } else {
            kv.append_tensors(&new.to_dtype(place.dtype)?, None, offset, tokens)?;
        }
        Ok(Keys { kv, place, start, offset, tokens })
    }

    /// Entries that a token may see, and their positions.
    fn visible(&self, token: usize) -> impl Iterator<Item = (usize, u32)> {
        let (sight, p) = (self.kv.sight(None, None), (self.offset + token) as u32);
        let rule = Attend { window: sight.window, keep: sight.keep, ..Default::default() };
        self.kv.positions.iter().copied().enumerate().filter(move |&(_, k)| rule.sees(0, 0, p, k))
    }

    /// q·k `[rows, heads, entries]`, for as many tokens at a time as memory allows.
    fn score(&self, q: &Tensor, mut each: impl FnMut(&Rows, Tensor) -> Result<()>) -> Result<()> {
        let (_, heads, dim) = q.dims3()?;
        let entries = self.kv.positions.len();
        let keys = match (&self.kv.keys, self.kv.keys.tensor()?) {
            (_, Some(rows)) => rows.to_dtype(DType::F32)?.squeeze(1)?.t()?.contiguous()?,
            (Table::Tensor(_), None) => bail!("the cache is empty"),
            (table, None) => {
                Tensor::from_vec(table.numbers()?, (entries, dim), &self.place.device)?.t()?.contiguous()?
            }
        };
        let abreast = (MOST_SCORES / (heads * entries).max(1)).max(1);
        for first in (0..self.tokens).step_by(abreast) {
            let rows = Rows { start: self.start, first, count: abreast.min(self.tokens - first) };
            let scores = rows.of(q)?.flatten(0, 1)?.matmul(&keys)?.reshape((rows.count, heads, entries))?;
            each(&rows, scores)?;
        }
        Ok(())
    }
}

/// What was scored, best first; `tie` orders equal scores.
fn best_first(mut scored: Vec<(f32, u32)>, tie: impl Fn(u32, u32) -> std::cmp::Ordering) -> impl Iterator<Item = u32> {
    scored.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then_with(|| tie(a.1, b.1)));
    scored.into_iter().map(|(_, what)| what)
}

/// The first `count` of a list, and [`NONE`] where there are fewer.
fn pad(to: &mut Vec<u32>, count: usize, list: impl Iterator<Item = u32>) {
    let end = to.len() + count;
    to.extend(list.take(count));
    to.resize(end, NONE);
}
