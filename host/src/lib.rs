//! dylm (dynamic-library language models): loads a Hugging Face or MLX checkpoint and generates text; the architecture is a plugin.

pub mod config;
pub mod error;
pub mod kernels;
pub mod processors;
pub mod repo;
pub mod sampler;
pub mod speculate;
pub mod statistics;
pub mod stop;
pub mod weights;

pub use error::{Error, Result};
