//! Many tokens on the matrix unit. Panels are opened into bfloat16, scales and biases included, some rows and columns at a time, which stay in
//! the second-level cache while all tokens pass; what comes next is opened between the unit's steps, so that the vector units work while it
//! multiplies. Tokens are tiles of A and panels, whose lanes are rows, are tiles of B; so sums come out token by token.
//!
//! A sum runs over pairs of columns from the first to the last, in f32: a token's bits are the same among as few tokens as come here as among
//! any more, and on any number of threads, but not those of fewer tokens, whose activations are rounded otherwise.

use super::{
    LANES,
    lying::{Source, Turn, View},
    pairs::{COLUMNS, Open, Opening, Part, Tile, column_order, lay_out},
    product::{FEW, Line},
};
use crate::kernels::cpu::{
    amx::{Operands, PAIR, Shape, TILE, Tiles, two},
    tasks::{Output, by_list, in_tasks},
    team::each_chunk,
    unwritten::{Plain, unwritten},
};
use std::{arch::x86_64::*, ops::Range};

/// Panels that are opened at a time, and columns: a quarter of a megabyte, of which there are two.
const PANELS: usize = 8;
const MOST: usize = 1024;
/// Steps of the unit between which some of the next panels is opened.
const BURST: usize = 4;

impl Plain for Sums {}

/// The sums of two tiles of tokens with two panels.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Sums([[u32; TILE]; 4 * TILE]);

/// What a thread needs besides.
#[derive(Default)]
struct Scratch {
    /// Panels that are multiplied, tile after tile, and those that are opened meanwhile.
    opened: [Vec<Tile>; 2],
    /// Sums of some columns, where there are more.
    sums: Vec<Sums>,
}

/// Whether tiles are whole, and tokens so many that it takes less time to open panels for them than to multiply otherwise.
pub(super) fn is_worth_while(panels: &View<'_>, tokens: usize) -> bool {
    let few = if panels.layout.e4m3 { FEW } else { PAIR };
    tokens > few && panels.cols.is_multiple_of(COLUMNS)
}

/// out = x · Wᵀ for each of `of`, panels of one layout and as many columns, which come from `sources`: `x` is `[tokens, cols]`, an output
/// `[tokens, rows]`.
pub(super) fn multiply(of: &[View], sources: &[Source], outs: &[Output], x: &[f32], open: impl Open) {
    let Some(&View { ref layout, cols, .. }) = of.first() else { return };
    let (tokens, order) = (x.len() / cols, column_order(layout));
    // SAFETY: tokens are written below, and of those that are none the unit reads nothing.
    let mut lines = unsafe { unwritten::<Line>(tokens.next_multiple_of(TILE) * cols / COLUMNS) };
    each_chunk(&mut lines, TILE * cols / COLUMNS, |i, to| {
        for (t, x) in x.chunks_exact(cols).skip(i * TILE).take(TILE).enumerate() {
            // SAFETY: the unit is available, and with it all of AVX-512 that is asked for; columns are whole tiles.
            unsafe { lay_out(x, &order, to[t..].iter_mut().step_by(TILE)) };
        }
    });
    let lengths = || of.iter().map(|panels| panels.rows.div_ceil(LANES));
    let size = LANES * cols * tokens;
    in_tasks(lengths().sum(), size, PANELS, usize::MAX, |(scratch, turn): &mut (_, Turn), range| {
        by_list(range, lengths(), |i, range| {
            sources[i].each(&of[i], range, PANELS, turn, |panels, range| {
                let product = Product { panels, x: &lines, tokens, out: outs[i] };
                // SAFETY: panels that there are; tasks write disjoint rows of the output; the unit is available.
                unsafe { product.run(open, range, scratch) }
            });
        });
    });
}

/// One product.
#[derive(Clone, Copy)]
struct Product<'a> {
    panels: &'a View<'a>,
    /// For each sixteen tokens and tile of columns a line of each token.
    x: &'a [Line],
    tokens: usize,
    out: Output,
}

