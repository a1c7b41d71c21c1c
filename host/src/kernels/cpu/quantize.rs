//! f32 to packed, with mlx's exact formulas (mlx.core.quantize), so that a converted model equals one that mlx converted.
//! Affine: the extreme of larger magnitude becomes exact. The mx formats: scales are rounded up to a power of two, so that
//! nothing saturates (the OCP paper rounds down; mlx before 0.32 rounded to nearest).

use super::{
    dequantize::{e4m3_to_f32, e8m0_to_f32},
    format::{Float, Format},
    matrix::Matrix,
};
use crate::{
    error::{Error, Result},
    weights::bytes::Bytes,
};
use rayon::prelude::*;

/// Packed weights, scales and biases of one row.
type Row = [Vec<u8>; 3];

impl Matrix {
    /// Packs `w`, `[rows, cols]`, as dense, affine, mxfp4, mxfp8, nvfp4 or fp8. Scales are computed in f32 and stored in the
    /// format's own type. Fails for GGUF's formats, and where the columns are not a multiple of the group.
    pub fn quantize(w: &[f32], rows: usize, cols: usize, format: Format) -> Result<Self> {
        let (group, _) = format.block();
        let sound =
            format.is_known() && cols > 0 && cols.is_multiple_of(group) && rows.checked_mul(cols) == Some(w.len());
        if !sound {
            return Err(Error::Weights(format!(
                "{} weights cannot become a [{rows}, {cols}] matrix in {format:?}: columns must be a multiple of {group}; leave it dense",
                w.len()
            )));
        }
        let pack: fn(&[f32], Format) -> Row = match format {
            Format::Dense(_) => dense,
            Format::Affine { .. } => affine,
            Format::Mxfp4 | Format::Mxfp8 | Format::Nvfp4 | Format::Nvfp4Scaled => small_floats,
            Format::Fp8 { .. } => blocks_of_bytes,
            _ => {
                return Err(Error::Usage(format!(
                    "{format:?} can be read but not made; choose affine, mxfp4, mxfp8 or nvfp4"
                )));
            }
        };
        let packed: Vec<Row> = w.par_chunks(cols).map(|row| pack(row, format)).collect();
        let part = |p: usize| Bytes::from(packed.iter().flat_map(|row| &row[p]).copied().collect::<Vec<u8>>());
        Matrix::new(format, rows, cols, part(0), Some(part(1)), Some(part(2)))
    }
}

fn dense(w: &[f32], format: Format) -> Row {
    let mut row = Row::default();
    if let Format::Dense(float) = format {
        w.iter().for_each(|&x| float.write(x, &mut row[0]));
    }
    row
}

/// Scale, bias and numbers of one affine group, still in f32.
pub(super) fn affine_group(w: &[f32], bits: u32, mut number: impl FnMut(u8)) -> (f32, f32) {
    let top = ((1u32 << bits) - 1) as f32;
    let low = w.iter().copied().fold(f32::INFINITY, f32::min);
    let high = w.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let step = ((high - low) / top).max(1e-7);
    let (edge, mut scale) = if low.abs() > high.abs() { (low, step) } else { (high, -step) };
    let zero = (edge / scale).round_ties_even();
    let mut bias = 0.0;
    if zero != 0.0 {
        scale = edge / zero;
        bias = edge;
    }
    for x in w {
        number(((x - bias) / scale).round_ties_even().clamp(0.0, top) as u8);
    }
    (scale, bias)
}

fn affine(w: &[f32], format: Format) -> Row {
    let mut row = Row::default();
    let Format::Affine { bits, group, scales: float } = format else { return row };
    for w in w.chunks_exact(group) {
        let (mut pending, mut held) = (0u32, 0);
        let (scale, bias) = affine_group(w, bits, |q| {
            pending |= u32::from(q) << held;
            held += bits;
            while held >= 8 {
                row[0].push(pending as u8);
                pending >>= 8;
                held -= 8;
            }
        });
        float.write(scale, &mut row[1]);
        float.write(bias, &mut row[2]);
    }
    row
}

