//! MLX affine rows: a little-endian bit stream of b-bit numbers, and for each group w = q * scale + bias.
//! Three-, five- and six-bit numbers straddle bytes; eight of them always fill whole bytes.

use super::super::format::Float;

/// `[data, scales, biases]` of one row to f32.
pub(super) fn row(bits: u32, group: usize, float: Float, [data, scales, biases]: [&[u8]; 3], out: &mut [f32]) {
    let beside = scales.chunks_exact(float.size()).zip(biases.chunks_exact(float.size()));
    let groups = out.chunks_exact_mut(group).zip(data.chunks_exact(group * bits as usize / 8));
    for ((out, data), (scale, bias)) in groups.zip(beside) {
        let (scale, bias) = (float.read(scale), float.read(bias));
        for (eight, bytes) in out.chunks_exact_mut(8).zip(data.chunks_exact(bits as usize)) {
            let word = bytes.iter().rev().fold(0u64, |word, &b| word << 8 | u64::from(b));
            for (i, o) in eight.iter_mut().enumerate() {
                let q = word >> (i as u32 * bits) & ((1 << bits) - 1);
                *o = q as f32 * scale + bias;
            }
        }
    }
}
