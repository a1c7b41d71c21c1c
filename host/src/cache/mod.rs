//! What a sequence has been through: for each layer its keys and values, or the state of its recurrence. The host owns it, so chunked
//! prefill, trimming, reuse and saving work for every architecture.

pub mod identity;
pub mod kv;
pub mod memory;
pub mod numbers;
#[cfg(feature = "cuda")]
pub mod packed;
pub mod prompt;
pub mod room;
pub mod rows;
mod state;

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
pub use state::State;

/// How caches are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheOptions {
    /// Keep the first few tokens and the last ones, together this many (`--max-kv-size`); `None` keeps all.
    pub max_kv_size: Option<usize>,
    /// Quantize keys and values to so many bits (`--kv-bits`).
    pub kv_bits: Option<u32>,
    /// Values that share a scale (`--kv-group-size`).
    pub kv_group_size: usize,
    /// Quantize from this many tokens on (`--quantized-kv-start`).
    pub quantized_kv_start: usize,
}

impl Default for CacheOptions {
    fn default() -> Self {
        CacheOptions { max_kv_size: None, kv_bits: None, kv_group_size: 64, quantized_kv_start: 5000 }
    }
}

/// Tokens at the start that `max_kv_size` always keeps: attention leans on them. <https://arxiv.org/abs/2309.17453>
pub const KEEP: usize = 4;

impl CacheOptions {
    /// Values that make no sense, in one sentence.
    pub fn validate(&self) -> Result<()> {
        match self.max_kv_size {
            Some(n) if n <= KEEP => {
                return Err(Error::Usage(format!(
                    "--max-kv-size {n}: it must be above {KEEP}, the tokens always kept"
                )));
            }
            _ => {}
        }
        match self.kv_bits {
            Some(bits) if !matches!(bits, 2 | 3 | 4 | 5 | 6 | 8) => {
                return Err(Error::Usage(format!("--kv-bits {bits}: 2, 3, 4, 5, 6 and 8 can be packed")));
            }
            _ => {}
        }
        if !matches!(self.kv_group_size, 32 | 64 | 128) {
            return Err(Error::Usage(format!("--kv-group-size {}: 32, 64 or 128", self.kv_group_size)));
        }
        Ok(())
    }
}
