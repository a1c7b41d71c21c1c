//! Some panels against some tokens, all sums in registers: four products an instruction and lane within a group, then one product in floats
//! with the group's scales.

use super::{
    LANES, Panels,
    layout::{BIAS_STEPS, BIASES, HIGH, LOW, SCALES, STEPS},
    numbers::Numbers,
    rounded::{Rounded, Token},
    scales::scales,
};
use crate::kernels::cpu::tasks::Output;
use std::arch::x86_64::*;

/// One product.
#[derive(Clone, Copy)]
pub(super) struct Product<'a> {
    pub(super) panels: &'a Panels,
    pub(super) rounded: &'a Rounded,
    pub(super) tokens: usize,
    pub(super) out: Output,
}

/// Where numbers lie that have been taken out of their panels, `pitch` bytes a panel.
#[derive(Clone, Copy)]
pub(super) struct Opened {
    pub(super) numbers: *const u8,
    pub(super) pitch: usize,
}

impl Product<'_> {
    /// `P` panels from panel `p` on with `T` tokens from token `t` on; says how many tokens. A single panel is read as the one stream that it
    /// is, and nothing is fetched ahead: the processor does that better.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    pub(super) unsafe fn tile<N: Numbers, const P: usize, const T: usize>(
        &self,
        numbers: N,
        opened: Option<Opened>,
        p: usize,
        t: usize,
    ) -> usize {
        let (layout, blocks) = (&self.panels.layout, &self.panels.blocks);
        let tokens: [Token; T] = std::array::from_fn(|i| self.rounded.token(t + i));
        let steps = layout.group / N::COLUMNS;
        let beside = layout.scale.size() * LANES;
        // SAFETY: sizes of panels and of rounded tokens follow from the same layout and columns.
        unsafe {
            let panels: [*const u8; P] = std::array::from_fn(|k| self.panels.panel(p + k).as_ptr());
            let lows: [*const u8; P] = std::array::from_fn(|k| match opened {
                Some(opened) => opened.numbers.add(k * opened.pitch),
                None => panels[k].add(blocks.at[LOW]),
            });
            let low_bytes = if opened.is_some() { blocks.groups * steps * N::LOW } else { blocks.bytes };
            let mut sums = [[_mm512_setzero_ps(); T]; P];
            let mut g = 0;
            for block in 0..blocks.count {
                let bases: [*const u8; P] = std::array::from_fn(|k| panels[k].add(block * blocks.bytes));
                for group in 0..blocks.groups {
                    let of = self.group::<N, P, T>(numbers, tokens, g, |k, step| {
                        let low = lows[k].add(block * low_bytes + (group * steps + step) * N::LOW);
                        let high = bases[k].add(blocks.at[HIGH] + N::high(group * steps + step));
                        (low, high, group * steps + step)
                    });
                    for k in 0..P {
                        let strip = |kind: usize| bases[k].add(blocks.at[kind]);
                        let scale = scales(layout.scale, false, strip(SCALES).add(group * beside), strip(STEPS));
                        for i in 0..T {
                            let scale = _mm512_mul_ps(scale, _mm512_set1_ps((*tokens[i].beside.add(g)).step));
                            sums[k][i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(of[k][i]), scale, sums[k][i]);
                        }
                        if layout.biased {
                            let from = strip(BIASES).add(group * beside);
                            let bias = scales(layout.scale, true, from, strip(BIAS_STEPS));
                            for i in 0..T {
                                let sum = _mm512_set1_ps((*tokens[i].beside.add(g)).sum);
                                sums[k][i] = _mm512_fmadd_ps(bias, sum, sums[k][i]);
                            }
                        }
                    }
                    g += 1;
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

    /// The products of group `g`, added up. `at` says where a panel's step of the group begins, and which of its block it is.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn group<N: Numbers, const P: usize, const T: usize>(
        &self,
        numbers: N,
        tokens: [Token; T],
        g: usize,
        at: impl Fn(usize, usize) -> (*const u8, *const u8, usize),
    ) -> [[__m512i; T]; P] {
        let (group, pitch) = (self.panels.layout.group, self.rounded.pitch());
        // The first byte's sums, and the second's; or two halves of the only byte's, which need not wait for each other.
        let mut of = [[[_mm512_setzero_si512(); 2]; T]; P];
        // SAFETY: passed on to the caller.
        unsafe {
            for i in 0..T {
                let offset = _mm512_set1_epi32((*tokens[i].beside.add(g)).offset);
                for k in 0..P {
                    of[k][i][N::BYTES - 1] = offset;
                }
            }
            let mut column = g * group;
            for step in 0..group / N::COLUMNS {
                let mut weights = [[_mm512_setzero_si512(); 8]; P];
                for k in 0..P {
                    let (low, high, step) = at(k, step);
                    weights[k] = numbers.vectors(low, high, step);
                }
                for v in 0..N::VECTORS {
                    for i in 0..T {
                        for byte in 0..N::BYTES {
                            let four = tokens[i].bytes.add(byte * pitch + column).cast::<i32>();
                            let four = _mm512_set1_epi32(four.read_unaligned());
                            let half = if N::BYTES == 1 && P * T == 1 { v % 2 } else { byte };
                            for k in 0..P {
                                of[k][i][half] = _mm512_dpbusd_epi32(of[k][i][half], weights[k][v], four);
                            }
                        }
                    }
                    column += 4;
                }
            }
        }
        let mut sums = [[_mm512_setzero_si512(); T]; P];
        for k in 0..P {
            for i in 0..T {
                let [first, second] = of[k][i];
                sums[k][i] = match N::BYTES {
                    1 if P * T > 1 => first,
                    1 => _mm512_add_epi32(first, second),
                    _ => _mm512_add_epi32(_mm512_slli_epi32::<8>(first), second),
                };
            }
        }
        sums
    }
}
