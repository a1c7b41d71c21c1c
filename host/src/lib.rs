//! dylm (dynamic-library language models): loads a Hugging Face or MLX checkpoint and generates text; the architecture is a plugin.

/// The commands of the binary.
pub mod cli {
    pub mod pull;
}
pub mod error;
pub mod hub;
pub mod kernels;
pub mod pip;
pub mod processors;
pub mod sampler;
pub mod source;
pub mod speculate;
pub mod statistics;
pub mod stop;
pub mod weights;

pub use error::{Error, Result};
