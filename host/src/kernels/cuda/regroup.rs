//! What a checkpoint's packed matrix is in the terms of the GPU's kernels: rows that are streams of integers or E2M1 numbers, with a scale
//! and a bias for each group, or an exponent. MLX's formats are that already; GGUF's plain blocks are taken apart.

use super::packed::{Layout, Packing};
use crate::kernels::cpu::{Float, Format, Matrix, e4m3_to_f32, scale_and_min};
use half::{bf16, f16};
use rayon::prelude::*;
use std::borrow::Cow;

/// A matrix before it is uploaded.
pub struct Regrouped<'m> {
    /// What the tiles will be.
    pub layout: Layout,
    /// Bits of a weight in `data`.
    pub bits: usize,
    /// Rows of weights, little-endian bit streams.
    pub data: Cow<'m, [u8]>,
    /// For each row and group.
    pub scales: Cow<'m, [u8]>,
    /// The same, where the packing has biases.
    pub biases: Cow<'m, [u8]>,
}

/// `None` where the GPU has no kernels for the format.
pub fn regrouped(matrix: &Matrix) -> Option<Regrouped<'_>> {
    if matrix.has_column_order() {
        return None;
    }
    let [data, scales, biases] = matrix.parts();
    let as_it_is = |packing, group, half, bits| Regrouped {
        layout: Layout { packing, group, half },
        bits,
        data: Cow::Borrowed(&**data),
        scales: Cow::Borrowed(&**scales),
        biases: Cow::Borrowed(&**biases),
    };
    match matrix.format() {
        Format::Affine { bits, group, scales: scale @ (Float::F16 | Float::BF16) } => {
            let packing = if bits <= 4 { Packing::Nibble } else { Packing::Byte };
            Some(as_it_is(packing, group, scale == Float::F16, bits as usize))
        }
        Format::Mxfp8 => {
            // 2^-127 is no normal bf16, but one all the same.
            let exponent = |&e: &u8| if e == 0 { [0x40, 0] } else { (u16::from(e) << 7).to_le_bytes() };
            let scales: Vec<u8> = scales.iter().flat_map(exponent).collect();
            let biases = vec![0; scales.len()].into();
            Some(Regrouped { scales: scales.into(), biases, ..as_it_is(Packing::Fp8, 32, false, 8) })
        }
        Format::Fp8 { block }
            if matrix.cols().is_multiple_of(128) && (block.is_multiple_of(128) || block >= matrix.cols()) =>
        {
            let [scales, biases] = in_two(scales, matrix.cols(), block);
            Some(Regrouped { scales: scales.into(), biases: biases.into(), ..as_it_is(Packing::Fp8, 128, false, 8) })
        }
        Format::Mxfp4 => Some(as_it_is(Packing::Mx4, 32, false, 4)),
        Format::Q4_0 => Some(blocks(data, 18, 4, |b, q| {
            q.copy_from_slice(&nibbles(&b[2..18]));
            let d = half(b, 0);
            (d, -8.0 * d)
        })),
        Format::Q4_1 => Some(blocks(data, 20, 4, |b, q| {
            q.copy_from_slice(&nibbles(&b[4..20]));
            (half(b, 0), half(b, 2))
        })),
        Format::Q5_0 => Some(blocks(data, 22, 8, |b, q| {
            fives(&b[2..6], &b[6..22], q);
            let d = half(b, 0);
            (d, -16.0 * d)
        })),
        Format::Q5_1 => Some(blocks(data, 24, 8, |b, q| {
            fives(&b[4..8], &b[8..24], q);
            (half(b, 0), half(b, 2))
        })),
        Format::Q8_0 => Some(blocks(data, 34, 8, |b, q| {
            q.iter_mut().zip(&b[2..34]).for_each(|(q, &x)| *q = x ^ 0x80);
            let d = half(b, 0);
            (d, -128.0 * d)
        })),
        Format::Q4K => Some(groups(data, 144, 8, 4, |b, g, q| {
            let high = 4 * (g % 2);
            let of = |i: usize| (b[16 + g / 2 * 32 + i] >> high) & 15;
            q.iter_mut().enumerate().for_each(|(i, q)| *q = of(2 * i) | of(2 * i + 1) << 4);
            sixes(b, g)
        })),
        Format::Q5K => Some(groups(data, 176, 8, 8, |b, g, q| {
            let high = 4 * (g % 2);
            let of = |i: usize| (b[48 + g / 2 * 32 + i] >> high) & 15 | ((b[16 + i] >> g) & 1) << 4;
            q.iter_mut().enumerate().for_each(|(i, q)| *q = of(i));
            sixes(b, g)
        })),
        Format::Q6K => Some(sixteens(data, |b, i, q| {
            let (upper, part, side) = (i / 8, i % 8 / 2, i % 2);
            for (k, q) in q.iter_mut().enumerate() {
                let (low, high) = (b[upper * 64 + part % 2 * 32 + side * 16 + k], b[128 + upper * 32 + side * 16 + k]);
                *q = (low >> (part / 2 * 4)) & 15 | ((high >> (2 * part)) & 3) << 4;
            }
            half(b, 208) * f32::from(b[192 + i] as i8)
        })),
        Format::Nvfp4 | Format::Nvfp4Scaled if matrix.cols().is_multiple_of(16) => {
            let each = matrix.cols() / 16;
            let factor = |row: usize| match matrix.format() {
                Format::Nvfp4Scaled => Float::F32.read(biases.get(4 * row..).unwrap_or_default()),
                _ => 1.0,
            };
            // As the kernels take them: an E2M1 number is found 2^126 too small, of which they leave 2^16.
            let more = f32::from_bits((127 + 110) << 23);
            let mut narrow = Vec::with_capacity(2 * scales.len());
            for (i, &scale) in scales.iter().enumerate() {
                Float::BF16.write(e4m3_to_f32(scale) * factor(i / each) * more, &mut narrow);
            }
            Some(Regrouped { scales: narrow.into(), ..as_it_is(Packing::Nv4, 128, false, 4) })
        }
        _ => None,
    }
}

