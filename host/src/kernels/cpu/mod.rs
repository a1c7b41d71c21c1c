//! Kernels for the CPU, in f32 arithmetic: packed matrices of every format, attention, and the small ops around them.
//! Each is written once over `lanes` and compiled for AVX-512, AVX2 and plain Rust (NEON on ARM); the machine picks at run
//! time. No result depends on the number of threads.

mod dequantize;
pub mod format;
pub mod lanes;
mod matmul;
pub mod matrix;
mod quantize;
mod stream;
mod tile;
mod unpack;

pub use format::{Float, Format};
pub use lanes::Isa;
pub use matrix::Matrix;
pub use quantize::quantize_rows;
