//! Some queries of some key heads over a stretch of a cache, a block of keys at a time: all heads of a block before the next block, as they
//! lie side by side in memory. What of a block nobody sees is not read.

use super::{
    super::{
        lanes::{Isa, dispatch},
        tile::Block,
    },
    Call, Keys,
    block::{self, KEYS, Slopes},
    rows::{Rows, Widen},
    sight::{Sees, Span},
    state::State,
};
#[cfg(target_arch = "x86_64")]
use super::{halves, pairs};
use std::ops::Range;

/// Entries that are summed up on their own before they are merged; a multiple of [`KEYS`].
pub(super) const STRETCH: usize = 256;

/// Up to [`STRETCH`] entries of a cache.
#[derive(Clone, Copy)]
pub(super) struct Stretch {
    pub(super) cache: usize,
    pub(super) first: usize,
}

/// Queries that go through keys together.
#[derive(Clone, PartialEq)]
pub(super) struct Queries {
    pub(super) tokens: Range<usize>,
    /// Key heads.
    pub(super) heads: Range<usize>,
}

/// Memory of a thread, kept from one pass of a call to the next.
#[derive(Default)]
pub(super) struct Room {
    /// Whose queries, and for which cache.
    ready: Option<(usize, Queries)>,
    /// Queries, then keys, values and scores.
    floats: Vec<f32>,
    /// Queries in bfloat16.
    halves: Vec<u16>,
    /// Keys and values in pairs.
    pairs: Vec<u32>,
    /// Which keys of a block rows see.
    visible: Vec<u64>,
    /// Of each row, its slope and position.
    slopes: Vec<(f32, u32)>,
    /// Sums of a stretch, for whom they are not the last word.
    pub(super) sums: Vec<f32>,
}

/// Whether keys and values are multiplied as bfloat16.
fn in_halves(isa: Isa, cache: &Keys<'_>) -> bool {
    let halves = |rows| matches!(rows, Rows::BF16(_));
    let here = cfg!(target_arch = "x86_64") && isa.has_vnni();
    #[cfg(target_arch = "x86_64")]
    let here = here && halves::runs_here();
    here && halves(cache.keys) && cache.values.is_none_or(halves)
}

/// Queries over stretches of a call's caches.
pub(super) struct Pass<'a> {
    pub(super) call: &'a Call<'a>,
    pub(super) queries: Queries,
}

