//! Packed rows to vectors of f32 in registers: the inner half of every matrix product. An unpacker hands vectors to a `Sink`
//! in a fixed order; activations are laid out in that same order once per product (`Order`), so that the vectors of a
//! nibble stream need no shuffling: word l of sixteen goes to lane l, and its eight nibbles come out one after the other.

mod dense;
mod fp8;
mod ggml;
mod super_blocks;
mod words;

use super::{lanes::Lanes, matrix::Matrix};
pub(super) use dense::{Bf16, Dense, F16, F32, Unpacked};
pub(super) use fp8::Fp8;
pub(super) use ggml::{Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};
pub(super) use super_blocks::{Q2K, Q3K, Q4K, Q5K, Q6K};
pub(super) use words::Words;

/// Where the weights of a row go, `W` at a time.
pub(super) trait Sink<L: Lanes> {
    /// Vector number `at` of the current chunk.
    unsafe fn take(&mut self, at: usize, weights: L::F);
}

/// Reads rows of one format.
///
/// # Safety
/// Methods ask for what [`Lanes`] asks for, for rows inside the matrix, and for chunks below `chunks`.
pub(super) trait Unpack: Copy + Sync {
    /// What a chunk needs to know about its row.
    type Row: Copy;
    /// Vectors that a chunk hands out.
    fn vectors<L: Lanes>(&self) -> usize;
    /// Chunks of a row; the last one may be padded with zeros.
    fn chunks<L: Lanes>(&self) -> usize;
    /// Floats of scratch that `row` wants.
    fn scratch(&self) -> usize {
        0
    }
    /// Prepares row `r`.
    unsafe fn row<L: Lanes>(&self, r: usize, scratch: *mut f32) -> Self::Row;
    /// Hands chunk `c` of a row to `sink`.
    unsafe fn chunk<L: Lanes, S: Sink<L>>(&self, row: Self::Row, c: usize, sink: &mut S);
}

/// How activations are laid out to meet the vectors of an unpacker.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// As they are.
    Plain,
    /// In chunks of `W` words of `per` weights: the first weight of each word, then the second of each, ...
    Words {
        /// Weights of a 32-bit word.
        per: usize,
    },
}

/// Rows of a matrix as raw memory, for unpackers.
#[derive(Clone, Copy)]
pub(super) struct Raw {
    pub(super) data: *const u8,
    pub(super) stride: usize,
    pub(super) cols: usize,
}

// SAFETY: read-only memory that outlives the product, see `Raw::of`.
unsafe impl Sync for Raw {}
// SAFETY: as above.
unsafe impl Send for Raw {}

impl Raw {
    /// Valid while `m` is borrowed: callers keep the reference for the length of the product.
    pub(super) fn of(m: &Matrix) -> Self {
        let [data, ..] = m.parts();
        Self { data: data.as_ptr(), stride: m.format().row_bytes(m.cols())[0], cols: m.cols() }
    }

    /// # Safety
    /// `r` is a row of the matrix.
    #[inline(always)]
    pub(super) unsafe fn row(&self, r: usize) -> *const u8 {
        // SAFETY: sizes are checked when a matrix is made.
        unsafe { self.data.add(r * self.stride) }
    }
}
