//! config.json, generation_config.json and `--config key=value` -> one flat JSON object that host and plugin read.
//! "One form" is the point: a wrapper's `text_config` is lifted to the top, and what newer libraries renamed is also
//! there under the older name, so that no plugin needs to know who wrote the file.

pub mod quantization;
mod rope;
pub mod scheme;

pub use quantization::{Kind, Mode, Quantization};
pub use scheme::{Bitnet, Scheme};

use crate::{
    error::{Error, Result},
    repo::{CONFIG_CAP, Folder},
};
use serde_json::{Map, Value};
use std::path::Path;

/// Tokens that end a text, for models that generate.
pub const GENERATION: &str = "generation_config.json";

/// A model's configuration, merged and checked as far as the host reads it.
#[derive(Debug, Clone)]
pub struct Config {
    /// Which architecture; safe to form a file name from.
    pub model_type: String,
    /// Tokens that end a text; empty where only the tokenizer knows.
    pub eos_token_ids: Vec<u32>,
    json: Map<String, Value>,
    quantization: Option<Quantization>,
}

impl Config {
    /// Reads a model's folder and lays `overrides` (keys may be paths, `rope_scaling.factor`) on top. Of a key that a file has
    /// twice the last counts.
    pub fn from_folder(dir: &Path, overrides: &[(String, Value)]) -> Result<Self> {
        let folder = Folder::open(dir)?;
        let Some(text) = folder.read_text("config.json", CONFIG_CAP)? else {
            let path = dir.join("config.json");
            return Err(Error::Config(format!("{}: not there: is this a model's folder?", path.display())));
        };
        let generation = folder.read_text(GENERATION, CONFIG_CAP)?;
        Self::from_texts(dir, &text, generation.as_deref(), overrides)
    }

    /// The same from the texts of config.json and generation_config.json; `dir` is where they lie, for messages.
    pub fn from_texts(dir: &Path, text: &str, generation: Option<&str>, overrides: &[(String, Value)]) -> Result<Self> {
        let (path, path_of_generation) = (dir.join("config.json"), dir.join(GENERATION));
        let mut json = parse(text, &path)?;
        let generation = generation.map(|text| parse(text, &path_of_generation)).transpose()?;
        if let Some(eos) =
            generation.and_then(|mut g| g.get_mut("eos_token_id").map(Value::take)).filter(|v| !v.is_null())
        {
            token_ids(&eos)
                .ok_or_else(|| bad_key(&path_of_generation.display().to_string(), "eos_token_id", &eos, TOKEN_IDS))?;
            object(&mut json, &path)?.insert("eos_token_id".into(), eos);
        }
        Self::from_json(json, overrides, &path.display().to_string())
    }

    /// The same from JSON at hand (a GGUF file's metadata); `source` is the file named in messages.
    pub fn from_json(mut json: Value, overrides: &[(String, Value)], source: &str) -> Result<Self> {
        // What these two hold is about to be moved: an override inside them has to come before, every other one after.
        let (before, after): (Vec<_>, Vec<_>) = overrides
            .iter()
            .partition(|(key, _)| matches!(key.split('.').next(), Some("text_config" | "rope_parameters")));
        for (key, value) in before {
            set(&mut json, key, value)?;
        }
        lift_text_config(&mut json);
        let map = object(&mut json, Path::new(source))?;
        add_old_names(map);
        rope::add_old_names(map);
        for (key, value) in after {
            set(&mut json, key, value)?;
        }
        let Value::Object(json) = json else {
            return Err(Error::Config(format!("{source}: not a JSON object")));
        };

        let model_type = match json.get("model_type") {
            None => return Err(Error::Config(format!("{source}: model_type is missing"))),
            Some(Value::String(name)) if is_model_type(name) => name.clone(),
            Some(other) => {
                return Err(bad_key(source, "model_type", other, "a name of letters, digits, _ . - (at most 64)"));
            }
        };
        let eos = json.get("eos_token_id").unwrap_or(&Value::Null);
        let eos_token_ids = token_ids(eos).ok_or_else(|| bad_key(source, "eos_token_id", eos, TOKEN_IDS))?;
        let quantization = Quantization::from_config(&json, source)?;
        Ok(Self { model_type, eos_token_ids, json, quantization })
    }

    /// The merged configuration as JSON text: what the plugin reads.
    pub fn text(&self) -> String {
        serde_json::to_string(&self.json).unwrap_or_default()
    }

    /// A key of the merged configuration.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.json.get(key).filter(|value| !value.is_null())
    }

    /// The merged configuration.
    pub fn json(&self) -> &Map<String, Value> {
        &self.json
    }

    /// How the weights are packed; `None` where they are plain numbers.
    pub fn quantization(&self) -> Option<&Quantization> {
        self.quantization.as_ref()
    }
}

