//! AutoGPTQ's layout: `qweight` i32 `[inputs * bits / 32, outputs]`, each output's numbers a bit stream down its column, `qzeros` i32
//! `[groups, outputs * bits / 32]` a stream along each row, `scales` `[groups, outputs]`, and `g_idx` `[inputs]` with the group of each
//! input, which is out of order where the tool sorted inputs by importance. <https://arxiv.org/abs/2210.17323>

use super::{
    Form, Named,
    integers::{Integers, Numbers, turned, unpack},
};
use crate::{config::Scheme, error::Result, kernels::cpu::Matrix, weights::Dtype};

pub struct Gptq;

struct Layout {
    inputs: usize,
    outputs: usize,
    bits: u32,
    groups: usize,
    zeros_less_one: bool,
}

impl Gptq {
    fn layout(w: &Named) -> Result<Layout> {
        let (weight, scales, zeros) = (w.need(".qweight")?, w.need(".scales")?, w.need(".qzeros")?);
        let Some(&Scheme::Gptq { bits, zeros_less_one }) = w.scheme() else {
            return Err(weight.wrong(
                "config.json does not say who packed it: a quantization_config with quant_method \"awq\" or \"gptq\" belongs there",
            ));
        };
        weight.is(&[Dtype::I32])?;
        zeros.is(&[Dtype::I32])?;
        let (&[words, outputs], &[groups, _]) = (&weight.stored.shape[..], &scales.stored.shape[..]) else {
            return Err(weight.wrong(format!(
                "{:?} with scales {:?}: both must have two axes",
                weight.stored.shape, scales.stored.shape
            )));
        };
        scales.has_shape(&[groups, outputs])?;
        let stream = words.saturating_mul(32);
        // Single layers may have other bits than the model; then the number of inputs tells.
        let (inputs, bits) = match w.get(".g_idx").map(|g| g.stored.elements()).filter(|&n| n > 0) {
            Some(inputs) => (inputs, stream / inputs),
            None => (stream / bits as usize, bits as usize),
        };
        let sound = matches!(bits, 2 | 3 | 4 | 8) && inputs.checked_mul(bits) == Some(stream);
        if !sound || inputs == 0 || outputs == 0 || groups == 0 || !inputs.is_multiple_of(groups) {
            return Err(weight.wrong(format!(
                "[{words}, {outputs}] with {groups} groups for {inputs} inputs is not GPTQ with 2, 3, 4 or 8 bits"
            )));
        }
        zeros.has_shape(&[groups, outputs.saturating_mul(bits).div_ceil(32)])?;
        Ok(Layout { inputs, outputs, bits: bits as u32, groups, zeros_less_one })
    }

    /// `[outputs, groups]`
    fn zeros(w: &Named, l: &Layout) -> Result<Vec<f32>> {
        let mut words = w.need(".qzeros")?.stored.bytes().to_vec();
        let whole = 32u32.is_multiple_of(l.bits);
        if l.zeros_less_one && whole {
            // As GPTQModel takes it back: one added in every field of a word at once, carries included, as they were borrowed.
            let ones = u32::MAX / ((1 << l.bits) - 1);
            words
                .as_chunks_mut()
                .0
                .iter_mut()
                .for_each(|w| *w = u32::from_le_bytes(*w).wrapping_add(ones).to_le_bytes());
        }
        let mut zeros = vec![0; l.groups * l.outputs];
        for (row, zeros) in words.chunks(words.len() / l.groups).zip(zeros.chunks_mut(l.outputs.max(1))) {
            unpack(row, l.bits, zeros);
        }
        if l.zeros_less_one && !whole {
            zeros.iter_mut().for_each(|zero| *zero = (*zero + 1) % (1 << l.bits));
        }
        Ok(turned(&zeros, l.outputs).into_iter().map(f32::from).collect())
    }
}

impl Form for Gptq {
    fn tensors(&self) -> &'static [&'static str] {
        &[".qweight", ".qzeros", ".scales", ".g_idx"]
    }

    fn shape(&self, w: &Named) -> Result<Vec<usize>> {
        Self::layout(w).map(|l| vec![l.outputs, l.inputs])
    }

    fn matrix(&self, w: &Named) -> Result<Matrix> {
        let l = Self::layout(w)?;
        let (weight, scales) = (w.need(".qweight")?.stored.bytes(), w.need(".scales")?);
        // Turned around, each column's stream is a row of ours.
        let words = turned(weight.as_chunks::<4>().0, l.outputs);
        Integers {
            rows: l.outputs,
            cols: l.inputs,
            bits: l.bits,
            numbers: Numbers::Packed(words.into_flattened().into()),
            scales: turned(&scales.floats()?, l.outputs),
            float: scales.float()?,
            zeros: Self::zeros(w, &l)?,
            group_of: w.get(".g_idx").filter(|g| !g.stored.is_empty()).map(|g| g.whole_numbers()).transpose()?,
        }
        .matrix()
    }
}
