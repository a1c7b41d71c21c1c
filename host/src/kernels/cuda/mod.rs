//! Kernels for NVIDIA's GPUs: what candle lacks there, or does in more launches than a token has time for.

pub mod attend;
pub mod program;
pub mod step;
