//! dylm's own kernels, one folder a device, where candle is slow or lacks the op.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod metal;
