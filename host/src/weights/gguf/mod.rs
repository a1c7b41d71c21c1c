//! A GGUF file (llama.cpp's format: weights, configuration and tokenizer in one) -> what a checkpoint folder would have held.
//! This file reads the header; `names` renames tensors, `config` and `tokenizer` rewrite the metadata.
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, versions 2 and 3, little-endian.

mod config;
mod names;
mod pre_tokenizer;
mod reader;
mod tokenizer;

pub use reader::{Numbers, Value};

use crate::{
    error::{Error, Result},
    weights::{
        bytes::Bytes,
        checkpoint::Checkpoint,
        stored::{Dtype, Stored},
    },
};
use reader::Reader;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
};

const METADATA_CAP: u64 = 1 << 16;
const TENSORS_CAP: u64 = 1 << 20;
const DIMENSIONS_CAP: u32 = 4;
// What the shortest entries take in the file.
const LEAST_METADATA_BYTES: u64 = 8 + 4 + 1;
const LEAST_TENSOR_BYTES: u64 = 8 + 4 + 4 + 8;

/// An opened GGUF file (or all files of a split one).
#[derive(Debug)]
pub struct Gguf {
    /// Everything the header says, by key: `general.architecture`, `llama.block_count`, `tokenizer.ggml.tokens`.
    pub metadata: BTreeMap<String, Value>,
    /// Tensors by llama.cpp's names, shapes row-major.
    pub tensors: BTreeMap<String, Stored>,
    file: Arc<Path>,
}

impl Gguf {
    /// Opens a file; given the first of a split model (`NAME-00001-of-00003.gguf`), the others too.
    pub fn open(path: &Path) -> Result<Self> {
        let mut first = Self::open_one(path)?;
        let count = first.unsigned("split.count").unwrap_or(0);
        if count < 2 {
            return Ok(first);
        }
        for part in 2..=count {
            let next = Self::open_one(&part_path(path, part, count)?)?;
            for (name, tensor) in next.tensors {
                if first.tensors.contains_key(&name) {
                    return Err(Error::Weights(format!("{}: {name}: also in an earlier part", next.file.display())));
                }
                first.tensors.insert(name, tensor);
            }
        }
        let expected = first.unsigned("split.tensors.count").unwrap_or(first.tensors.len() as u64);
        if expected != first.tensors.len() as u64 {
            return Err(first.wrong(format!("{} tensors in all parts, should be {expected}", first.tensors.len())));
        }
        Ok(first)
    }

    fn open_one(path: &Path) -> Result<Self> {
        let wrong = |what: String| Error::Weights(format!("{}: {what}", path.display()));
        if !path.is_file() {
            return Err(wrong("not a file".into()));
        }
        let bytes = Bytes::map(path)?;
        let file: Arc<Path> = path.into();
        let mut reader = Reader::new(&bytes);
        let (metadata_count, tensor_count) = read_start(&mut reader).map_err(wrong)?;

        let mut metadata = BTreeMap::new();
        for _ in 0..metadata_count {
            let key = reader.name().map_err(wrong)?;
            let value = reader.value().map_err(|what| wrong(format!("{key}: {what}")))?;
            if metadata.contains_key(&key) {
                return Err(wrong(format!("{key}: twice in its header")));
            }
            metadata.insert(key, value);
        }
        let alignment = match metadata.get("general.alignment").map(Value::as_u64) {
            None => 32,
            Some(Some(a)) if a.is_power_of_two() && a <= 1 << 20 => a,
            Some(_) => return Err(wrong("general.alignment is not a power of two: the file is damaged".into())),
        };
        if tensor_count.saturating_mul(LEAST_TENSOR_BYTES) > reader.left() {
            return Err(wrong(format!("header of {tensor_count} tensors: the file is damaged or cut short")));
        }
        let mut entries = Vec::with_capacity(tensor_count as usize);
        for _ in 0..tensor_count {
            entries.push(Entry::read(&mut reader).map_err(wrong)?);
        }
        let start = (reader.position() as u64).next_multiple_of(alignment);
        let tensors = place(entries, &bytes, start, alignment, &file)?;
        Ok(Self { metadata, tensors, file })
    }

    /// The tensors under the names and in the conventions of a Hugging Face checkpoint.
    pub fn checkpoint(&self) -> Result<Checkpoint> {
        names::checkpoint(self)
    }

    /// The metadata as a `config.json`.
    pub fn config(&self) -> Result<serde_json::Value> {
        config::config(self)
    }

    /// The metadata as a tokenizer, and what `tokenizer_config.json` would say (special tokens, chat template).
    pub fn tokenizer(&self) -> Result<(tokenizers::Tokenizer, serde_json::Value)> {
        tokenizer::tokenizer(self)
    }

    /// `general.architecture`, in llama.cpp's spelling.
    pub fn architecture(&self) -> Result<&str> {
        let name = self.metadata.get("general.architecture").and_then(Value::as_str);
        name.ok_or_else(|| self.wrong("general.architecture is missing from its header"))
    }

    /// The file, as it was given.
    pub fn file(&self) -> &Path {
        &self.file
    }

    fn unsigned(&self, key: &str) -> Option<u64> {
        self.metadata.get(key).and_then(Value::as_u64)
    }

    fn wrong(&self, what: impl std::fmt::Display) -> Error {
        Error::Weights(format!("{}: {what}", self.file.display()))
    }
}