impl Pass<'_> {
    /// Query rows of a key head.
    pub(super) fn rows(&self) -> usize {
        self.queries.tokens.len() * self.call.group()
    }

    /// Keys of one stretch, into states that are cleared first: one a head.
    pub(super) fn stretch(&self, stretch: Stretch, room: &mut Room, states: &mut [f32]) {
        let call = self.call;
        let cache = &call.caches[stretch.cache];
        let (how, rows, width) = (cache.how, self.rows(), call.width());
        let size = State::room(rows, width);
        for state in states.chunks_exact_mut(size) {
            State::of(state, rows, width).clear();
        }
        let at = &call.query_positions[self.queries.tokens.clone()];
        let queries = Span::of(at);
        let group = call.group();
        // Block-sparse heads see different keys, others the same ones.
        let (alike, shared) = (if how.alike(group) { group } else { 1 }, how.alike(call.q_heads));
        room.visible.resize(rows / alike, 0);
        let end = cache.positions.len().min(stretch.first + STRETCH);
        for first in (stretch.first..end).step_by(KEYS) {
            let positions = &cache.positions[first..end.min(first + KEYS)];
            let sees = how.spans(queries, Span::of(positions));
            if sees == Sees::None {
                continue;
            }
            if sees == Sees::All {
                room.visible.fill(u64::MAX >> (KEYS - positions.len()));
            }
            for (i, head) in self.queries.heads.clone().enumerate() {
                if sees == Sees::Some && (i == 0 || !shared) {
                    for (row, seen) in room.visible.iter_mut().enumerate().map(|(i, seen)| (i * alike, seen)) {
                        let token = row / group;
                        let head = head * group + row % group;
                        *seen = how.mask(self.queries.tokens.start + token, head, at[token], positions);
                    }
                }
                if room.visible.iter().all(|&seen| seen == 0) {
                    continue;
                }
                self.prepare(stretch.cache, room);
                let state = &mut State::of(&mut states[i * size..(i + 1) * size], rows, width);
                let slopes = how.slopes.map(|_| &room.slopes[i * rows..(i + 1) * rows]);
                let slopes = slopes.map(|rows| Slopes { rows, keys: positions });
                let step = Step { cache, head, i, first, count: positions.len(), alike, slopes };
                if in_halves(call.isa, cache) {
                    #[cfg(target_arch = "x86_64")]
                    self.step_in_halves(step, &room.halves, &mut room.pairs, &room.visible, state);
                } else {
                    self.step_in_floats(step, &mut room.floats, &room.visible, state);
                }
            }
        }
    }

    /// Lays out queries, once for all stretches of a cache.
    fn prepare(&self, cache: usize, room: &mut Room) {
        let key = (cache, self.queries.clone());
        if room.ready.as_ref() == Some(&key) {
            return;
        }
        let call = self.call;
        let (how, dim, group) = (call.caches[cache].how, call.dim, call.group());
        let all = self.rows() * self.queries.heads.len();
        let rows = self.queries.heads.clone().flat_map(|head| {
            let tokens = self.queries.tokens.clone();
            tokens.flat_map(move |token| (0..group).map(move |i| (token, head * group + i)))
        });
        room.slopes.clear();
        if let Some(slopes) = how.slopes {
            room.slopes.extend(rows.clone().map(|(token, head)| (slopes[head], call.query_positions[token])));
        }
        let query = |(token, head)| &call.q[(token * call.q_heads + head) * dim..][..dim];
        let (len, width) = (dim.next_multiple_of(32), call.width());
        if in_halves(call.isa, &call.caches[cache]) {
            room.halves.resize(all * len, 0);
            room.pairs.resize(KEYS * len / 2 + KEYS / 2 * width, 0);
            for (to, row) in room.halves.chunks_exact_mut(len).zip(rows) {
                // SAFETY: `in_halves` has made sure of the instructions.
                #[cfg(target_arch = "x86_64")]
                unsafe {
                    super::super::bf16::round(query(row), to)
                };
                #[cfg(not(target_arch = "x86_64"))]
                let _ = (to, row);
            }
        } else {
            let len = dim.next_multiple_of(16);
            room.floats.resize(all * len + KEYS * len + KEYS * width + self.rows() * KEYS, 0.0);
            for (to, row) in room.floats.chunks_exact_mut(len).zip(rows) {
                to.fill(0.0);
                for (to, x) in to.iter_mut().zip(query(row)) {
                    *to = x * how.scale;
                }
            }
        }
        room.ready = Some(key);
    }

    #[cfg(target_arch = "x86_64")]
    fn step_in_halves(
        &self,
        s: Step<'_>,
        queries: &[u16],
        laid_out: &mut [u32],
        visible: &[u64],
        state: &mut State<'_>,
    ) {
        let (call, how) = (self.call, s.cache.how);
        let (len, width, rows) = (call.dim.next_multiple_of(32), call.width(), self.rows());
        let entries = |rows: Rows<'_>, dim: usize| {
            let Rows::BF16(x) = rows else {
                return pairs::Entries { from: std::ptr::null(), stride: 0, dim, count: 0 };
            };
            let from = x[(s.first * call.kv_heads + s.head) * dim..].as_ptr().cast();
            pairs::Entries { from, stride: call.kv_heads * dim, dim, count: s.count }
        };
        let keys = entries(s.cache.keys, call.dim);
        let values = match s.cache.values {
            Some(values) => entries(values, call.v_dim),
            None => pairs::Entries { dim: call.v_dim, ..keys },
        };
        let (by_dimension, by_entry) = laid_out.split_at_mut(KEYS * len / 2);
        // SAFETY: `in_halves` has made sure of the instructions, `attend_all` that the rows hold all entries; the rest is sized in `prepare`.
        unsafe {
            keys.by_dimension(by_dimension.as_mut_ptr());
            values.by_entry(by_entry.as_mut_ptr(), width);
            let step = halves::Step {
                queries: queries[s.i * rows * len..].as_ptr(),
                rows,
                pairs: len / 2,
                keys: by_dimension.as_ptr(),
                values: by_entry.as_ptr(),
                count: s.count,
                visible,
                alike: s.alike,
                scale: how.scale,
                softcap: how.softcap,
                slopes: s.slopes,
                state,
            };
            if call.isa == Isa::Amx {
                let pairs = s.count.div_ceil(2);
                by_entry[pairs * width..pairs.next_multiple_of(16) * width].fill(0);
                step.run_on_tiles();
            } else {
                step.run();
            }
        }
    }

    fn step_in_floats(&self, s: Step<'_>, floats: &mut [f32], visible: &[u64], state: &mut State<'_>) {
        let (call, how, rows) = (self.call, s.cache.how, self.rows());
        let (len, width) = (call.dim.next_multiple_of(16), call.width());
        let (queries, rest) = floats.split_at_mut(self.queries.heads.len() * rows * len);
        let (keys, rest) = rest.split_at_mut(KEYS * len);
        let (values, scores) = rest.split_at_mut(KEYS * width);
        let (heads, head, entries) = (call.kv_heads, s.head, (s.first, s.count));
        let widen =
            |rows, dim, stride, to: &mut [f32]| Widen { rows, dim, heads, head, entries, to: to.as_mut_ptr(), stride };
        // SAFETY: blocks are sized in `prepare`; `attend_all` checked that the rows hold all entries.
        unsafe {
            dispatch(call.isa, widen(s.cache.keys, call.dim, len, keys));
            // Keys that double as values are widened once.
            let (values, pitch) = match s.cache.values {
                Some(rows) => {
                    dispatch(call.isa, widen(rows, call.v_dim, width, values));
                    (values.as_ptr(), width)
                }
                None => (keys.as_ptr(), len),
            };
            let step = block::Step {
                queries: Block { data: queries[s.i * rows * len..].as_ptr(), stride: len, rows },
                keys: Block { data: keys.as_ptr(), stride: len, rows: s.count },
                len,
                values,
                pitch,
                visible,
                alike: s.alike,
                softcap: how.softcap,
                slopes: s.slopes,
                scores,
                state,
            };
            dispatch(call.isa, step);
        }
    }
}

/// One head and one block of keys.
struct Step<'a> {
    cache: &'a Keys<'a>,
    head: usize,
    /// The head's number within the pass.
    i: usize,
    first: usize,
    count: usize,
    alike: usize,
    slopes: Option<Slopes<'a>>,
}
