//! Formats whose numbers stand around a zero in the middle: GGUF's blocks of 32, and the 4-bit floats of MXFP4 and NVFP4, which are whole
//! numbers of halves. The number that stands for zero is taken off the sums (`Numbers::ZERO`), or is a bias where blocks have one.

use super::{
    super::{
        dequantize::{e4m3_to_f32, e8m0_to_f32},
        format::Format,
        matrix::Matrix,
        unpack::Raw,
    },
    Numbers, Order,
};
use std::arch::x86_64::*;

/// The f16 at the start of each of a row's blocks of `bytes`, and the one behind it, in f32, with zeros after them.
#[inline(always)]
unsafe fn halves(row: *const u8, bytes: usize, blocks: usize, first: *mut f32, second: Option<*mut f32>) {
    // SAFETY: the caller vouches for four bytes in each block, room for 16 floats more than blocks, and AVX-512.
    unsafe {
        let lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        let at = _mm512_mullo_epi32(lane, _mm512_set1_epi32(bytes as i32));
        for b in (0..blocks).step_by(16) {
            let mask = (u32::MAX >> (32 - (blocks - b).min(16))) as u16;
            let words = _mm512_mask_i32gather_epi32::<1>(_mm512_setzero_si512(), mask, at, row.add(b * bytes).cast());
            _mm512_storeu_ps(first.add(b), _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words)));
            if let Some(second) = second {
                let upper = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(words));
                _mm512_storeu_ps(second.add(b), _mm512_cvtph_ps(upper));
            }
        }
        _mm512_storeu_ps(first.add(blocks), _mm512_setzero_ps());
        if let Some(second) = second {
            _mm512_storeu_ps(second.add(blocks), _mm512_setzero_ps());
        }
    }
}

/// Q4_0 (18 bytes a block, zero at 8) and Q4_1 (20 bytes, with a minimum): f16 scale, f16 minimum, 16 bytes.
#[derive(Clone, Copy)]
pub(super) struct Q4<const BYTES: usize, const MIDDLE: i32>(pub(super) Raw);

impl<const BYTES: usize, const MIDDLE: i32> Numbers for Q4<BYTES, MIDDLE> {
    const VECTORS: usize = 2;
    const ORDER: Order = Order::Halves;
    const ZERO: i32 = MIDDLE;
    const BIASED: bool = BYTES == 20;

    fn raw(&self) -> Raw {
        self.0
    }
    fn group(&self) -> usize {
        32
    }

    #[inline(always)]
    unsafe fn scales(&self, r: usize, scales: *mut f32, biases: *mut f32) {
        // SAFETY: a row has a block for each 32 columns; the caller gave room.
        unsafe { halves(self.0.row(r), BYTES, self.0.cols / 32, scales, Self::BIASED.then_some(biases)) }
    }

    #[inline(always)]
    unsafe fn vectors(&self, row: *const u8, c: usize) -> [__m512i; 4] {
        let left = self.0.cols / 32 - 4 * c;
        // SAFETY: only blocks of the row are read; the caller vouches for the instruction set.
        unsafe {
            let at = row.add(4 * c * BYTES + BYTES - 16);
            // Only the last chunk of a row may have fewer.
            let whole = left >= 4;
            let block = |b: usize| match whole || b < left {
                true => _mm_loadu_si128(at.add(b * BYTES).cast()),
                false => _mm_setzero_si128(),
            };
            let low = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(block(0)), block(1));
            let high = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(block(2)), block(3));
            let bytes = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high);
            let mask = _mm512_set1_epi8(15);
            let none = _mm512_setzero_si512();
            [_mm512_and_si512(bytes, mask), _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), mask), none, none]
        }
    }
}

/// Q8_0: f16 scale, 32 signed bytes; 128 is added to make them unsigned.
#[derive(Clone, Copy)]
pub(super) struct Q8(pub(super) Raw);

impl Numbers for Q8 {
    const VECTORS: usize = 1;
    const ORDER: Order = Order::InTurns;
    const ZERO: i32 = 128;
    const BIASED: bool = false;

    fn raw(&self) -> Raw {
        self.0
    }
    fn group(&self) -> usize {
        32
    }

