//! dylm (dynamic-library language models): loads a Hugging Face or MLX checkpoint and generates text; the architecture is a plugin.

pub mod adapter;
pub mod cache;
pub mod cli;
pub mod config;
pub mod detokenize;
pub mod device;
pub mod error;
pub mod hub;
pub mod kernels;
pub mod layers;
pub mod model;
mod ops;
pub mod pip;
pub mod plugin;
pub mod processors;
pub mod repo;
pub mod sampler;
pub mod source;
pub mod speculate;
pub mod statistics;
pub mod stop;
pub mod template;
pub mod tokenizer;
pub mod weights;

pub use error::{Error, Result};
