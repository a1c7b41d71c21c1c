//! compressed-tensors' integers. Packed: `X.weight_packed` i32, each row a bit stream of numbers that 2^(bits - 1) was added to, with
//! `weight_shape`; or plain: `X.weight` i8. Beside either lie `weight_scale` `[outputs, groups]` (one group: a scale a row) and, if
//! the code is not symmetric, `weight_zero_point`. Packed numbers are ours already; of plain ones the sign bit is turned.

use super::{
    Beside, Form, Named, flat,
    integers::{Integers, Numbers, turned, unpack},
};
use crate::{
    config::Scheme,
    error::Result,
    kernels::cpu::Matrix,
    weights::{Dtype, bytes},
};

/// In words.
pub struct Packed;
/// A byte each.
pub struct Bytes;

struct Layout {
    outputs: usize,
    inputs: usize,
    bits: u32,
}

/// `[rows, groups]` from one scale, one a row, or one a group.
fn scales(w: &Named, rows: usize, cols: usize) -> Result<(Vec<f32>, usize)> {
    let scale = w.need("_scale")?;
    let values = scale.floats()?;
    match (values.len(), scale.stored.shape.as_slice()) {
        (1, _) => Ok((vec![values[0]; rows], 1)),
        (n, _) if n == rows => Ok((values, 1)),
        (_, [.., groups]) if *groups > 0 && rows * groups == values.len() && cols.is_multiple_of(*groups) => {
            Ok((values, *groups))
        }
        (_, shape) => Err(scale.wrong(format!("{shape:?} does not divide a weight of [{rows}, {cols}]"))),
    }
}

/// Zero points as they are meant for numbers that `offset` was added to: one, or `[rows, groups]`.
fn zeros(w: &Named, rows: usize, groups: usize, bits: u32) -> Result<Vec<f32>> {
    let offset = (1u32 << (bits - 1)) as f32;
    let Some(zero) = w.get("_zero_point") else { return Ok(vec![offset]) };
    let data = zero.stored.bytes();
    match zero.stored.dtype {
        // Packed down the columns, the same offset added.
        Dtype::I32 if rows > 0 && groups > 0 => {
            zero.has_shape(&[(rows * bits as usize).div_ceil(32), groups])?;
            let streams = turned(data.as_chunks::<4>().0, groups).into_flattened();
            let mut numbers = vec![0; rows * groups];
            for (stream, numbers) in streams.chunks(streams.len() / groups).zip(numbers.chunks_mut(rows)) {
                unpack(stream, bits, numbers);
            }
            Ok(turned(&numbers, rows).into_iter().map(f32::from).collect())
        }
        Dtype::I8 if zero.stored.elements() == rows * groups => {
            Ok(data.iter().map(|&b| f32::from(b as i8) + offset).collect())
        }
        Dtype::I8 if data.len() == 1 => Ok(vec![f32::from(data[0] as i8) + offset]),
        other => {
            Err(zero.wrong(format!("{other} {:?} does not fit {rows} rows of {groups} groups", zero.stored.shape)))
        }
    }
}

/// The group of each column; -1 for all of them stands for "in order".
fn group_of(w: &Named) -> Result<Option<Vec<usize>>> {
    let Some(index) = w.get("_g_idx") else { return Ok(None) };
    if index.stored.bytes().iter().all(|&b| b == 0xff) { Ok(None) } else { index.whole_numbers().map(Some) }
}

impl Packed {
    fn layout(w: &Named) -> Result<Layout> {
        let (packed, shape) = (w.need("_packed")?, w.need("_shape")?);
        packed.is(&[Dtype::I32])?;
        let &[rows, words] = &packed.stored.shape[..] else {
            return Err(packed.wrong(format!("{:?}: packed weights have two axes", packed.stored.shape)));
        };
        let declared = match (shape.stored.is_here(), w.scheme()) {
            // From headers alone: no row ends within a word, which holds for every width that is a multiple of 32.
            (false, Some(&Scheme::CompressedTensors { bits, .. })) => {
                vec![rows, words.saturating_mul(32).checked_div(bits as usize).unwrap_or(0)]
            }
            _ => shape.whole_numbers()?,
        };
        let &[outputs, inputs] = &declared[..] else {
            return Err(shape.wrong(format!("{declared:?}: packed weights have two axes")));
        };
        // So many bits that the words are full; rows end with a whole word.
        let bits = words.saturating_mul(32).checked_div(inputs).unwrap_or(0).min(9);
        let sound = (1..=8).contains(&bits) && inputs.checked_mul(bits).map(|n| n.div_ceil(32)) == Some(words);
        if rows != outputs || !sound {
            return Err(
                packed.wrong(format!("[{rows}, {words}] words cannot be [{outputs}, {inputs}] numbers of 1 to 8 bits"))
            );
        }
        Ok(Layout { outputs, inputs, bits: bits as u32 })
    }
}

impl Form for Packed {
    fn tensors(&self) -> &'static [&'static str] {
        &["_packed", "_scale", "_zero_point", "_shape", "_g_idx", ".input_scale", ".input_zero_point", ".output_scale"]
    }

    fn shape(&self, w: &Named) -> Result<Vec<usize>> {
        let l = Self::layout(w)?;
        w.need("_scale")?;
        Ok(vec![l.outputs, l.inputs])
    }

    fn matrix(&self, w: &Named) -> Result<Matrix> {
        let l = Self::layout(w)?;
        let (scales, groups) = scales(w, l.outputs, l.inputs)?;
        Integers {
            rows: l.outputs,
            cols: l.inputs,
            bits: l.bits,
            numbers: Numbers::Packed(w.need("_packed")?.stored.bytes()),
            scales,
            float: w.need("_scale")?.float()?,
            zeros: zeros(w, l.outputs, groups, l.bits)?,
            group_of: group_of(w)?,
        }
        .matrix()
    }
}

impl Form for Bytes {
    fn tensors(&self) -> &'static [&'static str] {
        &["", "_scale", "_zero_point", "_g_idx", ".input_scale", ".input_zero_point", ".output_scale"]
    }

    fn shape(&self, w: &Named) -> Result<Vec<usize>> {
        Ok(w.need("")?.stored.shape.clone())
    }

    fn matrix(&self, w: &Named) -> Result<Matrix> {
        let weight: Beside = w.need("")?;
        let (rows, cols) = flat(&weight.stored.shape).ok_or_else(|| weight.wrong("a weight without columns"))?;
        let data: bytes::Bytes = weight.stored.bytes();
        let row = |r: usize, numbers: &mut [u8]| {
            numbers.iter_mut().zip(&data[r * cols..(r + 1) * cols]).for_each(|(q, b)| *q = b ^ 0x80);
        };
        let (scales, groups) = scales(w, rows, cols)?;
        Integers {
            rows,
            cols,
            bits: 8,
            numbers: Numbers::Row(&row),
            scales,
            float: w.need("_scale")?.float()?,
            zeros: zeros(w, rows, groups, 8)?,
            group_of: group_of(w)?,
        }
        .matrix()
    }
}