    #[inline(always)]
    unsafe fn scales(&self, r: usize, scales: *mut f32, _: *mut f32) {
        // SAFETY: a row has a block for each 32 columns; the caller gave room.
        unsafe { halves(self.0.row(r), 34, self.0.cols / 32, scales, None) }
    }

    #[inline(always)]
    unsafe fn vectors(&self, row: *const u8, c: usize) -> [__m512i; 4] {
        // SAFETY: only blocks of the row are read; the caller vouches for the instruction set.
        unsafe {
            let at = row.add(2 * c * 34 + 2);
            let first = _mm256_loadu_si256(at.cast());
            let second = if 2 * c + 1 < self.0.cols / 32 {
                _mm256_loadu_si256(at.add(34).cast())
            } else {
                _mm256_setzero_si256()
            };
            let signed = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(first), second);
            let none = _mm512_setzero_si512();
            [_mm512_xor_si512(signed, _mm512_set1_epi8(-128)), none, none, none]
        }
    }
}

/// E2M1 nibbles with E8M0 or E4M3 scales: twice the float, and 12, the largest of them, added.
#[derive(Clone, Copy)]
pub(super) struct Fp4 {
    raw: Raw,
    scales: *const u8,
    stride: usize,
    group: usize,
    /// Factors of rows, for `Nvfp4Scaled`.
    factors: *const u8,
}

// SAFETY: read-only memory of a matrix that outlives the product.
unsafe impl Sync for Fp4 {}
// SAFETY: as above.
unsafe impl Send for Fp4 {}

impl Fp4 {
    /// Valid while `m` is borrowed.
    pub(super) fn new(m: &Matrix) -> Self {
        let [_, scales, factors] = m.parts();
        let factors = if m.format() == Format::Nvfp4Scaled { factors.as_ptr() } else { std::ptr::null() };
        let [_, stride, _] = m.format().row_bytes(m.cols());
        Self { raw: Raw::of(m), scales: scales.as_ptr(), stride, group: m.format().block().0, factors }
    }
}

impl Numbers for Fp4 {
    const VECTORS: usize = 2;
    const ORDER: Order = Order::InTurns;
    const ZERO: i32 = 12;
    const BIASED: bool = false;

    fn raw(&self) -> Raw {
        self.raw
    }
    fn group(&self) -> usize {
        self.group
    }

    #[inline(always)]
    unsafe fn scales(&self, r: usize, scales: *mut f32, _: *mut f32) {
        let groups = self.raw.cols / self.group;
        // SAFETY: a row has a scale for each group, and a factor where there are any; the caller gave room.
        unsafe {
            let from = std::slice::from_raw_parts(self.scales.add(r * self.stride), groups);
            let to = std::slice::from_raw_parts_mut(scales, groups);
            let factor = match self.factors.is_null() {
                true => 0.5,
                false => 0.5 * self.factors.add(r * 4).cast::<f32>().read_unaligned(),
            };
            if self.group == 32 {
                to.iter_mut().zip(from).for_each(|(to, &from)| *to = 0.5 * e8m0_to_f32(from));
            } else {
                to.iter_mut().zip(from).for_each(|(to, &from)| *to = factor * e4m3_to_f32(from));
            }
            _mm512_storeu_ps(scales.add(groups), _mm512_setzero_ps());
        }
    }

    #[inline(always)]
    unsafe fn vectors(&self, row: *const u8, c: usize) -> [__m512i; 4] {
        let left = self.raw.cols / 2 - 64 * c;
        // SAFETY: only bytes of the row are read; the caller vouches for the instruction set.
        unsafe {
            let bytes = if left >= 64 {
                _mm512_loadu_si512(row.add(64 * c).cast())
            } else {
                _mm512_maskz_loadu_epi8(u64::MAX >> (64 - left), row.add(64 * c).cast())
            };
            let table =
                _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
            let mask = _mm512_set1_epi8(15);
            let low = _mm512_shuffle_epi8(table, _mm512_and_si512(bytes, mask));
            let high = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), mask));
            [low, high, _mm512_setzero_si512(), _mm512_setzero_si512()]
        }
    }
}
