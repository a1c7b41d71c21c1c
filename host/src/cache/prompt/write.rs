//! A state -> a prompt cache file. The file appears under its name when it is complete, so that a stopped process leaves no half of one.

use super::{FORMAT, Facts, Origin, swap};
use crate::{
    cache::{
        State,
        kv::KvCache,
        memory::{Memory, Recurrent},
        rows::Table,
    },
    error::{Error, Result},
};
use ::safetensors::tensor::{Dtype, TensorView};
use candle_core::DType;
use std::{collections::HashMap, path::Path};

/// A tensor of the file.
struct Written {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// Writes `state` to `path`, replacing what is there.
pub fn save(path: &Path, state: &State, origin: &Origin) -> Result<()> {
    let wrong =
        |what: &dyn std::fmt::Display| Error::Generate(format!("{}: cannot be written: {what}", path.display()));
    // What the layers have yet to read again is as if never read.
    let offset = state.offset - state.behind;
    if !state.others.is_empty() {
        return Err(wrong(&"several devices hold its heads; make it without --devices"));
    }
    if offset == 0 {
        return Err(wrong(&"there is no prompt to keep"));
    }
    let facts = Facts {
        format: FORMAT,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        fingerprint: origin.fingerprint.to_owned(),
        text: origin.text.clone(),
        tokens: state.tokens[..offset.min(state.tokens.len())].to_vec(),
        horizon: state.horizon,
        options: state.options,
        positions: state.layers.iter().map(|l| l.key_value().map_or_else(Vec::new, runs)).collect(),
    };
    let facts = serde_json::to_string(&facts).map_err(|e| wrong(&e))?;
    let mut metadata = HashMap::from([
        ("0.model".to_owned(), origin.model.to_owned()),
        ("0.tokenizer_config".to_owned(), "{}".to_owned()),
        ("0.dylm".to_owned(), facts),
        ("2.0".to_owned(), String::new()),
    ]);
    let (mut tensors, mut numbers) = (Vec::new(), 0);
    for (index, layer) in state.layers.iter().enumerate() {
        let layer = match layer {
            Memory::KeyValue(kv) => kv,
            Memory::State(state) => {
                metadata.insert(format!("1.{index}"), "ArraysCache".to_owned());
                for none in write_state(&mut tensors, index, state)? {
                    numbers += 1;
                    metadata.insert(format!("2.{numbers}.0"), none);
                    metadata.insert(format!("2.{numbers}.1"), "none".to_owned());
                }
                continue;
            }
        };
        let (class, scalars) = describe(layer, offset);
        metadata.insert(format!("1.{index}"), class.to_owned());
        let Some([heads, dim, v_heads, v_dim]) = layer.shape else { return Err(wrong(&"a layer's cache is empty")) };
        let entries = layer.positions.len();
        write_table(&mut tensors, format!("{index}.0"), &layer.keys, [entries, heads, dim])?;
        if v_dim > 0 {
            write_table(&mut tensors, format!("{index}.1"), &layer.values, [entries, v_heads, v_dim])?;
        }
        for (place, number) in (2..).zip(scalars) {
            numbers += 1;
            let name = format!("{index}.{place}");
            metadata.insert(format!("2.{numbers}.0"), name.clone());
            metadata.insert(format!("2.{numbers}.1"), "scalar".to_owned());
            let bytes = (number as i32).to_le_bytes().to_vec();
            tensors.push(Written { name, dtype: Dtype::I32, shape: Vec::new(), bytes });
        }
    }
    let views = tensors.iter().map(|t| Ok((&t.name, TensorView::new(t.dtype, t.shape.clone(), &t.bytes)?)));
    let views = views.collect::<Result<Vec<_>, ::safetensors::SafeTensorError>>().map_err(|e| wrong(&e))?;

    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let file = tempfile::Builder::new().prefix(".dylm-").tempfile_in(folder).map_err(Error::io(path))?;
    ::safetensors::serialize_to_file(views, Some(metadata), file.path()).map_err(|e| wrong(&e))?;
    file.persist(path).map_err(|e| Error::io(path)(e.error))?;
    Ok(())
}

/// An `ArraysCache` of one array: the state, then no padding and no lengths, whose names come back.
fn write_state(out: &mut Vec<Written>, index: usize, state: &Recurrent) -> Result<[String; 2]> {
    let mut write = |name: String, shape: Vec<usize>, numbers: &[f32]| {
        out.push(Written { name, dtype: Dtype::F32, shape, bytes: bytes(numbers, |x| x.to_le_bytes()) });
    };
    let shape = if state.dims.is_empty() { vec![1, 0] } else { [&[1], state.dims.as_slice()].concat() };
    write(format!("{index}.0.0"), shape, &state.numbers.read()?);
    let nones = [format!("{index}.1"), format!("{index}.2")];
    nones.iter().for_each(|name| write(name.clone(), vec![0], &[]));
    Ok(nones)
}

/// mlx-lm's class for a layer's cache and its numbers, offset first. What none of its classes can hold gets a name of its own.
fn describe(layer: &KvCache, offset: usize) -> (&'static str, Vec<usize>) {
    let rule = layer.rule();
    #[cfg(feature = "cuda")]
    if let Some(form) = layer.keys.form() {
        let class = match (layer.every, rule.window, rule.chunk) {
            (2.., _, _) => "PooledQuantizedKVCache",
            (_, None, None) => "QuantizedKVCache",
            _ => "WindowedQuantizedKVCache",
        };
        return (class, vec![offset, form.group, form.bits]);
    }
    if layer.every > 1 {
        return match &layer.keys {
            Table::Packed { bits, group, .. } => ("PooledQuantizedKVCache", vec![offset, *group, *bits as usize]),
            _ => ("PooledKVCache", vec![offset]),
        };
    }
    match (&layer.keys, rule.window) {
        (Table::Packed { bits, group, .. }, None) if rule.chunk.is_none() => {
            ("QuantizedKVCache", vec![offset, *group, *bits as usize])
        }
        (Table::Packed { bits, group, .. }, _) => ("WindowedQuantizedKVCache", vec![offset, *group, *bits as usize]),
        (_, Some(window)) => {
            let entries = layer.positions.len();
            ("RotatingKVCache", vec![offset, rule.keep, window + rule.keep, entries])
        }
        (_, None) => match (rule.chunk, layer.positions.first()) {
            (Some(chunk), Some(&first)) => ("ChunkedKVCache", vec![offset, chunk, first as usize]),
            _ => ("KVCache", vec![offset]),
        },
    }
}

/// `[entries, heads, dim]` -> `[1, heads, entries, dim]`
fn write_table(out: &mut Vec<Written>, name: String, table: &Table, [entries, heads, dim]: [usize; 3]) -> Result<()> {
    let mut write = |name: String, dtype: Dtype, bytes: &[u8], width: usize| {
        let chunk = bytes.len() / (entries * heads).max(1);
        let bytes = swap(bytes, entries, heads, chunk);
        out.push(Written { name, dtype, shape: vec![1, heads, entries, width], bytes });
    };
    match table {
        Table::F32(t) => write(name, Dtype::F32, &bytes(t, |x| x.to_le_bytes()), dim),
        Table::F16(t) => write(name, Dtype::F16, &bytes(t, |x| x.to_le_bytes()), dim),
        Table::BF16(t) => write(name, Dtype::BF16, &bytes(t, |x| x.to_le_bytes()), dim),
        Table::Packed { data, scales, biases, bits, group } => {
            write(format!("{name}.0"), Dtype::U32, data, dim * *bits as usize / 32);
            write(format!("{name}.1"), Dtype::F32, &bytes(scales, |x| x.to_le_bytes()), dim / group);
            write(format!("{name}.2"), Dtype::F32, &bytes(biases, |x| x.to_le_bytes()), dim / group);
        }
        #[cfg(feature = "cuda")]
        Table::PackedThere(packed) => write_table(out, name, &packed.here()?, [entries, heads, dim])?,
        Table::Tensor(room) => {
            let numbers = table.numbers()?;
            // Of pooled keys there may be none yet.
            match room.whole().map_or(DType::F32, |t| t.dtype()) {
                DType::BF16 => {
                    write(name, Dtype::BF16, &bytes(&numbers, |x| half::bf16::from_f32(*x).to_le_bytes()), dim)
                }
                DType::F16 => write(name, Dtype::F16, &bytes(&numbers, |x| half::f16::from_f32(*x).to_le_bytes()), dim),
                _ => write(name, Dtype::F32, &bytes(&numbers, |x| x.to_le_bytes()), dim),
            }
        }
    }
    Ok(())
}

fn bytes<T, const N: usize>(values: &[T], of: impl Fn(&T) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(of).collect()
}

/// 0 1 2 3 9 10 -> 0..4, 9..11. Keys that stand for several tokens count by their number: every fourth, 3 7 11 -> 0..3.
fn runs(kv: &KvCache) -> Vec<(u32, u32)> {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for position in kv.positions.iter().map(|position| position / kv.every as u32) {
        match runs.last_mut() {
            Some((_, to)) if *to == position => *to += 1,
            _ => runs.push((position, position + 1)),
        }
    }
    runs
}
