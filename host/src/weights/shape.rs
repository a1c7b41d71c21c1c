//! The shape that a tensor has after its transforms, told from the files' headers alone; transforms that do not fit are found here.

use super::recipe::{Pantry, Recipe};
use crate::error::{Error, Result};

impl Pantry {
    /// The logical shape: packed weights count their elements, not their words.
    pub fn shape(&self, recipe: &Recipe) -> Result<Vec<usize>> {
        let wrong = |what: String| Error::Weights(format!("{}: {what}", recipe.name()));
        Ok(match recipe {
            Recipe::Stored(name) => {
                let (named, form) = self.form(name)?;
                form.shape(&named)?
            }
            Recipe::Numbers(values) => vec![values.len()],
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
}
