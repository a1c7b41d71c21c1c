//! Whole parameters of an adapter, put in the place of the checkpoint's before anything is planned. A trained weight is dense even
//! where the checkpoint's is packed; then the scales of the packed one go with it.

use super::Adapters;
use crate::{
    error::{Error, Result},
    weights::{
        checkpoint::Checkpoint,
        names::{is_wrapped, plain_name},
        recipe::float,
        stored::Stored,
    },
};
use std::{collections::BTreeMap, sync::atomic::Ordering};

const HEAD: &str = "lm_head.weight";

impl Adapters {
    /// Replaces the checkpoint's tensors by the adapter's whole ones. To be called before the plan is made, with the names as they are
    /// in the files or plain. Fails where a name is not in the checkpoint, or has another shape there.
    pub fn overlay(&self, checkpoint: &mut Checkpoint) -> Result<()> {
        self.overlaid.store(true, Ordering::Relaxed);
        if self.parts.full.is_empty() {
            return Ok(());
        }
        let wrapped = is_wrapped(checkpoint.names());
        let stored_names: BTreeMap<String, String> =
            checkpoint.names().filter_map(|name| Some((plain_name(name, wrapped)?, name.to_owned()))).collect();
        for (name, tensor) in &self.parts.full {
            match stored_names.get(name) {
                Some(stored_name) => replace(checkpoint, stored_name, name, tensor)?,
                // PEFT saves a tied embedding under both names.
                None if name == HEAD && self.is_embedding(tensor) => {}
                None => {
                    return Err(Error::Adapter(format!(
                        "{name}: the adapter replaces a tensor that this model does not have"
                    )));
                }
            }
        }
        Ok(())
    }

    fn is_embedding(&self, head: &Stored) -> bool {
        let embedding = self.parts.full.iter().find(|(name, _)| name.ends_with("embed_tokens.weight"));
        embedding.is_some_and(|(_, e)| e.dtype == head.dtype && e.shape == head.shape && *e.bytes() == *head.bytes())
    }
}

fn replace(checkpoint: &mut Checkpoint, stored_name: &str, name: &str, new: &Stored) -> Result<()> {
    let Some(old) = checkpoint.get(stored_name) else { return Ok(()) };
    let beside = |part: &str| stored_name.strip_suffix(".weight").map(|path| format!("{path}.{part}"));
    let scales = beside("scales").and_then(|scales| checkpoint.get(&scales));
    let unpacks = scales.is_some() && float(old.dtype).is_none() && float(new.dtype).is_some();
    let fits = match scales {
        Some(scales) if unpacks => fits_packed(new, old, scales),
        _ => old.shape == new.shape,
    };
    if !fits {
        let packed = if unpacks { " (packed)" } else { "" };
        return Err(Error::Adapter(format!(
            "{name}: adapter has {:?}, the model has {:?}{packed}",
            new.shape, old.shape
        )));
    }
    let both_numbers = float(new.dtype).is_some() && (float(old.dtype).is_some() || old.dtype.is_blocks());
    if !unpacks && !both_numbers && old.dtype != new.dtype {
        return Err(Error::Adapter(format!(
            "{name}: adapter has {}, which cannot stand where the model has {}",
            new.dtype, old.dtype
        )));
    }
    if unpacks {
        for part in ["scales", "biases"] {
            beside(part).and_then(|part| checkpoint.remove(&part));
        }
    }
    checkpoint.remove(stored_name);
    checkpoint.insert(stored_name, new.clone())
}

/// Whether a dense tensor has the shape of a packed one: the same rows, and columns of which words and groups are whole parts.
/// The plan compares the exact shape with what the architecture asks for.
fn fits_packed(new: &Stored, packed: &Stored, scales: &Stored) -> bool {
    let (Some((&cols, rows)), Some((&words, packed_rows)), Some(&groups)) =
        (new.shape.split_last(), packed.shape.split_last(), scales.shape.last())
    else {
        return false;
    };
    let bits = words * packed.dtype.size_in_bytes(8).unwrap_or(0);
    rows == packed_rows
        && cols > 0
        && groups > 0
        && bits.is_multiple_of(cols)
        && (2..=8).contains(&(bits / cols))
        && cols.is_multiple_of(groups)
}
