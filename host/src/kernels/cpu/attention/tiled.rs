//! A block of keys on the matrix unit (`amx`): queries are tiles of A as they lie, keys by pairs of dimensions and values by pairs of entries
//! are tiles of B as `halves` has them laid out. The softmax between the two products is that of `halves`.
//!
//! Sums are other bits than those of `vdpbf16ps`, but a row has the same ones whatever rows it shares a tile with.

use super::{
    super::amx::{Operands, PAIR, Shape, TILE, Tiles, two},
    block::KEYS,
    halves::{SCORES, Step},
};
use std::arch::x86_64::*;

/// Bytes of a row of A in a tile, and pairs in them.
const DEPTH: usize = 64;
const PAIRS: usize = DEPTH / 4;
/// Rows whose scores become weights at once.
const ROWS: usize = 4;

/// The sums of two tiles with two tiles, row by row.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Sums([[u32; TILE]; 4 * TILE]);

/// The weights of two tiles of rows, pairs of them.
#[repr(C, align(64))]
struct Weights([[u32; KEYS / 2]; PAIR]);

impl Step<'_, '_> {
    /// As [`Step::run`].
    ///
    /// # Safety
    /// The unit is available; all blocks have the sizes that `Step` says, and values have zeros up to a multiple of 32 entries.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) unsafe fn run_on_tiles(mut self) {
        let (mut scores, mut weights) = ([Sums([[0; TILE]; 4 * TILE]); KEYS / PAIR], Weights([[0; KEYS / 2]; PAIR]));
        let mut fades = [0.0; PAIR];
        // SAFETY: rows of the state and of the queries, keys and lanes of their blocks; the unit is this thread's until the end.
        unsafe {
            let mut tiles = Tiles::new(shape(two(self.rows)));
            for row in (0..self.rows).step_by(PAIR) {
                let a = two(self.rows - row);
                tiles.reshape(shape(a));
                for (half, scores) in scores.iter_mut().enumerate() {
                    let keys = self.keys.add(half * PAIR);
                    tiles.zero();
                    tiles.halves(self.queries_of(row, a, keys), self.pairs / PAIRS);
                    tiles.store(&raw mut scores.0);
                }
                let rows = (self.rows - row).min(PAIR);
                for i in (0..rows).step_by(ROWS) {
                    match rows - i {
                        ROWS.. => self.weights_of::<ROWS>(row, i, &scores, &mut weights, &mut fades),
                        3 => self.weights_of::<3>(row, i, &scores, &mut weights, &mut fades),
                        2 => self.weights_of::<2>(row, i, &scores, &mut weights, &mut fades),
                        _ => self.weights_of::<1>(row, i, &scores, &mut weights, &mut fades),
                    }
                }
                let width = self.state.width;
                for lane in (0..width).step_by(PAIR) {
                    let values = self.values.add(lane);
                    let second = if lane + TILE < width { TILE } else { 0 };
                    let from = Operands {
                        a: a.map(|(at, _)| weights.0.as_ptr().add(at).cast()),
                        a_pitch: size_of::<[u32; KEYS / 2]>(),
                        a_step: DEPTH,
                        b: [values.cast(), values.add(second).cast()],
                        b_pitch: [4 * width; 2],
                    };
                    // Scores are done with: their room is free.
                    tiles.zero();
                    tiles.halves(from, self.count.div_ceil(2 * PAIRS));
                    tiles.store(&raw mut scores[0].0);
                    for (i, &fade) in fades.iter().enumerate().take(rows) {
                        for tile in 0..1 + usize::from(second > 0) {
                            let new = scores[0].0.as_ptr().add((i / TILE * 2 + tile) * TILE + i % TILE);
                            let sum = self.state.sum.as_mut_ptr().add((row + i) * width + lane + tile * TILE);
                            let new = _mm512_load_ps(new.cast());
                            _mm512_storeu_ps(sum, _mm512_fmadd_ps(_mm512_loadu_ps(sum), _mm512_set1_ps(fade), new));
                        }
                    }
                }
            }
        }
    }

    /// Tiles of queries from `row` on, with two of keys.
    unsafe fn queries_of(&self, row: usize, a: [(usize, usize); 2], keys: *const u32) -> Operands {
        // SAFETY: passed on to the caller.
        unsafe {
            Operands {
                a: a.map(|(at, _)| self.queries.add((row + at) * 2 * self.pairs).cast()),
                a_pitch: 4 * self.pairs,
                a_step: DEPTH,
                b: [keys.cast(), keys.add(TILE).cast()],
                b_pitch: [4 * KEYS; 2],
            }
        }
    }

    /// Scores of `R` rows of a pair of tiles, from its row `i` on, to weights.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn weights_of<const R: usize>(
        &mut self,
        row: usize,
        i: usize,
        scores: &[Sums; KEYS / PAIR],
        weights: &mut Weights,
        fades: &mut [f32; PAIR],
    ) {
        let mut of = [[_mm512_setzero_ps(); SCORES]; R];
        for (r, of) in of.iter_mut().enumerate() {
            for (v, of) in of.iter_mut().enumerate() {
                let line = &scores[v / 2].0[((i + r) / TILE * 2 + v % 2) * TILE + (i + r) % TILE];
                // SAFETY: sixteen numbers.
                *of = unsafe { _mm512_loadu_ps(line.as_ptr().cast()) };
            }
        }
        let Some(to) = weights.0[i..].first_chunk_mut::<R>() else { return };
        // SAFETY: passed on to the caller.
        let faded = unsafe { self.soften::<R>(row + i, &mut of, to) };
        fades[i..i + R].copy_from_slice(&faded[..R]);
    }
}

fn shape(a: [(usize, usize); 2]) -> Shape {
    Shape { a: a.map(|(_, size)| size), b: [TILE; 2], depth: DEPTH }
}
