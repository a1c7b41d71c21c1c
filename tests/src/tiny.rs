//! Turns an entry of `tests/fixtures/tiny` (config.json, tensors.json, expected.json) into a checkpoint folder that can be loaded.
//!
//! No weights are stored: each value is a pure function of (seed, tensor name, flat index). `tests/fixtures/make_tiny` states the
//! rule and computes the same bits, so that the logits transformers or mlx-lm gave for them hold here.
//!
//! `TINY=llama,qwen3*` restricts the entries to these names (a trailing `*` stands for anything), `TINY_FIXTURES=FOLDER` takes the
//! entries of another folder: one built test serves another checkout, with its plugins in `DYLM_PLUGINS`.

use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// What goes wrong here is a damaged fixture or a full disk: the text is for the author of a test.
pub type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

/// The dtype that the weights are stored in. `expected.json` holds for `F32` only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightDtype {
    /// As generated.
    F32,
    /// The generated values, rounded to the nearest bfloat16, ties to even.
    Bf16,
}

/// The initialization of one tensor, as `tensors.json` lists it.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorSpec {
    /// Name in the checkpoint; it seeds the values.
    pub name: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// What its values are.
    pub range: Range,
}

/// A uniform distribution.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Range {
    /// Of f32 numbers: the middle and half of the width, multiples of 1/256.
    Floats(f64, f64),
    /// Of bytes: the least and the greatest.
    Bytes(u8, u8),
}

/// `tensors.json`: every tensor of a checkpoint, in the order of the file.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// One per entry, chosen so that no greedy step and no expert choice is a close call.
    pub seed: u64,
    /// Sorted by name.
    pub tensors: Vec<TensorSpec>,
}

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
    crate::tiny_tokenizer::write(&config, out)?;
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

impl Checkpoint {
    /// Reads `tensors.json` of an entry.
    pub fn read(entry: &Path) -> Result<Self> {
        let json = read_json(&entry.join("tensors.json"))?;
        let lines = json["tensors"].as_object().ok_or("tensors.json: no tensors")?;
        let mut tensors = Vec::new();
        for (pattern, fields) in lines {
            let read = || {
                let shape =
                    fields[0].as_array()?.iter().map(|n| Some(n.as_u64()? as usize)).collect::<Option<Vec<_>>>()?;
                let range = match fields[3].as_str() {
                    None => Range::Floats(fields[1].as_f64()?, fields[2].as_f64()?),
                    Some("u8") => Range::Bytes(fields[1].as_u64()? as u8, fields[2].as_u64()? as u8),
                    Some(_) => return None,
                };
                let names = names(pattern)?.into_iter();
                Some(names.map(move |name| TensorSpec { name, shape: shape.clone(), range }))
            };
            tensors.extend(read().ok_or_else(|| format!("tensors.json: cannot read {pattern:?}: {fields}"))?);
        }
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Self { seed: json["seed"].as_u64().ok_or("tensors.json: no seed")?, tensors })
    }

    fn write(&self, file: &Path, dtype: WeightDtype) -> Result<()> {
        let stored: Vec<_> = self.tensors.iter().map(|tensor| (tensor, tensor.stored(self.seed, dtype))).collect();
        let views = stored
            .iter()
            .map(|(tensor, (kind, bytes))| Ok((&tensor.name, TensorView::new(*kind, tensor.shape.clone(), bytes)?)))
            .collect::<Result<Vec<_>>>()?;
        let metadata = [("format".to_owned(), "pt".to_owned())].into();
        safetensors::serialize_to_file(views, Some(metadata), file)?;
        Ok(())
    }
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

impl TensorSpec {
    /// The values in row-major order; bytes as the numbers that they are.
    pub fn values(&self, seed: u64) -> impl Iterator<Item = f32> + use<> {
        let (start, range) = (fnv1a(&self.name) ^ seed, self.range);
        (0..self.shape.iter().product::<usize>() as u64).map(move |index| {
            let bits = splitmix64(start.wrapping_add(index.wrapping_mul(GOLDEN))) >> 40;
            match range {
                // 24 bits times n/256, plus n/256: exact in f64, so the cast rounds once.
                Range::Floats(center, scale) => (center + scale * (bits as f64 / 8_388_608.0 - 1.0)) as f32,
                Range::Bytes(low, high) => (u64::from(low) + ((bits * (u64::from(high - low) + 1)) >> 24)) as f32,
            }
        })
    }

    /// As a file holds them: floats in `dtype`, bytes as they are.
    pub fn stored(&self, seed: u64, dtype: WeightDtype) -> (Dtype, Vec<u8>) {
        let values = self.values(seed);
        match (self.range, dtype) {
            (Range::Bytes(..), _) => (Dtype::U8, values.map(|value| value as u8).collect()),
            (_, WeightDtype::F32) => (Dtype::F32, values.flat_map(f32::to_le_bytes).collect()),
            (_, WeightDtype::Bf16) => (Dtype::BF16, values.flat_map(|value| bf16_bits(value).to_le_bytes()).collect()),
        }
    }
}

/// "a.{0..2,5}.b" names a.0.b, a.1.b, a.2.b and a.5.b; None if the braces hold anything else.
fn names(pattern: &str) -> Option<Vec<String>> {
    let Some((start, rest)) = pattern.split_once('{') else { return Some(vec![pattern.to_owned()]) };
    let (numbers, rest) = rest.split_once('}')?;
    let (rest, mut all) = (names(rest)?, Vec::new());
    for run in numbers.split(',') {
        let (first, last) = run.split_once("..").unwrap_or((run, run));
        for number in first.parse::<usize>().ok()?..=last.parse().ok()? {
            all.extend(rest.iter().map(|rest| format!("{start}{number}{rest}")));
        }
    }
    Some(all)
}

/// Numbers between `-scale` and `scale`, by the rule of the checkpoints, with seed 0.
pub fn uniform(name: &str, count: usize, scale: f32) -> Vec<f32> {
    let spec = TensorSpec { name: name.to_owned(), shape: vec![count], range: Range::Floats(0.0, f64::from(scale)) };
    spec.values(0).collect()
}

/// Fowler-Noll-Vo 1a, 64 bits.
fn fnv1a(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// One step of Steele, Lea and Flood's generator (2014).
fn splitmix64(x: u64) -> u64 {
    let x = x.wrapping_add(GOLDEN);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Nearest bfloat16, ties to even; the generated values are all finite.
fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    serde_json::from_str(&text).map_err(|error| format!("{}: {error}", path.display()).into())
}

fn list<T>(json: &Value, key: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Vec<T>> {
    let items = json[key].as_array().ok_or_else(|| format!("no list {key:?}"))?;
    items.iter().map(|item| read(item).ok_or_else(|| format!("{key}: cannot read {item}").into())).collect()
}
