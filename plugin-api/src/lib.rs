//! The words in which a dylm architecture is written.
//!
//! A plugin is one crate of type `cdylib` with one file: the keys of config.json that it reads, its blocks from the inside out, and the
//! trait [`Architecture`]. It names tensors and orders ops; everything else (files, quantization, LoRA, devices, positions, masks,
//! caches, batching, sampling) is the host's, so the same library serves all of it, and later improvements too.
//!
//! ```
//! use plugin_api::prelude::*;
//!
//! config! {
//!     struct Config {
//!         vocab_size: usize,
//!         hidden_size: usize,
//!         num_hidden_layers: usize,
//!         num_attention_heads: usize where >= 1,
//!         head_dim: usize = hidden_size / num_attention_heads,
//!     }
//! }
//!
//! struct Block { norm: RmsNorm, qkv: [Linear; 3], out: Linear, rope: Rope, head_dim: usize }
//!
//! impl Block {
//!     fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
//!         let normed = self.norm.forward(x);
//!         let [q, k, v] = self.qkv.each_ref().map(|proj| proj.forward(&normed).split_heads(self.head_dim));
//!         let (q, k) = (layer.rotate(&self.rope, q), layer.rotate(&self.rope, k));
//!         let scale = (self.head_dim as f32).powf(-0.5);
//!         x + self.out.forward(&layer.attend(q, k, v, &Attend { scale, ..Default::default() }).merge_heads())
//!     }
//! }
//!
//! struct Tiny { embed: Embedding, blocks: Vec<Block> }
//!
//! impl Architecture for Tiny {
//!     const MODEL_TYPES: &'static [&'static str] = &["tiny"];
//!     type Config = Config;
//!     type Model = Self;
//!
//!     fn new(c: Config, w: &Weights) -> Result<Self> {
//!         let (dim, heads) = (c.hidden_size, c.num_attention_heads * c.head_dim);
//!         Ok(Self {
//!             embed: w.embedding("embed", c.vocab_size, dim),
//!             blocks: w.at("blocks").each(c.num_hidden_layers, |w, _| Ok(Block {
//!                 norm: w.rms_norm("norm", dim, 1e-5),
//!                 qkv: w.linears(dim, false, [("q", heads), ("k", heads), ("v", heads)]),
//!                 out: w.linear("out", heads, dim, false),
//!                 rope: w.rope(c.head_dim, 10_000.0, &None),
//!                 head_dim: c.head_dim,
//!             }))?,
//!         })
//!     }
//! }
//!
//! impl Model for Tiny {
//!     fn caches(&self) -> Vec<Cache> {
//!         vec![Cache::key_value(None); self.blocks.len()]
//!     }
//!
//!     fn forward(&self, tokens: &Tensor, step: &mut Step) -> Tensor {
//!         step.through(&self.blocks, self.embed.forward(tokens), Block::forward)
//!     }
//!
//!     fn head(&self, hidden: &Tensor) -> Tensor {
//!         self.embed.as_linear(hidden)
//!     }
//! }
//!
//! export_plugin!(Tiny);
//! ```
//!
//! Build it with `panic = "unwind"` (cargo's default): a panic is then caught here and becomes an error of the host.

pub mod abi;
pub mod architecture;
pub mod blocks;
pub mod cache;
pub mod config;
#[doc = include_str!("contract.md")]
pub mod contract {}
pub mod experts;
pub mod export;
pub mod layers;
pub mod own_op;
pub mod scan;
pub mod step;
pub mod tensor;
pub mod weights;

pub use abi::ops::have;
pub use architecture::{Architecture, Error, Model, Result};
pub use blocks::*;
pub use cache::Cache;
pub use config::RopeScaling;
pub use experts::{ExpertKind, Experts, ExpertsShape};
pub use layers::{Conv1d, Embedding, LayerNorm, Linear, MultiLinear, Norm, Parameter, RmsNorm, Rope};
pub use own_op::{Op, OwnOp, View};
pub use step::{Attend, BlockChoice, Layer, Pooled, SparseBlocks, Step};
pub use tensor::Tensor;
pub use weights::{Source, Weights};

#[doc(hidden)]
pub use abi_stable;

/// Everything that an architecture's file needs: `use plugin_api::prelude::*;`
pub mod prelude {
    pub use crate::{
        Architecture, Attend, BlockChoice, Cache, Conv1d, Embedding, ExpertKind, Experts, ExpertsShape, Layer,
        LayerNorm, Linear, Model, MultiLinear, Norm, Op, OwnOp, Parameter, Pooled, Result, RmsNorm, Rope, RopeScaling,
        Source, SparseBlocks, Step, Tensor, View, Weights, blocks::*, config, decoder_shape, export_plugin, have,
    };
}
