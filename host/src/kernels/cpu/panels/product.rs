//! The sums: some panels against some tokens at a time, all in registers. A few tokens take the numbers out of their panels as these stream
//! from memory; many have them taken out once, into cache.

use super::{
    LANES, Panels,
    numbers::{Bytes, E2m1, Nibbles, Numbers, Quarters, scales},
    rounded::{Rounded, Token},
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

/// One product.
#[derive(Clone, Copy)]
struct Product<'a> {
    panels: &'a Panels,
    rounded: &'a Rounded,
    tokens: usize,
    out: Output,
}

/// A cache line.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Line([u8; 64]);

impl Product<'_> {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn few<N: Numbers>(self, numbers: N, range: Range<usize>) {
        let mut p = range.start;
        while p < range.end {
            let left = range.end - p;
            // SAFETY: passed on to the caller.
            unsafe {
                p += match (self.tokens, left) {
                    // One stream is what memory gives fastest, but where numbers are small it is not memory that is waited for.
                    (1, 4..) if N::BYTES == 1 => self.packed::<N, 4, 1>(numbers, p),
                    (1, _) => self.packed::<N, 1, 1>(numbers, p),
                    (2, 2..) => self.packed::<N, 2, 2>(numbers, p),
                    (2, _) => self.packed::<N, 1, 2>(numbers, p),
                    (3, 2..) => self.packed::<N, 2, 3>(numbers, p),
                    (3, _) => self.packed::<N, 1, 3>(numbers, p),
                    (_, 2..) => self.packed::<N, 2, 4>(numbers, p),
                    (_, _) => self.packed::<N, 1, 4>(numbers, p),
                };
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn packed<N: Numbers, const P: usize, const T: usize>(&self, numbers: N, p: usize) -> usize {
        let panels: [[&[u8]; 3]; P] = std::array::from_fn(|i| self.panels.panel(p + i));
        // SAFETY: whole panels, and as many tokens as there are.
        unsafe { self.tile::<N, P, T>(numbers, panels, p, 0, P * self.panels.panel_bytes()) };
        P
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
        let mut panels: [[&[u8]; 3]; P] = std::array::from_fn(|i| self.panels.panel(p + i));
        let lines = self.panels.cols / 4;
        if N::VECTORS > 1 {
            scratch.resize(P * lines, Line([0; 64]));
            for (panel, lines) in panels.iter_mut().zip(scratch.chunks_exact_mut(lines)) {
                for (piece, lines) in panel[0].as_chunks::<64>().0.iter().zip(lines.chunks_exact_mut(N::VECTORS)) {
                    // SAFETY: lines of 64 bytes.
                    unsafe {
                        let vectors = numbers.vectors(_mm512_loadu_si512(piece.as_ptr().cast()));
                        for (line, vector) in lines.iter_mut().zip(vectors) {
                            _mm512_store_si512(line.0.as_mut_ptr().cast(), vector);
                        }
                    }
                }
                // SAFETY: lines are bytes.
                panel[0] = unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), 64 * lines.len()) };
            }
        }
        let bytes = Bytes::<BYTES>;
        let mut t = 0;
        // SAFETY: tokens that there are, panels as above.
        unsafe {
            while t < self.tokens {
                t += match (self.tokens - t, BYTES) {
                    (6.., 1) => self.tile::<_, P, 6>(bytes, panels, p, t, 0),
                    (4.., _) => self.tile::<_, P, 4>(bytes, panels, p, t, 0),
                    (2.., _) => self.tile::<_, P, 2>(bytes, panels, p, t, 0),
                    (_, _) => self.tile::<_, P, 1>(bytes, panels, p, t, 0),
                };
            }
        }
        P
    }

    /// `P` panels from panel `p` on with `T` tokens from token `t` on; says how many tokens. What lies `ahead` bytes further is fetched from
    /// memory meanwhile: panels are too short for the processor to see a stream in them.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn tile<N: Numbers, const P: usize, const T: usize>(
        &self,
        numbers: N,
        panels: [[&[u8]; 3]; P],
        p: usize,
        t: usize,
        ahead: usize,
    ) -> usize {
        let layout = &self.panels.layout;
        let tokens: [Token; T] = std::array::from_fn(|i| self.rounded.token(t + i));
        let pitch = self.rounded.pitch();
        let pieces = layout.group / (4 * N::VECTORS);
        let beside = layout.scale.size() * LANES;
        // SAFETY: sizes of panels and of rounded tokens follow from the same layout and columns.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); T]; P];
            let (mut piece, mut column) = (0, 0);
            for g in 0..self.panels.cols / layout.group {
                // The first byte's sums, and the second's.
                let mut of = [[[_mm512_setzero_si512(); 2]; T]; P];
                for i in 0..T {
                    let offset = _mm512_set1_epi32((*tokens[i].beside.add(g)).offset);
                    for k in 0..P {
                        of[k][i][N::BYTES - 1] = offset;
                    }
                }
                for _ in 0..pieces {
                    let mut weights = [[_mm512_setzero_si512(); 4]; P];
                    for k in 0..P {
                        let at = panels[k][0].as_ptr().wrapping_add(piece);
                        _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(ahead).cast());
                        weights[k] = numbers.vectors(_mm512_loadu_si512(at.cast()));
                    }
                    for v in 0..N::VECTORS {
                        for i in 0..T {
                            for byte in 0..N::BYTES {
                                let four = tokens[i].bytes.add(byte * pitch + column).cast::<i32>();
                                let four = _mm512_set1_epi32(four.read_unaligned());
                                for k in 0..P {
                                    of[k][i][byte] = _mm512_dpbusd_epi32(of[k][i][byte], weights[k][v], four);
                                }
                            }
                        }
                        column += 4;
                    }
                    piece += 64;
                }
                for k in 0..P {
                    let scale = scales(layout.scale, panels[k][1].as_ptr().add(g * beside));
                    for i in 0..T {
                        let sum = if N::BYTES == 1 {
                            of[k][i][0]
                        } else {
                            _mm512_add_epi32(_mm512_slli_epi32::<8>(of[k][i][0]), of[k][i][1])
                        };
                        let scale = _mm512_mul_ps(scale, _mm512_set1_ps((*tokens[i].beside.add(g)).step));
                        sums[k][i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, sums[k][i]);
                    }
                    if layout.biased {
                        let bias = scales(layout.scale, panels[k][2].as_ptr().add(g * beside));
                        for i in 0..T {
                            sums[k][i] =
                                _mm512_fmadd_ps(bias, _mm512_set1_ps((*tokens[i].beside.add(g)).sum), sums[k][i]);
                        }
                    }
                }
            }
            for k in 0..P {
                let row = (p + k) * LANES;
                let mask = (u32::MAX >> (32 - (self.panels.rows - row).min(LANES))) as u16;
                let factors = match self.panels.factors.get(row..row + LANES) {
                    Some(factors) => _mm512_loadu_ps(factors.as_ptr()),
                    None => _mm512_set1_ps(1.0),
                };
                for i in 0..T {
                    let to = self.out.pointer().add((t + i) * self.panels.rows + row);
                    _mm512_mask_storeu_ps(to, mask, _mm512_mul_ps(sums[k][i], factors));
                }
            }
        }
        T
    }
}
