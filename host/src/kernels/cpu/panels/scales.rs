//! Sixteen rows' scales or biases as floats, from whatever the format keeps them in.

use super::layout::{Scale, Steps};
use crate::kernels::cpu::format::Float;
use std::arch::x86_64::*;

/// Sixteen scales, or the biases of their kind; for scales that are counts, `steps` are what they count.
///
/// # Safety
/// `from` has as many, `steps` too if they are read; asks for AVX-512 F, BW, VL.
#[inline(always)]
pub(super) unsafe fn scales(kind: Scale, bias: bool, from: *const u8, steps: *const u8) -> __m512 {
    // SAFETY: the caller vouches.
    unsafe {
        match kind {
            Scale::Float(Float::BF16) => {
                let halves = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(halves))
            }
            Scale::Float(Float::F16) => _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())),
            Scale::Float(Float::F32) => _mm512_loadu_ps(from.cast()),
            Scale::E8m0 => {
                let exponents = _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()));
                // 2^-127 has no exponent of its own in f32.
                let least = _mm512_cmpeq_epi32_mask(exponents, _mm512_setzero_si512());
                let bits = _mm512_slli_epi32::<23>(exponents);
                _mm512_castsi512_ps(_mm512_mask_mov_epi32(bits, least, _mm512_set1_epi32(0x0040_0000)))
            }
            Scale::E4m3 => {
                let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()));
                let magnitude = _mm512_and_si512(bytes, _mm512_set1_epi32(0x7f));
                // The bits one exponent field further left are the value times 2^-120, subnormals included.
                let small = _mm512_castsi512_ps(_mm512_slli_epi32::<20>(magnitude));
                let value = _mm512_castps_si512(_mm512_mul_ps(small, _mm512_set1_ps(f32::from_bits(247 << 23))));
                let sign = _mm512_slli_epi32::<24>(_mm512_and_si512(bytes, _mm512_set1_epi32(0x80)));
                let none = _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(0x7f));
                let value = _mm512_mask_mov_epi32(value, none, _mm512_set1_epi32(0x7fc0_0000));
                _mm512_castsi512_ps(_mm512_or_si512(value, sign))
            }
            Scale::Steps(kind) => {
                let bytes = _mm_loadu_si128(from.cast());
                let counts = match kind {
                    Steps::Signed => _mm512_cvtepi8_epi32(bytes),
                    Steps::Unsigned => _mm512_cvtepu8_epi32(bytes),
                    Steps::Halves if bias => _mm512_srli_epi32::<4>(_mm512_cvtepu8_epi32(bytes)),
                    Steps::Halves => _mm512_and_si512(_mm512_cvtepu8_epi32(bytes), _mm512_set1_epi32(15)),
                };
                _mm512_mul_ps(_mm512_cvtepi32_ps(counts), _mm512_cvtph_ps(_mm256_loadu_si256(steps.cast())))
            }
        }
    }
}
