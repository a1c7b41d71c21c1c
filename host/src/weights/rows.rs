//! Transforms that move whole rows, in whatever the rows are packed: a range of rows is a slice of the file, other choices copy rows.
//! A matrix' rows are all axes but the last, so a choice along any other axis is a list of rows.

use super::{
    floats::columns,
    recipe::{Pantry, Recipe},
};
use crate::{
    config::{Quantization, Scheme},
    error::{Error, Result},
    kernels::cpu::{Format, Matrix},
};

impl Recipe {
    /// Whether it is made of stored tensors by nothing that changes a number.
    pub(super) fn moves_rows(&self) -> bool {
        match self {
            Recipe::Stored(_) => true,
            Recipe::Rows(r, ..) | Recipe::Narrow(r, ..) | Recipe::Every(r, ..) | Recipe::Reshape(r, _) => {
                r.moves_rows()
            }
            Recipe::Stack(parts) | Recipe::Join(parts, _) => parts.iter().all(|p| p.moves_rows()),
            Recipe::Numbers(_) | Recipe::Affine(..) | Recipe::Transpose(_) | Recipe::UnitRows(..) => false,
        }
    }
}

/// Rows of a tensor of `shape` that lie at `entries` of `axis`, which is not the last.
fn rows_at(shape: &[usize], axis: usize, entries: impl Iterator<Item = usize> + Clone) -> Vec<usize> {
    let outer: usize = shape[..axis].iter().product();
    let (len, chunk) = (shape[axis], shape[axis + 1..shape.len() - 1].iter().product::<usize>());
    let page = |o: usize| entries.clone().flat_map(move |i| (o * len + i) * chunk..(o * len + i + 1) * chunk);
    (0..outer).flat_map(page).collect()
}

/// Some rows of a matrix, by reference where they lie together; `None` where they are not all there.
fn select(matrix: &Matrix, rows: &[usize]) -> Option<Matrix> {
    let first = rows.first().copied().unwrap_or(0);
    if rows.iter().enumerate().all(|(i, &row)| row == first + i) {
        return matrix.slice_rows(first..first + rows.len());
    }
    rows.iter().all(|&row| row < matrix.rows()).then(|| matrix.permute_rows(rows))
}

