//! Products of packed whole numbers without unpacking them to floats: activations are rounded to steps that fit two or three bytes
//! (`rounded`), and VNNI multiplies 64 pairs of bytes an instruction, once for each byte (`product`). Scales are applied to sums.
//!
//! The error is that of the rounding alone, relative to the largest of the 64 to 256 activations that share a step: 6e-8 in three bytes,
//! for activations that are f32, and 1.5e-5 in two, for bfloat16, whose own is 2e-3. Sums of whole numbers are exact, so a token gives
//! the same bits in any company.

mod affine;
mod blocks;
mod product;
mod rounded;

use super::{format::Format, matrix::Matrix, unpack::Raw};
use affine::Affine;
use blocks::{Fp4, Q4, Q8};
pub(super) use product::Product;
use std::arch::x86_64::__m512i;

/// Which column byte `j` of vector `v` of a chunk belongs to; `V` is [`Numbers::VECTORS`].
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    /// `V j + v`: neighbours share a byte.
    InTurns,
    /// `32 (j / 16) + 16 v + j % 16`: the halves of a GGUF block share its bytes.
    Halves,
}

/// Reads the numbers of one format, in chunks of `64 V` columns.
///
/// # Safety
/// Methods ask for AVX-512 F, BW, DQ, VL and VNNI, for rows inside the matrix, and for chunks that begin inside the row.
trait Numbers: Copy + Sync {
    /// Vectors of a chunk, at most 4. Lane `l` of each holds columns that share a scale.
    const VECTORS: usize;
    /// Where the columns are.
    const ORDER: Order;
    /// The number that stands for zero.
    const ZERO: i32;
    /// Whether groups have a bias beside the scale.
    const BIASED: bool;
    /// The matrix.
    fn raw(&self) -> Raw;
    /// Columns that share a scale.
    fn group(&self) -> usize;
    /// Writes a row's scales, and biases if there are any, in f32, with zeros after them.
    unsafe fn scales(&self, r: usize, scales: *mut f32, biases: *mut f32);
    /// The numbers of chunk `c`, as unsigned bytes; 0 in columns that are not there. Only the first `VECTORS` count.
    unsafe fn vectors(&self, row: *const u8, c: usize) -> [__m512i; 4];
}

/// Zeros behind the scales of a row, so that whole vectors of them can be read from any place.
const SLACK: usize = 16;

/// Computes `product` if its format is one of those that are read here.
pub(super) fn multiply(m: &Matrix, product: Product<'_>, out: &mut [f32]) -> bool {
    match m.format() {
        Format::Affine { bits: 2, .. } => product.run(Affine::<2, 4>::new(m), out),
        Format::Affine { bits: 4, .. } => product.run(Affine::<4, 2>::new(m), out),
        Format::Affine { bits: 8, .. } => product.run(Affine::<8, 1>::new(m), out),
        Format::Mxfp4 | Format::Nvfp4 | Format::Nvfp4Scaled => product.run(Fp4::new(m), out),
        Format::Q4_0 => product.run(Q4::<18, 8>(Raw::of(m)), out),
        Format::Q4_1 => product.run(Q4::<20, 0>(Raw::of(m)), out),
        Format::Q8_0 => product.run(Q8(Raw::of(m)), out),
        _ => return false,
    }
    true
}
