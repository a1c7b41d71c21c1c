//! What a plugin named, made into numbers: a stored tensor with the transforms that the plugin asked for.
//!
//! Packed weights stay packed through everything that moves whole rows (`rows`, `stack`, what keeps the last axis); any other
//! transform unpacks them, since a packed group cannot be cut.

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
    fn mode(&self, name: &str) -> Result<Option<Mode>> {
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

    fn stored(&self, name: &str) -> Result<&Stored> {
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

    /// The logical shape: packed weights count their elements, not their words.
    pub fn shape(&self, recipe: &Recipe) -> Result<Vec<usize>> {
        let wrong = |what: String| Error::Weights(format!("{}: {what}", recipe.name()));
        Ok(match recipe {
            Recipe::Stored(name) => {
                let mut shape = self.stored(name)?.shape.clone();
                if let (Some(mode), Some(last)) = (self.mode(name)?, shape.last_mut()) {
                    let word = self.stored(name)?.dtype.size_in_bytes(1).unwrap_or(4) * 8;
                    *last = *last * word / mode.bits as usize;
                }
                shape
            }
            Recipe::Rows(inner, from, to) => {
                let mut shape = self.shape(inner)?;
                match shape.first_mut() {
                    Some(rows) if from <= to && *to <= *rows => *rows = to - from,
                    _ => return Err(wrong(format!("rows {from}..{to} of a tensor of shape {shape:?}"))),
                }
                shape
            }
            Recipe::Affine(inner, ..) | Recipe::UnitRows(inner, _) => self.shape(inner)?,
            Recipe::Narrow(inner, axis, from, to) => {
                let mut shape = self.shape(inner)?;
                match shape.get_mut(*axis) {
                    Some(len) if from <= to && *to <= *len => *len = to - from,
                    _ => return Err(wrong(format!("entries {from}..{to} of axis {axis} of shape {shape:?}"))),
                }
                shape
            }
            Recipe::Every(inner, axis, start, step) => {
                let mut shape = self.shape(inner)?;
                match shape.get_mut(*axis) {
                    Some(len) if start < len && *step > 0 => *len = (*len - start).div_ceil(*step),
                    _ => return Err(wrong(format!("every {step}th entry of axis {axis} of shape {shape:?}"))),
                }
                shape
            }
            Recipe::Join(parts, axis) => {
                let mut shapes = parts.iter().map(|p| self.shape(p)).collect::<Result<Vec<_>>>()?.into_iter();
                let mut shape = shapes.next().ok_or_else(|| Error::Weights("a join of no tensors".into()))?;
                for other in shapes {
                    let fits = other.len() == shape.len()
                        && (0..shape.len()).all(|i| i == *axis || other[i] == shape[i])
                        && *axis < shape.len();
                    if !fits {
                        return Err(wrong(format!("has shape {shape:?}, it cannot be joined with {other:?}")));
                    }
                    shape[*axis] += other[*axis];
                }
                shape
            }
            Recipe::Transpose(inner) => {
                let mut shape = self.shape(inner)?;
                let n = shape.len();
                if n < 2 {
                    return Err(wrong(format!("a tensor of shape {shape:?} cannot be transposed")));
                }
                shape.swap(n - 1, n - 2);
                shape
            }
            Recipe::Reshape(inner, dims) => {
                let shape = self.shape(inner)?;
                let count = |dims: &[usize]| dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
                if count(&shape) != count(dims) {
                    return Err(wrong(format!("a tensor of shape {shape:?} cannot become {dims:?}")));
                }
                dims.clone()
            }
            Recipe::Stack(parts) => {
                let shapes = parts.iter().map(|p| self.shape(p)).collect::<Result<Vec<_>>>()?;
                let first = shapes.first().ok_or_else(|| Error::Weights("a stack of no tensors".into()))?;
                if let Some((part, shape)) = parts.iter().zip(&shapes).find(|(_, s)| *s != first) {
                    return Err(Error::Weights(format!(
                        "{}: has shape {shape:?}, its neighbours {first:?}",
                        part.name()
                    )));
                }
                [parts.len()].into_iter().chain(first.iter().copied()).collect()
            }
        })
    }

    /// The tensor as a matrix: all axes but the last make up its rows.
    pub fn matrix(&self, recipe: &Recipe) -> Result<Matrix> {
        let shape = self.shape(recipe)?;
        let cols = shape.last().copied().unwrap_or(1);
        let rows = shape.iter().rev().skip(1).product::<usize>();
        match recipe {
            Recipe::Stored(name) => self.stored_matrix(name, rows, cols),
            Recipe::Rows(inner, from, to) => {
                let each = rows / (to - from).max(1);
                let range = from * each..to * each;
                let whole = self.matrix(inner)?;
                whole
                    .slice_rows(range)
                    .ok_or_else(|| Error::Weights(format!("{}: rows {from}..{to} are not there", recipe.name())))
            }
            Recipe::Stack(parts) => Matrix::stack(&parts.iter().map(|p| self.matrix(p)).collect::<Result<Vec<_>>>()?),
            Recipe::Reshape(inner, _) if self.shape(inner)?.last() == Some(&cols) => self.matrix(inner),
            // Whole rows, of every page of an inner axis.
            Recipe::Narrow(inner, axis, from, to) if axis + 1 < shape.len() => {
                let (whole, len) = (self.matrix(inner)?, self.shape(inner)?[*axis]);
                let chunk = shape[axis + 1..shape.len() - 1].iter().product::<usize>();
                let kept = (0..whole.rows()).filter(|row| (from..to).contains(&&(row / chunk.max(1) % len.max(1))));
                Ok(whole.permute_rows(&kept.collect::<Vec<_>>()))
            }
            _ => Matrix::quantize(&self.floats(recipe)?, rows, cols, Format::Dense(self.float(recipe.name()))),
        }
    }

    /// The float type in which transformed numbers are kept: that of the stored tensor, or of its scales.
    fn float(&self, name: &str) -> Float {
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

    /// Entries of one axis, some `step` apart.
    fn pick(
        &self,
        inner: &Recipe,
        axis: usize,
        range: impl Fn(usize) -> std::ops::Range<usize>,
        step: usize,
    ) -> Result<Vec<f32>> {
        let (shape, numbers) = (self.shape(inner)?, self.floats(inner)?);
        let (len, chunk) = (shape[axis], shape[axis + 1..].iter().product::<usize>());
        let pages = numbers.chunks((len * chunk).max(1));
        let entries = |page: &'_ [f32]| {
            range(len).step_by(step).flat_map(|i| page[i * chunk..][..chunk].to_vec()).collect::<Vec<_>>()
        };
        Ok(pages.flat_map(entries).collect())
    }

    /// The tensor's numbers, row after row.
    pub fn floats(&self, recipe: &Recipe) -> Result<Vec<f32>> {
        match recipe {
            Recipe::Affine(inner, scale, offset) => {
                let mut numbers = self.floats(inner)?;
                numbers.iter_mut().for_each(|x| *x = *x * scale + offset);
                Ok(numbers)
            }
            Recipe::Transpose(inner) => {
                let (shape, numbers) = (self.shape(inner)?, self.floats(inner)?);
                let (n, m) = (shape[shape.len() - 2], shape[shape.len() - 1]);
                let turn = |page: &[f32]| (0..n * m).map(|i| page[(i % n) * m + i / n]).collect::<Vec<_>>();
                Ok(numbers.chunks(n * m).flat_map(turn).collect())
            }
            Recipe::Reshape(inner, _) => self.floats(inner),
            Recipe::Narrow(inner, axis, from, to) => self.pick(inner, *axis, |_| *from..*to, 1),
            Recipe::Every(inner, axis, start, step) => self.pick(inner, *axis, |len| *start..len, *step),
            Recipe::UnitRows(inner, least) => {
                let (mut numbers, cols) = (self.floats(inner)?, self.shape(inner)?.last().copied().unwrap_or(1));
                for row in numbers.chunks_mut(cols.max(1)) {
                    let length = row.iter().map(|x| x * x).sum::<f32>().sqrt().max(*least);
                    row.iter_mut().for_each(|x| *x /= length);
                }
                Ok(numbers)
            }
            Recipe::Join(parts, axis) => {
                let parts = parts.iter().map(|p| Ok((self.shape(p)?, self.floats(p)?))).collect::<Result<Vec<_>>>()?;
                let chunk = |shape: &[usize]| shape[*axis..].iter().product::<usize>();
                let outer = self.shape(recipe)?[..*axis].iter().product::<usize>();
                let page = |i: usize| {
                    parts
                        .iter()
                        .flat_map(move |(shape, numbers)| numbers[i * chunk(shape)..][..chunk(shape)].iter().copied())
                };
                Ok((0..outer).flat_map(page).collect())
            }
            _ => {
                let matrix = self.matrix(recipe)?;
                let mut numbers = vec![0.0; matrix.rows() * matrix.cols()];
                matrix.dequantize_rows(0..matrix.rows(), &mut numbers);
                Ok(numbers)
            }
        }
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
