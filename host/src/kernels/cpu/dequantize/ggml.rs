//! GGUF blocks to f32 (ggml-common.h, ggml-quants.c). Blocks of 32 keep element i in the low half of byte i and element
//! i + 16 in the high half. Super-blocks of 256 keep eight or sixteen small scales, themselves packed, under one or two f16.

use half::f16;

/// Unpacks `data`, block after block; a block holds `N` bytes and `M` weights.
pub(super) fn blocks<const N: usize, const M: usize>(data: &[u8], out: &mut [f32], one: fn(&[u8; N], &mut [f32; M])) {
    for (block, out) in data.as_chunks::<N>().0.iter().zip(out.as_chunks_mut::<M>().0) {
        one(block, out);
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// d, 16 bytes: w = d (q - 8)
pub(super) fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for i in 0..16 {
        let q = block[2 + i];
        out[i] = (f32::from(q & 15) - 8.0) * d;
        out[i + 16] = (f32::from(q >> 4) - 8.0) * d;
    }
}

/// d, m, 16 bytes: w = d q + m
pub(super) fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for i in 0..16 {
        let q = block[4 + i];
        out[i] = f32::from(q & 15) * d + m;
        out[i + 16] = f32::from(q >> 4) * d + m;
    }
}

/// The fifth bits of a block: bit i belongs to element i. Returns element i and i + 16 as five-bit numbers.
fn five_bits(high: &[u8], q: u8, i: usize) -> [f32; 2] {
    let high = u32::from_le_bytes([high[0], high[1], high[2], high[3]]);
    let low = [u32::from(q & 15), u32::from(q >> 4)];
    [(low[0] | (high >> i & 1) << 4) as f32, (low[1] | (high >> (i + 16) & 1) << 4) as f32]
}

/// d, 4 bytes of fifth bits, 16 bytes: w = d (q - 16)
pub(super) fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for i in 0..16 {
        let [a, b] = five_bits(&block[2..6], block[6 + i], i);
        out[i] = (a - 16.0) * d;
        out[i + 16] = (b - 16.0) * d;
    }
}

/// d, m, 4 bytes of fifth bits, 16 bytes: w = d q + m
pub(super) fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for i in 0..16 {
        let [a, b] = five_bits(&block[4..8], block[8 + i], i);
        out[i] = a * d + m;
        out[i + 16] = b * d + m;
    }
}

/// d, 32 signed bytes: w = d q
pub(super) fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (o, &q) in out.iter_mut().zip(&block[2..]) {
        *o = f32::from(q as i8) * d;
    }
}

/// 16 bytes of scale (low half) and minimum (high half), 64 bytes, d, dmin. Byte b of a half of 32 bytes holds the elements
/// b, b + 32, b + 64, b + 96 of 128, two bits each.
pub(super) fn q2_k(block: &[u8; 84], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 80), half_at(block, 82));
    for (i, o) in out.iter_mut().enumerate() {
        let (half, shift, byte) = (i / 128, i % 128 / 32 * 2, i % 32);
        let q = block[16 + half * 32 + byte] >> shift & 3;
        let scale = block[i / 16];
        *o = d * f32::from(scale & 15) * f32::from(q) - dmin * f32::from(scale >> 4);
    }
}

/// Scale number `s` of sixteen in Q3_K's twelve bytes: the low four bits are half of byte s % 8, the high two a quarter of
/// byte 8 + s % 4.
#[inline(always)]
pub(in super::super) fn six_bit_scale(packed: &[u8], s: usize) -> u8 {
    packed[s % 8] >> (s / 8 * 4) & 15 | (packed[8 + s % 4] >> (s / 4 * 2) & 3) << 4
}

/// 32 bytes of third bits (inverted: a clear bit takes 4 away), 64 bytes, 12 bytes with 16 six-bit scales, d.
pub(super) fn q3_k(block: &[u8; 110], out: &mut [f32; 256]) {
    let d = half_at(block, 108);
    let packed = &block[96..108];
    for (i, o) in out.iter_mut().enumerate() {
        let (half, part, byte) = (i / 128, i % 128 / 32, i % 32);
        let q = block[32 + half * 32 + byte] >> (2 * part) & 3;
        let third = block[byte] >> (half * 4 + part) & 1;
        let scale = six_bit_scale(packed, i / 16);
        *o = d * (f32::from(scale) - 32.0) * (f32::from(q) + f32::from(third) * 4.0 - 4.0);
    }
}

/// Scale and minimum number `s` of eight, six bits each, in the twelve bytes that Q4_K and Q5_K share: the first four of each
/// lie in the low bits of bytes 0-7, whose top bits complete the last four.
#[inline(always)]
pub(crate) fn scale_and_min(packed: &[u8], s: usize) -> (u8, u8) {
    if s < 4 {
        (packed[s] & 63, packed[s + 4] & 63)
    } else {
        (packed[s + 4] & 15 | packed[s - 4] >> 6 << 4, packed[s + 4] >> 4 | packed[s] >> 6 << 4)
    }
}

/// d, dmin, 12 bytes of scales and minima, 128 bytes: 32 bytes hold the elements of two groups of 32.
pub(super) fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for (i, o) in out.iter_mut().enumerate() {
        let (scale, min) = scale_and_min(&block[4..16], i / 32);
        let q = block[16 + i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4) & 15;
        *o = d * f32::from(scale) * f32::from(q) - dmin * f32::from(min);
    }
}

/// d, dmin, 12 bytes of scales and minima, 32 bytes of fifth bits (bit g of byte b: element b of group g), 128 bytes.
pub(super) fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for (i, o) in out.iter_mut().enumerate() {
        let (scale, min) = scale_and_min(&block[4..16], i / 32);
        let low = block[48 + i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4) & 15;
        let q = low | (block[16 + i % 32] >> (i / 32) & 1) << 4;
        *o = d * f32::from(scale) * f32::from(q) - dmin * f32::from(min);
    }
}

/// 128 bytes of low halves, 64 bytes of upper two bits, 16 signed scales, d: w = d scale (q - 32).
pub(super) fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let d = half_at(block, 208);
    for (i, o) in out.iter_mut().enumerate() {
        let (half, part, byte) = (i / 128, i % 128 / 32, i % 32);
        let low = block[half * 64 + part % 2 * 32 + byte] >> (part / 2 * 4) & 15;
        let q = low | (block[128 + half * 32 + byte] >> (2 * part) & 3) << 4;
        let scale = block[192 + i / 16] as i8;
        *o = d * f32::from(scale) * (f32::from(q) - 32.0);
    }
}