/// Super-blocks of Q6_K -> a byte a weight, and a bf16 scale for each 16.
fn sixteens(from: &[u8], split: impl Fn(&[u8], usize, &mut [u8]) -> f32 + Sync) -> Regrouped<'static> {
    let count = from.len() / 210 * 16;
    let (mut data, mut scales) = (vec![0; count * 16], vec![0; count * 2]);
    let into = data.par_chunks_exact_mut(16).zip(scales.par_chunks_exact_mut(2)).enumerate();
    into.for_each(|(i, (q, scale))| {
        let d = split(&from[i / 16 * 210..][..210], i % 16, q);
        scale.copy_from_slice(&bf16::from_f32(d).to_le_bytes());
    });
    let layout = Layout { packing: Packing::Six, group: 128, half: false };
    Regrouped { layout, bits: 8, data: data.into(), scales: scales.into(), biases: Cow::Borrowed(&[]) }
}

/// Scales in f32, one for each `block` columns of a row -> one for each 128, each as a bf16 and what that leaves of it.
fn in_two(scales: &[u8], cols: usize, block: usize) -> [Vec<u8>; 2] {
    let mut two = [Vec::new(), Vec::new()];
    for row in scales.chunks(4 * cols.div_ceil(block.max(1)).max(1)) {
        for at in (0..cols).step_by(128) {
            let scale = Float::F32.read(row.get(at / block * 4..).unwrap_or_default());
            let high = Float::BF16.round(scale);
            Float::BF16.write(high, &mut two[0]);
            Float::BF16.write(scale - high, &mut two[1]);
        }
    }
    two
}

/// Scale and bias of group g of a super-block: six bits of each beside the block's own two.
fn sixes(block: &[u8], g: usize) -> (f32, f32) {
    let (scale, min) = scale_and_min(&block[4..16], g);
    (half(block, 0) * f32::from(scale), -half(block, 2) * f32::from(min))
}

fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Sixteen bytes with weights i and i + 16 in one -> weights 2 i and 2 i + 1 in one.
fn nibbles(from: &[u8]) -> [u8; 16] {
    std::array::from_fn(|i| match i {
        ..8 => (from[2 * i] & 15) | (from[2 * i + 1] << 4),
        _ => (from[2 * i - 16] >> 4) | (from[2 * i - 15] & 0xF0),
    })
}

/// The same with a fifth bit for each weight, a byte a weight.
fn fives(high: &[u8], low: &[u8], to: &mut [u8]) {
    for (i, to) in to.iter_mut().enumerate() {
        let nibble = if i < 16 { low[i] & 15 } else { low[i - 16] >> 4 };
        *to = nibble | ((high[i / 8] >> (i % 8)) & 1) << 4;
    }
}

/// Blocks of 32 weights in `size` bytes, each split into its weights, `bits` wide, and its scale and bias.
fn blocks(
    from: &[u8],
    size: usize,
    bits: usize,
    split: impl Fn(&[u8], &mut [u8]) -> (f32, f32) + Sync,
) -> Regrouped<'static> {
    groups(from, size, 1, bits, |block, _, q| split(block, q))
}

