//! Entries of a bfloat16 cache laid out in pairs, as `vdpbf16ps` adds them up: by dimension for scores, by entry for what is weighed.
//! Whatever lies beyond the entries and their dimensions is zero.

use super::{super::turned::turned, block::KEYS};
use std::arch::x86_64::*;

/// Some entries of one head in a cache.
#[derive(Clone, Copy)]
pub(super) struct Entries {
    pub(super) from: *const u16,
    /// From one entry to the next.
    pub(super) stride: usize,
    pub(super) dim: usize,
    /// At most [`KEYS`].
    pub(super) count: usize,
}

impl Entries {
    /// 32 numbers of an entry from `at` on; zeros beyond either end.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn load(self, entry: usize, at: usize) -> __m512i {
        if entry >= self.count {
            return _mm512_setzero_si512();
        }
        // SAFETY: masked to what there is of the entry.
        unsafe {
            let from = self.from.add(entry * self.stride + at);
            // The same of the next block, which lies too far ahead for the machine to guess.
            _mm_prefetch::<_MM_HINT_T1>(from.wrapping_add(KEYS * self.stride).cast());
            match self.dim - at {
                32.. => _mm512_loadu_si512(from.cast()),
                left => _mm512_maskz_loadu_epi16(u32::MAX >> (32 - left), from.cast()),
            }
        }
    }

    /// Pairs of dimensions, `[dim / 2, KEYS]`, dimensions padded to a multiple of 32.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub(super) unsafe fn by_dimension(self, to: *mut u32) {
        for first in (0..KEYS).step_by(16) {
            for at in (0..self.dim).step_by(32) {
                // SAFETY: `to` has room for all pairs of all keys.
                unsafe {
                    let mut rows = [_mm512_setzero_si512(); 16];
                    for i in 0..16 {
                        rows[i] = self.load(first + i, at);
                    }
                    for (i, column) in turned(rows).into_iter().enumerate() {
                        _mm512_storeu_si512(to.add((at / 2 + i) * KEYS + first).cast(), column);
                    }
                }
            }
        }
    }

    /// Pairs of entries, `[KEYS / 2, width]`; `width` is a multiple of 16.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub(super) unsafe fn by_entry(self, to: *mut u32, width: usize) {
        let order = _mm512_cvtepu16_epi32(_mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
        let low = _mm512_or_si512(order, _mm512_slli_epi32::<16>(_mm512_add_epi32(order, _mm512_set1_epi32(32))));
        let high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
        for pair in 0..self.count.div_ceil(2) {
            for at in (0..self.dim).step_by(32) {
                // SAFETY: `to` has room for all pairs.
                unsafe {
                    let (a, b) = (self.load(2 * pair, at), self.load(2 * pair + 1, at));
                    let to = to.add(pair * width + at);
                    _mm512_storeu_si512(to.cast(), _mm512_permutex2var_epi16(a, low, b));
                    if at + 16 < width {
                        _mm512_storeu_si512(to.add(16).cast(), _mm512_permutex2var_epi16(a, high, b));
                    }
                }
            }
        }
    }
}
