//! Checkpoint files -> named tensors in the file's own format -> what the layers compute with.

pub mod bytes;
pub mod checkpoint;
mod floats;
pub mod forms;
pub mod gguf;
pub mod load;
pub mod moving;
pub mod names;
pub mod plan;
pub mod recipe;
mod rows;
pub mod safetensors;
mod shape;
pub mod stored;

pub use checkpoint::Checkpoint;
pub use stored::{Dtype, Stored};
