//! Stored tensors -> the weights that plugins name. A plugin asks for `X.weight`; whether the files have that, or `X.qweight` with
//! scales and zero points beside it, is settled here, by names and types of what is there. config.json is asked only where those leave
//! something open. Each form says which tensors it takes, so that none of them counts as unused.

mod awq;
mod bitnet;
mod fp4;
mod fp8;
mod gptq;
mod integers;
mod mlx;
mod packed;
mod plain;

pub use bitnet::ternary;
pub use plain::{float, format_of};

use super::{Checkpoint, Dtype, Stored};
use crate::{
    config::{Quantization, Scheme},
    error::{Error, Result},
    kernels::cpu::{Float, Matrix, e8m0_to_f32},
};

/// A way to store one weight.
pub trait Form: Sync {
    /// The tensors that may belong to it, the one with the numbers first: `_x` comes after the weight's whole name, `.x` after its
    /// module's path.
    fn tensors(&self) -> &'static [&'static str];
    /// The weight's own shape. Fails where tensors are missing or do not fit each other; reads no data.
    fn shape(&self, weight: &Named) -> Result<Vec<usize>>;
    /// All axes but the last are its rows.
    fn matrix(&self, weight: &Named) -> Result<Matrix>;
    /// What its numbers are kept in where a transform unpacks them.
    fn float(&self, _: &Named) -> Float {
        Float::F32
    }
}

/// A weight by its name.
#[derive(Clone, Copy)]
pub struct Named<'a> {
    /// `model.layers.0.mlp.up_proj.weight`
    pub name: &'a str,
    /// The files' tensors.
    pub checkpoint: &'a Checkpoint,
    /// What config.json says of packing.
    pub quantization: Option<&'a Quantization>,
}

/// A tensor beside the weight, its name for messages.
struct Beside<'a> {
    name: String,
    stored: &'a Stored,
}

impl<'a> Named<'a> {
    /// The module that the weight belongs to.
    fn path(&self) -> &'a str {
        self.name.strip_suffix(".weight").unwrap_or(self.name)
    }

    fn name_of(&self, part: &str) -> String {
        format!("{}{part}", if part.starts_with('.') { self.path() } else { self.name })
    }

    fn get(&self, part: &str) -> Option<Beside<'a>> {
        let name = self.name_of(part);
        let stored = self.checkpoint.get(&name)?;
        Some(Beside { name, stored })
    }

    fn need(&self, part: &str) -> Result<Beside<'a>> {
        self.get(part).ok_or_else(|| {
            Error::Weights(format!("{}: {} is not in the checkpoint: download it again", self.name, self.name_of(part)))
        })
    }

    fn scheme(&self) -> Option<&'a Scheme> {
        match self.quantization {
            Some(Quantization::Other(scheme)) => Some(scheme),
            _ => None,
        }
    }

    fn wrong(&self, what: impl std::fmt::Display) -> Error {
        Error::Weights(format!("{}: {what}", self.name))
    }

    /// How the weight is stored; `None` where it is not.
    pub fn form(&self) -> Option<&'static dyn Form> {
        let has = |part: &str| self.checkpoint.get(&self.name_of(part)).is_some();
        let Some(stored) = self.checkpoint.get(self.name) else {
            // Of a weight in parts, none has its name.
            return match self.get("_packed").map(|packed| packed.stored.dtype) {
                Some(Dtype::U8) => Some(&fp4::PACKED),
                Some(_) => Some(&packed::Packed),
                None if has(".qweight") => Some(match self.scheme() {
                    Some(Scheme::Awq) => &awq::Awq,
                    _ => &gptq::Gptq,
                }),
                None if has("_blocks") => Some(&fp4::BLOCKS),
                None => None,
            };
        };
        Some(match stored.dtype {
            _ if has(".scales") => &mlx::Mlx,
            Dtype::F8E4M3 => &fp8::Fp8,
            Dtype::U8 if has("_scale_2") => &fp4::MODELOPT,
            Dtype::U8 if has("_scale") => &bitnet::Ternary,
            Dtype::I8 if has("_scale") => &packed::Bytes,
            Dtype::I8 | Dtype::U8 if has(".scale") => &fp4::DEEPSEEK,
            _ => &plain::Plain,
        })
    }

    /// The numbers of a table of ids; `None` where it is no plain tensor of whole numbers.
    pub fn ids(&self) -> Result<Option<Vec<u32>>> {
        let Some(found) = self.get("").filter(|_| self.parts().len() == 1) else { return Ok(None) };
        let numbers = match found.stored.dtype {
            Dtype::U8 => found.stored.bytes().iter().map(|&b| usize::from(b)).collect(),
            Dtype::I32 | Dtype::I64 => found.whole_numbers()?,
            _ => return Ok(None),
        };
        let narrow = |n| u32::try_from(n).map_err(|_| found.wrong(format!("{n} is not a number that belongs there")));
        numbers.into_iter().map(narrow).collect::<Result<_>>().map(Some)
    }

    /// Whether BitNet's codes are stored, as opposed to the weights that they are made from.
    pub fn is_ternary(&self) -> bool {
        let codes = self.checkpoint.get(self.name).is_some_and(|stored| stored.dtype == Dtype::U8);
        codes && matches!(self.scheme(), Some(Scheme::Bitnet(_)))
    }

    /// The stored tensors that make it up.
    pub fn parts(&self) -> Vec<String> {
        let parts = self.form().map_or(&[""][..], |form| form.tensors());
        parts.iter().map(|part| self.name_of(part)).filter(|name| self.checkpoint.get(name).is_some()).collect()
    }

    /// The same as a matrix, its sentences with the weight's name before them.
    pub fn matrix(&self, form: &dyn Form) -> Result<Matrix> {
        form.matrix(self).map_err(|e| match e {
            Error::Weights(what) if !what.starts_with(self.path()) => self.wrong(what),
            other => other,
        })
    }
}

