//! Sixteen rows' numbers out of a step of their strips, as unsigned bytes: four columns a vector. Planes of bits are joined by shifts that are
//! the same for all bytes, so bits that cross into a neighbour are masked away.

use std::arch::x86_64::*;

/// Takes numbers out of their strips, some columns of sixteen rows at a step.
///
/// # Safety
/// Asks for AVX-512 F, BW, and for strips that have the step.
pub(super) trait Numbers: Copy + Sync {
    /// Columns of a step, at most 32.
    const COLUMNS: usize;
    /// Vectors of a step: four columns each.
    const VECTORS: usize = Self::COLUMNS / 4;
    /// Bytes of an activation that they meet.
    const BYTES: usize;
    /// Bytes of a step in the strip of low bits.
    const LOW: usize;
    /// Where a step begins in the strip of high bits.
    #[inline(always)]
    fn high(_step: usize) -> usize {
        0
    }
    /// Of the returned vectors the first `VECTORS` count. `low` and `high` are where the step begins.
    unsafe fn vectors(self, low: *const u8, high: *const u8, step: usize) -> [__m512i; 8];
}

/// As they are: whole bytes.
#[derive(Clone, Copy)]
pub(super) struct Bytes<const BYTES: usize>;

impl<const BYTES: usize> Numbers for Bytes<BYTES> {
    const COLUMNS: usize = 4;
    const BYTES: usize = BYTES;
    const LOW: usize = 64;
    #[inline(always)]
    unsafe fn vectors(self, low: *const u8, _: *const u8, _: usize) -> [__m512i; 8] {
        // SAFETY: the caller vouches, here and below.
        unsafe { [_mm512_loadu_si512(low.cast()); 8] }
    }
}

/// Two bits each.
#[derive(Clone, Copy)]
pub(super) struct Quarters;

/// The four pairs of bits of each byte.
#[inline(always)]
unsafe fn quarters(low: *const u8) -> [__m512i; 4] {
    // SAFETY: as above.
    unsafe {
        let (piece, mask) = (_mm512_loadu_si512(low.cast()), _mm512_set1_epi8(3));
        let shifted =
            [piece, _mm512_srli_epi16::<2>(piece), _mm512_srli_epi16::<4>(piece), _mm512_srli_epi16::<6>(piece)];
        [0, 1, 2, 3].map(|i| _mm512_and_si512(shifted[i], mask))
    }
}

impl Numbers for Quarters {
    const COLUMNS: usize = 16;
    const BYTES: usize = 1;
    const LOW: usize = 64;
    #[inline(always)]
    unsafe fn vectors(self, low: *const u8, _: *const u8, _: usize) -> [__m512i; 8] {
        // SAFETY: as above.
        unsafe {
            let [a, b, c, d] = quarters(low);
            [a, b, c, d, d, d, d, d]
        }
    }
}

/// Three bits each, the third in a plane of its own.
#[derive(Clone, Copy)]
pub(super) struct Three;

impl Numbers for Three {
    const COLUMNS: usize = 16;
    const BYTES: usize = 1;
    const LOW: usize = 64;
    #[inline(always)]
    fn high(step: usize) -> usize {
        step / 2 * 64
    }
    #[inline(always)]
    unsafe fn vectors(self, low: *const u8, high: *const u8, step: usize) -> [__m512i; 8] {
        // SAFETY: as above.
        unsafe {
            let [a, b, c, d] = quarters(low);
            // The lower or the upper four bits of each byte.
            let high = _mm512_loadu_si512(high.cast());
            let thirds = _mm512_srl_epi16(high, _mm_cvtsi32_si128((step % 2 * 4) as i32));
            let third = _mm512_set1_epi8(4);
            let a = or_masked(a, _mm512_slli_epi16::<2>(thirds), third);
            let b = or_masked(b, _mm512_slli_epi16::<1>(thirds), third);
            let c = or_masked(c, thirds, third);
            let d = or_masked(d, _mm512_srli_epi16::<1>(thirds), third);
            [a, b, c, d, d, d, d, d]
        }
    }
}

/// a | b & mask
#[inline(always)]
unsafe fn or_masked(a: __m512i, b: __m512i, mask: __m512i) -> __m512i {
    // SAFETY: as above.
    unsafe { _mm512_ternarylogic_epi32::<0b1111_1000>(a, b, mask) }
}

