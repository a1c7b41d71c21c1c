//! Rows of bfloat16 times tokens, both in registers: few tokens with rows as they stream from memory, many with rows that stay in cache.

use super::{LANES, halves};
use crate::kernels::cpu::{ahead::fetch, tasks::Output};
use std::{arch::x86_64::*, ops::Range};

/// One product.
#[derive(Clone, Copy)]
pub(super) struct Product {
    /// Rows as they are multiplied.
    pub(super) weights: *const u16,
    /// Where rows come from that are fetched when it is the turn of those before them, and the bytes from one to the next there.
    pub(super) lying: *const u8,
    pub(super) pitch: usize,
    pub(super) x: *const u16,
    pub(super) out: Output,
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// From one token to the next in `x`.
    pub(super) stride: usize,
    pub(super) tokens: usize,
}

// SAFETY: read-only memory that outlives the product, and an output of which threads write disjoint rows.
unsafe impl Sync for Product {}

impl Product {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) unsafe fn few(self, range: Range<usize>) {
        let mut r = range.start;
        while r < range.end {
            // SAFETY: passed on to the caller.
            unsafe {
                r += match (self.tokens, range.end - r) {
                    (1, 4..) => self.four::<1>(r),
                    (2, 4..) => self.four::<2>(r),
                    (3, 4..) => self.four::<3>(r),
                    (4, 4..) => self.four::<4>(r),
                    (5.., 4..) => self.all::<4>(r),
                    (_, _) => self.all::<1>(r),
                }
            };
        }
    }

    /// `R` rows with all tokens; says how many rows.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn all<const R: usize>(self, r: usize) -> usize {
        let mut t = 0;
        let next: [*const u8; R] = std::array::from_fn(|i| self.lying.wrapping_add((r + R + i) * self.pitch));
        while t < self.tokens {
            // SAFETY: passed on to the caller.
            t += unsafe {
                match self.tokens - t {
                    6.. if t == 0 => self.tile::<R, 6, R>(r, t, next),
                    6.. => self.tile::<R, 6, 0>(r, t, []),
                    4.. if t == 0 => self.tile::<R, 4, R>(r, t, next),
                    4.. => self.tile::<R, 4, 0>(r, t, []),
                    2.. => self.tile::<R, 2, 0>(r, t, []),
                    _ => self.tile::<R, 1, 0>(r, t, []),
                }
            };
        }
        R
    }

    /// Four rows with `T` tokens, one row after the other: memory gives one stream half as much again as four side by side, and more yet where
    /// nothing is fetched ahead that the processor foresees by itself.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn four<const T: usize>(self, r: usize) -> usize {
        let mut sums = [[_mm512_setzero_ps(); 4]; T];
        let whole = self.cols / LANES * LANES;
        // SAFETY: rows of the matrix and tokens of `x`; what lies beyond the last column is masked away.
        unsafe {
            let tokens: [*const u16; T] = std::array::from_fn(|k| self.x.add(k * self.stride));
            for i in 0..4 {
                let row = self.weights.add((r + i) * self.cols);
                for c in (0..whole).step_by(LANES) {
                    let w = halves(_mm512_loadu_si512(row.add(c).cast()));
                    for k in 0..T {
                        let x = halves(_mm512_loadu_si512(tokens[k].add(c).cast()));
                        sums[k][i] = _mm512_dpbf16_ps(sums[k][i], w, x);
                    }
                }
                if whole < self.cols {
                    let mask = u32::MAX >> (LANES - (self.cols - whole));
                    let w = halves(_mm512_maskz_loadu_epi16(mask, row.add(whole).cast()));
                    for k in 0..T {
                        let x = halves(_mm512_maskz_loadu_epi16(mask, tokens[k].add(whole).cast()));
                        sums[k][i] = _mm512_dpbf16_ps(sums[k][i], w, x);
                    }
                }
            }
            for k in 0..T {
                _mm_storeu_ps(self.out.pointer().add(k * self.rows + r), added_up(sums[k]));
            }
        }
        4
    }

    /// Rows that stay in cache while all tokens pass, more than [`FEW`](super::FEW), six at a time or nearly so: never fewer than four. Meanwhile, if that
    /// is `ahead`, as many rows behind them are fetched: one in four each time that tokens pass, two where they pass but three times.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) unsafe fn many(self, range: Range<usize>, ahead: bool) {
        let (passes, mut t) = (self.tokens.div_ceil(6), 0);
        for pass in 0..passes {
            let fetched = if !ahead || pass == 0 {
                0..0
            } else if passes > 4 {
                (pass - 1).min(4)..pass.min(4)
            } else {
                (2 * pass - 2).min(4)..(2 * pass).min(4)
            };
            // SAFETY: passed on to the caller.
            unsafe {
                t += match (self.tokens - t).div_ceil(passes - pass) {
                    4 => self.column::<4>(range.clone(), t, fetched),
                    5 => self.column::<5>(range.clone(), t, fetched),
                    _ => self.column::<6>(range.clone(), t, fetched),
                }
            };
        }
    }

    /// All rows of the range with some tokens; `fetched` says which of each four rows of the next as many.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn column<const T: usize>(self, range: Range<usize>, t: usize, fetched: Range<usize>) -> usize {
        // SAFETY: passed on to the caller.
        unsafe {
            match fetched.len() {
                0 => self.fours::<T, 0>(range, t, 0),
                1 => self.fours::<T, 1>(range, t, fetched.start),
                _ => self.fours::<T, 2>(range, t, fetched.start),
            }
        }
        T
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn fours<const T: usize, const NEXT: usize>(self, range: Range<usize>, t: usize, fetched: usize) {
        let whole = range.len() / 4 * 4;
        for r in (range.start..range.start + whole).step_by(4) {
            let next = |i: usize| self.lying.wrapping_add((r + range.len() + fetched + i) * self.pitch);
            // SAFETY: passed on to the caller.
            unsafe { self.tile::<4, T, NEXT>(r, t, std::array::from_fn(next)) };
        }
        for r in range.start + whole..range.end {
            // SAFETY: as above.
            unsafe { self.tile::<1, T, 0>(r, t, []) };
        }
    }

    /// `R` rows with `T` tokens, while `next` ones are fetched; says how many tokens.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn tile<const R: usize, const T: usize, const NEXT: usize>(
        self,
        r: usize,
        t: usize,
        next: [*const u8; NEXT],
    ) -> usize {
        // SAFETY: rows of the matrix and tokens of `x`; what lies beyond the last column is masked away.
        unsafe {
            let rows: [*const u16; R] = std::array::from_fn(|i| self.weights.add((r + i) * self.cols));
            let tokens: [*const u16; T] = std::array::from_fn(|i| self.x.add((t + i) * self.stride));
            let mut sums = [[_mm512_setzero_ps(); T]; R];
            let whole = self.cols / LANES * LANES;
            let mut c = 0;
            while c < whole {
                let weights: [__m512bh; R] = std::array::from_fn(|i| halves(_mm512_loadu_si512(rows[i].add(c).cast())));
                for row in next {
                    fetch(row.wrapping_add(2 * c));
                }
                for k in 0..T {
                    let x = halves(_mm512_loadu_si512(tokens[k].add(c).cast()));
                    for i in 0..R {
                        sums[i][k] = _mm512_dpbf16_ps(sums[i][k], weights[i], x);
                    }
                }
                c += LANES;
            }
            if c < self.cols {
                let mask = u32::MAX >> (LANES - (self.cols - c));
                for i in 0..R {
                    let weights = halves(_mm512_maskz_loadu_epi16(mask, rows[i].add(c).cast()));
                    for k in 0..T {
                        let x = halves(_mm512_maskz_loadu_epi16(mask, tokens[k].add(c).cast()));
                        sums[i][k] = _mm512_dpbf16_ps(sums[i][k], weights, x);
                    }
                }
            }
            for k in 0..T {
                let out = self.out.pointer().add((t + k) * self.rows + r);
                let mut i = 0;
                while i + 4 <= R {
                    _mm_storeu_ps(out.add(i), added_up([sums[i][k], sums[i + 1][k], sums[i + 2][k], sums[i + 3][k]]));
                    i += 4;
                }
                while i < R {
                    let none = _mm512_setzero_ps();
                    *out.add(i) = _mm_cvtss_f32(added_up([sums[i][k], none, none, none]));
                    i += 1;
                }
            }
        }
        T
    }
}

/// The lanes' sums of four vectors, side by side: halves to halves, quarters to quarters, and so on, whatever else is in the vectors.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn added_up([a, b, c, d]: [__m512; 4]) -> __m128 {
    let halves = |a, b| _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b));
    let (ab, cd) = (halves(a, b), halves(c, d));
    let quarters = _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(ab, cd), _mm512_shuffle_f32x4::<0xdd>(ab, cd));
    let eighths = _mm512_add_ps(quarters, _mm512_permute_ps::<0b01_00_11_10>(quarters));
    let sums = _mm512_add_ps(eighths, _mm512_permute_ps::<0b10_11_00_01>(eighths));
    _mm512_castps512_ps128(_mm512_permutexvar_ps(
        _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
        sums,
    ))
}
