//! Transforms that change numbers, or cut rows: all in f32, row after row.

use super::recipe::{Pantry, Recipe};
use crate::error::Result;
use rayon::prelude::*;

impl Pantry {
    /// The tensor's numbers, row after row.
    pub fn floats(&self, recipe: &Recipe) -> Result<Vec<f32>> {
        match recipe {
            Recipe::Numbers(values) => Ok(values.to_vec()),
            Recipe::Affine(inner, scale, offset) => {
                let mut numbers = self.floats(inner)?;
                numbers.iter_mut().for_each(|x| *x = *x * scale + offset);
                Ok(numbers)
            }
            Recipe::Transpose(inner) => {
                let (shape, numbers) = (self.shape(inner)?, self.floats(inner)?);
                let [.., n, m] = shape[..] else { return Ok(numbers) };
                let all = (0..m).collect::<Vec<_>>();
                Ok(numbers.chunks((n * m).max(1)).flat_map(|page| columns(page, m, &all)).collect())
            }
            Recipe::Reshape(inner, _) => self.floats(inner),
            Recipe::UnitRows(inner, least) => {
                let (mut numbers, cols) = (self.floats(inner)?, self.shape(inner)?.last().copied().unwrap_or(1));
                for row in numbers.chunks_mut(cols.max(1)) {
                    let length = row.iter().map(|x| x * x).sum::<f32>().sqrt().max(*least);
                    row.iter_mut().for_each(|x| *x /= length);
                }
                Ok(numbers)
            }
            Recipe::Rows(inner, from, to) if self.is_cut(inner, 0)? => self.pick(inner, 0, |_| *from..*to, 1),
            Recipe::Narrow(inner, axis, from, to) if self.is_cut(inner, *axis)? => {
                self.pick(inner, *axis, |_| *from..*to, 1)
            }
            Recipe::Every(inner, axis, start, step) if self.is_cut(inner, *axis)? => {
                self.pick(inner, *axis, |len| *start..len, *step)
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

    /// Whether picking along this axis has to go through numbers: rows are cut, or were computed and would be rounded as a matrix.
    fn is_cut(&self, inner: &Recipe, axis: usize) -> Result<bool> {
        Ok(axis + 1 >= self.shape(inner)?.len() || !inner.moves_rows())
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
}

/// Some columns of a matrix `[n, m]`, as rows: `[columns, n]`.
pub(super) fn columns(page: &[f32], m: usize, columns: &[usize]) -> Vec<f32> {
    // Both sides are walked in tiles of this width, since one of them is always read or written across its rows.
    const TILE: usize = 32;
    let n = page.len() / m.max(1);
    let mut out = vec![0.0; columns.len() * n];
    let tile = |(out, columns): (&mut [f32], &[usize])| {
        for start in (0..n).step_by(TILE) {
            for (out, &column) in out.chunks_exact_mut(n).zip(columns) {
                let rows = start..(start + TILE).min(n);
                out[rows.clone()].iter_mut().zip(rows).for_each(|(x, row)| *x = page[row * m + column]);
            }
        }
    };
    out.par_chunks_mut((TILE * n).max(1)).zip(columns.par_chunks(TILE)).for_each(tile);
    out
}
