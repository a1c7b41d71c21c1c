//! What the end-to-end tests share: checkpoints small enough to be generated on the spot, the real binary, plugins built by strangers.

pub mod binary;
pub mod outside;
pub mod tiny;
mod tiny_tokenizer;
