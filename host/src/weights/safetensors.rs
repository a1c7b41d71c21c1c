//! A safetensors file's header -> its tensors, every number checked against the file before anything is built from it.
//! The `safetensors` crate checks the same header again at the end; it comes last because it adds the offsets without a check
//! for overflow, and because our sentences name the tensor. Format: 8 bytes of length, that many bytes of JSON, then the tensors without holes.

use crate::{
    error::{Error, Result},
    weights::{
        bytes::Bytes,
        stored::{Dtype, Stored},
    },
};
use ::safetensors::SafeTensors;
use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, Visitor},
};
use std::{fmt, path::Path, sync::Arc};

// The format's own bound on the header.
const HEADER_CAP: u64 = 100_000_000;

/// All tensors of one mapped file, in the order of their bytes. `file` is for messages and goes along with each tensor.
pub fn read_header(bytes: &Bytes, file: &Arc<Path>) -> Result<Vec<(String, Stored)>> {
    let header_end = header_end(bytes, bytes.len() as u64, file)?;
    let mut tensors = Vec::new();
    for (name, dtype, shape, (start, end)) in placed(bytes, bytes.len() as u64, file)? {
        let range = header_end as usize + start as usize..header_end as usize + end as usize;
        let data = bytes
            .slice(range)
            .ok_or_else(|| Error::Weights(format!("{}: {name}: lies outside the file", file.display())))?;
        tensors.push((name, Stored::new(dtype, shape, data, file.clone())?));
    }
    SafeTensors::read_metadata(bytes)
        .map_err(|e| Error::Weights(format!("{}: header refused ({e})", file.display())))?;
    Ok(tensors)
}

/// The tensors of a file that is elsewhere, checked as strictly: `head` are its first bytes, to the end of the header at least, `len` is the
/// length of the whole.
pub fn read_head(head: &[u8], len: u64, file: &Arc<Path>) -> Result<Vec<(String, Stored)>> {
    let placed = placed(head, len, file)?.into_iter();
    Ok(placed.map(|(name, dtype, shape, _)| (name, Stored::elsewhere(dtype, shape, file.clone()))).collect())
}

/// Where the header of a file of `len` bytes ends, told by its first eight.
pub fn header_end(start: &[u8], len: u64, file: &Path) -> Result<u64> {
    let wrong = |what: String| Error::Weights(format!("{}: {what}", file.display()));
    let Some(length) = start.first_chunk() else {
        return Err(wrong("too short for a safetensors file: download it again".into()));
    };
    let length = u64::from_le_bytes(*length);
    if length > HEADER_CAP {
        return Err(wrong(format!("header of {length} bytes: not a safetensors file, or a damaged one")));
    }
    let end = 8 + length;
    match end <= len {
        true => Ok(end),
        false => Err(wrong(format!("cut short within its header ({len} bytes of {end}): download it again"))),
    }
}

type Placed = (String, Dtype, Vec<usize>, (u64, u64));

fn placed(head: &[u8], len: u64, file: &Path) -> Result<Vec<Placed>> {
    let wrong = |what: String| Error::Weights(format!("{}: {what}", file.display()));
    let header_end = header_end(head, len, file)?;
    let header = head.get(8..header_end as usize).ok_or_else(|| wrong("its header is not all here".into()))?;
    let Header(mut entries) =
        serde_json::from_slice(header).map_err(|e| wrong(format!("header is not as it should be ({e})")))?;
    entries.sort_by_key(|(_, entry)| entry.data_offsets);
    check_offsets(&entries, len - header_end).map_err(wrong)?;

    let mut tensors = Vec::with_capacity(entries.len());
    for (name, entry) in entries {
        let wrong = |what: String| Error::Weights(format!("{}: {name}: {what}", file.display()));
        let dtype = dtype(&entry.dtype).ok_or_else(|| wrong(format!("dtype {} is not supported", entry.dtype)))?;
        let (start, end) = entry.data_offsets;
        let shape: Vec<usize> = entry.shape.iter().map(|&d| usize::try_from(d).unwrap_or(usize::MAX)).collect();
        if dtype.size_of_shape(&shape).map(|size| size as u64) != Some(end - start) {
            return Err(wrong(format!(
                "{dtype} {shape:?} does not take the {} bytes that the header gives it",
                end - start
            )));
        }
        tensors.push((name, dtype, shape, (start, end)));
    }
    Ok(tensors)
}

// In order of offset, each tensor must begin where the one before it ends, and the last must end with the file.
fn check_offsets(entries: &[(String, Entry)], data_len: u64) -> Result<(), String> {
    let mut expected = 0;
    for (name, entry) in entries {
        let (start, end) = entry.data_offsets;
        if end < start {
            return Err(format!("{name}: data_offsets [{start}, {end}] run backwards"));
        }
        if end > data_len {
            return Err(format!(
                "{name}: data ends at {end}, the file has {data_len} bytes of data: download it again"
            ));
        }
        if start != expected {
            let what = if start < expected { "overlaps the tensor before it" } else { "leaves a hole before it" };
            return Err(format!("{name}: data_offsets [{start}, {end}]: {what}"));
        }
        expected = end;
    }
    if expected != data_len {
        return Err(format!("{} bytes after the last tensor belong to none", data_len - expected));
    }
    Ok(())
}

fn dtype(name: &str) -> Option<Dtype> {
    Some(match name {
        "F64" => Dtype::F64,
        "F32" => Dtype::F32,
        "F16" => Dtype::F16,
        "BF16" => Dtype::BF16,
        "F8_E4M3" => Dtype::F8E4M3,
        "F8_E5M2" => Dtype::F8E5M2,
        "F8_E8M0" => Dtype::F8E8M0,
        "U64" => Dtype::U64,
        "I64" => Dtype::I64,
        "U32" => Dtype::U32,
        "I32" => Dtype::I32,
        "U16" => Dtype::U16,
        "I16" => Dtype::I16,
        "U8" => Dtype::U8,
        "I8" => Dtype::I8,
        "BOOL" => Dtype::Bool,
        _ => return None,
    })
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

// A list and not a map: a map would swallow names that come twice.
struct Header(Vec<(String, Entry)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    let entry = map.next_value().map_err(|e| serde::de::Error::custom(format!("{name}: {e}")))?;
                    entries.push((name, entry));
                }
                Ok(Header(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}
