//! bfloat16 in twelve bits, bit for bit. A weight's upper byte is its sign and seven of eight bits of its exponent, and weights of a matrix are
//! of few magnitudes: all but two in ten thousand of SmolLM2's have one of sixteen upper bytes. So four bits name it, the lower byte stays as it is, and
//! decoding, which waits for memory, goes a third faster. Where another upper byte comes up, the columns around it are kept plain, beside. That
//! weights of trained models can be coded so is from DFloat11 (arXiv 2504.11651), whose codes are of many lengths.
//!
//! A matrix is [coded once the model is in use](crate::weights::moving), as others are copied then; until then its rows are read where they lie.
//! Where there is a matrix unit nothing is coded: opening keeps its cores from asking memory for more, and decoding goes a quarter slower.

mod code;
mod store;

use super::{
    format::{Float, Format},
    matrix::Matrix,
};
use crate::weights::moving::SMALL;
pub(super) use code::{CHUNK, CODED, Code, Plain};
use rayon::prelude::*;
use std::sync::Arc;
pub(super) use store::Source;
use store::Store;

/// `[rows, cols]` = `[out, in]` of bfloat16. Cloning shares the bytes.
#[derive(Clone)]
pub struct Coded {
    rows: usize,
    cols: usize,
    store: Arc<Store>,
}

impl std::fmt::Debug for Coded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} [{}, {}], coded", Format::Dense(Float::BF16), self.rows, self.cols)
    }
}

impl Coded {
    /// The same matrix, to be coded once the model is in use, if this machine multiplies it faster so.
    pub fn later(matrix: &Matrix) -> Option<Self> {
        let fits = matrix.bytes() >= SMALL && matrix.cols() >= CHUNK && !matrix.has_column_order();
        let (rows, cols) = (matrix.rows(), matrix.cols());
        (fits && multiplies(matrix)).then(|| Self { rows, cols, store: Store::lying(matrix.clone()) })
    }

    /// Whether it is coded by now. One of too many magnitudes never is.
    pub fn is_coded(&self) -> bool {
        matches!(self.source(), Source::Coded(_))
    }

    /// Whether that is decided.
    pub fn is_settled(&self) -> bool {
        self.store.is_settled()
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Where its weights are now, which stay there while this is held.
    pub(super) fn source(&self) -> Source<'_> {
        self.store.source()
    }

    /// Unpacks all rows into `out`, `[rows, cols]`.
    ///
    /// # Panics
    /// If `out` does not fit.
    pub fn dequantize(&self, out: &mut [f32]) {
        assert!(out.len() == self.rows * self.cols, "dequantize: {} numbers of {self:?}", out.len());
        match self.source() {
            Source::Lying(matrix) => matrix.dequantize_rows(0..self.rows, out),
            Source::Coded(code) => {
                out.par_chunks_exact_mut(self.cols).enumerate().for_each(|(r, out)| code.row(r, out));
            }
        }
    }

    /// Unpacks the rows named by `ids` into `out`, `[ids.len(), cols]`: an embedding lookup.
    ///
    /// # Panics
    /// If an id is out of range or `out` does not fit.
    pub fn gather_rows(&self, ids: &[u32], out: &mut [f32]) {
        assert!(out.len() == ids.len() * self.cols, "gather_rows: {} ids of {self:?}", ids.len());
        match self.source() {
            Source::Lying(matrix) => matrix.gather_rows(ids, out),
            Source::Coded(code) => {
                ids.iter().zip(out.chunks_exact_mut(self.cols)).for_each(|(&id, out)| code.row(id as usize, out));
            }
        }
    }

    /// out = x · Wᵀ: `x` is `[tokens, cols]`, `out` `[tokens, rows]`; the bits are those of the [matrix](Matrix::matmul).
    ///
    /// # Panics
    /// If the lengths of `x` and `out` do not belong to the same number of tokens.
    pub fn matmul(&self, x: &[f32], out: &mut [f32]) {
        super::multiply_all(vec![(super::Factor::Coded(self), out)], x);
    }

    /// The same in f32, number by number, for machines that have nothing coded.
    pub(super) fn multiply_plainly(&self, x: &[f32], out: &mut [f32]) {
        let mut weights = vec![0.0; self.cols];
        for row in 0..self.rows {
            self.gather_rows(&[row as u32], &mut weights);
            for (x, out) in x.chunks_exact(self.cols).zip(out.chunks_exact_mut(self.rows)) {
                out[row] = weights.iter().zip(x).map(|(w, x)| w * x).sum();
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn multiplies(matrix: &Matrix) -> bool {
    matrix.multiplies_in_halves() && super::bf16::opens_codes()
}

#[cfg(not(target_arch = "x86_64"))]
fn multiplies(_: &Matrix) -> bool {
    false
}