/// Four bits each.
#[derive(Clone, Copy)]
pub(super) struct Nibbles;

/// The two halves of each byte.
#[inline(always)]
unsafe fn nibbles(low: *const u8) -> [__m512i; 2] {
    // SAFETY: as above.
    unsafe {
        let (piece, mask) = (_mm512_loadu_si512(low.cast()), _mm512_set1_epi8(15));
        [_mm512_and_si512(piece, mask), _mm512_and_si512(_mm512_srli_epi16::<4>(piece), mask)]
    }
}

impl Numbers for Nibbles {
    const COLUMNS: usize = 8;
    const BYTES: usize = 1;
    const LOW: usize = 64;
    #[inline(always)]
    unsafe fn vectors(self, low: *const u8, _: *const u8, _: usize) -> [__m512i; 8] {
        // SAFETY: as above.
        unsafe {
            let [a, b] = nibbles(low);
            [a, b, b, b, b, b, b, b]
        }
    }
}

/// Four bits each, of E2M1: twice the value plus 12.
#[derive(Clone, Copy)]
pub(super) struct E2m1;

impl Numbers for E2m1 {
    const COLUMNS: usize = 8;
    const BYTES: usize = 1;
    const LOW: usize = 64;
    #[inline(always)]
    unsafe fn vectors(self, low: *const u8, _: *const u8, _: usize) -> [__m512i; 8] {
        // SAFETY: as above.
        unsafe {
            let values = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
            let values = _mm512_broadcast_i32x4(values);
            let [a, b] = nibbles(low).map(|halves| _mm512_shuffle_epi8(values, halves));
            [a, b, b, b, b, b, b, b]
        }
    }
}

/// Five bits each, the fifth in a plane of its own.
#[derive(Clone, Copy)]
pub(super) struct Five;

impl Numbers for Five {
    const COLUMNS: usize = 32;
    const BYTES: usize = 2;
    const LOW: usize = 256;
    #[inline(always)]
    fn high(step: usize) -> usize {
        step * 64
    }
    #[inline(always)]
    unsafe fn vectors(self, low: *const u8, high: *const u8, _: usize) -> [__m512i; 8] {
        // SAFETY: as above.
        unsafe {
            let h = _mm512_loadu_si512(high.cast());
            let fifth = _mm512_set1_epi8(16);
            let ([a, b], [c, d]) = (nibbles(low), nibbles(low.add(64)));
            let ([e, f], [g, i]) = (nibbles(low.add(128)), nibbles(low.add(192)));
            [
                or_masked(a, _mm512_slli_epi16::<4>(h), fifth),
                or_masked(b, _mm512_slli_epi16::<3>(h), fifth),
                or_masked(c, _mm512_slli_epi16::<2>(h), fifth),
                or_masked(d, _mm512_slli_epi16::<1>(h), fifth),
                or_masked(e, h, fifth),
                or_masked(f, _mm512_srli_epi16::<1>(h), fifth),
                or_masked(g, _mm512_srli_epi16::<2>(h), fifth),
                or_masked(i, _mm512_srli_epi16::<3>(h), fifth),
            ]
        }
    }
}

/// Six bits each, the upper two in a plane of their own.
#[derive(Clone, Copy)]
pub(super) struct Six;

impl Numbers for Six {
    const COLUMNS: usize = 16;
    const BYTES: usize = 2;
    const LOW: usize = 128;
    #[inline(always)]
    fn high(step: usize) -> usize {
        step * 64
    }
    #[inline(always)]
    unsafe fn vectors(self, low: *const u8, high: *const u8, _: usize) -> [__m512i; 8] {
        // SAFETY: as above.
        unsafe {
            let h = _mm512_loadu_si512(high.cast());
            let upper = _mm512_set1_epi8(48);
            let ([a, b], [c, d]) = (nibbles(low), nibbles(low.add(64)));
            let a = or_masked(a, _mm512_slli_epi16::<4>(h), upper);
            let b = or_masked(b, _mm512_slli_epi16::<2>(h), upper);
            let c = or_masked(c, h, upper);
            let d = or_masked(d, _mm512_srli_epi16::<2>(h), upper);
            [a, b, c, d, d, d, d, d]
        }
    }
}
