//! Turns an entry of `tests/fixtures/tiny` (config.json, tensors.json, expected.json) into a checkpoint folder that can be loaded.
//!
//! No weights are stored: `dylm::tiny` makes them, and `tests/fixtures/make_tiny` makes the same ones, so that the logits transformers or
//! mlx-lm gave for them hold here.
//!
//! `TINY=llama,qwen3*` restricts the entries to these names (a trailing `*` stands for anything), `TINY_FIXTURES=FOLDER` takes the
//! entries of another folder: one built test serves another checkout, with its plugins in `DYLM_PLUGINS`.

use std::path::{Path, PathBuf};

use serde_json::Value;

pub use dylm::tiny::{Checkpoint, Range, TensorSpec, WeightDtype};

/// What goes wrong here is a damaged fixture or a full disk: the text is for the author of a test.
pub type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

/// `expected.json`: what the reference computed for the checkpoint, in f32 on the CPU.
#[derive(Clone, Debug, PartialEq)]
pub struct Expected {
    /// Token ids.
    pub prompt: Vec<u32>,
    /// The six greedy tokens (two with an adapter) after the prompt, fed one by one through the cache.
    pub steps: Vec<u32>,
    /// `[7][vocab]` (`[3][vocab]` with an adapter), to six decimals: row 0 follows the prompt, row `i` follows `steps[i - 1]`.
    pub logits: Vec<Vec<f32>>,
    /// The same rows without a cache, where that is known to give something else: rotary frequencies that depend on the
    /// length so far leave cached keys rotated by the frequencies of their own time.
    pub uncached_logits: Option<Vec<Vec<f32>>>,
    /// (tensor, flat index, f32 bits or byte) of some generated values.
    pub samples: Vec<(String, usize, u32)>,
    /// How far off the logits may be, relative to the largest: 2e-5, or what `entry.json` allows and gives a reason for.
    pub bound: f32,
}

/// f32's own noise over a few layers, with a margin.
const BOUND: f32 = 2e-5;

/// `tests/fixtures/tiny`, or the folder that `TINY_FIXTURES` names.
pub fn fixtures() -> PathBuf {
    let own = || Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tiny");
    std::env::var_os("TINY_FIXTURES").map_or_else(own, PathBuf::from)
}

/// The folder of every entry, sorted by name.
pub fn all_entries() -> Result<Vec<PathBuf>> {
    let folder = fixtures();
    let mut entries: Vec<_> = std::fs::read_dir(&folder)
        .map_err(|error| format!("{}: {error}", folder.display()))?
        .map(|e| e.map(|e| e.path()))
        .collect::<Result<_, std::io::Error>>()?;
    entries.retain(|entry| entry.join("tensors.json").is_file());
    entries.sort();
    Ok(entries)
}

/// Those of [`all_entries`] that `TINY` lets through.
///
/// # Errors
/// If a name in `TINY` is none of an entry: a mistyped name must not pass for a test that succeeds.
pub fn entries() -> Result<Vec<PathBuf>> {
    let mut entries = all_entries()?;
    let Ok(wanted) = std::env::var("TINY") else { return Ok(entries) };
    let fits = |entry: &PathBuf, pattern: &str| {
        let name = name(entry);
        pattern.strip_suffix('*').map_or(name == pattern, |start| name.starts_with(start))
    };
    let patterns: Vec<&str> = wanted.split(',').map(str::trim).filter(|pattern| !pattern.is_empty()).collect();
    if let Some(none) = patterns.iter().find(|pattern| !entries.iter().any(|entry| fits(entry, pattern))) {
        return Err(format!("TINY: no entry {none:?} with a tensors.json in {}", fixtures().display()).into());
    }
    entries.retain(|entry| patterns.iter().any(|pattern| fits(entry, pattern)));
    Ok(entries)
}

/// config.json of an entry, or of a folder that it was written into.
pub fn config(entry: &Path) -> Result<Value> {
    read_json(&entry.join("config.json"))
}

/// entry.json of an entry, or null where there is nothing to say.
pub fn facts(entry: &Path) -> Result<Value> {
    let file = entry.join("entry.json");
    if file.is_file() { read_json(&file) } else { Ok(Value::Null) }
}

/// An entry's name: that of its folder.
pub fn name(entry: &Path) -> String {
    entry.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Writes `config.json`, `model.safetensors` and a tokenizer with a chat template into `out`, which must exist.
pub fn write(entry: &Path, out: &Path) -> Result<()> {
    write_as(entry, out, WeightDtype::F32)
}

/// The folder of an adapter for one of the entries: `llama-lora` or `llama-dora`. [`Expected::read`] reads what is expected with it.
pub fn adapter(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/adapter").join(name)
}

/// Writes `adapter_config.json` and `adapters.safetensors` of an [`adapter`] into `out`, which must exist.
pub fn write_adapter(adapter: &Path, out: &Path) -> Result<()> {
    Checkpoint::read(adapter)?.write(&out.join("adapters.safetensors"), WeightDtype::F32)?;
    std::fs::copy(adapter.join("adapter_config.json"), out.join("adapter_config.json"))?;
    Ok(())
}

/// [`write()`], with the weights in `dtype`.
pub fn write_as(entry: &Path, out: &Path, dtype: WeightDtype) -> Result<()> {
    Checkpoint::read(entry)?.write(&out.join("model.safetensors"), dtype)?;

    let mut config = config(entry)?;
    dylm::tiny::tokenizer::write(&config, out)?;
    if dtype == WeightDtype::Bf16 {
        for key in ["torch_dtype", "dtype"] {
            if config.get(key).is_some() {
                config[key] = "bfloat16".into();
            }
        }
    }
    std::fs::write(out.join("config.json"), serde_json::to_string_pretty(&config)?)?;
    Ok(())
}

impl Expected {
    /// Reads `expected.json` of an entry.
    pub fn read(entry: &Path) -> Result<Self> {
        let json = read_json(&entry.join("expected.json"))?;
        let id = |id: &Value| Some(id.as_u64()? as u32);
        let row = |row: &Value| row.as_array()?.iter().map(|x| Some(x.as_f64()? as f32)).collect::<Option<Vec<_>>>();
        let sample = |s: &Value| Some((s[0].as_str()?.to_owned(), s[1].as_u64()? as usize, s[2].as_u64()? as u32));
        Ok(Self {
            bound: facts(entry)?["bound"].as_f64().map_or(BOUND, |bound| bound as f32),
            prompt: list(&json, "prompt", id)?,
            steps: list(&json, "steps", id)?,
            logits: list(&json, "logits", row)?,
            uncached_logits: json.get("uncached_logits").map(|_| list(&json, "uncached_logits", row)).transpose()?,
            samples: list(&json, "samples", sample)?,
        })
    }
}

/// Numbers between `-scale` and `scale`, by the rule of the checkpoints, with seed 0.
pub fn uniform(name: &str, count: usize, scale: f32) -> Vec<f32> {
    let spec = TensorSpec { name: name.to_owned(), shape: vec![count], range: Range::Floats(0.0, f64::from(scale)) };
    spec.values(0).collect()
}

fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    serde_json::from_str(&text).map_err(|error| format!("{}: {error}", path.display()).into())
}

fn list<T>(json: &Value, key: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Vec<T>> {
    let items = json[key].as_array().ok_or_else(|| format!("no list {key:?}"))?;
    items.iter().map(|item| read(item).ok_or_else(|| format!("{key}: cannot read {item}").into())).collect()
}
