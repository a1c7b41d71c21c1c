//! Activations in two or three signed bytes: x = step (.. 256² b₀ + 256 b₁ + b₂), the step chosen for each chunk of columns, the bytes in
//! the order in which the weights come out of their packing.

use super::{Numbers, Order, SLACK};
use std::arch::x86_64::*;

/// The largest whole number that an activation becomes in so many bytes: the first byte never overflows.
const fn most(bytes: usize) -> f32 {
    if bytes == 2 { 127.0 * 256.0 } else { 127.0 * 65_536.0 }
}

/// A cache line of bytes.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(super) struct Line<T>(pub(super) T);

/// Some tokens.
pub(super) struct Rounded {
    /// For each token and chunk, for each vector: first bytes, second bytes ..
    bytes: Vec<Line<[i8; 64]>>,
    /// For each token and chunk: what is added to each lane's sums of the first two bytes, and of the third, so that `ZERO` counts as
    /// nothing.
    offsets: Vec<[Line<[i32; 16]>; 2]>,
    /// For each token and chunk.
    steps: Vec<f32>,
    /// For each token and group, with slack: the sum of the activations, rounded.
    sums: Vec<f32>,
    /// Lines of a chunk.
    lines: usize,
    chunks: usize,
    groups: usize,
}

/// One token's, as the product reads it.
#[derive(Clone, Copy)]
pub(super) struct Token {
    pub(super) bytes: *const i8,
    pub(super) offsets: *const i32,
    pub(super) steps: *const f32,
    pub(super) sums: *const f32,
}

impl Rounded {
    /// `x` is `[tokens, cols]`.
    pub(super) fn new<N: Numbers, const BYTES: usize>(numbers: &N, x: &[f32], tokens: usize) -> Self {
        let (cols, group) = (numbers.raw().cols, numbers.group());
        let chunks = cols.div_ceil(64 * N::VECTORS);
        let groups = cols.div_ceil(group);
        let mut all = Self {
            bytes: vec![Line([0; 64]); tokens * chunks * BYTES * N::VECTORS],
            offsets: vec![[Line([0; 16]); 2]; if N::ZERO == 0 { 0 } else { tokens * chunks }],
            steps: vec![0.0; tokens * chunks],
            sums: vec![0.0; if N::BIASED { tokens * (groups + SLACK) } else { 0 }],
            lines: BYTES * N::VECTORS,
            chunks,
            groups,
        };
        for (t, x) in x.chunks_exact(cols).enumerate() {
            // SAFETY: `Product::run` made sure of the instruction set.
            unsafe { all.fill::<N, BYTES>(t, x, group) };
        }
        all
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn fill<N: Numbers, const BYTES: usize>(&mut self, t: usize, x: &[f32], group: usize) {
        let chunks = t * self.chunks..(t + 1) * self.chunks;
        let lines = self.lines;
        let bytes = self.bytes[chunks.start * lines..chunks.end * lines].chunks_exact_mut(lines);
        let mut offsets = if N::ZERO == 0 { &mut [][..] } else { &mut self.offsets[chunks.clone()] }.iter_mut();
        let sums = self.sums.get_mut(t * (self.groups + SLACK)..).unwrap_or_default();
        for (c, ((x, bytes), step)) in x.chunks(64 * N::VECTORS).zip(bytes).zip(&mut self.steps[chunks]).enumerate() {
            let mut padded = [0.0f32; 256];
            padded[..x.len()].copy_from_slice(x);
            let (mut peaks, mut strays) = ([0.0f32; 16], [0.0f32; 16]);
            for lanes in padded[..64 * N::VECTORS].as_chunks::<16>().0 {
                for ((peak, stray), x) in peaks.iter_mut().zip(&mut strays).zip(lanes) {
                    *peak = if x.abs() > *peak { x.abs() } else { *peak };
                    *stray += x * 0.0;
                }
            }
            let peak = peaks.into_iter().fold(0.0f32, f32::max);
            let per_step = if peak > 0.0 { most(BYTES) / peak } else { 0.0 };
            // What is infinite or no number at all must not come out as a number: 0 times it is none.
            *step = peak / most(BYTES) + strays.into_iter().sum::<f32>();
            let mut whole = [0i32; 256];
            for (whole, x) in whole.as_chunks_mut::<16>().0.iter_mut().zip(padded.as_chunks::<16>().0) {
                // SAFETY: both are sixteen lanes long.
                unsafe {
                    let y = _mm512_mul_ps(_mm512_loadu_ps(x.as_ptr()), _mm512_set1_ps(per_step));
                    _mm512_storeu_si512(whole.as_mut_ptr().cast(), _mm512_cvtps_epi32(y));
                }
            }
            if N::BIASED {
                // Of what is multiplied, not of what was meant: then a rounding counts by the weight, not by its two parts, which are larger.
                for (i, whole) in whole[..64 * N::VECTORS].chunks(group.min(64 * N::VECTORS)).enumerate() {
                    // Only what is no number could overflow, and the step says so then.
                    let sum = whole.iter().fold(0i32, |sum, &y| sum.wrapping_add(y));
                    sums[c * 64 * N::VECTORS / group + i] += sum as f32 * *step;
                }
            }
            for v in 0..N::VECTORS {
                for byte in (0..BYTES).rev() {
                    let line = &mut bytes[BYTES * v + byte].0;
                    for (j, to) in line.iter_mut().enumerate() {
                        let column = match N::ORDER {
                            Order::InTurns => N::VECTORS * j + v,
                            Order::Halves => 32 * (j / 16) + 16 * v + j % 16,
                        };
                        *to = whole[column] as i8;
                        whole[column] = (whole[column].wrapping_add(128)) >> 8;
                    }
                }
            }
            if let Some(offsets) = offsets.next() {
                for line in bytes.chunks_exact(BYTES) {
                    for l in 0..16 {
                        let sum = |line: &Line<[i8; 64]>| (0..4).map(|b| i32::from(line.0[4 * l + b])).sum::<i32>();
                        offsets[0].0[l] -= N::ZERO * (256 * sum(&line[0]) + sum(&line[1]));
                        if BYTES == 3 {
                            offsets[1].0[l] -= N::ZERO * sum(&line[2]);
                        }
                    }
                }
            }
        }
    }

    /// Token `t`; pointers are good while `self` is.
    pub(super) fn token(&self, t: usize) -> Token {
        let (line, group) = (t * self.chunks, t * (self.groups + SLACK));
        Token {
            bytes: self.bytes[line * self.lines..].as_ptr().cast(),
            offsets: self.offsets.get(line..).unwrap_or_default().as_ptr().cast(),
            steps: self.steps[line..].as_ptr(),
            sums: self.sums.get(group..).unwrap_or_default().as_ptr(),
        }
    }
}
