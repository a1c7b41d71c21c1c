//! The sums: four rows of weights against up to four tokens at a time, so that numbers taken out of their bytes serve several tokens.

use super::{
    super::matmul::Output,
    Numbers, SLACK,
    rounded::{Rounded, Token},
};
use rayon::prelude::*;
use std::{arch::x86_64::*, ops::Range};

/// Rows, and tokens, whose sums stay in registers together.
const TILE: usize = 4;
/// Tokens whose bytes stay in a core's second-level cache while rows pass.
const COMPANY: usize = 64;
/// Weights that are worth a task of their own.
const TASK: usize = 1 << 16;

/// `x` `[tokens, cols]` times a matrix of `[rows, cols]`.
#[derive(Clone, Copy)]
pub(in super::super) struct Product<'a> {
    pub(in super::super) rows: usize,
    pub(in super::super) cols: usize,
    pub(in super::super) tokens: usize,
    pub(in super::super) x: &'a [f32],
    /// Three bytes for an activation, which is as good as f32; two where it was of half the width anyway.
    pub(in super::super) exact: bool,
}

impl Product<'_> {
    /// out `[tokens, rows]`
    pub(super) fn run<N: Numbers>(self, numbers: N, out: &mut [f32]) {
        if self.exact { self.in_bytes::<N, 3>(numbers, out) } else { self.in_bytes::<N, 2>(numbers, out) }
    }

    fn in_bytes<N: Numbers, const BYTES: usize>(self, numbers: N, out: &mut [f32]) {
        let rounded = Rounded::new::<N, BYTES>(&numbers, self.x, self.tokens);
        let out = Output(out.as_mut_ptr());
        let threads = rayon::current_num_threads();
        let rows = self.rows.div_ceil(threads * 4).max(TASK / self.cols).max(1).next_multiple_of(TILE);
        let task = |scratch: &mut Vec<f32>, i: usize| {
            let part = Part::<N, BYTES> { numbers, rounded: &rounded, all: self, out: out.pointer() };
            // SAFETY: rows lie inside the matrix, which the caller borrows; tasks write disjoint rows of `out`; the instruction set is
            // the one that was asked for.
            unsafe { part.rows(i * rows..self.rows.min((i + 1) * rows), scratch) }
        };
        let tasks = self.rows.div_ceil(rows);
        // Entering the pool from outside wakes a thread and waits for it: tens of microseconds that a small product has not.
        let alone = if rayon::current_thread_index().is_some() { TASK } else { 4 * TASK };
        if tasks == 1 || self.rows * self.cols * self.tokens <= alone {
            let mut scratch = Vec::new();
            (0..tasks).for_each(|i| task(&mut scratch, i));
        } else {
            (0..tasks).into_par_iter().for_each_init(Vec::new, task);
        }
    }
}

/// What one task works on.
struct Part<'a, N, const BYTES: usize> {
    numbers: N,
    rounded: &'a Rounded,
    all: Product<'a>,
    out: *mut f32,
}

