//! One tensor that is the weight. What kernels do not take as it is (F64, and FP8 in the five-bit exponent) is widened or narrowed to a
//! float type that they take; integers are no weights.

use super::{Form, Named, flat};
use crate::{
    error::{Error, Result},
    kernels::cpu::{Float, Format, Matrix},
    weights::Dtype,
};

pub struct Plain;

impl Form for Plain {
    fn tensors(&self) -> &'static [&'static str] {
        &[""]
    }

    fn shape(&self, w: &Named) -> Result<Vec<usize>> {
        Ok(w.need("")?.stored.shape.clone())
    }

    fn matrix(&self, w: &Named) -> Result<Matrix> {
        let stored = w.need("")?.stored;
        // A vector is one row, a number a vector of one.
        let shape = if stored.shape.is_empty() { vec![1] } else { stored.shape.clone() };
        let (rows, cols) = flat(&shape).unwrap_or((0, 0));
        if let Some(format) = format_of(stored.dtype) {
            return Matrix::new(format, rows, cols, stored.bytes(), None, None);
        }
        let bytes = stored.bytes();
        let (float, data) = match stored.dtype {
            Dtype::F64 => {
                let narrow = |b: &[u8; 8]| (f64::from_le_bytes(*b) as f32).to_le_bytes();
                (Float::F32, bytes.as_chunks().0.iter().flat_map(narrow).collect::<Vec<u8>>())
            }
            // The upper byte of a half.
            Dtype::F8E5M2 => (Float::F16, bytes.iter().flat_map(|&b| [0, b]).collect()),
            other => return Err(Error::Weights(format!("{other} is not a type that a layer can compute with"))),
        };
        Matrix::new(Format::Dense(float), rows, cols, data.into(), None, None)
    }

    fn float(&self, w: &Named) -> Float {
        w.get("").and_then(|t| float(t.stored.dtype)).unwrap_or(Float::F32)
    }
}

/// The float type of a plain tensor.
pub fn float(dtype: Dtype) -> Option<Float> {
    match dtype {
        Dtype::F32 => Some(Float::F32),
        Dtype::F16 => Some(Float::F16),
        Dtype::BF16 => Some(Float::BF16),
        _ => None,
    }
}

/// How a matrix of this type is laid out; `None` for types that kernels do not take.
pub fn format_of(dtype: Dtype) -> Option<Format> {
    Some(match dtype {
        Dtype::Q4_0 => Format::Q4_0,
        Dtype::Q4_1 => Format::Q4_1,
        Dtype::Q5_0 => Format::Q5_0,
        Dtype::Q5_1 => Format::Q5_1,
        Dtype::Q8_0 => Format::Q8_0,
        Dtype::Q2K => Format::Q2K,
        Dtype::Q3K => Format::Q3K,
        Dtype::Q4K => Format::Q4K,
        Dtype::Q5K => Format::Q5K,
        Dtype::Q6K => Format::Q6K,
        plain => Format::Dense(float(plain)?),
    })
}
