//! MLX's triples: `X.weight` in words, `X.scales`, and for affine codes `X.biases`, as mlx.core.quantize lays them out. Modes are those
//! of config.json, which may have one for each layer.

use super::{Form, Named, flat};
use crate::{
    config::{Kind, Mode},
    error::{Error, Result},
    kernels::cpu::{Float, Format, Matrix},
};

pub struct Mlx;

impl Mlx {
    fn mode(w: &Named) -> Result<Mode> {
        let path = w.path();
        match w.quantization.and_then(|q| q.for_path(path)) {
            Some(Some(mode)) => Ok(mode),
            Some(None) => Err(w.wrong(format!("config.json says it is not quantized, but the file has {path}.scales"))),
            None => Err(w.wrong("has scales, but config.json has no \"quantization\" that says how to read them")),
        }
    }
}

impl Form for Mlx {
    fn tensors(&self) -> &'static [&'static str] {
        &["", ".scales", ".biases"]
    }

    /// Counts elements, not words.
    fn shape(&self, w: &Named) -> Result<Vec<usize>> {
        let (mode, stored) = (Self::mode(w)?, w.need("")?.stored);
        let mut shape = stored.shape.clone();
        if let Some(last) = shape.last_mut() {
            let word = stored.dtype.size_in_bytes(1).unwrap_or(4) * 8;
            *last = last
                .checked_mul(word)
                .ok_or_else(|| w.wrong(format!("{:?} is too large for a weight", stored.shape)))?
                / mode.bits as usize;
        }
        Ok(shape)
    }

    fn matrix(&self, w: &Named) -> Result<Matrix> {
        let (mode, shape) = (Self::mode(w)?, self.shape(w)?);
        let (rows, cols) = flat(&shape).ok_or_else(|| Error::Weights(format!("a weight of shape {shape:?}")))?;
        let scales = w.need(".scales")?;
        let format = match mode.kind {
            Kind::Affine => Format::Affine { bits: mode.bits, group: mode.group as usize, scales: scales.float()? },
            Kind::Mxfp4 => Format::Mxfp4,
            Kind::Mxfp8 => Format::Mxfp8,
            Kind::Nvfp4 => Format::Nvfp4,
        };
        let biases = match mode.kind {
            Kind::Affine => Some(w.need(".biases")?.stored.bytes()),
            _ => None,
        };
        Matrix::new(format, rows, cols, w.need("")?.stored.bytes(), Some(scales.stored.bytes()), biases)
    }

    fn float(&self, w: &Named) -> Float {
        w.get(".scales").and_then(|t| super::float(t.stored.dtype)).unwrap_or(Float::F32)
    }
}
