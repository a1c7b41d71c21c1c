//! Recurrences over one sequence's tokens: every kernel takes the state before the first of them and leaves the state after the last,
//! so that a text may come in pieces of any length.

mod by_head;
mod gated_delta;
mod linear_attention;
mod rg_lru;
mod wkv7;

pub use by_head::{Decay, Recurrence, Shape, recur};
pub use gated_delta::GatedDelta;
pub use linear_attention::LinearAttention;
pub use rg_lru::rg_lru;
pub use wkv7::Wkv7;
