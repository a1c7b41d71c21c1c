//! Kernels for NVIDIA's GPUs: what candle lacks there, or does in more launches than a token has time for.

pub mod attend;
pub mod attention;
pub mod experts;
mod hopper;
pub mod ids;
pub mod norm;
pub mod pack;
pub mod packed;
pub mod product;
pub mod program;
pub mod recurrence;
mod regroup;
pub mod route;
pub mod rows;
pub mod sample;
mod scratch;
pub mod step;
pub mod sum;
pub mod turn;

pub use scratch::keeping;
pub mod together;
