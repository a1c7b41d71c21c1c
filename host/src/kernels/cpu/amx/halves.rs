//! Activations times bfloat16 weights on the matrix unit, for any number of tokens. Weights are tiles of A as they are, and only brought side
//! by side; activations are rounded to bfloat16 and laid out once as B, pairs of columns of sixteen tokens side by side. So sums come out by
//! rows of weights, and are turned once they are complete.
//!
//! A sum runs over pairs of columns from the first to the last, in f32 throughout: other bits than `bf16`'s sums of sixteen lanes, but the same
//! alone, in a batch and on any number of threads. The unit takes subnormal numbers for zeros, as `bf16` does.

use super::{
    laid_out::{Bring, Line, PAIR, STEP, lay_out, mask},
    tiles::{Operands, Shape, TILE, Tiles},
};
use crate::kernels::cpu::{
    ahead,
    bf16::Given,
    tasks::{Output, by_list, in_streams, in_tasks},
    team::each_chunk,
    turned::turned,
    unwritten::unwritten,
};
use std::{arch::x86_64::*, ops::Range};

/// Up to this many tokens weights are read from memory once and never again.
const FEW: usize = PAIR;
/// Bytes of weights that stay in a core's second-level cache while tokens pass; as many are brought there meanwhile.
const CACHED: usize = 1 << 20;
/// Columns that are multiplied before the next rows come: so many of both factors stay in the second-level cache.
const COLUMNS: usize = 2048;
/// Steps between which some of the next weights are brought.
const BURST: usize = 4;

/// The sums of two tiles of rows with two of tokens.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Sums([[u32; TILE]; 4 * TILE]);

/// What a thread needs besides.
#[derive(Default)]
struct Scratch {
    /// Weights that are multiplied, and those that are brought meanwhile: of each 32 rows, step by step.
    weights: [Vec<Line>; 2],
    /// Sums of some columns, where there are more.
    sums: Vec<Sums>,
}

