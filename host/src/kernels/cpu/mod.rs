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
pub mod attention {
    pub enum Rows<'a> {
        F32(&'a [f32]),
        F16(&'a [half::f16]),
        BF16(&'a [half::bf16]),
        Affine { data: &'a [u8], scales: &'a [f32], biases: &'a [f32], bits: u32, group: usize },
    }
    pub struct Attend<'a> {
        pub scale: f32,
        pub softcap: Option<f32>,
        pub window: Option<usize>,
        pub keep: usize,
        pub sinks: Option<&'a [f32]>,
    }
    pub fn attend(
        q: &[f32],
        q_heads: usize,
        dim: usize,
        query_positions: &[u32],
        keys: Rows,
        values: Rows,
        kv_heads: usize,
        v_dim: usize,
        key_positions: &[u32],
        how: &Attend,
        out: &mut [f32],
    ) {
        unimplemented!()
    }
}
pub fn rms_norm(x: &[f32], weight: Option<&[f32]>, eps: f32, dim: usize, out: &mut [f32]) {
    unimplemented!()
}
pub fn rope(
    x: &mut [f32],
    positions: &[u32],
    heads: usize,
    head_dim: usize,
    inv_freq: &[f32],
    interleaved: bool,
    amplitude: f32,
) {
    unimplemented!()
}
