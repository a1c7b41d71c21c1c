//! A list of tensors -> a checkpoint of a few KB with made-up weights, for a new plugin's first words and for tests.
//!
//! No weights are stored: each value is a pure function of (seed, tensor name, flat index), the same on every machine. The tests' script
//! `make_tiny` states the rule too and computes the same bits, so that logits of other programs hold for these weights.

pub mod tokenizer;

use crate::error::{Error, Result};
use ::safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;
use std::path::Path;

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The dtype that the weights are stored in.
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
    /// Chosen so that no greedy step and no expert choice is a close call.
    pub seed: u64,
    /// Sorted by name.
    pub tensors: Vec<TensorSpec>,
}

impl Checkpoint {
    /// Reads `tensors.json` of a folder.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("tensors.json");
        let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
        Self::parse(&text).map_err(|e| Error::Config(format!("{}: {e}", path.display())))
    }

    /// From the text of a `tensors.json`: `{"seed": 7, "tensors": {"layers.{0..2}.weight": [[4, 8], 0, 0.5]}}`.
    pub fn parse(text: &str) -> Result<Self> {
        let wrong = |what: String| Error::Config(format!("tensors.json: {what}"));
        let json: Value = serde_json::from_str(text).map_err(|e| wrong(e.to_string()))?;
        let lines = json["tensors"].as_object().ok_or_else(|| wrong("no tensors".into()))?;
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
            tensors.extend(read().ok_or_else(|| wrong(format!("cannot read {pattern:?}: {fields}")))?);
        }
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Self { seed: json["seed"].as_u64().ok_or_else(|| wrong("no seed".into()))?, tensors })
    }

    /// Writes the weights as safetensors.
    pub fn write(&self, file: &Path, dtype: WeightDtype) -> Result<()> {
        let wrong = |e: ::safetensors::SafeTensorError| Error::Weights(format!("{}: {e}", file.display()));
        let stored: Vec<_> = self.tensors.iter().map(|tensor| (tensor, tensor.stored(self.seed, dtype))).collect();
        let views = stored
            .iter()
            .map(|(tensor, (kind, bytes))| Ok((&tensor.name, TensorView::new(*kind, tensor.shape.clone(), bytes)?)))
            .collect::<Result<Vec<_>, _>>()
            .map_err(wrong)?;
        let metadata = [("format".to_owned(), "pt".to_owned())].into();
        let bytes = ::safetensors::serialize(views, Some(metadata)).map_err(wrong)?;
        std::fs::write(file, bytes).map_err(Error::io(file))
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
                Range::Bytes(low, high) => {
                    (u64::from(low) + ((bits * (u64::from(high.saturating_sub(low)) + 1)) >> 24)) as f32
                }
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