/// The largest weight of a block becomes the largest number of the format.
fn blocks_of_bytes(w: &[f32], format: Format) -> Row {
    let mut row = Row::default();
    let Format::Fp8 { block } = format else { return row };
    for w in w.chunks(block) {
        let peak = w.iter().fold(0.0f32, |peak, x| peak.max(x.abs()));
        let scale = if peak > 0.0 { peak / 448.0 } else { 1.0 };
        row[0].extend(w.iter().map(|x| f32_to_e4m3(x / scale)));
        row[1].extend(scale.to_le_bytes());
    }
    row
}

fn small_floats(w: &[f32], format: Format) -> Row {
    let mut row = Row::default();
    let (group, bytes) = format.block();
    // The largest number of the format is what the largest weight of a group shall become.
    let largest = if format == Format::Mxfp8 { 448.0 } else { 6.0 };
    // NVIDIA's factor: the row's largest weight becomes 448 * 6.
    let factor = match format {
        Format::Nvfp4Scaled => w.iter().fold(f32::MIN_POSITIVE, |peak, x| peak.max(x.abs())) / (448.0 * 6.0),
        _ => 1.0,
    };
    if format == Format::Nvfp4Scaled {
        row[2].extend(factor.to_le_bytes());
    }
    for w in w.chunks_exact(group) {
        let peak = w.iter().fold(0.0f32, |peak, x| peak.max(x.abs())) / largest;
        let (byte, scale) = if matches!(format, Format::Nvfp4 | Format::Nvfp4Scaled) {
            let byte = f32_to_e4m3(peak / factor);
            (byte, e4m3_to_f32(byte) * factor)
        } else {
            let byte = if peak == 0.0 { 127 } else { f32_to_e8m0(peak) };
            (byte, e8m0_to_f32(byte))
        };
        row[1].push(byte);
        let number = |x: f32| if scale == 0.0 { 0.0 } else { x / scale };
        if bytes == group {
            row[0].extend(w.iter().map(|&x| f32_to_e4m3(number(x))));
        } else {
            row[0].extend(
                w.as_chunks::<2>().0.iter().map(|&[a, b]| f32_to_e2m1(number(a)) | f32_to_e2m1(number(b)) << 4),
            );
        }
    }
    row
}

/// The nearest four-bit float; halfway goes to the smaller one, as mlx.core.quantize does on a CPU; beyond 6 stays 6.
fn f32_to_e2m1(x: f32) -> u8 {
    let a = x.abs();
    // Thresholds between neighbours.
    let code = u8::from(a > 0.25)
        + u8::from(a > 0.75)
        + u8::from(a > 1.25)
        + u8::from(a > 1.75)
        + u8::from(a > 2.5)
        + u8::from(a > 3.5)
        + u8::from(a > 5.0);
    // A negative zero becomes a plain one.
    if code == 0 { 0 } else { code | u8::from(x < 0.0) << 3 }
}

/// The smallest power of two that is not less than x > 0.
fn f32_to_e8m0(x: f32) -> u8 {
    let bits = x.to_bits();
    ((bits >> 23) + u32::from(bits & 0x7f_ffff != 0)).min(254) as u8
}

/// The nearest eight-bit float with four exponent bits; halfway goes to the even code; beyond 448 stays 448.
pub(super) fn f32_to_e4m3(x: f32) -> u8 {
    let a = x.abs();
    let code = if a < 0.015_625 {
        // Subnormal: a whole number of 2^-9.
        (a * 512.0).round_ties_even() as u8
    } else {
        let bits = a.min(448.0).to_bits();
        let even = bits + 0x7_ffff + (bits >> 20 & 1);
        ((even >> 20) - (120 << 3)) as u8
    };
    code | u8::from(x.is_sign_negative()) << 7
}

/// Key and value rows are quantized like weights: groups of `group` numbers along each row. Data, scales and biases are
/// appended; rows must be a multiple of `group` long.
pub fn quantize_rows(
    x: &[f32],
    bits: u32,
    group: usize,
    data: &mut Vec<u8>,
    scales: &mut Vec<f32>,
    biases: &mut Vec<f32>,
) {
    for w in x.chunks_exact(group) {
        let [packed, scale, bias] = affine(w, Format::Affine { bits, group, scales: Float::F32 });
        data.extend(packed);
        scales.push(Float::F32.read(&scale));
        biases.push(Float::F32.read(&bias));
    }
}
