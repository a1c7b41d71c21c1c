//! Some panels against some tokens, all sums in registers: four products an instruction and lane within a group, then one product in floats
//! with the group's scales.

use super::{
    LANES, Panels,
    layout::SUPER,
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

/// Where a panel's strips begin, and how far it is to the next panel's.
#[derive(Clone, Copy)]
pub(super) struct Strips {
    pub(super) low: *const u8,
    /// Low bits may have been taken elsewhere.
    pub(super) low_pitch: usize,
    pub(super) high: *const u8,
    pub(super) scales: *const u8,
    pub(super) biases: *const u8,
    pub(super) steps: *const u8,
    pub(super) bias_steps: *const u8,
    pub(super) pitch: usize,
}

impl Product<'_> {
    /// Of panel `p` and those after it.
    pub(super) fn strips(&self, p: usize) -> Strips {
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

    /// `P` panels from panel `p` on with `T` tokens from token `t` on; says how many tokens. What lies `ahead` bytes further is fetched from
    /// memory meanwhile: panels are too short for the processor to see a stream in them.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    pub(super) unsafe fn tile<N: Numbers, const P: usize, const T: usize>(
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
                let (at, step_at) = (g * beside, (g >> shared) * 2 * LANES);
                for k in 0..P {
                    let (at, step_at) = (k * strips.pitch + at, k * strips.pitch + step_at);
                    let from = strips.scales.add(at);
                    let scale = scales(layout.scale, false, from, strips.steps.wrapping_add(step_at));
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
                        let from = strips.biases.add(at);
                        let bias = scales(layout.scale, true, from, strips.bias_steps.wrapping_add(step_at));
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
