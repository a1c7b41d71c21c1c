//! dylm's own kernels, one folder a device, where candle is slow or lacks the op.

pub mod cpu;
pub mod metal;
