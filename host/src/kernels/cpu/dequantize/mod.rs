//! Packed rows back to f32, one weight after the other in plain code: what embeddings are read with, and what every fast
//! kernel is held against.

mod affine;
mod ggml;
mod mx;

use super::format::{Float, Format};
pub(crate) use ggml::scale_and_min;
pub(super) use ggml::six_bit_scale;
pub(super) use mx::E2M1;
pub(crate) use mx::e4m3_to_f32;
pub use mx::e8m0_to_f32;

/// Unpacks one row. The slices are the row's own, of exactly the sizes that `format` asks for `out.len()` columns.
pub(super) fn dequantize_row(format: Format, data: &[u8], scales: &[u8], biases: &[u8], out: &mut [f32]) {
    match format {
        Format::Dense(float) => {
            for (o, bytes) in out.iter_mut().zip(data.chunks_exact(float.size())) {
                *o = float.read(bytes);
            }
        }
        Format::Affine { bits, group, scales: float } => affine::row(bits, group, float, [data, scales, biases], out),
        Format::Mxfp4 => mx::nibbles(data, scales, 32, e8m0_to_f32, out),
        Format::Nvfp4 => mx::nibbles(data, scales, 16, e4m3_to_f32, out),
        Format::Nvfp4Scaled => {
            let factor = Float::F32.read(biases);
            mx::nibbles(data, scales, 16, |s| e4m3_to_f32(s) * factor, out);
        }
        Format::Mxfp8 => mx::bytes(data, 32, scales.iter().map(|&s| e8m0_to_f32(s)), out),
        Format::Fp8 { block } => {
            mx::bytes(data, block, scales.chunks_exact(4).map(|s| Float::F32.read(s)), out);
        }
        Format::Q4_0 => ggml::blocks(data, out, ggml::q4_0),
        Format::Q4_1 => ggml::blocks(data, out, ggml::q4_1),
        Format::Q5_0 => ggml::blocks(data, out, ggml::q5_0),
        Format::Q5_1 => ggml::blocks(data, out, ggml::q5_1),
        Format::Q8_0 => ggml::blocks(data, out, ggml::q8_0),
        Format::Q2K => ggml::blocks(data, out, ggml::q2_k),
        Format::Q3K => ggml::blocks(data, out, ggml::q3_k),
        Format::Q4K => ggml::blocks(data, out, ggml::q4_k),
        Format::Q5K => ggml::blocks(data, out, ggml::q5_k),
        Format::Q6K => ggml::blocks(data, out, ggml::q6_k),
    }
}
