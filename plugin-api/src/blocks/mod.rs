//! Blocks that papers cite rather than define, and the config keys that pick between them. Each is a composition of the words in the
//! other files and issues no op of its own, so an author whose model differs in one line writes that block anew.

mod activation;
mod alibi;
mod attention;
mod block;
mod branch;
mod compressor;
mod decoder;
mod delta_rule;
mod hyper_connection;
mod kimi_delta;
mod layer_ropes;
mod mamba;
mod mamba2;
mod mla;
mod mlp;
mod moe;
mod output_gate;
mod per_layer;
mod per_layer_inputs;
mod qk_norm;
mod sharing;
mod turning;

pub use activation::{Activation, LayerTypes, SiluOnly};
pub use alibi::alibi_slopes;
pub use attention::{Heads, SelfAttention};
pub use block::{Block, FeedForward, Mixer};
pub use branch::{AnyMixer, Branch, Unmixed};
pub use compressor::{Compression, Compressor};
pub use decoder::{Decoder, DecoderShape, LmHead};
pub use delta_rule::{DeltaRule, DeltaShape};
pub use hyper_connection::{HyperConnection, HyperHead, HyperShape};
pub use kimi_delta::{KimiDelta, KimiDeltaShape};
pub use layer_ropes::LayerRopes;
pub use mamba::{Mamba, MambaShape, OrAuto};
pub use mamba2::{GatedNorm, Mamba2, Mamba2Shape, TimeStepLimit};
pub use mla::{Mla, MlaShape};
pub use mlp::{GatedMlp, Mlp};
pub use moe::{Ffn, GroupScore, Moe, Router, Score};
pub use per_layer::PerLayer;
pub use per_layer_inputs::{PerLayerGate, PerLayerInputs, PerLayerShape};
pub use sharing::SharingAttention;
