//! Kernels for the CPU: packed matrices and attention, in f32 arithmetic.