/// out = x · Wᵀ for each of `of`, rows of the same columns: `x` is `[tokens, cols]`, an `out` `[tokens, rows]`.
pub(in crate::kernels::cpu) fn multiply(of: &[Given<'_>], cols: usize, x: &[f32]) {
    let (tokens, depth) = (x.len() / cols, cols.next_multiple_of(STEP));
    // SAFETY: `lay_out` writes all pairs of all tokens.
    let mut pairs = unsafe { unwritten::<u32>(tokens * depth / 2) };
    each_chunk(&mut pairs, TILE * depth / 2, |i, to| {
        let x = &x[i * TILE * cols..];
        // SAFETY: the unit is `available`, and with it all of AVX-512 that is asked for.
        unsafe { lay_out(&x[..x.len().min(TILE * cols)], cols, to) };
    });
    // No tile ends within a row of weights that lies where it lies.
    let few = tokens <= FEW && cols == depth;
    let product = |&Given { rows, bytes, out, .. }: &Given| {
        if few {
            ahead::pass(bytes);
        }
        Product { weights: bytes.as_ptr().cast(), x: pairs.as_ptr(), out, rows, cols, depth, tokens }
    };
    let products: Vec<Product> = of.iter().map(product).collect();
    let rows = products.iter().map(|p| p.rows).sum();
    let lengths = || products.iter().map(|p| p.rows);
    if few {
        in_streams(rows, cols * tokens, PAIR, |(): &mut (), range| {
            // SAFETY: rows of the matrix; tasks write disjoint rows of `out`; the unit is `available`.
            by_list(range, lengths(), |i, range| unsafe { products[i].few(range) });
        });
    } else {
        let most = (CACHED / (2 * COLUMNS.min(depth))).next_multiple_of(PAIR);
        in_tasks(rows, cols * tokens, PAIR, most, |scratch, range| {
            // SAFETY: as above.
            by_list(range, lengths(), |i, range| unsafe { products[i].many(range, scratch) });
        });
    }
}

/// One product.
#[derive(Clone, Copy)]
struct Product {
    weights: *const u16,
    /// For each sixteen tokens, as [`lay_out`] leaves them.
    x: *const u32,
    out: Output,
    rows: usize,
    cols: usize,
    /// Columns of `x`.
    depth: usize,
    tokens: usize,
}

// SAFETY: read-only memory that outlives the product, and an output of which threads write disjoint rows.
unsafe impl Sync for Product {}

impl Product {
    /// Up to two tiles of tokens: weights are multiplied where they lie.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn few(self, range: Range<usize>) {
        let mut sums = Sums([[0; TILE]; 4 * TILE]);
        let b = two(self.tokens);
        // SAFETY: passed on to the caller; rows of the matrix, whose columns are whole steps.
        unsafe {
            let mut tiles = Tiles::new(Shape { a: [TILE; 2], b: b.map(|(_, size)| size), depth: 2 * STEP });
            for row in range.clone().step_by(PAIR) {
                let a = two(range.end - row);
                tiles.reshape(shape(a, b));
                let from = Operands {
                    a: a.map(|(at, _)| self.weights.add((row + at) * self.cols).cast()),
                    a_pitch: 2 * self.cols,
                    a_step: 2 * STEP,
                    ..self.tokens_of(b, 0, 0)
                };
                tiles.zero();
                self.few_steps(&tiles, from, row);
                tiles.store(&raw mut sums.0);
                self.put_all(&sums, (row, a), (0, b));
            }
        }
    }

    /// All columns of some rows from `row` on, while the rows behind them are asked for, one after the other: memory gives one stream half as
    /// much again as the rows of two tiles side by side.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn few_steps(self, tiles: &Tiles, mut from: Operands, row: usize) {
        let next = self.weights.wrapping_add((row + PAIR) * self.cols).cast::<Line>();
        for step in 0..self.cols / STEP {
            for line in step * PAIR..(step + 1) * PAIR {
                ahead::fetch(next.wrapping_add(line).cast());
            }
            // SAFETY: passed on to the caller; columns are whole steps.
            unsafe { tiles.halves(from, 1) };
            from = from.further(1);
        }
    }

    /// Any number of tokens: weights are brought side by side once, and stay in cache while tokens pass.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn many(self, range: Range<usize>, scratch: &mut Scratch) {
        let (groups, passes) = (range.len().div_ceil(PAIR), self.tokens.div_ceil(PAIR));
        let size = COLUMNS.min(self.depth);
        scratch.weights.iter_mut().for_each(|lines| lines.resize(groups * PAIR * size / STEP, Line([0; STEP])));
        scratch.sums.resize(groups * passes, Sums([[0; TILE]; 4 * TILE]));
        let part = |column: usize| Part { rows: range.clone(), columns: column..self.depth.min(column + size) };
        // SAFETY: passed on to the caller.
        unsafe {
            self.bring(&part(0), &mut scratch.weights[1], 1).lines(usize::MAX);
            let mut tiles = Tiles::new(Shape { a: [TILE; 2], b: [TILE; 2], depth: 2 * STEP });
            for column in (0..self.depth).step_by(size) {
                let [weights, room] = &mut scratch.weights;
                std::mem::swap(weights, room);
                let now = part(column);
                let steps = now.columns.len() / STEP;
                let bursts = passes * groups * steps.div_ceil(BURST);
                let next = Some(now.columns.end).filter(|&end| end < self.depth).map(part);
                let mut bring = next.map(|part| self.bring(&part, room, bursts));
                for (pass, token) in (0..self.tokens).step_by(PAIR).enumerate() {
                    for group in 0..groups {
                        let sums = &mut scratch.sums[pass * groups + group];
                        let weights = weights.as_ptr().add(group * PAIR * steps);
                        self.block(&mut tiles, &now, (group, token), weights, sums, &mut bring);
                    }
                }
                bring.iter_mut().for_each(|rest| rest.lines(usize::MAX));
            }
        }
    }

    /// Prepares to bring weights, in so many bursts.
    fn bring(&self, part: &Part, room: &mut [Line], bursts: usize) -> Bring {
        let (rows, steps) = (part.rows.len(), part.columns.len() / STEP);
        debug_assert!(room.len() >= rows.next_multiple_of(PAIR) * steps);
        Bring {
            from: self.weights.wrapping_add(part.rows.start * self.cols + part.columns.start),
            pitch: self.cols,
            columns: part.columns.end.min(self.cols) - part.columns.start,
            to: room.as_mut_ptr(),
            rows,
            steps,
            at: (0, 0),
            burst: (rows * steps).div_ceil(bursts.max(1)),
        }
    }

    /// The 32 rows `group` of a part with two tiles of tokens, from `token` on.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn block(
        self,
        tiles: &mut Tiles,
        Part { rows, columns }: &Part,
        (group, token): (usize, usize),
        weights: *const Line,
        sums: &mut Sums,
        bring: &mut Option<Bring>,
    ) {
        let row = rows.start + group * PAIR;
        let (a, b) = (two(rows.end - row), two(self.tokens - token));
        tiles.reshape(shape(a, b));
        // SAFETY: weights that were brought and tokens of `x`; rows and tokens of the output.
        unsafe {
            let mut from = Operands {
                a: a.map(|(at, _)| weights.add(at).cast()),
                a_pitch: 2 * STEP,
                a_step: 2 * STEP * PAIR,
                ..self.tokens_of(b, token, columns.start)
            };
            if columns.start > 0 {
                tiles.load(&raw const sums.0);
            } else {
                tiles.zero();
            }
            let mut steps = columns.len() / STEP;
            while steps > 0 {
                let burst = steps.min(BURST);
                tiles.halves(from, burst);
                if let Some(bring) = bring {
                    bring.lines(bring.burst);
                }
                from = from.further(burst);
                steps -= burst;
            }
            tiles.store(&raw mut sums.0);
            if columns.end == self.depth {
                self.put_all(sums, (row, a), (token, b));
            }
        }
    }

    /// Two tiles of tokens from `token` on, from a column on; whose weights is yet to be said.
    #[inline]
    unsafe fn tokens_of(&self, b: [(usize, usize); 2], token: usize, column: usize) -> Operands {
        // SAFETY: passed on to the caller.
        let at = |(at, size)| unsafe { self.x.add((token + at) * self.depth / 2 + column / 2 * size).cast() };
        Operands { a: [std::ptr::null(); 2], a_pitch: 0, a_step: 0, b: b.map(at), b_pitch: b.map(|(_, size)| 4 * size) }
    }

    /// Sums to their places: tiles of rows from `row` on with tiles of tokens from `token` on.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn put_all(
        self,
        sums: &Sums,
        (row, a): (usize, [(usize, usize); 2]),
        (token, b): (usize, [(usize, usize); 2]),
    ) {
        for (i, j) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            // What is twice there counts once.
            if (i == 0 || a[1].0 > 0) && (j == 0 || b[1].0 > 0) {
                // SAFETY: passed on to the caller.
                unsafe {
                    let sums = sums.0.as_ptr().add((2 * i + j) * TILE);
                    self.put(sums, row + a[i].0, a[i].1, token + b[j].0, b[j].1);
                }
            }
        }
    }

    /// A tile of sums to its place.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn put(self, sums: *const [u32; TILE], row: usize, rows: usize, token: usize, tokens: usize) {
        // SAFETY: sixteen lines of sums, and rows and tokens that the output has.
        unsafe {
            let by_token = turned(std::array::from_fn(|i| _mm512_loadu_si512(sums.add(i).cast())));
            for (i, sums) in by_token.into_iter().enumerate().take(tokens) {
                let to = self.out.pointer().add((token + i) * self.rows + row);
                _mm512_mask_storeu_ps(to, mask(rows), _mm512_castsi512_ps(sums));
            }
        }
    }
}

impl Operands {
    pub(in crate::kernels::cpu) fn further(self, steps: usize) -> Self {
        let Self { a, a_step, b, b_pitch, .. } = self;
        let a = a.map(|a| a.wrapping_add(a_step * steps));
        let b = std::array::from_fn(|j| b[j].wrapping_add(TILE * b_pitch[j] * steps));
        Self { a, b, ..self }
    }
}

/// Some rows and columns.
struct Part {
    rows: Range<usize>,
    columns: Range<usize>,
}

/// Two tiles of what is left: where each begins, and its size. If one is enough, it is taken twice.
pub(in crate::kernels::cpu) fn two(left: usize) -> [(usize, usize); 2] {
    if left > TILE { [(0, TILE), (TILE, (left - TILE).min(TILE))] } else { [(0, left); 2] }
}

fn shape(a: [(usize, usize); 2], b: [(usize, usize); 2]) -> Shape {
    Shape { a: a.map(|(_, size)| size), b: b.map(|(_, size)| size), depth: 2 * STEP }
}
