//! Many tokens of weights of more than four bits, where there is no matrix unit: panels are opened into bfloat16, scales and biases included, some
//! rows and columns at a time, and 32 products an instruction (`vdpbf16ps`) add a pair of columns of sixteen rows to a token's sums. Whole numbers
//! would need two bytes of each activation, which are as many instructions, and scales for each group besides.
//!
//! A sum runs over pairs of columns from the first to the last, in f32: a token's bits are the same among as few tokens as come here as among
//! any more, and on any number of threads, but not those of fewer tokens, whose activations are rounded otherwise.

use super::{
    LANES,
    floats::{self, add_products},
    lying::{Source, Turn, View},
    pairs::{COLUMNS, Open, Opening, Part, Tile, column_order, lay_out},
    product::{FEW, Line},
};
use crate::kernels::cpu::{
    tasks::{Output, by_list, in_tasks},
    team::each_chunk,
    unwritten::unwritten,
};
use std::{arch::x86_64::*, ops::Range};

/// Up to this many tokens opening whole numbers takes longer than it saves.
const SOME: usize = 64;
/// Panels that are multiplied together, and columns that are opened at a time: an eighth of a megabyte.
const PANELS: usize = 4;
const MOST: usize = 1024;
/// Tokens that are multiplied together, at most: their sums with all panels fill the registers.
const TOKENS: usize = 6;
/// Tokens that are worth a task of their own to be rounded.
const ROUNDED: usize = 16;

/// Whether this machine has the instructions, tiles are whole, and tokens so many that it takes less time.
pub(super) fn is_worth_while(panels: &View<'_>, tokens: usize) -> bool {
    tokens > if panels.layout.e4m3 { FEW } else { SOME } && panels.cols.is_multiple_of(COLUMNS) && floats::runs_here()
}

/// out = x · Wᵀ for each of `of`, panels of one layout and as many columns, which come from `sources`: `x` is `[tokens, cols]`, an output
/// `[tokens, rows]`.
pub(super) fn multiply(of: &[View], sources: &[Source], outs: &[Output], x: &[f32], open: impl Open) {
    let Some(&View { ref layout, cols, .. }) = of.first() else { return };
    let (tokens, order) = (x.len() / cols, column_order(layout));
    // A line more than a token needs: tokens whose starts are a power of two apart would all fall into the same few lines of the cache.
    let pitch = cols / COLUMNS + 1;
    // SAFETY: of a token all but its last line is written below, and no more is read.
    let mut lines = unsafe { unwritten::<Line>(tokens * pitch) };
    each_chunk(&mut lines, ROUNDED * pitch, |i, to| {
        for (to, x) in to.chunks_exact_mut(pitch).zip(x.chunks_exact(cols).skip(i * ROUNDED)) {
            // SAFETY: the machine has all of AVX-512 that is asked for; columns are whole lines.
            unsafe { lay_out(x, &order, to.iter_mut()) };
        }
    });
    let lengths = || of.iter().map(|panels| panels.rows.div_ceil(LANES));
    let size = LANES * cols * tokens;
    in_tasks(lengths().sum(), size, PANELS, usize::MAX, |(scratch, turn): &mut (_, Turn), range| {
        by_list(range, lengths(), |i, range| {
            sources[i].each(&of[i], range, PANELS, turn, |panels, range| {
                let product = Product { panels, x: lines.as_ptr(), pitch, tokens, out: outs[i] };
                // SAFETY: panels that there are; tasks write disjoint rows of the output; the machine has the instructions.
                unsafe { product.run(open, range, scratch) }
            });
        });
    });
}

/// One product.
#[derive(Clone, Copy)]
struct Product<'a> {
    panels: &'a View<'a>,
    x: *const Line,
    /// Lines from one token to the next.
    pitch: usize,
    tokens: usize,
    out: Output,
}

