//! AutoAWQ's layout: `qweight` i32 `[inputs, outputs / 8]`, `qzeros` i32 `[groups, outputs / 8]` and `scales` `[groups, outputs]`,
//! w = (q - zero) * scale. A word has eight outputs of one input, in an order that suits NVIDIA's registers; it is turned around once,
//! when the weight is loaded. <https://arxiv.org/abs/2306.00978>

use super::{
    Form, Named,
    integers::{Integers, Numbers, turned},
};
use crate::{error::Result, kernels::cpu::Matrix, weights::Dtype};

pub struct Awq;

/// Which nibble of a word has output j of its eight.
const NIBBLE: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

impl Form for Awq {
    fn tensors(&self) -> &'static [&'static str] {
        &[".qweight", ".qzeros", ".scales"]
    }

    fn shape(&self, w: &Named) -> Result<Vec<usize>> {
        let (weight, scales) = (w.need(".qweight")?, w.need(".scales")?);
        weight.is(&[Dtype::I32])?;
        let (&[inputs, words], &[groups, outputs]) = (&weight.stored.shape[..], &scales.stored.shape[..]) else {
            return Err(weight.wrong(format!(
                "{:?} with scales {:?}: both must have two axes",
                weight.stored.shape, scales.stored.shape
            )));
        };
        if words.checked_mul(8) != Some(outputs) || groups == 0 || inputs == 0 || !inputs.is_multiple_of(groups) {
            return Err(weight.wrong(format!(
                "[{inputs}, {words}] with scales [{groups}, {outputs}] is not AutoAWQ's \"gemm\" layout with 4 bits"
            )));
        }
        if let Some(zeros) = w.get(".qzeros") {
            zeros.is(&[Dtype::I32])?;
            zeros.has_shape(&[groups, words])?;
        }
        Ok(vec![outputs, inputs])
    }

    fn matrix(&self, w: &Named) -> Result<Matrix> {
        let shape = self.shape(w)?;
        let (outputs, inputs) = (shape[0], shape[1]);
        let (weight, scales) = (w.need(".qweight")?.stored.bytes(), w.need(".scales")?);
        let nibble = |words: &[u8], line: usize, output: usize| {
            let at = NIBBLE[output % 8];
            words[(line * (outputs / 8) + output / 8) * 4 + at / 2] >> (at % 2 * 4) & 15
        };
        let row = |output: usize, numbers: &mut [u8]| {
            numbers.iter_mut().enumerate().for_each(|(input, q)| *q = nibble(&weight, input, output));
        };
        let groups = scales.stored.shape[0];
        let zeros = match w.get(".qzeros") {
            Some(zeros) => {
                let zeros = zeros.stored.bytes();
                let of = |output| (0..groups).map(move |group| (group, output));
                (0..outputs).flat_map(of).map(|(group, output)| f32::from(nibble(&zeros, group, output))).collect()
            }
            None => vec![8.0],
        };
        Integers {
            rows: outputs,
            cols: inputs,
            bits: 4,
            numbers: Numbers::Row(&row),
            scales: turned(&scales.floats()?, outputs),
            float: scales.float()?,
            zeros,
            group_of: None,
        }
        .matrix()
    }
}
