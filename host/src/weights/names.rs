//! Names in files -> names that plugins use: those of a language model alone, where a file is of a larger model that wraps it.
//! Checkpoints and adapters go through the same rule, so that an adapter finds its layers whichever of the two was saved unwrapped.

use super::checkpoint::Checkpoint;
use crate::error::Result;

/// A checkpoint by plain names.
pub fn plain_names(checkpoint: Checkpoint) -> Result<Checkpoint> {
    let wrapped = is_wrapped(checkpoint.names());
    checkpoint.rename(|name| plain_name(name, wrapped))
}

/// Whether these are the names of a model that wraps a language model.
pub fn is_wrapped<'a>(mut names: impl Iterator<Item = &'a str>) -> bool {
    names.any(|n| n.starts_with("language_model.") || n.starts_with("model.language_model."))
}

/// The plain form of one name; `None` where it is no part of the language model, or is computed anyway.
pub fn plain_name(name: &str, wrapped: bool) -> Option<String> {
    // Tables that old exporters stored and every loader computes.
    if name.ends_with("rotary_emb.inv_freq") {
        return None;
    }
    if !wrapped {
        return Some(name.to_owned());
    }
    let text = name.strip_prefix("language_model.").or_else(|| name.strip_prefix("model.language_model."));
    match text {
        Some(text) if name.starts_with("model.") => Some(format!("model.{text}")),
        Some(text) => Some(text.to_owned()),
        None if name.starts_with("lm_head.") => Some(name.to_owned()),
        // What is left of a wrapper is its towers and projectors.
        None => None,
    }
}
