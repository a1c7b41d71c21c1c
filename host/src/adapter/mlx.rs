//! What mlx-lm trained -> parts by layer. `adapters.safetensors` has `<module path>.lora_a`, `.lora_b` and, for DoRA, `.m`; where
//! all of a layer was trained (`"fine_tune_type": "full"`), parameters under their own names. The scale is used as it stands.

use super::{
    Parts,
    low_rank::{Convention, Factor, Found},
    settings::Settings,
};
use crate::{
    error::{Error, Result},
    weights::{
        checkpoint::Checkpoint,
        names::{is_wrapped, plain_name},
    },
};
use std::collections::BTreeMap;

/// The file with the tensors.
pub const TENSORS: &str = "adapters.safetensors";

/// Sorts the tensors by layer.
pub fn read(settings: &Settings, tensors: &Checkpoint) -> Result<Parts> {
    let wrapped = is_wrapped(tensors.names());
    let plain = tensors.iter().filter_map(|(name, tensor)| Some((plain_name(name, wrapped)?, name, tensor)));
    let kind = settings.text("fine_tune_type")?.unwrap_or("lora");
    match kind {
        "full" => {
            let full = plain.map(|(plain, _, tensor)| (plain, tensor.clone())).collect();
            return Ok(Parts { full, ..Parts::default() });
        }
        "lora" | "dora" => {}
        other => return Err(settings.wrong("fine_tune_type", format!("\"{other}\" is not lora, dora or full"))),
    }
    let parameters = settings
        .object("lora_parameters")?
        .ok_or_else(|| settings.wrong("lora_parameters", "is missing: it says rank and scale of the adapter"))?;
    let rank = parameters.rank("rank")?;
    let scale = parameters.number("scale")?.ok_or_else(|| {
        let hint = if parameters.get("alpha").is_some() { "; \"alpha\" is PEFT's: scale = alpha / rank" } else { "" };
        parameters.wrong("scale", format!("is missing: it multiplies the low-rank product{hint}"))
    })?;

    let mut found: BTreeMap<String, Found> = BTreeMap::new();
    for (plain, name, tensor) in plain {
        // Stacks of experts lie the other way round.
        let factor = Factor { name: name.to_owned(), tensor: tensor.clone(), turned: tensor.shape.len() == 3 };
        let (path, leaf) = plain.rsplit_once('.').unwrap_or(("", &plain));
        let found = found.entry(path.to_owned()).or_default();
        match leaf {
            "lora_a" => found.a = Some(factor),
            "lora_b" => found.b = Some(factor),
            "m" => found.m = Some(factor),
            _ => {
                return Err(Error::Adapter(format!(
                    "{name}: not a part of an adapter whose fine_tune_type is {kind}: those end in lora_a, lora_b and m"
                )));
            }
        }
    }
    let complete = |(path, found): (String, Found)| {
        let layer = found.complete(&path, rank, scale, kind == "dora", Convention::Mlx)?;
        Ok((path, layer))
    };
    Ok(Parts { layers: found.into_iter().map(complete).collect::<Result<_>>()?, ..Parts::default() })
}