/// Splits `key=value` as given to `--config`: the value is JSON where it parses as such, otherwise a string.
pub fn parse_override(text: &str) -> Result<(String, Value)> {
    match text.split_once('=') {
        Some((key, value)) if !key.trim().is_empty() => {
            let value = serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.into()));
            Ok((key.trim().into(), value))
        }
        _ => Err(Error::Usage(format!("--config {text}: write key=value, as in rope_scaling.factor=8"))),
    }
}

/// Whether a plugin's file name may be formed from this.
pub fn is_model_type(name: &str) -> bool {
    let allowed = |c: u8| c.is_ascii_alphanumeric() || b"_.-".contains(&c);
    (1..=64).contains(&name.len()) && !name.starts_with('.') && name.bytes().all(allowed)
}

const TOKEN_IDS: &str = "a token id or a list of them";

fn bad_key(source: &str, key: &str, value: &Value, expected: &str) -> Error {
    let mut text = value.to_string();
    if text.len() > 80 {
        let end = (0..=80).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
        text.truncate(end);
        text.push('…');
    }
    Error::Config(format!("{source}: {key} is {text}: it must be {expected}"))
}

fn token_ids(value: &Value) -> Option<Vec<u32>> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Null => Some(Vec::new()),
        Value::Array(ids) => ids.iter().map(id).collect(),
        one => Some(vec![id(one)?]),
    }
}

fn object<'a>(json: &'a mut Value, path: &Path) -> Result<&'a mut Map<String, Value>> {
    json.as_object_mut().ok_or_else(|| Error::Config(format!("{}: not a JSON object", path.display())))
}

/// JSON as Python writes it: with `NaN` and `Infinity`, which become null and the largest number.
fn parse(text: &str, path: &Path) -> Result<Value> {
    let strict = || serde_json::from_str(text);
    let parsed = strict().or_else(|e| match text.contains("Infinity") || text.contains("NaN") {
        true => serde_json::from_str(&without_python_numbers(text)),
        false => Err(e),
    });
    parsed.map_err(|e| Error::Config(format!("{}: not valid JSON ({e})", path.display())))
}

fn without_python_numbers(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    // Every second piece between quotes is a string, once escaped quotes are passed over.
    let (mut in_string, mut escaped, mut start) = (false, false, 0);
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' if in_string => escaped = true,
            '"' => {
                let piece = &text[start..at];
                match in_string {
                    true => out.push_str(piece),
                    false => out.push_str(&piece.replace("Infinity", "1.7976931348623157e308").replace("NaN", "null")),
                }
                out.push('"');
                (in_string, start) = (!in_string, at + 1);
            }
            _ => {}
        }
    }
    out.push_str(&text[start..].replace("Infinity", "1.7976931348623157e308").replace("NaN", "null"));
    out
}

// Sets a key at any depth; an object given for an object is merged into it.
fn set(json: &mut Value, path: &str, value: &Value) -> Result<()> {
    let mut slot = json;
    for key in path.split('.') {
        if slot.is_null() {
            *slot = Value::Object(Map::new());
        }
        let Value::Object(map) = slot else {
            return Err(Error::Usage(format!(
                "--config {path}: {key} has no place, what is above it is not an object"
            )));
        };
        slot = map.entry(key).or_insert(Value::Null);
    }
    merge(slot, value);
    Ok(())
}

fn merge(slot: &mut Value, value: &Value) {
    match (slot, value) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (slot, value) => *slot = value.clone(),
    }
}

// The wrapper is what the checkpoint is; these keys of it describe the whole and win over the text model's.
const OF_THE_WRAPPER: [&str; 8] = [
    "model_type",
    "architectures",
    "quantization",
    "quantization_config",
    "tie_word_embeddings",
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
];

fn lift_text_config(json: &mut Value) {
    let Some(map) = json.as_object_mut() else { return };
    if !map.get("text_config").is_some_and(Value::is_object) {
        return;
    }
    let Some(Value::Object(text)) = map.remove("text_config") else { return };
    if let Some(model_type) = text.get("model_type") {
        map.insert("text_model_type".into(), model_type.clone());
    }
    for (key, value) in text {
        let kept = OF_THE_WRAPPER.contains(&key.as_str()) && map.get(&key).is_some_and(|v| !v.is_null());
        if !kept {
            map.insert(key, value);
        }
    }
}

fn add_old_names(map: &mut Map<String, Value>) {
    if map.get("torch_dtype").is_none_or(Value::is_null)
        && let Some(dtype) = map.get("dtype").filter(|v| v.is_string()).cloned()
    {
        map.insert("torch_dtype".into(), dtype);
    }
}
