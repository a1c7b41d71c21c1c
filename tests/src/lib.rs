//! What the end-to-end tests share: checkpoints small enough to be generated on the spot, and the real one.

pub mod binary;
pub mod smollm2;
pub mod tiny;
mod tiny_tokenizer;

/// README.md, so that its Rust is compiled with the doctests.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
pub struct Readme;
