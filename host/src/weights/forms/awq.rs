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

/// One output's numbers, down the lines of `outputs` each.
fn of_output(words: &[u8], outputs: usize, output: usize) -> impl Iterator<Item = u8> + '_ {
    let nibble = NIBBLE[output % 8];
    let first = output / 8 * 4 + nibble / 2;
    words[first..].iter().step_by(outputs / 2).map(move |byte| byte >> (nibble % 2 * 4) & 15)
}

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
        let row = |output: usize, numbers: &mut [u8]| {
            numbers.iter_mut().zip(of_output(&weight, outputs, output)).for_each(|(to, q)| *to = q);
        };
        let zeros = match w.get(".qzeros") {
            Some(zeros) => {
                let zeros = zeros.stored.bytes();
                (0..outputs).flat_map(|output| of_output(&zeros, outputs, output)).map(f32::from).collect()
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
