//! Activations times bfloat16 weights as the checkpoint has them, 32 products an instruction (`vdpbf16ps`): activations are rounded to
//! bfloat16 too, half a unit in their eighth bit, as everybody does who computes in that type; sums stay f32.
//!
//! Each sum is one vector that runs from the first column to the last, added up in one order at the end: a token's bits are the same
//! alone, in a batch and on any number of threads.

use super::{
    ahead::{self, fetch},
    amx,
    lanes::Isa,
    matrix::Matrix,
    tasks::{Output, by_list, in_streams, in_tasks},
    team::each_chunk,
    unwritten::{Plain, unwritten},
};
use std::{arch::x86_64::*, ops::Range, sync::OnceLock};

/// Columns of a vector.
const LANES: usize = 32;
/// Up to this many tokens weights are streamed from memory once, rows before tokens.
const FEW: usize = 16;
/// Up to this many one row after the other: memory is what they wait for.
const LEAST: usize = 4;
/// Up to this many the next rows are fetched.
const SOME: usize = 64;
/// Tokens that are worth a task of their own to be rounded.
const ROUNDED: usize = 16;
/// Bytes of weights that stay in a core's second-level cache while tokens pass.
const CACHED: usize = 1 << 19;

/// A cache line: a vector that straddles two takes twice as long to load.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Line([u16; LANES]);

impl Plain for Line {}

fn flat(lines: &mut [Line]) -> &mut [u16] {
    // SAFETY: a line is its numbers and nothing else.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), lines.len() * LANES) }
}

/// Whether this machine has the instruction.
pub(super) fn runs_here() -> bool {
    static RUNS: OnceLock<bool> = OnceLock::new();
    *RUNS.get_or_init(|| Isa::best().has_vnni() && is_x86_feature_detected!("avx512bf16"))
}

/// out = x · Wᵀ for each of `of`, matrices of the same columns: `x` is `[tokens, cols]`, an `out` `[tokens, rows]`.
pub(super) fn multiply(of: &mut [(&Matrix, &mut [f32])], x: &[f32]) {
    if Isa::best() == Isa::Amx {
        return amx::multiply(of, x);
    }
    let Some(cols) = of.first().map(|(m, _)| m.cols()) else { return };
    let tokens = x.len() / cols;
    // Rows whose starts are a power of two apart would all fall into the same few lines of the first-level cache.
    let stride = cols.next_multiple_of(LANES) + LANES;
    // SAFETY: `round` writes a token's whole stride.
    let mut lines = unsafe { unwritten::<Line>(tokens * stride / LANES) };
    let halves = flat(&mut lines);
    let rounded = |(to, x): (&mut [u16], &[f32])| {
        // SAFETY: `runs_here`; a token's room is whole vectors longer than its columns.
        unsafe { round(x, to) }
    };
    each_chunk(halves, stride * ROUNDED, |i, halves| {
        halves.chunks_exact_mut(stride).zip(x.chunks_exact(cols).skip(i * ROUNDED)).for_each(rounded);
    });
    let product = |(m, out): &mut (&Matrix, &mut [f32])| {
        let weights = &m.parts()[0];
        if tokens <= FEW {
            ahead::pass(weights);
        }
        Product {
            weights: weights.as_ptr().cast(),
            x: halves.as_ptr(),
            out: Output(out.as_mut_ptr()),
            rows: m.rows(),
            cols,
            stride,
            tokens,
        }
    };
    let products: Vec<Product> = of.iter_mut().map(product).collect();
    let rows = products.iter().map(|p| p.rows).sum();
    let lengths = || products.iter().map(|p| p.rows);
    if tokens <= FEW {
        in_streams(rows, cols * tokens, if tokens > LEAST { 4 } else { 8 }, |(): &mut (), range| {
            // SAFETY: rows of the matrix; tasks write disjoint rows of `out`; `runs_here`.
            by_list(range, lengths(), |i, range| unsafe { products[i].few(range) });
        });
    } else {
        let most = (CACHED / (2 * cols)).max(8);
        // While some tokens pass, what is read next comes; while many do, it has time enough.
        let (most, block) = if tokens <= SOME { (4 * most, (most / 2).max(8)) } else { (most, most) };
        in_tasks(rows, cols * tokens, 8, most, |(): &mut (), range| {
            by_list(range, lengths(), |i, range| {
                for start in range.clone().step_by(block) {
                    // SAFETY: as above.
                    unsafe { products[i].many(start..range.end.min(start + block), tokens <= SOME) };
                }
            });
        });
    }
}

/// Numbers rounded to bfloat16, and zeros behind them; `to` has at least as many places, a multiple of sixteen.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) unsafe fn round(x: &[f32], to: &mut [u16]) {
    to[x.len()..].fill(0);
    for (x, to) in x.chunks(16).zip(to.chunks_exact_mut(16)) {
        let mask = (u32::MAX >> (32 - x.len())) as u16;
        // SAFETY: masked to what there is of `x`; sixteen places in `to`.
        unsafe {
            let rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, x.as_ptr()));
            _mm256_storeu_si256(to.as_mut_ptr().cast(), std::mem::transmute::<__m256bh, __m256i>(rounded));
        }
    }
}

/// One product.
#[derive(Clone, Copy)]
struct Product {
    weights: *const u16,
    x: *const u16,
    out: Output,
    rows: usize,
    cols: usize,
    /// From one token to the next in `x`.
    stride: usize,
    tokens: usize,
}

// SAFETY: read-only memory that outlives the product, and an output of which threads write disjoint rows.
unsafe impl Sync for Product {}

impl Product {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn few(self, range: Range<usize>) {
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
        let next: [*const u16; R] = std::array::from_fn(|i| self.weights.wrapping_add((r + R + i) * self.cols));
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

    /// Rows that stay in cache while all tokens pass, more than [`FEW`], six at a time or nearly so: never fewer than four. Meanwhile, if that
    /// is `ahead`, as many rows behind them are fetched: one in four each time that tokens pass, two where they pass but three times.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn many(self, range: Range<usize>, ahead: bool) {
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
            let next = |i: usize| self.weights.wrapping_add((r + range.len() + fetched + i) * self.cols);
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
        next: [*const u16; NEXT],
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
                    fetch(row.wrapping_add(c).cast());
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

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn halves(v: __m512i) -> __m512bh {
    // SAFETY: the same 512 bits.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(v) }
}

/// The lanes' sums of four vectors, side by side: halves to halves, quarters to quarters, and so on, whatever else is in the vectors.
#[inline]
#[target_feature(enable = "avx512f")]
fn added_up([a, b, c, d]: [__m512; 4]) -> __m128 {
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
