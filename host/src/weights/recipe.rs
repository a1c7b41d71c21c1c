//! What a plugin named, made into numbers: a stored tensor with the transforms that the plugin asked for.
//!
//! Packed weights stay packed through everything that moves whole rows (see `rows`); any other transform unpacks them (see `floats`), since
//! a packed group cannot be cut.

use super::{
    checkpoint::Checkpoint,
    stored::{Dtype, Stored},
};
use crate::{
    config::{Kind, Mode, Quantization},
    error::{Error, Result},
    kernels::cpu::{Float, Format, Matrix},
};
use std::sync::Arc;

/// A stored tensor and what is to be done to it, outermost first.
#[derive(Clone, Debug)]
pub enum Recipe {
    /// The tensor of this full name.
    Stored(String),
    /// Numbers `[len]` that the plugin computed.
    Numbers(Arc<[f32]>),
    /// Entries of the first axis.
    Rows(Arc<Recipe>, usize, usize),
    /// Every element times `.1` plus `.2`.
    Affine(Arc<Recipe>, f32, f32),
    /// The last two axes exchanged.
    Transpose(Arc<Recipe>),
    /// The same elements in another shape.
    Reshape(Arc<Recipe>, Vec<usize>),
    /// Entries `.2..(.3)` of axis `.1`.
    Narrow(Arc<Recipe>, usize, usize, usize),
    /// Entries `.2`, `.2 + .3`, .. of axis `.1`.
    Every(Arc<Recipe>, usize, usize, usize),
    /// Each row divided by its length, which counts as `.1` at least.
    UnitRows(Arc<Recipe>, f32),
    /// A new first axis.
    Stack(Vec<Arc<Recipe>>),
    /// Joined along an axis.
    Join(Vec<Arc<Recipe>>, usize),
}

impl Recipe {
    /// The stored tensors it reads.
    pub fn names<'a>(&'a self, to: &mut Vec<&'a str>) {
        match self {
            Recipe::Stored(name) => to.push(name),
            Recipe::Numbers(_) => {}
            Recipe::Rows(r, ..)
            | Recipe::Affine(r, ..)
            | Recipe::Transpose(r)
            | Recipe::Reshape(r, _)
            | Recipe::Narrow(r, ..)
            | Recipe::Every(r, ..)
            | Recipe::UnitRows(r, _) => r.names(to),
            Recipe::Stack(parts) | Recipe::Join(parts, _) => parts.iter().for_each(|p| p.names(to)),
        }
    }

    /// The first stored tensor it reads, which stands for it in messages.
    pub fn name(&self) -> &str {
        let mut names = Vec::new();
        self.names(&mut names);
        names.first().copied().unwrap_or("nothing")
    }

    /// The path of the module whose weight this is, where it is used untransformed.
    pub fn path(&self) -> Option<&str> {
        match self {
            Recipe::Stored(name) => name.strip_suffix(".weight"),
            _ => None,
        }
    }
}

/// The tensors of a checkpoint as recipes see them: with MLX's packed triples (weight, scales, biases) taken as one tensor.
pub struct Pantry {
    /// The files' tensors, by the names that plugins use.
    pub checkpoint: Checkpoint,
    /// What config.json says of packing.
    pub quantization: Option<Quantization>,
}

impl Pantry {
    /// The packing of `name`, if it is packed beside scales.
    pub(super) fn mode(&self, name: &str) -> Result<Option<Mode>> {
        let Some(path) = name.strip_suffix(".weight") else { return Ok(None) };
        if self.checkpoint.get(&format!("{path}.scales")).is_none() {
            return Ok(None);
        }
        match self.quantization.as_ref().and_then(|q| q.for_path(path)) {
            Some(Some(mode)) => Ok(Some(mode)),
            Some(None) => Err(Error::Weights(format!(
                "{name}: config.json says it is not quantized, but the file has {path}.scales"
            ))),
            None => Err(Error::Weights(format!(
                "{name}: has scales, but config.json has no \"quantization\" that says how to read them"
            ))),
        }
    }

    pub(super) fn stored(&self, name: &str) -> Result<&Stored> {
        self.checkpoint.get(name).ok_or_else(|| Error::Weights(format!("{name}: not in the checkpoint")))
    }

    /// The names that a recipe uses up, with scales and biases of packed weights.
    pub fn uses(&self, recipe: &Recipe) -> Vec<String> {
        let mut names = Vec::new();
        recipe.names(&mut names);
        let beside = |name: &str| {
            let path = name.strip_suffix(".weight").unwrap_or(name).to_owned();
            ["scales", "biases"].map(|part| format!("{path}.{part}"))
        };
        let with = |name: &str| [name.to_owned()].into_iter().chain(beside(name)).collect::<Vec<_>>();
        names.into_iter().flat_map(with).filter(|n| self.checkpoint.get(n).is_some()).collect()
    }

    /// The tensor as a matrix: all axes but the last make up its rows.
    pub fn matrix(&self, recipe: &Recipe) -> Result<Matrix> {
        let shape = self.shape(recipe)?;
        let cols = shape.last().copied().unwrap_or(1);
        let rows = shape.iter().rev().skip(1).product::<usize>();
        match recipe {
            Recipe::Stored(name) => self.stored_matrix(name, rows, cols),
            Recipe::Stack(parts) => Matrix::stack(&parts.iter().map(|p| self.matrix(p)).collect::<Result<Vec<_>>>()?),
            Recipe::Reshape(inner, _) if self.shape(inner)?.last() == Some(&cols) => self.matrix(inner),
            moved => match self.moved(moved)? {
                Some(matrix) => Ok(matrix),
                None => Matrix::quantize(&self.floats(moved)?, rows, cols, Format::Dense(self.float(moved.name()))),
            },
        }
    }

    /// The float type in which transformed numbers are kept: that of the stored tensor, or of its scales.
    pub(super) fn float(&self, name: &str) -> Float {
        let scales = name.strip_suffix(".weight").and_then(|p| self.checkpoint.get(&format!("{p}.scales")));
        scales.or(self.checkpoint.get(name)).and_then(|t| float(t.dtype)).unwrap_or(Float::F32)
    }

    fn stored_matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix> {
        let stored = self.stored(name)?;
        let Some(mode) = self.mode(name)? else {
            let format = format_of(stored.dtype).ok_or_else(|| {
                Error::Weights(format!("{name}: {} is not a type that a layer can compute with", stored.dtype.name()))
            })?;
            return Matrix::new(format, rows, cols, stored.bytes(), None, None).map_err(|e| named(name, e));
        };
        let path = name.strip_suffix(".weight").unwrap_or(name);
        let scales = self.stored(&format!("{path}.scales"))?;
        let format = match mode.kind {
            Kind::Affine => Format::Affine {
                bits: mode.bits,
                group: mode.group as usize,
                scales: float(scales.dtype).ok_or_else(|| {
                    Error::Weights(format!("{path}.scales: {} is not a float type", scales.dtype.name()))
                })?,
            },
            Kind::Mxfp4 => Format::Mxfp4,
            Kind::Mxfp8 => Format::Mxfp8,
            Kind::Nvfp4 => Format::Nvfp4,
        };
        let biases = match mode.kind {
            Kind::Affine => Some(self.stored(&format!("{path}.biases"))?.bytes()),
            _ => None,
        };
        Matrix::new(format, rows, cols, stored.bytes(), Some(scales.bytes()), biases).map_err(|e| named(name, e))
    }
}

fn named(name: &str, e: Error) -> Error {
    Error::Weights(format!("{name}: {e}"))
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

/// How a matrix of this type is laid out; `None` for types that no layer computes with.
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
