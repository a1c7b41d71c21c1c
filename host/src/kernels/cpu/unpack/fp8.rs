//! FP8 rows: a byte becomes a float by moving its bits, and one scale serves a whole chunk. That asks for blocks of whole chunks; matrices
//! with smaller blocks go through scratch instead.

use super::super::{format::Format, lanes::Lanes, matrix::Matrix};
use super::{Raw, Sink, Unpack, words::e4m3};

/// Vectors of a chunk.
const VECTORS: usize = 4;
/// Columns of the widest chunk.
const WIDEST: usize = VECTORS * 16;

/// A matrix of E4M3 bytes.
#[derive(Clone, Copy)]
pub(in super::super) struct Fp8 {
    raw: Raw,
    scales: *const u8,
    scales_stride: usize,
    block: usize,
}

// SAFETY: read-only memory of a matrix that outlives the product.
unsafe impl Sync for Fp8 {}
// SAFETY: as above.
unsafe impl Send for Fp8 {}

/// Numbers and scales of one row.
#[derive(Clone, Copy)]
pub(in super::super) struct Row {
    data: *const u8,
    scales: *const u8,
}

impl Fp8 {
    /// Columns that share a scale, as far as a row goes.
    fn block(m: &Matrix) -> usize {
        match m.format() {
            Format::Fp8 { block } if block < m.cols() => block,
            _ => m.cols().next_multiple_of(WIDEST),
        }
    }

    /// Whether no chunk has more than one scale.
    pub(in super::super) fn reads(m: &Matrix) -> bool {
        Self::block(m).is_multiple_of(WIDEST)
    }

    /// Valid while `m` is borrowed.
    pub(in super::super) fn new(m: &Matrix) -> Self {
        let [_, scales_stride, _] = m.format().row_bytes(m.cols());
        Self { raw: Raw::of(m), scales: m.parts()[1].as_ptr(), scales_stride, block: Self::block(m) }
    }
}

impl Unpack for Fp8 {
    type Row = Row;

    fn vectors<L: Lanes>(&self) -> usize {
        VECTORS
    }
    fn chunks<L: Lanes>(&self) -> usize {
        self.raw.cols.div_ceil(VECTORS * L::W)
    }

    #[inline(always)]
    unsafe fn row<L: Lanes>(&self, r: usize, _: *mut f32) -> Row {
        // SAFETY: the caller names a row of the matrix.
        unsafe { Row { data: self.raw.row(r), scales: self.scales.add(r * self.scales_stride) } }
    }

    #[inline(always)]
    unsafe fn chunk<L: Lanes, S: Sink<L>>(&self, row: Row, c: usize, sink: &mut S) {
        let first = c * VECTORS * L::W;
        // SAFETY: the row has a scale for every block that it begins; of the last chunk only what is left is copied.
        unsafe {
            let scale = L::splat(row.scales.cast::<f32>().add(first / self.block).read_unaligned());
            let mut from = row.data.add(first);
            let mut rest = [0u8; WIDEST];
            if first + VECTORS * L::W > self.raw.cols {
                std::ptr::copy_nonoverlapping(from, rest.as_mut_ptr(), self.raw.cols - first);
                from = rest.as_ptr();
            }
            for v in 0..VECTORS {
                sink.take(v, L::mul(e4m3::<L>(L::load_u8(from.add(v * L::W))), scale));
            }
        }
    }
}
