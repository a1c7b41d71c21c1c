//! Activations in whole steps: x = step * y, y in one or two signed bytes, the step chosen for each group of columns; the bytes in the order
//! in which the weights come out of their panels.

use super::{
    Panels,
    layout::{Layout, Order},
};
use crate::kernels::cpu::team::each_chunk_of_two;
use std::arch::x86_64::*;

/// Tokens that are worth a task of their own.
const MANY: usize = 16;

/// Some tokens.
pub(super) struct Rounded {
    /// For each token: the first bytes of all columns, then the second ones.
    bytes: Vec<i8>,
    /// For each token and group.
    beside: Vec<Beside>,
    /// Bytes of a plane of one token.
    pitch: usize,
    planes: usize,
    groups: usize,
}

/// What a group of one token has besides its bytes.
#[derive(Clone, Copy)]
pub(super) struct Beside {
    /// What a sum is begun with, so that the weights' zero counts as nothing.
    pub(super) offset: i32,
    /// What a step is worth.
    pub(super) step: f32,
    /// The sum of the activations, rounded, which meets the bias.
    pub(super) sum: f32,
}

/// One token's.
#[derive(Clone, Copy)]
pub(super) struct Token {
    pub(super) bytes: *const i8,
    pub(super) beside: *const Beside,
}

impl Rounded {
    /// `x` is `[tokens, cols]`.
    pub(super) fn new(panels: &Panels, x: &[f32]) -> Self {
        let (layout, cols) = (panels.layout, panels.cols);
        let (tokens, groups, planes) = (x.len() / cols, cols / layout.group, layout.planes());
        let pitch = cols.next_multiple_of(64);
        let mut all = Self {
            bytes: vec![0; tokens * planes * pitch],
            beside: vec![Beside { offset: 0, step: 0.0, sum: 0.0 }; tokens * groups],
            pitch,
            planes,
            groups,
        };
        let (most, beside) = (MANY * planes * pitch, MANY * groups);
        each_chunk_of_two((&mut all.bytes, most), (&mut all.beside, beside), |i, bytes, beside| {
            let tokens = bytes.chunks_exact_mut(planes * pitch).zip(beside.chunks_exact_mut(groups));
            for ((bytes, beside), x) in tokens.zip(x.chunks_exact(cols).skip(i * MANY)) {
                let line = Line { layout, x, beside };
                // SAFETY: panels exist only where the machine has the instructions.
                unsafe {
                    match planes {
                        1 => line.round::<1>(bytes, pitch),
                        _ => line.round::<2>(bytes, pitch),
                    }
                }
            }
        });
        all
    }

    /// Token `t`; pointers are good while `self` is.
    pub(super) fn token(&self, t: usize) -> Token {
        Token {
            bytes: self.bytes[t * self.planes * self.pitch..].as_ptr(),
            beside: self.beside[t * self.groups..].as_ptr(),
        }
    }

    /// From a token's first bytes to its second ones.
    pub(super) fn pitch(&self) -> usize {
        self.pitch
    }
}

/// One token on its way.
struct Line<'a> {
    layout: Layout,
    x: &'a [f32],
    beside: &'a mut [Beside],
}

impl Line<'_> {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn round<const BYTES: usize>(self, bytes: &mut [i8], pitch: usize) {
        // The first byte never overflows.
        let most = if BYTES == 1 { 127.0 } else { 127.0 * 256.0 };
        let absolute = _mm512_set1_epi32(0x7fff_ffff);
        let layout = self.layout;
        let vectors = layout.group / 16;
        for (g, (x, beside)) in self.x.chunks_exact(layout.group).zip(self.beside).enumerate() {
            // SAFETY: a group is whole vectors of `x`, and there are as many bytes.
            unsafe {
                let (mut peaks, mut strays) = (_mm512_setzero_ps(), _mm512_setzero_ps());
                for v in 0..vectors {
                    let x = _mm512_loadu_ps(x.as_ptr().add(16 * v));
                    let magnitude = _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), absolute));
                    peaks = _mm512_max_ps(magnitude, peaks);
                    strays = _mm512_fmadd_ps(x, _mm512_setzero_ps(), strays);
                }
                let peak = _mm512_reduce_max_ps(peaks);
                let per_step = _mm512_set1_ps(if peak > 0.0 { most / peak } else { 0.0 });
                // What is infinite or no number at all must not come out as a number: 0 times it is none.
                let worth = peak / most + _mm512_reduce_add_ps(strays);
                let mut total = _mm512_setzero_si512();
                for v in 0..vectors {
                    let x = _mm512_loadu_ps(x.as_ptr().add(16 * v));
                    let whole = _mm512_cvtps_epi32(_mm512_mul_ps(x, per_step));
                    total = _mm512_add_epi32(total, whole);
                    let to = bytes.as_mut_ptr().add(g * layout.group + 16 * v);
                    if BYTES == 1 {
                        _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(whole));
                    } else {
                        let first = _mm512_srai_epi32::<8>(_mm512_add_epi32(whole, _mm512_set1_epi32(128)));
                        _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(first));
                        // What the first byte leaves over are the last eight bits.
                        _mm_storeu_si128(to.add(pitch).cast(), _mm512_cvtepi32_epi8(whole));
                    }
                }
                let total = _mm512_reduce_add_epi32(total);
                *beside = Beside {
                    offset: total.wrapping_mul(-layout.zero),
                    step: worth * layout.unit,
                    // Of what is multiplied, not of what was meant: then a rounding counts by the weight, not by its two parts, which are
                    // larger.
                    sum: total as f32 * worth,
                };
            }
        }
        // SAFETY: planes are whole vectors.
        unsafe { turn(layout, bytes) };
    }
}

/// Brings columns from their own order into that of the pieces.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn turn(layout: Layout, bytes: &mut [i8]) {
    let (in_lanes, of_lanes): ([i8; 16], [i32; 16]) = match (layout.order, layout.bits) {
        (_, 8) | (Order::Straight, _) => return,
        (Order::Halves, _) => (
            [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
            [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15],
        ),
        (Order::InTurns, 4) => (
            [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15],
            [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
        ),
        (Order::InTurns, _) => (
            [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15],
            [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
        ),
    };
    // SAFETY: constants of the right sizes; chunks of 64 bytes.
    unsafe {
        let in_lanes = _mm512_broadcast_i32x4(_mm_loadu_si128(in_lanes.as_ptr().cast()));
        let of_lanes = _mm512_loadu_si512(of_lanes.as_ptr().cast());
        for line in bytes.as_chunks_mut::<64>().0 {
            let v = _mm512_loadu_si512(line.as_ptr().cast());
            let v = _mm512_permutexvar_epi32(of_lanes, _mm512_shuffle_epi8(v, in_lanes));
            _mm512_storeu_si512(line.as_mut_ptr().cast(), v);
        }
    }
}
