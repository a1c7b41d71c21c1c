//! Softmax attention over a cache of any type, without ever holding the matrix of scores. Heads and blocks of queries run in
//! parallel; when there are few of them, stretches of keys do as well, and are merged in order.
//! The blocks lie at fixed entries, so a query's result is the same bits alone, in a chunk of any size, on any threads.

mod block;
mod rows;
mod sight;

pub use rows::Rows;
pub use sight::{Attend, Blocks, Selection};

use super::{
    lanes::{Isa, dispatch},
    tile::Block,
};
use block::{KEYS, Slopes, State, Step};
use rayon::prelude::*;
use rows::Widen;

/// Entries that are summed up on their own before they are merged; a multiple of [`KEYS`].
const STRETCH: usize = 1024;
/// Query rows (tokens x heads of a group) that share one widened block of keys.
const ROWS: usize = 48;

/// A cache of keys and values, and how queries see it.
#[derive(Clone, Copy)]
pub struct Keys<'a> {
    /// `[entries, kv_heads, dim]`
    pub keys: Rows<'a>,
    /// `[entries, kv_heads, v_dim]`; without, a key's first `v_dim` lanes are its value.
    pub values: Option<Rows<'a>>,
    /// Where each entry stands.
    pub positions: &'a [u32],
    /// Which entries a query sees, and how they score.
    pub how: &'a Attend<'a>,
}

/// One call's shapes and inputs.
#[derive(Clone, Copy)]
struct Call<'a> {
    isa: Isa,
    q: &'a [f32],
    q_heads: usize,
    dim: usize,
    query_positions: &'a [u32],
    caches: &'a [Keys<'a>],
    kv_heads: usize,
    v_dim: usize,
    sinks: Option<&'a [f32]>,
}

/// Up to [`STRETCH`] entries of a cache.
#[derive(Clone, Copy)]
struct Stretch {
    cache: usize,
    first: usize,
}

/// out = softmax(scale q · k, over the keys that are seen) · v. `q` is `[tokens, q_heads, dim]`, keys `[entries, kv_heads, dim]`,
/// values `[entries, kv_heads, v_dim]`, `out` `[tokens, q_heads, v_dim]`; query head h reads key head h / (q_heads / kv_heads).
/// Without values, a key's first `v_dim` lanes are its value.
/// Entries may lie in any order (a ring): positions decide. A query that sees nothing gives zeros.
///
/// # Panics
/// If the lengths do not agree, or `q_heads` is not a multiple of `kv_heads`.
#[allow(clippy::too_many_arguments)]
pub fn attend(
    q: &[f32],
    q_heads: usize,
    dim: usize,
    query_positions: &[u32],
    keys: Rows<'_>,
    values: Option<Rows<'_>>,
    kv_heads: usize,
    v_dim: usize,
    key_positions: &[u32],
    how: &Attend<'_>,
    out: &mut [f32],
) {
    let cache = Keys { keys, values, positions: key_positions, how };
    attend_all(q, q_heads, dim, query_positions, &[cache], kv_heads, v_dim, out);
}

