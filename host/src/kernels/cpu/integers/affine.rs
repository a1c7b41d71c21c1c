//! MLX's affine 2, 4 and 8 bits: a byte holds the numbers of neighbouring columns, the first in its lowest bits.

use super::{
    super::{
        format::{Float, Format},
        matrix::Matrix,
        unpack::Raw,
    },
    Numbers, Order, SLACK,
};
use std::arch::x86_64::*;

/// Rows of `BITS`-bit numbers, `PER` of them in a byte.
#[derive(Clone, Copy)]
pub(super) struct Affine<const BITS: u32, const PER: usize> {
    raw: Raw,
    beside: [*const u8; 2],
    stride: usize,
    float: Float,
    group: usize,
}

// SAFETY: read-only memory of a matrix that outlives the product.
unsafe impl<const BITS: u32, const PER: usize> Sync for Affine<BITS, PER> {}
// SAFETY: as above.
unsafe impl<const BITS: u32, const PER: usize> Send for Affine<BITS, PER> {}

impl<const BITS: u32, const PER: usize> Affine<BITS, PER> {
    /// Valid while `m` is borrowed.
    pub(super) fn new(m: &Matrix) -> Self {
        let [_, scales, biases] = m.parts();
        let (float, group) = match m.format() {
            Format::Affine { scales, group, .. } => (scales, group),
            _ => (Float::F32, m.format().block().0),
        };
        let [_, stride, _] = m.format().row_bytes(m.cols());
        Self { raw: Raw::of(m), beside: [scales.as_ptr(), biases.as_ptr()], stride, float, group }
    }
}

/// `count` floats to f32, with slack behind them.
#[inline(always)]
unsafe fn widen(from: *const u8, float: Float, count: usize, to: *mut f32) {
    // SAFETY: the caller vouches for `count` floats at `from`, room for `SLACK` more at `to`, and AVX-512.
    unsafe {
        let mut i = 0;
        while i < count {
            let left = (count - i).min(16);
            let mask = (u32::MAX >> (32 - left)) as u16;
            let v = match float {
                Float::F32 => _mm512_maskz_loadu_ps(mask, from.add(4 * i).cast()),
                Float::F16 => _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from.add(2 * i).cast())),
                Float::BF16 => {
                    let halves = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from.add(2 * i).cast()));
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(halves))
                }
            };
            _mm512_storeu_ps(to.add(i), v);
            i += 16;
        }
        _mm512_storeu_ps(to.add(count), _mm512_setzero_ps());
    }
}

impl<const BITS: u32, const PER: usize> Numbers for Affine<BITS, PER> {
    const VECTORS: usize = PER;
    const ORDER: Order = Order::InTurns;
    const ZERO: i32 = 0;
    const BIASED: bool = true;

    fn raw(&self) -> Raw {
        self.raw
    }
    fn group(&self) -> usize {
        self.group
    }

    #[inline(always)]
    unsafe fn scales(&self, r: usize, scales: *mut f32, biases: *mut f32) {
        const { assert!(SLACK == 16) };
        let count = self.raw.cols / self.group;
        // SAFETY: a row has a scale and a bias for each group; the caller gave room.
        unsafe {
            widen(self.beside[0].add(r * self.stride), self.float, count, scales);
            widen(self.beside[1].add(r * self.stride), self.float, count, biases);
        }
    }

    #[inline(always)]
    unsafe fn vectors(&self, row: *const u8, c: usize) -> [__m512i; 4] {
        let left = self.raw.cols / PER - 64 * c;
        // SAFETY: only bytes of the row are read; the caller vouches for the instruction set.
        unsafe {
            let bytes = if left >= 64 {
                _mm512_loadu_si512(row.add(64 * c).cast())
            } else {
                _mm512_maskz_loadu_epi8(u64::MAX >> (64 - left), row.add(64 * c).cast())
            };
            let mask = _mm512_set1_epi8(((1u32 << BITS) - 1) as u8 as i8);
            let mut all = [_mm512_setzero_si512(); 4];
            for (v, numbers) in all.iter_mut().enumerate().take(PER) {
                let shifted = match v as u32 * BITS {
                    0 => bytes,
                    2 => _mm512_srli_epi16::<2>(bytes),
                    4 => _mm512_srli_epi16::<4>(bytes),
                    _ => _mm512_srli_epi16::<6>(bytes),
                };
                *numbers = if BITS == 8 { shifted } else { _mm512_and_si512(shifted, mask) };
            }
            all
        }
    }
}