impl<N: Numbers, const BYTES: usize> Part<'_, N, BYTES> {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn rows(&self, range: Range<usize>, scratch: &mut Vec<f32>) {
        let row = self.all.cols.div_ceil(self.numbers.group()) + SLACK;
        scratch.resize(2 * TILE * row, 0.0);
        for first in (0..self.all.tokens).step_by(COMPANY) {
            let tokens = first..self.all.tokens.min(first + COMPANY);
            let mut r = range.start;
            // SAFETY: rows of the range, tokens that there are, scratch for as many rows.
            unsafe {
                while r < range.end {
                    let abreast = range.end - r >= TILE;
                    for i in 0..if abreast { TILE } else { 1 } {
                        let at = scratch.as_mut_ptr().add(2 * i * row);
                        self.numbers.scales(r + i, at, at.add(row));
                    }
                    let mut t = tokens.start;
                    while t < tokens.end {
                        let few = (tokens.end - t).min(TILE);
                        match (abreast, few) {
                            (true, 4) => self.tile::<4, 4>(r, t, scratch.as_ptr(), row),
                            (true, 3) => self.tile::<4, 3>(r, t, scratch.as_ptr(), row),
                            (true, 2) => self.tile::<4, 2>(r, t, scratch.as_ptr(), row),
                            (true, _) => self.tile::<4, 1>(r, t, scratch.as_ptr(), row),
                            (false, 4) => self.tile::<1, 4>(r, t, scratch.as_ptr(), row),
                            (false, 3) => self.tile::<1, 3>(r, t, scratch.as_ptr(), row),
                            (false, 2) => self.tile::<1, 2>(r, t, scratch.as_ptr(), row),
                            (false, _) => self.tile::<1, 1>(r, t, scratch.as_ptr(), row),
                        }
                        t += few;
                    }
                    r += if abreast { TILE } else { 1 };
                }
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn tile<const R: usize, const T: usize>(&self, r: usize, t: usize, scales: *const f32, pitch: usize) {
        let raw = self.numbers.raw();
        let chunks = raw.cols.div_ceil(64 * N::VECTORS);
        let tokens: [Token; T] = std::array::from_fn(|i| self.rounded.token(t + i));
        // SAFETY: rows of the matrix; the caller vouches for scales of `R` rows, `2 pitch` floats apart.
        unsafe {
            let rows: [*const u8; R] = std::array::from_fn(|i| raw.row(r + i));
            // Both are powers of two: lanes that share a scale, and the shift from a lane to its scale.
            let sharing = (self.numbers.group() / (4 * N::VECTORS)).min(16);
            let lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            let spread = _mm512_srlv_epi32(lane, _mm512_set1_epi32(sharing.trailing_zeros() as i32));
            let mut sums = [[_mm512_setzero_ps(); T]; R];
            for c in 0..chunks {
                let first = c * 64 * N::VECTORS / self.numbers.group();
                for i in 0..R {
                    let numbers = self.numbers.vectors(rows[i], c);
                    let scale = _mm512_permutexvar_ps(spread, _mm512_loadu_ps(scales.add(2 * i * pitch + first)));
                    for k in 0..T {
                        let token = tokens[k];
                        let none = _mm512_setzero_si512();
                        // The first byte's sums, the second's, the third's.
                        let mut of = [none; BYTES];
                        if N::ZERO != 0 {
                            of[1] = _mm512_load_si512(token.offsets.add(32 * c).cast());
                            of[BYTES - 1] = _mm512_load_si512(token.offsets.add(32 * c + 16 * (BYTES - 2)).cast());
                        }
                        for v in 0..N::VECTORS {
                            let x = token.bytes.add((c * N::VECTORS + v) * 64 * BYTES);
                            for (byte, sum) in of.iter_mut().enumerate() {
                                *sum =
                                    _mm512_dpbusd_epi32(*sum, numbers[v], _mm512_load_si512(x.add(64 * byte).cast()));
                            }
                        }
                        let mut float = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32::<8>(of[0]), of[1]));
                        if BYTES == 3 {
                            float = _mm512_fmadd_ps(float, _mm512_set1_ps(256.0), _mm512_cvtepi32_ps(of[BYTES - 1]));
                        }
                        let float = _mm512_mul_ps(float, _mm512_set1_ps(*token.steps.add(c)));
                        sums[i][k] = _mm512_fmadd_ps(float, scale, sums[i][k]);
                    }
                }
            }
            for i in 0..R {
                for k in 0..T {
                    if N::BIASED {
                        let groups = raw.cols / self.numbers.group();
                        for g in (0..groups).step_by(16) {
                            let bias = _mm512_loadu_ps(scales.add((2 * i + 1) * pitch + g));
                            sums[i][k] = _mm512_fmadd_ps(bias, _mm512_loadu_ps(tokens[k].sums.add(g)), sums[i][k]);
                        }
                    }
                    *self.out.add((t + k) * self.all.rows + r + i) = _mm512_reduce_add_ps(sums[i][k]);
                }
            }
        }
    }
}
