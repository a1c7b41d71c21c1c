//! What a sequence has been through: for each layer its keys and values. The host owns it, so chunked prefill, trimming, reuse and
//! saving work for every architecture.

pub mod identity;
pub mod kv;
pub mod prompt;
pub mod rows;

use crate::{
    device::Placement,
    error::{Error, Result},
};
use kv::KvCache;
use plugin_api::abi::CacheSpec;
use serde::{Deserialize, Serialize};

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

/// One sequence's memory.
#[derive(Clone)]
pub struct State {
    /// One cache for each that the architecture declared.
    pub layers: Vec<KvCache>,
    /// Tokens seen: the position of the next one.
    pub offset: usize,
    /// Those tokens.
    pub tokens: Vec<u32>,
    /// How long the text is known to become, for ropes that look at it; set it to the prompt's length before the first chunk.
    pub horizon: usize,
    /// How it is kept.
    pub options: CacheOptions,
}

impl State {
    /// An empty memory.
    pub fn new(specs: &[CacheSpec], place: &Placement, options: &CacheOptions) -> Result<Self> {
        options.validate()?;
        if options.kv_bits.is_some() && !place.native {
            return Err(Error::Usage(
                "--kv-bits: quantized caches work on the cpu; leave it out, or use --device cpu".into(),
            ));
        }
        let layers = specs.iter().map(|spec| KvCache::new(spec, place, *options)).collect();
        Ok(State { layers, offset: 0, tokens: Vec::new(), horizon: 0, options: *options })
    }

    /// Whether the last `n` tokens can be forgotten: a window that has moved on cannot come back.
    pub fn can_trim(&self, n: usize) -> bool {
        n <= self.offset && self.layers.iter().all(|l| l.can_trim_to(self.offset - n))
    }

    /// Forgets the last `n` tokens.
    pub fn trim(&mut self, n: usize) -> Result<()> {
        if !self.can_trim(n) {
            return Err(Error::Generate(format!(
                "the cache cannot go back {n} of {} tokens: older ones were dropped",
                self.offset
            )));
        }
        self.offset -= n;
        self.tokens.truncate(self.offset);
        self.horizon = self.horizon.min(self.offset);
        let offset = self.offset;
        self.layers.iter_mut().for_each(|l| l.trim_to(offset));
        Ok(())
    }

    /// Bytes held by keys and values.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(KvCache::bytes).sum()
    }
}
