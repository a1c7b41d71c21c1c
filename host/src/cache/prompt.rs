//! Prompt cache files: a `State` to one safetensors file and back, in mlx-lm's layout as far as that can express it, with dylm's own
//! facts in one metadata entry that mlx-lm passes over.
//!
//! Tensors of layer L, as mlx-lm 0.32.2 writes them: `L.0` keys and `L.1` values, `[1, kv_heads, entries, head_dim]` (packed ones are
//! `L.0.0` u32, `L.0.1` scales, `L.0.2` biases), then the layer's numbers as tensors without a shape, `L.2` ..: offset first. Metadata:
//! `0.KEY` facts, `1.L` class names, `2.I.0` and `2.I.1` which tensors are numbers. mlx-lm 0.32.0 and before: facts at `1.KEY`, class
//! names at `2.L`, a layer's numbers in `0.L`. Both are read.
//! A state of a recurrence is an `ArraysCache` of one array, `L.0.0` `[1, ..]`, with nothing in `L.1` and `L.2`; mlx-lm joins those of a
//! layer in one, which tells neither the model's layers nor the tokens seen, so its own files with such layers are not taken. <https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/models/cache.py>

mod read;
mod write;

use super::CacheOptions;
use crate::{
    error::{Error, Result},
    weights::{bytes::Bytes, checkpoint::Checkpoint},
};
use ::safetensors::SafeTensors;
use serde::{Deserialize, Serialize};
use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};
pub use write::save;

/// Stands for a token of a cache that does not tell its tokens.
pub const UNKNOWN: u32 = u32::MAX;

/// The layout of dylm's own facts; a reader refuses a higher number.
const FORMAT: u32 = 1;

/// The text that a cache holds, as what it began a conversation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CachedText {
    /// The system message before it.
    pub system_prompt: Option<String>,
    /// The beginning of the first user message, or of a plain text.
    pub text: String,
    /// Whether a chat template was around it.
    pub chat: bool,
}

/// What a file is saved with, beside the state.
#[derive(Clone, Debug)]
pub struct Origin<'a> {
    /// What to load the model by: a Hub id, a path, `pip:PACKAGE`.
    pub model: &'a str,
    /// See [`fingerprint`](super::identity::fingerprint).
    pub fingerprint: &'a str,
    /// What the tokens came from.
    pub text: &'a CachedText,
}

/// dylm's own facts, as JSON under `0.dylm`.
#[derive(Serialize, Deserialize)]
struct Facts {
    format: u32,
    version: String,
    fingerprint: String,
    text: CachedText,
    tokens: Vec<u32>,
    horizon: usize,
    options: CacheOptions,
    /// Positions of each layer's entries, as runs `from..to`; none of a state.
    positions: Vec<Vec<(u32, u32)>>,
}

/// A prompt cache file, opened and checked as far as that takes no model.
pub struct PromptCache {
    /// The file.
    pub path: PathBuf,
    /// The model that it was made with.
    pub model: String,
    /// Which model that was, exactly; `None` in a file of mlx-lm.
    pub fingerprint: Option<String>,
    /// What its tokens came from; `None` in a file of mlx-lm.
    pub text: Option<CachedText>,
    facts: Option<Facts>,
    classes: Vec<String>,
    tensors: Checkpoint,
    metadata: HashMap<String, String>,
    offset: usize,
}

impl PromptCache {
    /// Opens a file of dylm or mlx-lm.
    ///
    /// # Errors
    /// One sentence: not there, damaged, of a later dylm, or not a prompt cache at all.
    pub fn open(path: &Path) -> Result<Self> {
        let tensors = Checkpoint::open_file(path)?;
        let bytes = Bytes::map(path)?;
        let wrong = |what: String| Error::Weights(format!("{}: {what}", path.display()));
        // The same header that was checked above; only its free text is of interest here.
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| wrong(format!("header refused ({e})")))?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let classes =
            ["1", "2"].map(|place| list(&metadata, place)).into_iter().max_by_key(Vec::len).unwrap_or_default();
        if classes.is_empty() {
            return Err(wrong("no prompt cache: make one with `dylm cache-prompt`".into()));
        }
        let facts: Option<Facts> = match metadata.get("0.dylm") {
            None => None,
            Some(text) => {
                let format = serde_json::from_str::<serde_json::Value>(text).ok().and_then(|v| v["format"].as_u64());
                if format.is_some_and(|format| format > FORMAT as u64) {
                    return Err(wrong("was written by a later dylm; update this one, or make the file again".into()));
                }
                Some(serde_json::from_str(text).map_err(|e| wrong(format!("is damaged ({e}); make it again")))?)
            }
        };
        let model = metadata.get("0.model").or(metadata.get("1.model")).cloned();
        let mut cache = PromptCache {
            path: path.to_owned(),
            model: model.ok_or_else(|| wrong("does not say which model it is for; make it again".into()))?,
            fingerprint: facts.as_ref().map(|f| f.fingerprint.clone()),
            text: facts.as_ref().map(|f| f.text.clone()),
            facts,
            classes,
            tensors,
            metadata,
            offset: 0,
        };
        cache.offset = cache.find_offset()?;
        Ok(cache)
    }

    /// Tokens in the cache.
    pub fn tokens(&self) -> usize {
        self.offset
    }

    fn wrong(&self, what: impl std::fmt::Display) -> Error {
        Error::Weights(format!("{}: {what}", self.path.display()))
    }
}

/// The texts `place.0`, `place.1`, .. as far as they are there.
fn list(metadata: &HashMap<String, String>, place: &str) -> Vec<String> {
    (0..).map_while(|i| metadata.get(&format!("{place}.{i}")).filter(|text| !text.is_empty()).cloned()).collect()
}

/// `[a, b, chunk]` -> `[b, a, chunk]`: between dylm's order (entry, head) and the file's (head, entry).
fn swap(bytes: &[u8], a: usize, b: usize, chunk: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len());
    for j in 0..b {
        for i in 0..a {
            out.extend_from_slice(&bytes[(i * b + j) * chunk..][..chunk]);
        }
    }
    out
}