impl Product<'_> {
    /// All tokens with some panels.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx512vbmi")]
    unsafe fn run(self, open: impl Open, range: Range<usize>, scratch: &mut Vec<Tile>) {
        let (all, most) = (self.panels.cols / COLUMNS, MOST / COLUMNS);
        if scratch.is_empty() {
            // SAFETY: tiles are opened before they are multiplied.
            *scratch = unsafe { unwritten(PANELS * most) };
        }
        for first in range.clone().step_by(PANELS) {
            let panels = first..range.end.min(first + PANELS);
            for start in (0..all).step_by(most) {
                let steps = start..all.min(start + most);
                let part = || Part { panels: panels.clone(), steps: steps.clone() };
                // SAFETY: passed on to the caller.
                unsafe {
                    Opening::new(self.panels, part(), scratch, 1).burst(open);
                    match panels.len() {
                        1 => self.tokens::<1>(part(), scratch),
                        2 => self.tokens::<2>(part(), scratch),
                        3 => self.tokens::<3>(part(), scratch),
                        _ => self.tokens::<PANELS>(part(), scratch),
                    }
                }
            }
        }
    }

    /// All tokens with a part that has been opened.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn tokens<const P: usize>(self, part: Part, opened: &[Tile]) {
        let (passes, mut t) = (self.tokens.div_ceil(TOKENS), 0);
        for pass in 0..passes {
            // SAFETY: passed on to the caller.
            t += unsafe {
                // As many each time, or one less: from thirteen on never fewer than four.
                match (self.tokens - t).div_ceil(passes - pass) {
                    4 => self.tile::<P, 4>(&part, opened, t),
                    5 => self.tile::<P, 5>(&part, opened, t),
                    _ => self.tile::<P, TOKENS>(&part, opened, t),
                }
            };
        }
    }

    /// `P` panels with `T` tokens from token `t` on; says how many tokens. What columns before these gave is in the output.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn tile<const P: usize, const T: usize>(self, part: &Part, opened: &[Tile], t: usize) -> usize {
        let Part { panels, steps } = part;
        let View { rows, cols, factors, .. } = *self.panels;
        // SAFETY: tokens of `x` and of the output, panels that have been opened; rows that there are not are masked away.
        unsafe {
            let tokens: [*const i32; T] =
                std::array::from_fn(|i| self.x.add((t + i) * self.pitch + steps.start).cast());
            let weights: [*const __m512i; P] = std::array::from_fn(|k| opened.as_ptr().add(k * steps.len()).cast());
            let outs: [(*mut f32, u16); P] = std::array::from_fn(|k| {
                let row = (panels.start + k) * LANES;
                (self.out.pointer().add(t * rows + row), (u32::MAX >> (32 - (rows - row).min(LANES))) as u16)
            });
            let mut sums = [[_mm512_setzero_ps(); T]; P];
            if steps.start > 0 {
                for k in 0..P {
                    for i in 0..T {
                        sums[k][i] = _mm512_maskz_loadu_ps(outs[k].1, outs[k].0.add(i * rows));
                    }
                }
            }
            for pair in 0..steps.len() * COLUMNS / 2 {
                let mut of = [_mm512_setzero_si512(); P];
                for k in 0..P {
                    of[k] = _mm512_load_si512(weights[k].add(pair));
                }
                for i in 0..T {
                    let two = *tokens[i].add(pair);
                    for k in 0..P {
                        sums[k][i] = add_products(sums[k][i], of[k], two);
                    }
                }
            }
            let whole = steps.end * COLUMNS == cols;
            for k in 0..P {
                let row = (panels.start + k) * LANES;
                let factors = match factors.get(row..row + LANES) {
                    Some(factors) if whole => _mm512_loadu_ps(factors.as_ptr()),
                    _ => _mm512_set1_ps(1.0),
                };
                for i in 0..T {
                    _mm512_mask_storeu_ps(outs[k].0.add(i * rows), outs[k].1, _mm512_mul_ps(sums[k][i], factors));
                }
            }
        }
        T
    }
}
