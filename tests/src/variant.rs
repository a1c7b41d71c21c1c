//! A tiny checkpoint -> pairs that must give the same logits: packed in 4 bits and unpacked again, with an adapter and with the adapter
//! multiplied into the weights.
//!
//! Which tensors are matrices is told by their names and shapes alone, since that is all that a checkpoint has of them.

use crate::tiny::{self, Checkpoint, Range, Result, WeightDtype};
use dylm::kernels::cpu::{Float, Format, Matrix};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;
use std::{collections::BTreeMap, path::Path};

/// A tensor of a checkpoint in f32, or of packed words.
#[derive(Clone)]
struct Tensor {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Tensor {
    fn floats(shape: &[usize], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        Tensor { dtype: Dtype::F32, shape: shape.to_vec(), bytes }
    }
}

type Tensors = BTreeMap<String, Tensor>;
/// Name, shape and values.
type Numbers = (String, Vec<usize>, Vec<f32>);

/// Weights that share a scale and a bias.
const GROUP: usize = 32;
const PACKED: Format = Format::Affine { bits: 4, group: GROUP, scales: Float::F32 };
const RANK: usize = 2;
const SCALE: f32 = 2.0;

/// Writes the entry into `packed` with every matrix that can be in MLX's 4 bits, and into `unpacked` with the numbers that those 4 bits
/// stand for.
pub fn pack(entry: &Path, packed: &Path, unpacked: &Path) -> Result<()> {
    let (mut small, mut plain) = (Tensors::new(), Tensors::new());
    let floats = numbers(entry, &mut plain)?;
    small.extend(plain.iter().map(|(name, tensor)| (name.clone(), tensor.clone())));
    for (name, shape, values) in floats {
        let Some(path) = name.strip_suffix(".weight").filter(|_| packs(&name, &shape)) else {
            small.insert(name.clone(), Tensor::floats(&shape, &values));
            plain.insert(name, Tensor::floats(&shape, &values));
            continue;
        };
        let cols = shape.last().copied().unwrap_or(1);
        let rows = values.len() / cols;
        let matrix = Matrix::quantize(&values, rows, cols, PACKED)?;
        let mut exact = vec![0.0; values.len()];
        matrix.dequantize_rows(0..rows, &mut exact);
        let [words, scales, biases] = matrix.parts();
        let with_last = |last: usize| [&shape[..shape.len() - 1], &[last]].concat();
        let mut part = |suffix: &str, dtype, last, bytes: &[u8]| {
            small.insert(format!("{path}.{suffix}"), Tensor { dtype, shape: with_last(last), bytes: bytes.to_vec() });
        };
        part("weight", Dtype::U32, cols / 8, words);
        part("scales", Dtype::F32, cols / GROUP, scales);
        part("biases", Dtype::F32, cols / GROUP, biases);
        plain.insert(name, Tensor::floats(&shape, &exact));
    }
    tiny::write(entry, unpacked)?;
    write(&plain, &unpacked.join("model.safetensors"))?;
    tiny::write(entry, packed)?;
    write(&small, &packed.join("model.safetensors"))?;
    let mut config = tiny::config(packed)?;
    config["quantization"] = json!({"group_size": GROUP, "bits": 4});
    std::fs::write(packed.join("config.json"), config.to_string())?;
    Ok(())
}

/// Whether the entry has a matrix that MLX's 4 bits can hold.
pub fn can_pack(entry: &Path) -> Result<bool> {
    Ok(Checkpoint::read(entry)?
        .tensors
        .iter()
        .any(|tensor| matches!(tensor.range, Range::Floats(..)) && packs(&tensor.name, &tensor.shape)))
}

/// Whether the entry's weights come packed already, in bytes.
pub fn is_packed(entry: &Path) -> Result<bool> {
    Ok(Checkpoint::read(entry)?.tensors.iter().any(|tensor| matches!(tensor.range, Range::Bytes(..))))
}

fn packs(name: &str, shape: &[usize]) -> bool {
    is_matrix(name, shape) && shape.last().is_some_and(|cols| cols % GROUP == 0)
}

/// The paths of linear layers that an adapter may change, one of each kind: of layers that differ in their numbers only, the last.
pub fn linears(entry: &Path) -> Result<Vec<String>> {
    let mut last = BTreeMap::new();
    for tensor in Checkpoint::read(entry)?.tensors {
        if matches!(tensor.range, Range::Bytes(..)) {
            continue;
        }
        let Some(path) = tensor.name.strip_suffix(".weight") else { continue };
        let parts: Vec<&str> = path.split('.').collect();
        let is_number = |part: &&str| part.bytes().all(|b| b.is_ascii_digit());
        let routes = parts.last().is_some_and(|leaf| ["gate", "router", "wg", "classifier"].contains(leaf));
        let sees = parts.iter().any(|part| part.contains("vision") || part.contains("visual"));
        let looks_up = parts.iter().any(|part| part.starts_with("embed"));
        if is_matrix(&tensor.name, &tensor.shape)
            && tensor.shape.len() == 2
            && !(routes || looks_up)
            && !sees
            && parts.iter().any(is_number)
        {
            let kind: Vec<&str> = parts.iter().map(|part| if is_number(part) { "0" } else { part }).collect();
            last.insert(kind.join("."), path.to_owned());
        }
    }
    Ok(last.into_values().collect())
}

/// Writes an adapter over these linear layers, as mlx-lm writes it, into `adapter`, and into `merged` the entry with its weights changed
/// to W + scale (A B)ᵀ.
pub fn adapt(entry: &Path, paths: &[String], adapter: &Path, merged: &Path) -> Result<()> {
    let (mut parts, mut all) = (Tensors::new(), Tensors::new());
    for (name, shape, mut values) in numbers(entry, &mut all)? {
        let path = name.strip_suffix(".weight").filter(|path| paths.iter().any(|p| p == path));
        if let (Some(path), &[rows, cols]) = (path, shape.as_slice()) {
            // The product then is about a third of what the weights themselves are.
            let size = (values.iter().map(|x| x * x).sum::<f32>() / values.len() as f32).sqrt();
            let a = tiny::uniform(&format!("{path}.lora_a"), cols * RANK, 1.0);
            let b = tiny::uniform(&format!("{path}.lora_b"), RANK * rows, size / SCALE);
            for (row, weights) in values.chunks_exact_mut(cols).enumerate() {
                for (col, weight) in weights.iter_mut().enumerate() {
                    let product: f32 = (0..RANK).map(|r| a[col * RANK + r] * b[r * rows + row]).sum();
                    *weight += SCALE * product;
                }
            }
            parts.insert(format!("{path}.lora_a"), Tensor::floats(&[cols, RANK], &a));
            parts.insert(format!("{path}.lora_b"), Tensor::floats(&[RANK, rows], &b));
        }
        all.insert(name, Tensor::floats(&shape, &values));
    }
    let config = json!({"fine_tune_type": "lora", "num_layers": -1,
                        "lora_parameters": {"rank": RANK, "scale": SCALE, "dropout": 0.0}});
    std::fs::write(adapter.join("adapter_config.json"), config.to_string())?;
    write(&parts, &adapter.join("adapters.safetensors"))?;
    tiny::write(entry, merged)?;
    write(&all, &merged.join("model.safetensors"))
}

/// Whether it is a linear layer, an embedding, or a stack of linear layers.
fn is_matrix(name: &str, shape: &[usize]) -> bool {
    let Some(path) = name.strip_suffix(".weight") else { return false };
    let (_, leaf) = path.rsplit_once('.').unwrap_or(("", path));
    let leaf = leaf.to_lowercase();
    let is_other = leaf.contains("norm") || leaf.contains("conv") || leaf == "ln" || leaf.starts_with("ln_");
    // A kernel a channel: [channels, 1, kernel] or [channels, kernel, 1].
    !is_other && (shape.len() == 2 || shape.len() == 3 && !shape[1..].contains(&1))
}

/// Every tensor of floats with its numbers; those of bytes go into `as_they_are`, since the packing that they come in is not for us to
/// read.
fn numbers(entry: &Path, as_they_are: &mut Tensors) -> Result<Vec<Numbers>> {
    let Checkpoint { seed, tensors } = Checkpoint::read(entry)?;
    let mut numbers = Vec::new();
    for tensor in tensors {
        if matches!(tensor.range, Range::Bytes(..)) {
            let (dtype, bytes) = tensor.stored(seed, WeightDtype::F32);
            as_they_are.insert(tensor.name, Tensor { dtype, shape: tensor.shape, bytes });
        } else {
            let values = tensor.values(seed).collect();
            numbers.push((tensor.name, tensor.shape, values));
        }
    }
    Ok(numbers)
}

fn write(tensors: &Tensors, file: &Path) -> Result<()> {
    let views = tensors.iter().map(|(name, t)| Ok((name, TensorView::new(t.dtype, t.shape.clone(), &t.bytes)?)));
    safetensors::serialize_to_file(
        views.collect::<Result<Vec<_>>>()?,
        Some([("format".into(), "pt".into())].into()),
        file,
    )?;
    Ok(())
}
