//! Checkpoint files -> named tensors in the file's own format -> what the layers compute with.

pub mod bytes;