impl Beside<'_> {
    fn wrong(&self, what: impl std::fmt::Display) -> Error {
        Error::Weights(format!("{}: {what}", self.name))
    }

    fn is(&self, dtypes: &[Dtype]) -> Result<()> {
        if dtypes.contains(&self.stored.dtype) {
            return Ok(());
        }
        let names: Vec<_> = dtypes.iter().map(|d| d.name()).collect();
        Err(self.wrong(format!("{} where {} belongs", self.stored.dtype, names.join(" or "))))
    }

    fn has_shape(&self, shape: &[usize]) -> Result<()> {
        if self.stored.shape == shape {
            return Ok(());
        }
        Err(self.wrong(format!("has {:?} where {shape:?} belongs to a weight of this size", self.stored.shape)))
    }

    /// Scales, widened: floats, or powers of two by their exponents.
    fn floats(&self) -> Result<Vec<f32>> {
        let bytes = self.stored.bytes();
        if matches!(self.stored.dtype, Dtype::F8E8M0 | Dtype::U8) {
            return Ok(bytes.iter().map(|&b| e8m0_to_f32(b)).collect());
        }
        let float = self.float()?;
        Ok(bytes.chunks_exact(float.size()).map(|b| float.read(b)).collect())
    }

    fn float(&self) -> Result<Float> {
        float(self.stored.dtype).ok_or_else(|| self.wrong(format!("{} is not a type for scales", self.stored.dtype)))
    }

    /// Whole numbers that are not negative.
    fn whole_numbers(&self) -> Result<Vec<usize>> {
        self.is(&[Dtype::I32, Dtype::I64])?;
        let wide = self.stored.dtype == Dtype::I64;
        let read = |b: &[u8]| match b {
            &[a, b, c, d] => i64::from(i32::from_le_bytes([a, b, c, d])),
            b => b.first_chunk().map_or(-1, |&b| i64::from_le_bytes(b)),
        };
        let bytes = self.stored.bytes();
        let numbers = bytes.chunks_exact(if wide { 8 } else { 4 }).map(read);
        numbers
            .map(|n| usize::try_from(n).map_err(|_| self.wrong(format!("{n} is not a number that belongs there"))))
            .collect()
    }
}

/// Rows and columns of a shape; fails where there is no column, or rows overflow.
fn flat(shape: &[usize]) -> Option<(usize, usize)> {
    let (&cols, leading) = shape.split_last()?;
    let rows = leading.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
    (cols > 0).then_some((rows, cols))
}
