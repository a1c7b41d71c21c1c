//! dylm (dynamic-library language models): loads a Hugging Face or MLX checkpoint and generates text; the architecture is a plugin.

pub mod detokenize;
pub mod error;
pub mod kernels;
pub mod template;
pub mod tokenizer;
pub mod weights;

pub use error::{Error, Result};
