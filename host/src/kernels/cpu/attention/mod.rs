//! Softmax attention over a cache of any type, without ever holding the matrix of scores. Heads and blocks of queries run in
//! parallel; when there are few of them, stretches of keys do as well, and are merged in order.
//! The blocks lie at fixed entries, so a query's result is the same bits alone, in a chunk of any size, on any threads.

mod block;
#[cfg(target_arch = "x86_64")]
mod halves;
#[cfg(target_arch = "x86_64")]
mod pairs;
mod pass;
mod rows;
mod sight;
mod state;
#[cfg(target_arch = "x86_64")]
mod tiled;

pub use rows::Rows;
pub use sight::{Attend, Blocks, Selection};

use super::{
    lanes::{Isa, dispatch},
    tasks::{Output, in_tasks},
    team::{each_chunk, threads},
};
use pass::{Pass, Queries, Room, STRETCH, Stretch};
use state::{Merge, State};

/// Query rows (tokens x heads of a group) that share a block of keys.
const ROWS: usize = 48;
/// Floats that stretches may sum up side by side before they are merged.
const PARTS: usize = 1 << 23;

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

/// One query of each of some sequences over its own cache: `q` is `[sequences, q_heads, dim]`, `out` `[sequences, q_heads, v_dim]`. Threads
/// take a sequence each where none is so long that the others would be done long before.
///
/// # Panics
/// As [`attend`].
#[allow(clippy::too_many_arguments)]
pub fn attend_apart(
    q: &[f32],
    q_heads: usize,
    dim: usize,
    query_positions: &[u32],
    caches: &[Keys<'_>],
    kv_heads: usize,
    v_dim: usize,
    out: &mut [f32],
) {
    let (from, to) = (q_heads * dim, (q_heads * v_dim).max(1));
    let one = |i: usize, out: &mut [f32]| {
        let (q, at, cache) = (&q[i * from..][..from], &query_positions[i..=i], &caches[i..=i]);
        attend_all(q, q_heads, dim, at, cache, kv_heads, v_dim, out);
    };
    let lengths = || caches.iter().map(|cache| cache.positions.len());
    if lengths().max().unwrap_or(0) * threads() <= lengths().sum() {
        each_chunk(out, to, one);
    } else {
        out.chunks_exact_mut(to).enumerate().for_each(|(i, out)| one(i, out));
    }
}

impl Call<'_> {
    fn group(&self) -> usize {
        self.q_heads / self.kv_heads
    }

    /// Lanes of a value, padded to whole vectors.
    fn width(&self) -> usize {
        self.v_dim.next_multiple_of(16)
    }

    fn run(&self, out: &mut [f32]) {
        let abreast = (ROWS / self.group()).max(1);
        let tokens = self.query_positions.len();
        let blocks = tokens.div_ceil(abreast);
        let of = |(cache, keys): (usize, &Keys<'_>)| {
            (0..keys.positions.len()).step_by(STRETCH).map(move |first| Stretch { cache, first })
        };
        let stretches: Vec<Stretch> = self.caches.iter().enumerate().flat_map(of).collect();
        let tokens = |block: usize| block * abreast..tokens.min((block + 1) * abreast);
        let out = Output(out.as_mut_ptr());
        // Products of a block of queries with a stretch.
        let products = tokens(0).len() * self.q_heads * STRETCH * (self.dim + self.v_dim);
        let size = self.kv_heads * State::room(abreast.min(tokens(0).len()) * self.group(), self.width());
        let parts = blocks * stretches.len() * size;
        let split = blocks == 1 || blocks * self.kv_heads < 4 * rayon::current_num_threads();
        if split && stretches.len() > 1 && parts <= PARTS {
            let mut sums = vec![0.0; parts];
            let room = Output(sums.as_mut_ptr());
            // Neighbours on one thread: it has the next entries on their way.
            in_tasks(blocks * stretches.len(), products, 1, usize::MAX, |scratch: &mut Room, range| {
                for i in range {
                    let pass = Pass {
                        call: self,
                        queries: Queries { tokens: tokens(i / stretches.len()), heads: 0..self.kv_heads },
                    };
                    let states = self.kv_heads * State::room(pass.rows(), self.width());
                    // SAFETY: each task has `size` floats of its own.
                    let states = unsafe { std::slice::from_raw_parts_mut(room.pointer().add(i * size), states) };
                    pass.stretch(stretches[i % stretches.len()], scratch, states);
                }
            });
            for (block, sums) in sums.chunks_exact_mut(stretches.len() * size).enumerate() {
                self.merge(tokens(block), size, sums, out);
            }
        } else {
            let tasks = blocks * self.kv_heads;
            in_tasks(tasks, products / self.kv_heads * stretches.len(), 1, 1, |scratch: &mut Room, range| {
                for i in range {
                    // The last queries see the most keys: what takes longest comes first.
                    let (block, head) = (blocks - 1 - i / self.kv_heads, i % self.kv_heads);
                    let pass = Pass { call: self, queries: Queries { tokens: tokens(block), heads: head..head + 1 } };
                    self.through(&pass, &stretches, scratch, out);
                }
            });
        }
    }

    /// One head's queries over all stretches, one after the other.
    fn through(&self, pass: &Pass<'_>, stretches: &[Stretch], scratch: &mut Room, out: Output) {
        let (rows, width) = (pass.rows(), self.width());
        let size = State::room(rows, width);
        let mut sums = std::mem::take(&mut scratch.sums);
        sums.resize(2 * size, 0.0);
        let (all, part) = sums.split_at_mut(size);
        State::of(all, rows, width).clear();
        for (i, &stretch) in stretches.iter().enumerate() {
            if i == 0 {
                pass.stretch(stretch, scratch, all);
                continue;
            }
            pass.stretch(stretch, scratch, part);
            let (into, from) = (&mut State::of(all, rows, width), &State::of(part, rows, width));
            // SAFETY: states of the same rows.
            unsafe { dispatch(self.isa, Merge { into, from }) };
        }
        self.finish(&pass.queries, &State::of(all, rows, width), out);
        scratch.sums = sums;
    }

    /// What stretches have summed up for a block of queries and all heads, `size` floats each, in order.
    fn merge(&self, tokens: std::ops::Range<usize>, size: usize, sums: &mut [f32], out: Output) {
        let (rows, width) = (tokens.len() * self.group(), self.width());
        let (all, parts) = sums.split_at_mut(size);
        let one = State::room(rows, width);
        for (head, all) in all.chunks_exact_mut(one).take(self.kv_heads).enumerate() {
            let into = &mut State::of(all, rows, width);
            for part in parts.chunks_exact_mut(size) {
                let from = &State::of(&mut part[head * one..(head + 1) * one], rows, width);
                // SAFETY: states of the same rows.
                unsafe { dispatch(self.isa, Merge { into, from }) };
            }
            self.finish(&Queries { tokens: tokens.clone(), heads: head..head + 1 }, into, out);
        }
    }

    /// Sums of one head to averages, sinks included.
    fn finish(&self, queries: &Queries, state: &State<'_>, out: Output) {
        let group = self.group();
        for row in 0..state.peak.len() {
            let head = queries.heads.start * group + row % group;
            let at = (queries.tokens.start + row / group) * self.q_heads + head;
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
            // SAFETY: `attend_all` has checked the output's size; a row is of one task alone.
            let out = unsafe { std::slice::from_raw_parts_mut(out.pointer().add(at * self.v_dim), self.v_dim) };
            for (out, x) in out.iter_mut().zip(sum) {
                *out = x * share;
            }
        }
    }
}