// Magic, version and counts.
fn read_start(reader: &mut Reader) -> Result<(u64, u64), String> {
    if reader.left() < 24 || reader.u32()? != u32::from_le_bytes(*b"GGUF") {
        return Err("not a GGUF file".into());
    }
    match reader.u32()? {
        2 | 3 => {}
        1 => return Err("GGUF version 1, from before 2023-10: convert the model again".into()),
        version if version.swap_bytes() <= 3 => {
            return Err("a big-endian GGUF file: convert the model for this machine".into());
        }
        version => return Err(format!("GGUF version {version}: versions 2 and 3 are read")),
    }
    let (tensors, metadata) = (reader.u64()?, reader.u64()?);
    if tensors > TENSORS_CAP || tensors.saturating_mul(LEAST_TENSOR_BYTES) > reader.left() {
        return Err(format!("header of {tensors} tensors: the file is damaged or cut short"));
    }
    if metadata > METADATA_CAP || metadata.saturating_mul(LEAST_METADATA_BYTES) > reader.left() {
        return Err(format!("header of {metadata} keys: the file is damaged or cut short"));
    }
    Ok((metadata, tensors))
}

struct Entry {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    offset: u64,
    size: u64,
}

impl Entry {
    fn read(reader: &mut Reader) -> Result<Self, String> {
        let name = reader.name()?;
        let wrong = |what: String| format!("{name}: {what}");
        let dimensions = reader.u32()?;
        if dimensions > DIMENSIONS_CAP {
            return Err(wrong(format!("{dimensions} dimensions: the file is damaged")));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let d = reader.u64()?;
            shape.push(usize::try_from(d).map_err(|_| wrong(format!("a dimension of {d}: the file is damaged")))?);
        }
        // GGUF counts dimensions from the innermost.
        shape.reverse();
        let dtype = dtype(reader.u32()?).map_err(wrong)?;
        let size =
            dtype.size_of_shape(&shape).ok_or_else(|| wrong(format!("{dtype} {shape:?} is not a possible shape")))?;
        Ok(Self { offset: reader.u64()?, size: size as u64, name, dtype, shape })
    }
}

// Gives each tensor its bytes; they may not reach over the file's end nor into one another.
fn place(
    mut entries: Vec<Entry>,
    bytes: &Bytes,
    start: u64,
    alignment: u64,
    file: &Arc<Path>,
) -> Result<BTreeMap<String, Stored>> {
    let data_len = (bytes.len() as u64).saturating_sub(start);
    entries.sort_by_key(|e| (e.offset, e.size));
    let (mut end_of_last, mut names) = (0, BTreeSet::new());
    let mut tensors = BTreeMap::new();
    for entry in entries {
        let Entry { name, dtype, shape, offset, size } = entry;
        let wrong = |what: String| Error::Weights(format!("{}: {name}: {what}", file.display()));
        if !offset.is_multiple_of(alignment) {
            return Err(wrong(format!("offset {offset} is not a multiple of {alignment}: the file is damaged")));
        }
        if offset < end_of_last {
            return Err(wrong("overlaps another tensor: the file is damaged".into()));
        }
        let end = offset.checked_add(size).filter(|&end| end <= data_len).ok_or_else(|| {
            wrong(format!("{size} bytes at {offset}, the file has {data_len} bytes of data: download it again"))
        })?;
        end_of_last = end;
        let data = bytes.slice((start + offset) as usize..(start + end) as usize);
        let data = data.ok_or_else(|| wrong("lies outside the file".into()))?;
        if !names.insert(name.clone()) {
            return Err(wrong("twice in its header".into()));
        }
        tensors.insert(name, Stored::new(dtype, shape, data, file.clone())?);
    }
    Ok(tensors)
}

fn dtype(code: u32) -> Result<Dtype, String> {
    // ggml's numbering, with its holes for types that were removed.
    let unsupported = match code {
        0 => return Ok(Dtype::F32),
        1 => return Ok(Dtype::F16),
        2 => return Ok(Dtype::Q4_0),
        3 => return Ok(Dtype::Q4_1),
        6 => return Ok(Dtype::Q5_0),
        7 => return Ok(Dtype::Q5_1),
        8 => return Ok(Dtype::Q8_0),
        10 => return Ok(Dtype::Q2K),
        11 => return Ok(Dtype::Q3K),
        12 => return Ok(Dtype::Q4K),
        13 => return Ok(Dtype::Q5K),
        14 => return Ok(Dtype::Q6K),
        24 => return Ok(Dtype::I8),
        25 => return Ok(Dtype::I16),
        26 => return Ok(Dtype::I32),
        27 => return Ok(Dtype::I64),
        28 => return Ok(Dtype::F64),
        30 => return Ok(Dtype::BF16),
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => return Err(format!("unknown tensor type {code}: the file is damaged or newer than this program")),
    };
    Err(format!("type {unsupported} is not supported: take a file with Q4_0 to Q8_0 or Q2_K to Q6_K weights"))
}

fn part_path(path: &Path, part: u64, count: u64) -> Result<PathBuf> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    match name.strip_suffix(&format!("-00001-of-{count:05}.gguf")) {
        Some(stem) if count <= 99_999 => Ok(path.with_file_name(format!("{stem}-{part:05}-of-{count:05}.gguf"))),
        _ => Err(Error::Weights(format!(
            "{}: a part of {count} files: give the first, named NAME-00001-of-{count:05}.gguf",
            path.display()
        ))),
    }
}