/// The same with one softmax over the entries of several caches; the sinks are those of the first.
///
/// # Panics
/// As [`attend`].
#[allow(clippy::too_many_arguments)]
pub fn attend_all(
    q: &[f32],
    q_heads: usize,
    dim: usize,
    query_positions: &[u32],
    caches: &[Keys<'_>],
    kv_heads: usize,
    v_dim: usize,
    out: &mut [f32],
) {
    let tokens = query_positions.len();
    assert!(
        kv_heads > 0 && q_heads.is_multiple_of(kv_heads),
        "attend: {q_heads} query heads over {kv_heads} key heads"
    );
    assert!(q.len() == tokens * q_heads * dim && out.len() == tokens * q_heads * v_dim, "attend: {tokens} tokens");
    for Keys { keys, values, positions, how } in caches {
        let entries = positions.len();
        let held = match values {
            Some(values) => values.holds(entries * kv_heads, v_dim),
            None => v_dim <= dim,
        };
        assert!(held && keys.holds(entries * kv_heads, dim), "attend: {entries} entries");
        let covered = |s: sight::Selection| s.groups * s.heads == q_heads && s.lists.len() == tokens * s.groups;
        assert!(how.selection.is_none_or(covered), "attend: one selection a token and group of heads");
        assert!(how.slopes.is_none_or(|slopes| slopes.len() == q_heads), "attend: one slope a query head");
    }
    let sinks = caches.first().and_then(|cache| cache.how.sinks);
    assert!(sinks.is_none_or(|sinks| sinks.len() == q_heads), "attend: one sink a query head");
    let isa = Isa::best();
    Call { isa, q, q_heads, dim, query_positions, caches, kv_heads, v_dim, sinks }.run(out);
}

/// A block of queries of one key head.
#[derive(Clone, Copy)]
struct Queries {
    head: usize,
    first: usize,
    tokens: usize,
}

impl Call<'_> {
    fn group(&self) -> usize {
        self.q_heads / self.kv_heads
    }

    fn run(&self, out: &mut [f32]) {
        let abreast = (ROWS / self.group()).max(1);
        let starts = (0..self.query_positions.len()).step_by(abreast);
        let blocks: Vec<Queries> = starts
            .flat_map(|first| {
                let tokens = abreast.min(self.query_positions.len() - first);
                (0..self.kv_heads).map(move |head| Queries { head, first, tokens })
            })
            .collect();
        let entries = self.caches.iter().map(|cache| cache.positions.len());
        let work = self.q.len() * entries.clone().sum::<usize>();
        let of = |(cache, entries)| (0..entries).step_by(STRETCH).map(move |first| Stretch { cache, first });
        let stretches: Vec<Stretch> = entries.enumerate().flat_map(of).collect();
        let states: Vec<State> = if work < 1 << 16 {
            blocks.iter().map(|&b| self.all(b, &stretches)).collect()
        } else if stretches.len() == 1 || blocks.len() >= 4 * rayon::current_num_threads() {
            blocks.par_iter().map(|&b| self.all(b, &stretches)).collect()
        } else {
            let tasks: Vec<(Queries, Stretch)> =
                blocks.iter().flat_map(|&b| stretches.iter().map(move |&s| (b, s))).collect();
            let parts: Vec<State> = tasks.par_iter().map(|&(b, s)| self.stretch(b, s)).collect();
            parts.chunks(stretches.len()).map(|parts| merge(parts.iter().cloned())).collect()
        };
        for (block, state) in blocks.iter().zip(&states) {
            self.finish(*block, state, out);
        }
    }

    /// All keys, one stretch after the other.
    fn all(&self, block: Queries, stretches: &[Stretch]) -> State {
        if stretches.is_empty() {
            return State::new(block.tokens * self.group(), self.v_dim.next_multiple_of(16));
        }
        merge(stretches.iter().map(|&s| self.stretch(block, s)))
    }

    /// Keys of one stretch.
    fn stretch(&self, block: Queries, stretch: Stretch) -> State {
        let Keys { keys: all_keys, values, positions: key_positions, how } = self.caches[stretch.cache];
        let (group, rows) = (self.group(), block.tokens * self.group());
        let (len, width) = (self.dim.next_multiple_of(16), self.v_dim.next_multiple_of(16));
        let mut state = State::new(rows, width);
        let end = key_positions.len().min(stretch.first + STRETCH);
        // Keys that double as values are widened once.
        let pitch = if values.is_some() { width } else { len };
        // Block-sparse heads see different keys, others the same ones.
        let alike = if how.alike(group) { group } else { 1 };
        let at = |row: usize| (block.first + row / group, block.head * group + row % group);
        let slopes: Vec<(f32, u32)> = match how.slopes {
            Some(slopes) => {
                (0..rows).map(at).map(|(token, head)| (slopes[head], self.query_positions[token])).collect()
            }
            None => Vec::new(),
        };
        let mut scratch = Vec::new();
        let mut visible = vec![0u64; rows / alike];
        for first in (stretch.first..end).step_by(KEYS) {
            let keys = KEYS.min(end - first);
            let positions = &key_positions[first..first + keys];
            for (row, seen) in visible.iter_mut().enumerate().map(|(i, seen)| (i * alike, seen)) {
                let (token, head) = at(row);
                let p = self.query_positions[token];
                let bits = positions.iter().enumerate().map(|(i, &k)| u64::from(how.sees(token, head, p, k)) << i);
                *seen = bits.fold(0, |all, bit| all | bit);
            }
            if visible.iter().all(|&seen| seen == 0) {
                continue;
            }
            // Queries, keys, values, scores.
            if scratch.is_empty() {
                scratch.resize(rows * len + KEYS * len + KEYS * width + rows * KEYS, 0.0);
                self.scale_queries(block, how.scale, len, &mut scratch);
            }
            let (queries, rest) = scratch.split_at_mut(rows * len);
            let (wide_keys, rest) = rest.split_at_mut(KEYS * len);
            let (wide_values, scores) = rest.split_at_mut(KEYS * width);
            let widen = |rows, dim, stride, to: &mut [f32]| Widen {
                rows,
                dim,
                heads: self.kv_heads,
                head: block.head,
                entries: (first, keys),
                to: to.as_mut_ptr(),
                stride,
            };
            // SAFETY: blocks are sized above; `attend` checked that the rows hold all entries.
            unsafe {
                dispatch(self.isa, widen(all_keys, self.dim, len, wide_keys));
                if let Some(values) = values {
                    dispatch(self.isa, widen(values, self.v_dim, width, wide_values));
                }
                dispatch(
                    self.isa,
                    Step {
                        queries: Block { data: queries.as_ptr(), stride: len, rows },
                        keys: Block { data: wide_keys.as_ptr(), stride: len, rows: keys },
                        len,
                        values: if values.is_some() { wide_values.as_ptr() } else { wide_keys.as_ptr() },
                        pitch,
                        visible: &visible,
                        alike,
                        softcap: how.softcap,
                        slopes: how.slopes.map(|_| Slopes { rows: &slopes, keys: positions }),
                        scores,
                        state: &mut state,
                    },
                );
            }
        }
        state
    }

    /// Queries of a block, `[tokens, group]` rows of `len`.
    fn scale_queries(&self, block: Queries, scale: f32, len: usize, to: &mut [f32]) {
        let group = self.group();
        for (row, to) in to.chunks_exact_mut(len).take(block.tokens * group).enumerate() {
            let at = (block.first + row / group) * self.q_heads + block.head * group + row % group;
            for (to, x) in to.iter_mut().zip(&self.q[at * self.dim..(at + 1) * self.dim]) {
                *to = x * scale;
            }
        }
    }

    /// Sums to averages, sinks included.
    fn finish(&self, block: Queries, state: &State, out: &mut [f32]) {
        let group = self.group();
        for row in 0..block.tokens * group {
            let head = block.head * group + row % group;
            let at = (block.first + row / group) * self.q_heads + head;
            let (mut mass, mut fade) = (state.mass[row], 1.0);
            if let Some(sink) = self.sinks.and_then(|sinks| sinks.get(head)) {
                let peak = state.peak[row].max(*sink);
                if state.peak[row] > f32::NEG_INFINITY {
                    fade = (state.peak[row] - peak).exp();
                }
                mass = mass * fade + (sink - peak).exp();
            }
            let share = if mass > 0.0 { fade / mass } else { 0.0 };
            let sum = &state.sum[row * state.width..][..self.v_dim];
            for (out, x) in out[at * self.v_dim..(at + 1) * self.v_dim].iter_mut().zip(sum) {
                *out = x * share;
            }
        }
    }
}

/// Stretches in order.
fn merge(mut parts: impl Iterator<Item = State>) -> State {
    let mut all = parts.next().unwrap_or_else(|| State::new(0, 0));
    for part in parts {
        all.merge(&part);
    }
    all
}
