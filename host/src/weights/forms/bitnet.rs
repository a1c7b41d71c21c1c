//! BitNet's ternary weights: `X.weight` u8 `[outputs / 4, inputs]`, two bits a weight, where bits 2i of row r hold row r + i * outputs / 4
//! as 0, 1, 2 for -1, 0, 1, and `X.weight_scale` for the whole matrix. They become our two-bit affine codes. Models that were stored as
//! trained ("online") get the same codes from their full weights. <https://arxiv.org/abs/2402.17764>

use super::{
    Form, Named,
    integers::{Integers, Numbers},
};
use crate::{
    config::{Bitnet, Scheme},
    error::{Error, Result},
    kernels::cpu::{Float, Matrix},
};

pub struct Ternary;

impl Ternary {
    fn scheme<'a>(w: &Named<'a>) -> Result<&'a Bitnet> {
        match w.scheme() {
            Some(Scheme::Bitnet(bitnet)) => Ok(bitnet),
            _ => Err(w.wrong(
                "U8 with a scale is read of BitNet models only, and config.json's quantization_config names none",
            )),
        }
    }
}

impl Form for Ternary {
    fn tensors(&self) -> &'static [&'static str] {
        &["", "_scale"]
    }

    fn shape(&self, w: &Named) -> Result<Vec<usize>> {
        Self::scheme(w)?;
        let (weight, scale) = (w.need("")?, w.need("_scale")?);
        if scale.stored.elements() != 1 {
            return Err(scale.wrong(format!("{:?} where one scale belongs", scale.stored.shape)));
        }
        match weight.stored.shape[..] {
            [rows, cols] if cols > 0 && rows.checked_mul(4).is_some() => Ok(vec![rows * 4, cols]),
            ref shape => Err(w.wrong(format!("{shape:?}: ternary weights have two axes"))),
        }
    }

    fn matrix(&self, w: &Named) -> Result<Matrix> {
        let shape = self.shape(w)?;
        let (rows, cols) = (shape[0], shape[1]);
        let (data, scale) = (w.need("")?.stored.bytes(), w.need("_scale")?);
        let quarter = rows / 4;
        let row = |r: usize, numbers: &mut [u8]| {
            let packed = &data[r % quarter * cols..][..cols];
            numbers.iter_mut().zip(packed).for_each(|(q, b)| *q = b >> (2 * (r / quarter)) & 3);
        };
        let stored = scale.floats()?;
        let (one, float) = match (Self::scheme(w)?.divides, stored[0]) {
            (true, s) if s != 0.0 => (1.0 / s, Float::F32),
            (true, _) => return Err(scale.wrong("0 cannot divide weights")),
            (false, s) => (s, scale.float()?),
        };
        Integers {
            rows,
            cols,
            bits: 2,
            numbers: Numbers::Row(&row),
            scales: vec![one; rows],
            float,
            zeros: vec![1.0],
            group_of: None,
        }
        .matrix()
    }
}

/// Full weights as the model sees them: to the nearest of -1, 0 and 1 times the mean magnitude of the matrix.
pub fn ternary(full: &Matrix) -> Result<Matrix> {
    let (rows, cols) = (full.rows(), full.cols());
    let mut w = vec![0.0; rows * cols];
    full.dequantize_rows(0..rows, &mut w);
    let sum: f64 = w.iter().map(|w| f64::from(w.abs())).sum();
    let mean = ((sum / (w.len().max(1) as f64)) as f32).max(1e-5);
    if !mean.is_finite() {
        return Err(Error::Weights("weights that are not numbers cannot become ternary".into()));
    }
    let inverse = 1.0 / mean;
    let row = |r: usize, numbers: &mut [u8]| {
        let w = &w[r * cols..(r + 1) * cols];
        numbers
            .iter_mut()
            .zip(w)
            .for_each(|(q, w)| *q = ((w * inverse).round_ties_even().clamp(-1.0, 1.0) + 1.0) as u8);
    };
    Integers {
        rows,
        cols,
        bits: 2,
        numbers: Numbers::Row(&row),
        scales: vec![1.0 / inverse; rows],
        float: Float::F32,
        zeros: vec![1.0],
        group_of: None,
    }
    .matrix()
}
