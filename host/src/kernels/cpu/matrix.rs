//! A weight matrix as it lies in the checkpoint: packed, shared, cut by rows without copying. Rows are outputs, so that a
//! fused projection, an expert or a shard of a matrix is a range of rows, and every row can be unpacked on its own. Columns may be stored
//! in another order than they are counted in (GPTQ's act-order); nobody but this file knows.

use super::{dequantize::dequantize_row, format::Format};
use crate::{
    error::{Error, Result},
    weights::bytes::Bytes,
};
use rayon::prelude::*;
use std::{borrow::Cow, ops::Range, sync::Arc};

/// `[rows, cols]` = `[out, in]`. Cloning shares the bytes.
#[derive(Clone)]
pub struct Matrix {
    format: Format,
    rows: usize,
    cols: usize,
    /// Packed weights, scales, biases; empty where the format has none.
    parts: [Bytes; 3],
    /// Stored column j is column `order[j]`.
    order: Option<Arc<[u32]>>,
    /// Whether products may round activations to bfloat16.
    in_halves: bool,
}

impl std::fmt::Debug for Matrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} [{}, {}]", self.format, self.rows, self.cols)
    }
}

impl Matrix {
    /// A matrix over bytes of a checkpoint. `scales` and `biases` for the formats that keep them apart (affine: both; mx
    /// formats: scales). Fails where a size is not exactly what the shape asks for.
    pub fn new(
        format: Format,
        rows: usize,
        cols: usize,
        data: Bytes,
        scales: Option<Bytes>,
        biases: Option<Bytes>,
    ) -> Result<Self> {
        let (block, _) = format.block();
        if !format.is_known() {
            return Err(Error::Weights(format!(
                "a matrix is packed as {format:?}: bits must be 2, 3, 4, 5, 6 or 8, groups 32, 64 or 128"
            )));
        }
        if !cols.is_multiple_of(block) {
            return Err(Error::Weights(format!(
                "a [{rows}, {cols}] matrix cannot be {format:?}: its columns are not a multiple of {block}; leave it dense"
            )));
        }
        let none = || Bytes::from(Vec::new());
        let parts = [data, scales.unwrap_or_else(none), biases.unwrap_or_else(none)];
        let sizes = format.row_bytes(cols);
        for ((part, size), name) in parts.iter().zip(sizes).zip(["weights", "scales", "biases"]) {
            if size.checked_mul(rows) != Some(part.len()) {
                let (held, wanted) = (part.len(), size as u128 * rows as u128);
                return Err(Error::Weights(format!(
                    "a [{rows}, {cols}] matrix in {format:?} has {held} bytes of {name} where {wanted} belong; the file is damaged or its config is of another model"
                )));
            }
        }
        Ok(Self { format, rows, cols, parts, order: None, in_halves: false })
    }

    /// The same matrix, where stored column j is to be column `order[j]`. Fails unless every column is named once.
    pub fn with_column_order(self, order: Vec<u32>) -> Result<Self> {
        let mut seen = vec![false; self.cols];
        let new = |&c: &u32| seen.get_mut(c as usize).is_some_and(|seen| !std::mem::replace(seen, true));
        if order.len() != self.cols || !order.iter().all(new) {
            return Err(Error::Weights(format!("{} columns are not an order of the columns of {self:?}", order.len())));
        }
        Ok(Self { order: Some(order.into()), ..self })
    }

    /// Whether columns are stored in another order.
    pub fn has_column_order(&self) -> bool {
        self.order.is_some()
    }

    /// The same matrix for activations of half precision, which products may round accordingly: 2^-9 of each, where that is faster.
    pub fn for_halves(self) -> Self {
        Self { in_halves: true, ..self }
    }

    /// The same matrix, whose bytes may [move](crate::weights::moving) once it is in use.
    pub fn that_moves(self) -> Self {
        Self { parts: self.parts.map(crate::weights::moving::later), ..self }
    }

    /// The same matrix in memory of its own now, if its bytes lie in a file, which is let go, and the system has huge pages.
    pub(super) fn moved(&self) -> std::io::Result<Self> {
        let [weights, scales, biases] = self.parts.each_ref().map(crate::weights::moving::moved);
        Ok(Self { parts: [weights?, scales?, biases?], ..self.clone() })
    }

    /// Whether products may round activations.
    pub fn is_for_halves(&self) -> bool {
        self.in_halves
    }

    /// Which column is stored at each place, unless they are stored as they are counted.
    pub fn column_order(&self) -> Option<&[u32]> {
        self.order.as_deref()
    }