/// The same of blocks that hold several groups of 32.
fn groups(
    from: &[u8],
    size: usize,
    each: usize,
    bits: usize,
    split: impl Fn(&[u8], usize, &mut [u8]) -> (f32, f32) + Sync,
) -> Regrouped<'static> {
    let count = from.len() / size * each;
    let (mut data, mut scales, mut biases) = (vec![0; count * 4 * bits], vec![0; count * 2], vec![0; count * 2]);
    let into =
        data.par_chunks_exact_mut(4 * bits).zip(scales.par_chunks_exact_mut(2)).zip(biases.par_chunks_exact_mut(2));
    into.enumerate().for_each(|(i, ((q, scale), bias))| {
        let (d, m) = split(&from[i / each * size..][..size], i % each, q);
        scale.copy_from_slice(&f16::from_f32(d).to_le_bytes());
        bias.copy_from_slice(&f16::from_f32(m).to_le_bytes());
    });
    let packing = if bits == 4 { Packing::Nibble } else { Packing::Byte };
    Regrouped {
        layout: Layout { packing, group: 32, half: true },
        bits,
        data: data.into(),
        scales: scales.into(),
        biases: biases.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_with_a_scale_for_sixteen_are_the_same_after_they_are_taken_apart() {
        let (rows, cols) = (3, 512);
        let numbers: Vec<f32> = (0..rows * cols).map(|i| ((i * 37 % 101) as f32 - 50.0) / 30.0).collect();
        let blocks = (0..rows * cols / 256 * 210).map(|i| if i % 210 == 209 { 0x2C } else { (i * 89 + i / 7) as u8 });
        let six = Matrix::new(Format::Q6K, rows, cols, blocks.collect::<Vec<u8>>().into(), None, None).unwrap();
        let small = [Format::Nvfp4, Format::Nvfp4Scaled].map(|f| Matrix::quantize(&numbers, rows, cols, f).unwrap());
        for matrix in small.iter().chain([&six]) {
            let (mut expected, format) = (vec![0.0; rows * cols], matrix.format());
            matrix.dequantize_rows(0..rows, &mut expected);
            let r = regrouped(matrix).unwrap();
            for (i, expected) in expected.into_iter().enumerate() {
                let scale = Float::BF16.read(&r.scales[i / 16 * 2..]);
                let number = match format {
                    Format::Q6K => (f32::from(r.data[i]) - 32.0) * scale,
                    _ => {
                        let nibble = (r.data[i / 2] >> (4 * (i % 2))) & 15;
                        let size = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][usize::from(nibble & 7)];
                        let sign = if nibble > 7 { -1.0 } else { 1.0 };
                        sign * size * scale * f32::from_bits((127 - 110) << 23)
                    }
                };
                assert!((number - expected).abs() <= 4e-3 * expected.abs(), "{format:?} {i}: {number}, {expected}");
            }
        }
    }

    #[test]
    fn blocks_of_gguf_hold_the_same_numbers_after_they_are_taken_apart() {
        let (rows, cols) = (3, 768);
        for format in [Format::Q4_0, Format::Q4_1, Format::Q5_0, Format::Q5_1, Format::Q8_0, Format::Q4K, Format::Q5K] {
            let (weights, size) = format.block();
            let mut bytes: Vec<u8> = (0..rows * cols / weights * size).map(|i| (i * 89 + i / 7) as u8).collect();
            // Scale and minimum: numbers of some tenths.
            bytes.chunks_mut(size).for_each(|block| (block[1], block[3]) = (0x2E, block[3] & 0x83 | 0x2C));
            let matrix = Matrix::new(format, rows, cols, bytes.into(), None, None).unwrap();
            let mut expected = vec![0.0; rows * cols];
            matrix.dequantize_rows(0..rows, &mut expected);
            let r = regrouped(&matrix).unwrap();
            for (i, expected) in expected.into_iter().enumerate() {
                let q = if r.bits == 4 { (r.data[i / 2] >> (4 * (i % 2))) & 15 } else { r.data[i] };
                let (scale, bias) = (half(&r.scales, i / 32 * 2), half(&r.biases, i / 32 * 2));
                let error = (f32::from(q) * scale + bias - expected).abs();
                // Scales of super-blocks are products, which f16 rounds.
                let size = (f32::from(q) * scale).abs().max(bias.abs());
                assert!(
                    error < 2e-3 * expected.abs() + 1e-3 * size + 1e-4,
                    "{format:?} {i}: {q} * {scale} + {bias}, {expected}"
                );
            }
        }
    }
}