impl Product<'_> {
    /// All tokens with some panels.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx512vbmi")]
    unsafe fn run(self, open: impl Open, range: Range<usize>, scratch: &mut Scratch) {
        let (all, most) = (self.panels.cols / COLUMNS, MOST / COLUMNS);
        let part = |i: usize| {
            let (panel, step) = (range.start + i / all.div_ceil(most) * PANELS, i % all.div_ceil(most) * most);
            Part { panels: panel..range.end.min(panel + PANELS), steps: step..all.min(step + most) }
        };
        let parts = range.len().div_ceil(PANELS) * all.div_ceil(most);
        let passes = self.tokens.div_ceil(PAIR);
        if scratch.sums.is_empty() {
            // SAFETY: tiles are opened before they are multiplied, sums stored before they are loaded.
            *scratch = unsafe {
                let opened = [unwritten(PANELS * all.min(most)), unwritten(PANELS * all.min(most))];
                Scratch { opened, sums: unwritten(passes * PANELS / 2) }
            };
        }
        // SAFETY: passed on to the caller.
        unsafe {
            Opening::new(self.panels, part(0), &mut scratch.opened[1], 1).burst(open);
            let mut tiles = Tiles::new(Shape { a: [TILE; 2], b: [TILE; 2], depth: 64 });
            for i in 0..parts {
                let [opened, room] = &mut scratch.opened;
                std::mem::swap(opened, room);
                let now = part(i);
                let pairs = now.panels.len().div_ceil(2);
                let bursts = passes * pairs * now.steps.len().div_ceil(BURST);
                let mut opening = (i + 1 < parts).then(|| Opening::new(self.panels, part(i + 1), room, bursts));
                let mut between = || {
                    if let Some(opening) = &mut opening {
                        opening.burst(open);
                    }
                };
                for (pass, token) in (0..self.tokens).step_by(PAIR).enumerate() {
                    for pair in 0..pairs {
                        let sums = &mut scratch.sums[pass * PANELS / 2 + pair];
                        self.block(&mut tiles, &now, (pair, token), opened, sums, &mut between);
                    }
                }
            }
        }
    }

    /// A pair of a part's panels with two tiles of tokens, from `token` on.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx512vbmi")]
    unsafe fn block(
        self,
        tiles: &mut Tiles,
        Part { panels, steps }: &Part,
        (pair, token): (usize, usize),
        opened: &[Tile],
        sums: &mut Sums,
        between: &mut impl FnMut(),
    ) {
        let all = self.panels.cols / COLUMNS;
        let a = two(self.tokens - token);
        // A last panel without another is taken twice.
        let b = [2 * pair, (2 * pair + 1).min(panels.len() - 1)];
        tiles.reshape(Shape { a: a.map(|(_, size)| size), b: [TILE; 2], depth: 64 });
        // SAFETY: tokens of `x`, whose lines come in sixteens; panels that were opened.
        unsafe {
            let mut from = Operands {
                a: a.map(|(at, _)| self.x.as_ptr().add((token + at) * all + steps.start * TILE).cast()),
                a_pitch: 64,
                a_step: 64 * TILE,
                b: b.map(|panel| opened.as_ptr().add(panel * steps.len()).cast()),
                b_pitch: [64; 2],
            };
            if steps.start > 0 {
                tiles.load(&raw const sums.0);
            } else {
                tiles.zero();
            }
            let mut left = steps.len();
            while left > 0 {
                let burst = left.min(BURST);
                tiles.halves(from, burst);
                between();
                from = from.further(burst);
                left -= burst;
            }
            tiles.store(&raw mut sums.0);
            if steps.end == all {
                for (i, &(at, size)) in a.iter().enumerate().take(1 + usize::from(a[1].0 > 0)) {
                    for (j, panel) in (panels.start + b[0]..=panels.start + b[1]).enumerate() {
                        self.put(&sums.0[(2 * i + j) * TILE..][..size], token + at, panel);
                    }
                }
            }
        }
    }

    /// A tile's sums, of tokens from `token` on, to their places.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn put(self, sums: &[[u32; TILE]], token: usize, panel: usize) {
        let (rows, row) = (self.panels.rows, panel * LANES);
        let mask = (u32::MAX >> (32 - (rows - row).min(LANES))) as u16;
        // SAFETY: sixteen numbers; tokens that the output has, and no more rows than it has.
        unsafe {
            let factors = match self.panels.factors.get(row..row + LANES) {
                Some(factors) => _mm512_loadu_ps(factors.as_ptr()),
                None => _mm512_set1_ps(1.0),
            };
            for (t, sums) in sums.iter().enumerate() {
                let to = self.out.pointer().add((token + t) * rows + row);
                _mm512_mask_storeu_ps(to, mask, _mm512_mul_ps(_mm512_loadu_ps(sums.as_ptr().cast()), factors));
            }
        }
    }
}
