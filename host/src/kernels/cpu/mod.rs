//! Kernels for the CPU, in f32 arithmetic: packed matrices of every format, attention, and the small ops around them.
//! Each is written once over `lanes` and compiled for AVX-512, AVX2, NEON and plain Rust; the machine picks at run time.
//! No result depends on the number of threads.
//! Where the machine can, weights of whole numbers are multiplied as such (`panels`) and bfloat16 as bfloat16 (`bf16`), both on the
//! processor's matrix unit if it has one (`amx`). Without that unit bfloat16 is kept in twelve bits (`coded`).

// Tiles of registers are indexed by constants on several arrays at once.
#![allow(clippy::needless_range_loop)]

mod ahead;
#[cfg(target_arch = "x86_64")]
mod amx;
mod asked;
pub mod attention;
#[cfg(target_arch = "x86_64")]
mod bf16;
mod coded;
mod dequantize;
pub mod elementwise;
pub mod format;
mod lanes;
mod matmul;
pub mod matrix;
pub mod norm;
mod panels;
mod quantize;
pub mod recurrence;
pub mod rope;
mod stream;
mod tasks;
mod team;
mod tile;
mod together;
#[cfg(target_arch = "x86_64")]
mod turned;
mod unpack;
mod unwritten;

pub use ahead::begin_step;
pub use attention::{Attend, Rows, attend, attend_all, attend_apart};
pub use coded::Coded;
pub use dequantize::e8m0_to_f32;
#[cfg(feature = "cuda")]
pub(crate) use dequantize::{e4m3_to_f32, scale_and_min};
pub use elementwise::{argmax, gelu_tanh_mul, in_pieces, largest, silu_mul, softmax_rows};
pub use format::{Float, Format};
pub use lanes::Isa;
pub use matrix::Matrix;
pub use norm::{layer_norm, rms_norm};
pub use panels::Panels;
pub use quantize::quantize_rows;
pub use rope::{Angles, Turn, rope};
pub use team::{copy, each, start_threads};
pub use together::{Factor, multiply_all, multiply_each};
pub use unwritten::zeros;
