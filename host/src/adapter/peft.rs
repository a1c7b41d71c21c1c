//! What Hugging Face's PEFT trained -> parts by layer. `adapter_model.safetensors` has `base_model.model.<module path>.lora_A.weight`
//! `[rank, inputs]`, `.lora_B.weight` `[outputs, rank]`, and whole parameters that were trained beside them. The scale is
//! alpha / rank (alpha / √rank for rsLoRA), where patterns may give single layers an alpha and a rank of their own.

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
pub const TENSORS: &str = "adapter_model.safetensors";

// Variants of LoRA that compute something else, or change the base model.
const REFUSED: [&str; 12] = [
    "fan_in_fan_out",
    "use_qalora",
    "lora_bias",
    "ensure_weight_tying",
    "alora_invocation_tokens",
    "layer_replication",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "trainable_token_indices",
    "target_parameters",
];

/// Sorts the tensors by layer.
pub fn read(settings: &Settings, tensors: &Checkpoint) -> Result<Parts> {
    refuse_variants(settings)?;
    let dora = settings.flag("use_dora")?;
    let wrapped = is_wrapped(tensors.names().map(strip_prefix));
    let mut parts = Parts::default();
    // By plain path; the path as PEFT has it is what patterns match.
    let mut found: BTreeMap<String, (String, Found)> = BTreeMap::new();
    for (name, tensor) in tensors.iter() {
        let stripped = strip_prefix(name);
        let Some(plain) = plain_name(stripped, wrapped) else { continue };
        let Some((path, leaf)) = plain.split_once(".lora_") else {
            // Parameters of a layer that has a low-rank part as well are saved one level deeper.
            parts.full.insert(plain.replace(".base_layer.", "."), tensor.clone());
            continue;
        };
        let own_path = stripped.split_once(".lora_").map_or(stripped, |(path, _)| path);
        let (_, found) = found.entry(path.to_owned()).or_insert_with(|| (own_path.to_owned(), Found::default()));
        let factor = Factor { name: name.to_owned(), tensor: tensor.clone(), turned: true };
        match leaf {
            "A.weight" | "embedding_A" => found.a = Some(factor),
            "B.weight" | "embedding_B" => found.b = Some(factor),
            "magnitude_vector" | "magnitude_vector.weight" => found.m = Some(factor),
            _ => {
                return Err(Error::Adapter(format!(
                    "{name}: not a part of a LoRA adapter as PEFT saves it: save it with save_pretrained"
                )));
            }
        }
    }
    for (path, (own_path, found)) in found {
        let (rank, scale) = rank_and_scale(settings, &own_path)?;
        parts.layers.insert(path.clone(), found.complete(&path, rank, scale, dora, Convention::Peft)?);
    }
    Ok(parts)
}

fn strip_prefix(name: &str) -> &str {
    name.strip_prefix("base_model.model.").unwrap_or(name)
}

fn refuse_variants(settings: &Settings) -> Result<()> {
    match settings.text("peft_type")? {
        Some("LORA") => {}
        other => {
            let other = other.unwrap_or("missing");
            return Err(settings.wrong("peft_type", format!("is {other}: only LORA is supported")));
        }
    }
    for key in REFUSED {
        let value = settings.get(key);
        let is_set = value.is_some_and(|v| v.as_bool() != Some(false) && v.as_array().is_none_or(|a| !a.is_empty()));
        if let (true, Some(value)) = (is_set, value) {
            return Err(settings.wrong(key, format!("{value} is not supported: merge the adapter with PEFT first")));
        }
    }
    // These begin from other base weights than the checkpoint's.
    match settings.get("init_lora_weights").and_then(|v| v.as_str()) {
        None | Some("gaussian" | "eva" | "orthogonal") => Ok(()),
        Some(init) => Err(settings.wrong(
            "init_lora_weights",
            format!("\"{init}\" changes the base model's weights: let PEFT convert the adapter to plain LoRA"),
        )),
    }
}

/// Rank and scale of the layer `path`.
fn rank_and_scale(settings: &Settings, path: &str) -> Result<(usize, f64)> {
    let rank = match of_pattern(settings, "rank_pattern", path)? {
        Some((ranks, key)) => ranks.rank(&key)?,
        None => settings.rank("r")?,
    };
    let alpha = match of_pattern(settings, "alpha_pattern", path)? {
        Some((alphas, key)) => alphas.number(&key)?,
        None => settings.number("lora_alpha")?,
    };
    let alpha = alpha.ok_or_else(|| settings.wrong("lora_alpha", "is missing: the scale is lora_alpha / r"))?;
    let divisor = if settings.flag("use_rslora")? { (rank as f64).sqrt() } else { rank as f64 };
    Ok((rank, alpha / divisor))
}

/// The first key of a pattern that fits `path`. PEFT takes them as regular expressions for the end of a path; here they are
/// names, since that is what everybody writes there.
fn of_pattern(settings: &Settings, name: &str, path: &str) -> Result<Option<(Settings, String)>> {
    let Some(patterns) = settings.object(name)? else { return Ok(None) };
    let mut first = None;
    for key in patterns.map.keys() {
        let plain = key.strip_suffix('$').unwrap_or(key).replace("\\.", ".");
        let (anchored, plain) = match plain.strip_prefix('^') {
            Some(rest) => (true, rest),
            None => (false, plain.as_str()),
        };
        if plain.contains(['*', '+', '?', '[', ']', '(', ')', '{', '}', '|', '\\', '^', '$']) {
            return Err(patterns.wrong(key, "is a regular expression, which is not supported: write the layer's name"));
        }
        let fits = match path.strip_suffix(plain) {
            Some("") => true,
            Some(before) => !anchored && before.ends_with('.'),
            None => false,
        };
        if fits && first.is_none() {
            first = Some(key.clone());
        }
    }
    Ok(first.map(|key| (patterns, key)))
}
