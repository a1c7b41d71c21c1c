//! Rows of sixteen 32-bit words to columns: what the matrix unit, attention and panels all begin with.

use std::arch::x86_64::*;

/// Words of a vector.
const LANES: usize = 16;

/// Lane i of vector j to lane j of vector i.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn turned(v: [__m512i; LANES]) -> [__m512i; LANES] {
    let mut a = v;
    for i in (0..LANES).step_by(2) {
        a[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    let mut b = a;
    for i in (0..LANES).step_by(4) {
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    // Now vector 4 i + j holds, in each quarter q, lane 4 q + j of vectors 4 i to 4 i + 3.
    let mut c = b;
    for j in 0..4 {
        let (low, high) = (
            [_mm512_shuffle_i32x4::<0x88>(b[j], b[4 + j]), _mm512_shuffle_i32x4::<0xdd>(b[j], b[4 + j])],
            [_mm512_shuffle_i32x4::<0x88>(b[8 + j], b[12 + j]), _mm512_shuffle_i32x4::<0xdd>(b[8 + j], b[12 + j])],
        );
        // Even quarters are 0 and 2, odd ones 1 and 3.
        c[j] = _mm512_shuffle_i32x4::<0x88>(low[0], high[0]);
        c[8 + j] = _mm512_shuffle_i32x4::<0xdd>(low[0], high[0]);
        c[4 + j] = _mm512_shuffle_i32x4::<0x88>(low[1], high[1]);
        c[12 + j] = _mm512_shuffle_i32x4::<0xdd>(low[1], high[1]);
    }
    c
}