    /// How it is packed.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Memory held, scales included.
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(|part| part.len()).sum::<usize>() + self.order.as_ref().map_or(0, |o| 4 * o.len())
    }

    /// Bits a weight takes, scales included.
    pub fn bits_per_weight(&self) -> f64 {
        self.format.bits_per_weight()
    }

    /// The packed weights, scales and biases (empty where the format has none), as given.
    pub fn parts(&self) -> &[Bytes; 3] {
        &self.parts
    }

    /// Some of the rows, without copying; `None` where the range does not fit.
    pub fn slice_rows(&self, rows: Range<usize>) -> Option<Self> {
        if rows.start > rows.end || rows.end > self.rows {
            return None;
        }
        let [data, scales, biases] = self.format.row_bytes(self.cols);
        let cut = |part: &Bytes, size: usize| part.slice(rows.start * size..rows.end * size);
        let parts = [cut(&self.parts[0], data)?, cut(&self.parts[1], scales)?, cut(&self.parts[2], biases)?];
        Some(Self { rows: rows.len(), parts, ..self.clone() })
    }

    /// Some of the columns; copies, unless it is all of them. `None` where the range does not fit, cuts through weights that share a scale,
    /// or where columns are stored in another order.
    pub fn slice_cols(&self, cols: Range<usize>) -> Option<Self> {
        let unit = match self.format {
            Format::Fp8 { block } => block,
            other => other.block().0,
        };
        let whole = cols.end == self.cols;
        if cols.start > cols.end || cols.end > self.cols || self.order.is_some() {
            return None;
        }
        if !cols.start.is_multiple_of(unit) || !(whole || cols.end.is_multiple_of(unit)) {
            return None;
        }
        if cols.len() == self.cols {
            return Some(self.clone());
        }
        let [all, from, to] = [self.cols, cols.start, cols.end].map(|cols| self.format.row_bytes(cols));
        let cut = |p: usize| {
            // A factor of the whole row is that of each part of it.
            let range = if all[p] == from[p] { 0..all[p] } else { from[p]..to[p] };
            let rows = self.parts[p].chunks_exact(all[p].max(1));
            Bytes::from(rows.flat_map(|row| &row[range.clone()]).copied().collect::<Vec<u8>>())
        };
        Some(Self { cols: cols.len(), parts: [0, 1, 2].map(cut), ..self.clone() })
    }

    /// Row i of the result is row `order[i]`; copies. Rows may be left out or repeated.
    ///
    /// # Panics
    /// If `order` names a row that is not there.
    pub fn permute_rows(&self, order: &[usize]) -> Self {
        let sizes = self.format.row_bytes(self.cols);
        let parts = [0, 1, 2].map(|p| {
            let (part, size) = (&self.parts[p], sizes[p]);
            let mut rows = Vec::with_capacity(order.len() * size);
            order.iter().for_each(|&r| rows.extend_from_slice(&part[r * size..(r + 1) * size]));
            Bytes::from(rows)
        });
        Self { rows: order.len(), parts, ..self.clone() }
    }

    /// Rows of several matrices, one after the other; copies. Fails unless formats and columns agree.
    pub fn stack(parts: &[Matrix]) -> Result<Self> {
        let Some(first) = parts.first() else {
            return Err(Error::Weights("there is no matrix to stack".into()));
        };
        if let Some(odd) = parts.iter().find(|m| !m.stacks_on(first)) {
            return Err(Error::Weights(format!(
                "{odd:?} cannot be stacked on {first:?}: formats and columns must agree; keep them apart"
            )));
        }
        let joined = [0, 1, 2].map(|p| {
            let slices: Vec<&[u8]> = parts.iter().map(|m| &*m.parts[p]).collect();
            Bytes::from(slices.concat())
        });
        Ok(Self { rows: parts.iter().map(|m| m.rows).sum(), parts: joined, ..first.clone() })
    }

    /// Whether rows of both can lie in one matrix.
    pub fn stacks_on(&self, other: &Matrix) -> bool {
        (self.format, self.cols, &self.order) == (other.format, other.cols, &other.order)
    }

    /// Unpacks rows into `out`, `[rows.len(), cols]`.
    ///
    /// # Panics
    /// If the range or `out` does not fit.
    pub fn dequantize_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        assert!(rows.end <= self.rows && out.len() == rows.len() * self.cols, "dequantize_rows: {rows:?} of {self:?}");
        let first = rows.start;
        let each = |(i, out): (usize, &mut [f32])| self.dequantize_row(first + i, out);
        if out.len() < 1 << 16 {
            out.chunks_exact_mut(self.cols.max(1)).enumerate().for_each(each);
        } else {
            out.par_chunks_exact_mut(self.cols.max(1)).enumerate().for_each(each);
        }
    }

    /// Unpacks the rows named by `ids` into `out`, `[ids.len(), cols]`: an embedding lookup.
    ///
    /// # Panics
    /// If an id is out of range or `out` does not fit.
    pub fn gather_rows(&self, ids: &[u32], out: &mut [f32]) {
        assert!(out.len() == ids.len() * self.cols, "gather_rows: {} ids of {self:?}", ids.len());
        for (&id, out) in ids.iter().zip(out.chunks_exact_mut(self.cols.max(1))) {
            self.dequantize_row(id as usize, out);
        }
    }

    fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        let Some(order) = &self.order else { return self.stored_row(row, out) };
        let mut stored = vec![0.0; self.cols];
        self.stored_row(row, &mut stored);
        for (&column, x) in order.iter().zip(stored) {
            out[column as usize] = x;
        }
    }

    /// A row in the order that its columns are stored in, in which [`Matrix::stored_order`] brings activations.
    pub(super) fn stored_row(&self, row: usize, out: &mut [f32]) {
        let [data, scales, biases] = self.row_parts(row);
        dequantize_row(self.format, data, scales, biases, out);
    }

    /// Activations `[tokens, cols]` with their columns as they are stored here.
    pub(super) fn stored_order<'x>(&self, x: &'x [f32]) -> Cow<'x, [f32]> {
        let Some(order) = &self.order else { return Cow::Borrowed(x) };
        x.chunks_exact(self.cols).flat_map(|x| order.iter().map(|&c| x[c as usize])).collect()
    }

    /// The packed weights of all rows from one on; none where it is beyond them.
    pub(super) fn rows_from(&self, row: usize) -> &[u8] {
        let [size, ..] = self.format.row_bytes(self.cols);
        self.parts[0].get(row * size..).unwrap_or_default()
    }

    /// The bytes of one row.
    pub(super) fn row_parts(&self, row: usize) -> [&[u8]; 3] {
        let sizes = self.format.row_bytes(self.cols);
        [0, 1, 2].map(|p| &self.parts[p][row * sizes[p]..(row + 1) * sizes[p]])
    }
}
