//! What the end-to-end tests share: checkpoints small enough to be generated on the spot, and the real one.

pub mod binary;
pub mod smollm2;
pub mod tiny;
mod tiny_tokenizer;
