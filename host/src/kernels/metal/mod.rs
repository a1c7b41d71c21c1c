//! Kernels for Apple's GPUs, in Metal's language: products with packed weights, attention of few queries over a long cache, the small ops
//! of a layer in one pass each, recurrences. The `.metal` files are compiled by the system when a kernel is first used.
//!
//! `launch` and the files of planners (`matmul`, `attention`, `rows`, `recurrence`) say what to run, in plain data; `device` runs it. So all
//! of it but `queue` is built and tested everywhere: the same text is also C++, which the tests compile and play on the CPU.

pub mod attention;
pub mod device;
pub mod launch;
pub mod matmul;
pub mod ops;
pub mod packed;
#[cfg(any(feature = "metal", target_os = "macos"))]
mod queue;
pub mod recurrence;
pub mod rows;

pub use device::serves;
pub use packed::Packed;
