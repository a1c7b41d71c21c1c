//! The sums: some panels against some tokens at a time, all in registers. A few tokens take the numbers out of their panels as these stream
//! from memory; many have them taken out once, into cache.

use super::{
    LANES, Panels,
    layout::{HIGH, LOW},
    numbers::{Bytes, E2m1, Five, Nibbles, Numbers, Quarters, Six, Three},
    rounded::Rounded,
    tile::{Opened, Product},
};
use crate::kernels::cpu::{
    ahead,
    lanes::Isa,
    tasks::{Output, by_list, in_streams, in_tasks},
};
use std::{arch::x86_64::*, ops::Range};

/// Up to this many tokens numbers are taken out in registers.
const FEW: usize = 4;

/// Whether this machine has the instructions.
pub(super) fn runs_here() -> bool {
    Isa::best() == Isa::Vnni
}

impl Panels {
    /// out = x · Wᵀ: `x` is `[tokens, cols]`, `out` `[tokens, rows]`.
    ///
    /// # Panics
    /// If the lengths of `x` and `out` do not belong to the same number of tokens.
    pub fn matmul(&self, x: &[f32], out: &mut [f32]) {
        let tokens = x.len() / self.cols;
        assert!(
            x.len() == tokens * self.cols && out.len() == tokens * self.rows,
            "matmul: {} inputs and {} outputs for {self:?}",
            x.len(),
            out.len()
        );
        multiply(&mut [(self, out)], x);
    }

    /// Whether activations are rounded for both in the same way.
    pub(in crate::kernels::cpu) fn rounds_like(&self, other: &Panels) -> bool {
        self.layout == other.layout && self.cols == other.cols
    }
}

/// out = x · Wᵀ for each of `of`, which [round](Panels::rounds_like) alike: `x` is `[tokens, cols]`, an `out` `[tokens, rows]`.
pub(in crate::kernels::cpu) fn multiply(of: &mut [(&Panels, &mut [f32])], x: &[f32]) {
    let Some(&(first, _)) = of.first() else { return };
    let tokens = x.len() / first.cols;
    let rounded = Rounded::new(first, x);
    let mut products = Vec::with_capacity(of.len());
    for &mut (panels, ref mut out) in of {
        if tokens <= FEW {
            ahead::pass(&panels.bytes);
        }
        products.push(Product { panels, rounded: &rounded, tokens, out: Output(out.as_mut_ptr()) });
    }
    match (first.layout.bits, first.layout.e2m1) {
        (2, _) => run(&products, Quarters),
        (3, _) => run(&products, Three),
        (5, _) => run(&products, Five),
        (6, _) => run(&products, Six),
        (4, false) => run(&products, Nibbles),
        (4, true) => run(&products, E2m1),
        _ => run(&products, Bytes::<2>),
    }
}

fn run<N: Numbers>(products: &[Product], numbers: N) {
    let Some(first) = products.first() else { return };
    let lengths = || products.iter().map(|p| p.panels.rows.div_ceil(LANES));
    let (panels, size) = (lengths().sum(), LANES * first.panels.cols * first.tokens);
    if first.tokens <= FEW {
        in_streams(panels, size, 4, |(): &mut (), range| {
            // SAFETY: panels that there are; tasks write disjoint rows of the output; panels exist only where the machine has the instructions.
            by_list(range, lengths(), |i, range| unsafe { products[i].few(numbers, range) });
        });
    } else {
        in_tasks(panels, size, 4, usize::MAX, |scratch, range| {
            // SAFETY: as above.
            by_list(range, lengths(), |i, range| unsafe { products[i].many(numbers, range, scratch) });
        });
    }
}

/// A cache line.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Line([u8; 64]);

impl Product<'_> {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn few<N: Numbers>(self, numbers: N, range: Range<usize>) {
        for p in range {
            // SAFETY: passed on to the caller.
            unsafe {
                match self.tokens {
                    1 => self.tile::<N, 1, 1>(numbers, None, p, 0),
                    2 => self.tile::<N, 1, 2>(numbers, None, p, 0),
                    3 => self.tile::<N, 1, 3>(numbers, None, p, 0),
                    _ => self.tile::<N, 1, 4>(numbers, None, p, 0),
                };
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn many<N: Numbers>(self, numbers: N, range: Range<usize>, scratch: &mut Vec<Line>) {
        let mut p = range.start;
        while p < range.end {
            // SAFETY: passed on to the caller.
            unsafe {
                p += match (range.end - p >= 2, N::BYTES) {
                    (true, 1) => self.column::<N, 1, 2>(numbers, p, scratch),
                    (true, _) => self.column::<N, 2, 2>(numbers, p, scratch),
                    (false, 1) => self.column::<N, 1, 1>(numbers, p, scratch),
                    (false, _) => self.column::<N, 2, 1>(numbers, p, scratch),
                };
            }
        }
    }

    /// Some panels with all tokens.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn column<N: Numbers, const BYTES: usize, const P: usize>(
        &self,
        numbers: N,
        p: usize,
        scratch: &mut Vec<Line>,
    ) -> usize {
        let (blocks, lines) = (&self.panels.blocks, self.panels.cols / 4);
        let mut opened = None;
        if N::VECTORS > 1 {
            scratch.resize(P * lines, Line([0; 64]));
            for (k, lines) in scratch.chunks_exact_mut(lines).enumerate() {
                let of_block = self.panels.panel(p + k).chunks_exact(blocks.bytes);
                for (lines, block) in lines.chunks_exact_mut(lines.len() / blocks.count).zip(of_block) {
                    for (step, lines) in lines.chunks_exact_mut(N::VECTORS).enumerate() {
                        // SAFETY: steps of the block's columns; lines of 64 bytes.
                        unsafe {
                            let low = block.as_ptr().add(blocks.at[LOW] + step * N::LOW);
                            let high = block.as_ptr().add(blocks.at[HIGH] + N::high(step));
                            for (line, vector) in lines.iter_mut().zip(numbers.vectors(low, high, step)) {
                                _mm512_store_si512(line.0.as_mut_ptr().cast(), vector);
                            }
                        }
                    }
                }
            }
            opened = Some(Opened { numbers: scratch.as_ptr().cast(), pitch: 64 * lines });
        }
        let bytes = Bytes::<BYTES>;
        let mut t = 0;
        // SAFETY: tokens that there are, panels as above.
        unsafe {
            while t < self.tokens {
                t += match (self.tokens - t, BYTES) {
                    (6.., 1) => self.tile::<_, P, 6>(bytes, opened, p, t),
                    (4.., _) => self.tile::<_, P, 4>(bytes, opened, p, t),
                    (2.., _) => self.tile::<_, P, 2>(bytes, opened, p, t),
                    (_, _) => self.tile::<_, P, 1>(bytes, opened, p, t),
                };
            }
        }
        P
    }
}