impl Pantry {
    /// What a choice of whole rows is made from: the tensor, and which of its rows. `None` for every other recipe.
    fn chosen_rows<'r>(&self, recipe: &'r Recipe) -> Result<Option<(&'r Recipe, Vec<usize>)>> {
        let (inner, axis, from, to, step) = match recipe {
            Recipe::Rows(inner, from, to) => (inner, 0, *from, *to, 1),
            Recipe::Narrow(inner, axis, from, to) => (inner, *axis, *from, *to, 1),
            Recipe::Every(inner, axis, start, step) => (inner, *axis, *start, usize::MAX, *step),
            _ => return Ok(None),
        };
        self.shape(recipe)?;
        let shape = self.shape(inner)?;
        if axis + 1 >= shape.len() {
            return Ok(None);
        }
        Ok(Some((inner, rows_at(&shape, axis, (from..to.min(shape[axis])).step_by(step)))))
    }

    /// The matrix of a recipe that only moves rows about; `None` where numbers have to be computed.
    pub(super) fn moved(&self, recipe: &Recipe) -> Result<Option<Matrix>> {
        if let Some((inner, rows)) = self.chosen_rows(recipe)? {
            let missing = || Error::Weights(format!("{}: not all of its rows are there", recipe.name()));
            return select(&self.matrix(inner)?, &rows).ok_or_else(missing).map(Some);
        }
        match recipe {
            Recipe::Narrow(inner, axis, from, to) if *axis > 0 && axis + 1 == self.shape(inner)?.len() => {
                self.shape(recipe)?;
                Ok(self.matrix(inner)?.slice_cols(*from..*to))
            }
            Recipe::Join(parts, axis) if axis + 1 < self.shape(recipe)?.len() => self.joined(parts, *axis),
            _ => Ok(None),
        }
    }

    /// Matrices of one format joined along an axis before the last.
    fn joined(&self, parts: &[std::sync::Arc<Recipe>], axis: usize) -> Result<Option<Matrix>> {
        let matrices = parts.iter().map(|p| self.matrix(p)).collect::<Result<Vec<_>>>()?;
        if !matrices.iter().all(|m| matrices.first().is_some_and(|first| m.stacks_on(first))) {
            return Ok(None);
        }
        let (stacked, mut start, mut outer, mut chunks) = (Matrix::stack(&matrices)?, 0, 1, Vec::new());
        for (part, matrix) in parts.iter().zip(&matrices) {
            let shape = self.shape(part)?;
            outer = shape[..axis].iter().product::<usize>();
            chunks.push((start, shape[axis..shape.len() - 1].iter().product::<usize>()));
            start += matrix.rows();
        }
        let rows =
            (0..outer).flat_map(|o| chunks.iter().flat_map(move |&(start, n)| start + o * n..start + (o + 1) * n));
        Ok(select(&stacked, &rows.collect::<Vec<_>>()))
    }

    /// A tensor `[n, rows, cols]` as n matrices, each without a copy where it lies in one piece, and none larger than one of them where
    /// numbers have to be computed.
    pub fn pages(&self, recipe: &Recipe) -> Result<Vec<Matrix>> {
        let shape = self.shape(recipe)?;
        let &[n, rows, _] = shape.as_slice() else {
            return Err(Error::Weights(format!("{}: {shape:?} is not a stack of matrices", recipe.name())));
        };
        let missing = || Error::Weights(format!("{}: not all of its rows are there", recipe.name()));
        match recipe {
            Recipe::Stack(parts) => parts.iter().map(|p| self.matrix(p)).collect(),
            Recipe::Narrow(inner, 1, from, to) => self.pages_of(inner, &(*from..*to).collect::<Vec<_>>()),
            Recipe::Narrow(inner, 2, from, to) => {
                let float = Format::Dense(self.float(inner.name()));
                let cut = |page: Matrix| match page.slice_cols(*from..*to) {
                    Some(page) => Ok(page),
                    None => {
                        let mut numbers = vec![0.0; page.rows() * page.cols()];
                        page.dequantize_rows(0..page.rows(), &mut numbers);
                        let rows = numbers.chunks_exact(page.cols().max(1));
                        let numbers: Vec<f32> = rows.flat_map(|row| &row[*from..*to]).copied().collect();
                        Matrix::quantize(&numbers, page.rows(), to - from, float)
                    }
                };
                self.pages(inner)?.into_iter().map(cut).collect()
            }
            Recipe::Every(inner, 1, start, step) => {
                self.pages_of(inner, &(0..rows).map(|i| start + i * step).collect::<Vec<_>>())
            }
            Recipe::Transpose(_) => self.pages_of(recipe, &(0..rows).collect::<Vec<_>>()),
            _ => {
                let all = self.matrix(recipe)?;
                (0..n).map(|i| all.slice_rows(i * rows..(i + 1) * rows).ok_or_else(missing)).collect()
            }
        }
    }

    /// These rows of each page. Of a turned tensor no other rows are computed.
    fn pages_of(&self, recipe: &Recipe, rows: &[usize]) -> Result<Vec<Matrix>> {
        let Recipe::Transpose(inner) = recipe else {
            let missing = || Error::Weights(format!("{}: not all of its rows are there", recipe.name()));
            return self.pages(recipe)?.iter().map(|page| select(page, rows).ok_or_else(missing)).collect();
        };
        let float = Format::Dense(self.float(inner.name()));
        let turn = |page: Matrix| {
            let mut numbers = vec![0.0; page.rows() * page.cols()];
            page.dequantize_rows(0..page.rows(), &mut numbers);
            Matrix::quantize(&columns(&numbers, page.cols(), rows), rows.len(), page.rows(), float)
        };
        self.pages(inner)?.into_iter().map(turn).collect()
    }

    /// Columns of the recipe's matrix that lie so close together that no cut may fall between them; `None` where no cut may fall at all:
    /// BitNet rounds inputs by the largest of a whole row, and act-order has columns anywhere.
    pub fn granule(&self, recipe: &Recipe) -> Option<usize> {
        if let Some(Quantization::Other(Scheme::Bitnet(_))) = &self.quantization {
            return None;
        }
        let (named, form) = self.form(recipe.name()).ok()?;
        let matrix = named.matrix(form).ok()?;
        match matrix.format() {
            _ if matrix.has_column_order() => None,
            Format::Fp8 { block } => Some(block),
            other => Some(other.block().0),
        }
    }

    /// The module whose stored matrix this is some rows of: its path, how many rows it has, and which of them these are. `None` where the
    /// recipe is of several tensors, or computes.
    pub fn rows_of_module<'r>(&self, recipe: &'r Recipe) -> Result<Option<(&'r str, usize, Vec<usize>)>> {
        if let Some(path) = recipe.path() {
            let of = self.shape(recipe)?.iter().rev().skip(1).product();
            return Ok(Some((path, of, (0..of).collect())));
        }
        if let Recipe::Reshape(inner, shape) = recipe
            && self.shape(inner)?.last() == shape.last()
        {
            return self.rows_of_module(inner);
        }
        let Some((inner, rows)) = self.chosen_rows(recipe)? else { return Ok(None) };
        let Some((path, of, all)) = self.rows_of_module(inner)? else { return Ok(None) };
        Ok(rows.into_iter().map(|row| all.get(row).copied()).collect::<Option<Vec<_>>>().map(|rows| (path, of, rows)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{
        checkpoint::Checkpoint,
        stored::{Dtype, Stored},
    };
    use super::*;
    use crate::{
        config::{Kind, Mode, Quantization},
        kernels::cpu::Float,
    };
    use std::sync::Arc;

    const PACKED: Format = Format::Affine { bits: 4, group: 32, scales: Float::F32 };

    /// `dense` [2, 6, 32] and `packed.weight`, the same in 4 bits, then `other.weight`, packed rows [2, 2, 32].
    fn pantry() -> Pantry {
        let mut checkpoint = Checkpoint::default();
        let mut put = |name: &str, dtype, shape: &[usize], bytes: &crate::weights::bytes::Bytes| {
            let stored = Stored::new(dtype, shape.to_vec(), bytes.clone(), std::path::Path::new("made").into());
            checkpoint.insert(name, stored.unwrap()).unwrap();
        };
        for (name, rows, seed) in [("packed", 6, 7), ("other", 2, 13)] {
            let numbers: Vec<f32> = (0..2 * rows * 32).map(|i| ((i * seed) % 31) as f32 / 8.0 - 2.0).collect();
            let packed = Matrix::quantize(&numbers, 2 * rows, 32, PACKED).unwrap();
            let [weight, scales, biases] = packed.parts();
            put(&format!("{name}.weight"), Dtype::U32, &[2, rows, 4], weight);
            put(&format!("{name}.scales"), Dtype::F32, &[2, rows, 1], scales);
            put(&format!("{name}.biases"), Dtype::F32, &[2, rows, 1], biases);
            let dense = Matrix::quantize(&numbers, 2 * rows, 32, Format::Dense(Float::F32)).unwrap();
            put(&format!("{name}_dense"), Dtype::F32, &[2, rows, 32], &dense.parts()[0]);
        }
        let default = Mode { bits: 4, group: 32, kind: Kind::Affine };
        Pantry { checkpoint, quantization: Some(Quantization::Mlx { default, paths: Default::default() }) }
    }

    fn of(name: &str) -> Arc<Recipe> {
        Arc::new(Recipe::Stored(name.into()))
    }

    fn numbers(matrix: &Matrix) -> Vec<f32> {
        let mut numbers = vec![0.0; matrix.rows() * matrix.cols()];
        matrix.dequantize_rows(0..matrix.rows(), &mut numbers);
        numbers
    }

    /// Rows of the stored tensor in f32.
    fn rows_of(pantry: &Pantry, name: &str, rows: &[usize]) -> Vec<f32> {
        let all = pantry.floats(&of(name)).unwrap();
        rows.iter().flat_map(|&row| all[row * 32..][..32].to_vec()).collect()
    }

    #[test]
    fn choices_of_whole_rows_keep_their_packing_and_pick_the_right_ones() {
        let pantry = pantry();
        for (name, format) in [("packed.weight", PACKED), ("packed_dense", Format::Dense(Float::F32))] {
            let cases = [
                (Recipe::Rows(of(name), 1, 2), vec![6, 7, 8, 9, 10, 11]),
                (Recipe::Narrow(of(name), 0, 0, 1), vec![0, 1, 2, 3, 4, 5]),
                (Recipe::Narrow(of(name), 1, 2, 4), vec![2, 3, 8, 9]),
                (Recipe::Every(of(name), 1, 1, 2), vec![1, 3, 5, 7, 9, 11]),
                (Recipe::Every(of(name), 0, 1, 2), vec![6, 7, 8, 9, 10, 11]),
                (Recipe::Every(Recipe::Narrow(of(name), 1, 1, 6).into(), 1, 1, 3), vec![2, 5, 8, 11]),
                (Recipe::Narrow(Recipe::Reshape(of(name), vec![2, 3, 2, 32]).into(), 2, 1, 2), vec![1, 3, 5, 7, 9, 11]),
            ];
            for (recipe, rows) in cases {
                let matrix = pantry.matrix(&recipe).unwrap();
                assert_eq!(matrix.format(), format, "{recipe:?}");
                assert_eq!(numbers(&matrix), rows_of(&pantry, name, &rows), "{recipe:?}");
                assert_eq!(pantry.floats(&recipe).unwrap(), numbers(&matrix), "{recipe:?}");
            }
        }
    }

    #[test]
    fn tensors_joined_before_their_last_axis_keep_their_packing() {
        let pantry = pantry();
        let join = |names: [&str; 2], axis| Recipe::Join(names.map(of).to_vec(), axis);
        let inner = pantry.matrix(&join(["packed.weight", "other.weight"], 1)).unwrap();
        let [a, b] = [[0usize, 6], [0, 2]];
        let page = |i: usize| {
            let first = rows_of(&pantry, "packed.weight", &(a[i]..a[i] + 6).collect::<Vec<_>>());
            [first, rows_of(&pantry, "other.weight", &(b[i]..b[i] + 2).collect::<Vec<_>>())].concat()
        };
        assert_eq!((inner.format(), inner.rows()), (PACKED, 16));
        assert_eq!(numbers(&inner), [page(0), page(1)].concat());
        let mixed = pantry.matrix(&join(["packed.weight", "other_dense"], 1)).unwrap();
        assert_eq!((mixed.format(), mixed.rows()), (Format::Dense(Float::F32), 16));
        let outer = pantry.matrix(&join(["packed.weight", "packed.weight"], 0)).unwrap();
        assert_eq!((outer.format(), outer.rows()), (PACKED, 24));
    }

    #[test]
    fn pages_are_the_matrices_along_the_first_axis_of_every_recipe() {
        let pantry = pantry();
        for name in ["packed.weight", "packed_dense"] {
            let turned = || Arc::new(Recipe::Transpose(of(name)));
            for recipe in [
                Recipe::Stored(name.into()),
                Recipe::Narrow(of(name), 1, 3, 6),
                Recipe::Every(of(name), 1, 1, 2),
                Recipe::Transpose(of(name)),
                Recipe::Narrow(turned(), 1, 16, 32),
                Recipe::Every(turned(), 1, 1, 2),
                Recipe::Reshape(of(name), vec![4, 3, 32]),
            ] {
                let pages = pantry.pages(&recipe).unwrap();
                let shape = pantry.shape(&recipe).unwrap();
                assert!(
                    pages.len() == shape[0] && pages.iter().all(|p| [p.rows(), p.cols()] == shape[1..]),
                    "{recipe:?}"
                );
                let joined = pages.iter().flat_map(numbers).collect::<Vec<_>>();
                assert_eq!(joined, pantry.floats(&recipe).unwrap(), "{recipe:?}");
            }
        }
    }

    #[test]
    fn a_choice_of_rows_knows_its_module_and_a_computed_tensor_has_none() {
        let pantry = pantry();
        let flat = Arc::new(Recipe::Reshape(of("packed.weight"), vec![12, 32]));
        let some = Recipe::Every(Recipe::Rows(flat, 2, 9).into(), 0, 1, 3);
        assert_eq!(pantry.rows_of_module(&some).unwrap(), Some(("packed", 12, vec![3, 6])));
        assert_eq!(pantry.rows_of_module(&Recipe::Affine(of("packed.weight"), 2.0, 0.0)).unwrap(), None);
        assert_eq!(pantry.rows_of_module(&Recipe::Narrow(of("packed.weight"), 2, 0, 8)).unwrap(), None);
    }

    #[test]
    fn what_is_cut_along_the_last_axis_is_unpacked() {
        let pantry = pantry();
        let recipe = Recipe::Every(of("packed.weight"), 2, 1, 2);
        let all = pantry.floats(&of("packed.weight")).unwrap();
        assert_eq!(pantry.matrix(&recipe).unwrap().format(), Format::Dense(Float::F32));
        assert_eq!(pantry.floats(&recipe).unwrap(), all.iter().skip(1).step_by(2).copied().collect::<Vec<_>>());
    }
}
