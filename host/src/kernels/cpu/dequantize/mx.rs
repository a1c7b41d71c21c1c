//! Microscaling rows (OCP MX v1.0; NVFP4): small floats, and for each group a scale that is itself an eight-bit float.
//! E4M3 has no infinities: S.1111.111 is its only NaN, and MLX, like most checkpoints, never stores it.

/// The values of a four-bit float: sign, two exponent bits, one mantissa bit.
pub(in super::super) const E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// A power of two: 2^(b - 127); 0 stands for 2^-127.
#[inline]
pub fn e8m0_to_f32(b: u8) -> f32 {
    f32::from_bits(if b == 0 { 0x0040_0000 } else { u32::from(b) << 23 })
}

/// Sign, four exponent bits (bias 7), three mantissa bits.
#[inline]
pub(crate) const fn e4m3_to_f32(b: u8) -> f32 {
    // The bits one exponent field further left are the value times 2^-120, subnormals included.
    let magnitude = f32::from_bits(((b & 0x7f) as u32) << 20) * f32::from_bits(247 << 23);
    match b & 0x7f {
        0x7f => f32::NAN,
        _ if b & 0x80 != 0 => -magnitude,
        _ => magnitude,
    }
}

/// Two E2M1 numbers a byte, the earlier one in the low half.
pub(super) fn nibbles(data: &[u8], scales: &[u8], group: usize, scale: impl Fn(u8) -> f32, out: &mut [f32]) {
    for ((out, data), &s) in out.chunks_exact_mut(group).zip(data.chunks_exact(group / 2)).zip(scales) {
        let s = scale(s);
        for (pair, &byte) in out.as_chunks_mut::<2>().0.iter_mut().zip(data) {
            *pair = [E2M1[usize::from(byte & 15)] * s, E2M1[usize::from(byte >> 4)] * s];
        }
    }
}

/// One E4M3 number a byte, a scale for each group; the last group may be shorter.
pub(super) fn bytes(data: &[u8], group: usize, scales: impl Iterator<Item = f32>, out: &mut [f32]) {
    for ((out, data), s) in out.chunks_mut(group).zip(data.chunks(group)).zip(scales) {
        for (o, &byte) in out.iter_mut().zip(data) {
            *o = e4m3_to_f32(byte) * s;
        }
    }
}
