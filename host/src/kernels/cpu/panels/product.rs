//! The sums: some panels against some tokens at a time, all in registers. A few tokens take the numbers out of their panels as these stream
//! from memory; many have them taken out once, into cache.

use super::{
    LANES, Panels,
    layout::{Panel, SUPER},
    numbers::{Bytes, E2m1, Five, Nibbles, Numbers, Quarters, Six, Three},
    rounded::{Rounded, Token},
    scales::scales,
};
use crate::kernels::cpu::{
    ahead,
    lanes::Isa,
    tasks::{Output, in_tasks},
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
        if tokens <= FEW {
            ahead::pass(&self.bytes);
        }
        let rounded = Rounded::new(self, x);
        let product = Product { panels: self, rounded: &rounded, tokens, out: Output(out.as_mut_ptr()) };
        match (self.layout.bits, self.layout.e2m1) {
            (2, _) => product.run(Quarters),
            (3, _) => product.run(Three),
            (5, _) => product.run(Five),
            (6, _) => product.run(Six),
            (4, false) => product.run(Nibbles),
            (4, true) => product.run(E2m1),
            _ => product.run(Bytes::<2>),
        }
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

/// Where a panel's strips begin, and how far it is to the next panel's.
#[derive(Clone, Copy)]
struct Strips {
    low: *const u8,
    /// Low bits may have been taken elsewhere.
    low_pitch: usize,
    high: *const u8,
    scales: *const u8,
    biases: *const u8,
    steps: *const u8,
    bias_steps: *const u8,
    pitch: usize,
}

impl Product<'_> {
    fn run<N: Numbers>(self, numbers: N) {
        let size = LANES * self.panels.cols * self.tokens;
        in_tasks(self.panels.rows.div_ceil(LANES), size, 4, usize::MAX, |scratch: &mut Vec<Line>, range| {
            // SAFETY: panels that there are; tasks write disjoint rows of the output; panels exist only where the machine has the
            // instructions.
            unsafe { if self.tokens <= FEW { self.few(numbers, range) } else { self.many(numbers, range, scratch) } }
        });
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn few<N: Numbers>(self, numbers: N, range: Range<usize>) {
        let mut p = range.start;
        while p < range.end {
            let left = range.end - p;
            // SAFETY: passed on to the caller.
            unsafe {
                p += match (self.tokens, left) {
                    (1, 4..) => self.packed::<N, 4, 1>(numbers, p),
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
        // SAFETY: whole panels, and as many tokens as there are.
        unsafe { self.tile::<N, P, T>(numbers, self.strips(p), p, 0, P * self.panels.panel_bytes()) };
        P
    }

    fn strips(&self, p: usize) -> Strips {
        let (panel, pitch) = (self.panels.panel(p), self.panels.panel_bytes());
        Strips {
            low: panel.low.as_ptr(),
            low_pitch: pitch,
            high: panel.high.as_ptr(),
            scales: panel.scales.as_ptr(),
            biases: panel.biases.as_ptr(),
            steps: panel.steps.as_ptr(),
            bias_steps: panel.bias_steps.as_ptr(),
            pitch,
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
        let mut strips = self.strips(p);
        let lines = self.panels.cols / 4;
        if N::VECTORS > 1 {
            scratch.resize(P * lines, Line([0; 64]));
            for (k, lines) in scratch.chunks_exact_mut(lines).enumerate() {
                let Panel { low, high, .. } = self.panels.panel(p + k);
                for (step, lines) in lines.chunks_exact_mut(N::VECTORS).enumerate() {
                    // SAFETY: steps of the panel's columns; lines of 64 bytes.
                    unsafe {
                        let (low, high) = (low.as_ptr().add(step * N::LOW), high.as_ptr().add(N::high(step)));
                        for (line, vector) in lines.iter_mut().zip(numbers.vectors(low, high, step)) {
                            _mm512_store_si512(line.0.as_mut_ptr().cast(), vector);
                        }
                    }
                }
            }
            strips = Strips { low: scratch.as_ptr().cast(), low_pitch: 64 * lines, ..strips };
        }
        let bytes = Bytes::<BYTES>;
        let mut t = 0;
        // SAFETY: tokens that there are, panels as above.
        unsafe {
            while t < self.tokens {
                t += match (self.tokens - t, BYTES) {
                    (6.., 1) => self.tile::<_, P, 6>(bytes, strips, p, t, 0),
                    (4.., _) => self.tile::<_, P, 4>(bytes, strips, p, t, 0),
                    (2.., _) => self.tile::<_, P, 2>(bytes, strips, p, t, 0),
                    (_, _) => self.tile::<_, P, 1>(bytes, strips, p, t, 0),
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
        strips: Strips,
        p: usize,
        t: usize,
        ahead: usize,
    ) -> usize {
        let layout = &self.panels.layout;
        let tokens: [Token; T] = std::array::from_fn(|i| self.rounded.token(t + i));
        let pitch = self.rounded.pitch();
        let steps_of = layout.group / N::COLUMNS;
        // Of the group, to that of its 256 columns.
        let shared = (SUPER / layout.group).trailing_zeros();
        let beside = layout.scale.size() * LANES;
        // SAFETY: sizes of panels and of rounded tokens follow from the same layout and columns.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); T]; P];
            let (mut step, mut column) = (0, 0);
            for g in 0..self.panels.cols / layout.group {
                // The first byte's sums, and the second's.
                let mut of = [[[_mm512_setzero_si512(); 2]; T]; P];
                for i in 0..T {
                    let offset = _mm512_set1_epi32((*tokens[i].beside.add(g)).offset);
                    for k in 0..P {
                        of[k][i][N::BYTES - 1] = offset;
                    }
                }
                for _ in 0..steps_of {
                    let mut weights = [[_mm512_setzero_si512(); 8]; P];
                    for k in 0..P {
                        let low = strips.low.add(k * strips.low_pitch + step * N::LOW);
                        let high = strips.high.add(k * strips.pitch + N::high(step));
                        for line in (0..N::LOW).step_by(64) {
                            _mm_prefetch::<_MM_HINT_T0>(low.wrapping_add(line + ahead).cast());
                        }
                        if N::high(2) > 0 {
                            _mm_prefetch::<_MM_HINT_T0>(high.wrapping_add(ahead).cast());
                        }
                        weights[k] = numbers.vectors(low, high, step);
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
                    step += 1;
                }
                let (from, steps) =
                    (strips.scales.add(g * beside), strips.steps.wrapping_add((g >> shared) * 2 * LANES));
                let (b_from, b_steps) =
                    (strips.biases.wrapping_add(g * beside), strips.bias_steps.wrapping_add((g >> shared) * 2 * LANES));
                for k in 0..P {
                    let scale =
                        scales(layout.scale, false, from.add(k * strips.pitch), steps.wrapping_add(k * strips.pitch));
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
                        let bias = scales(
                            layout.scale,
                            true,
                            b_from.wrapping_add(k * strips.pitch),
                            b_steps.wrapping_add(k * strips.pitch),
                        );
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
