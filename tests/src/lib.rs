//! What the end-to-end tests share: checkpoints small enough to be generated on the spot, the real one, the real binary, and plugins built
//! by strangers.

pub mod another_api;
pub mod binary;
pub mod c_header;
pub mod in_c;
pub mod metal_stage;
pub mod models;
pub mod outside;
pub mod packing;
pub mod smollm2;
pub mod tiny;
pub mod trap;
pub mod variant;

/// README.md, so that its Rust is compiled with the doctests.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
pub struct Readme;
