//! Sixteen rows' numbers out of a piece of a panel, as unsigned bytes, and their scales as floats.

use super::layout::Scale;
use crate::kernels::cpu::format::Float;
use std::arch::x86_64::*;

/// Takes pieces apart.
///
/// # Safety
/// Asks for AVX-512 F, BW.
pub(super) trait Numbers: Copy + Sync {
    /// Vectors of a piece, at most 4: four columns of sixteen rows each.
    const VECTORS: usize;
    /// Bytes of an activation that they meet.
    const BYTES: usize;
    /// Of the returned vectors the first `VECTORS` count.
    unsafe fn vectors(self, piece: __m512i) -> [__m512i; 4];
}

/// As they are: whole bytes.
#[derive(Clone, Copy)]
pub(super) struct Bytes<const BYTES: usize>;

impl<const BYTES: usize> Numbers for Bytes<BYTES> {
    const VECTORS: usize = 1;
    const BYTES: usize = BYTES;
    #[inline(always)]
    unsafe fn vectors(self, piece: __m512i) -> [__m512i; 4] {
        [piece; 4]
    }
}

/// Two bits each.
#[derive(Clone, Copy)]
pub(super) struct Quarters;

impl Numbers for Quarters {
    const VECTORS: usize = 4;
    const BYTES: usize = 1;
    #[inline(always)]
    unsafe fn vectors(self, piece: __m512i) -> [__m512i; 4] {
        // SAFETY: the caller vouches for the instructions.
        unsafe {
            let mask = _mm512_set1_epi8(3);
            let shifted =
                [piece, _mm512_srli_epi16::<2>(piece), _mm512_srli_epi16::<4>(piece), _mm512_srli_epi16::<6>(piece)];
            [0, 1, 2, 3].map(|i| _mm512_and_si512(shifted[i], mask))
        }
    }
}

/// Four bits each.
#[derive(Clone, Copy)]
pub(super) struct Nibbles;

impl Numbers for Nibbles {
    const VECTORS: usize = 2;
    const BYTES: usize = 1;
    #[inline(always)]
    unsafe fn vectors(self, piece: __m512i) -> [__m512i; 4] {
        // SAFETY: the caller vouches for the instructions.
        unsafe {
            let mask = _mm512_set1_epi8(15);
            let high = _mm512_and_si512(_mm512_srli_epi16::<4>(piece), mask);
            [_mm512_and_si512(piece, mask), high, high, high]
        }
    }
}

/// Four bits each, of E2M1: twice the value plus 12.
#[derive(Clone, Copy)]
pub(super) struct E2m1;

impl Numbers for E2m1 {
    const VECTORS: usize = 2;
    const BYTES: usize = 1;
    #[inline(always)]
    unsafe fn vectors(self, piece: __m512i) -> [__m512i; 4] {
        // SAFETY: the caller vouches for the instructions.
        unsafe {
            let values = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
            let values = _mm512_broadcast_i32x4(values);
            let [low, high, ..] = Nibbles.vectors(piece);
            let high = _mm512_shuffle_epi8(values, high);
            [_mm512_shuffle_epi8(values, low), high, high, high]
        }
    }
}

/// Sixteen scales.
///
/// # Safety
/// `from` has as many; asks for AVX-512 F, BW, VL.
#[inline(always)]
pub(super) unsafe fn scales(kind: Scale, from: *const u8) -> __m512 {
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
        }
    }
}
