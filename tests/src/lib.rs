//! What the end-to-end tests share: checkpoints small enough to be generated on the spot.

pub mod tiny;
mod tiny_tokenizer;
