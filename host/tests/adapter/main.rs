//! Adapters: folders crafted on the spot, laid over small layers; numbers held to explicit sums and to stored ones of mlx-lm and PEFT.

mod numbers;
mod refusals;
mod stored;
mod whole;

use candle_core::{DType, Device, Tensor};
use dylm::{
    adapter::Adapters,
    device::{DeviceChoice, DtypeChoice, Placement},
    kernels::cpu::{Float, Format, Matrix},
    layers::{embedding::Embedding, linear::Linear, weight::Weight},
};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use std::{collections::BTreeMap, path::Path};
use tempfile::TempDir;

const RANK: usize = 4;
const SCALE: f64 = 2.5;

/// A tensor of a crafted file.
#[derive(Clone)]
struct Named {
    name: String,
    shape: Vec<usize>,
    values: Vec<f32>,
}

/// The numbers that every test uses for `name`: those of tests/fixtures/make_tiny's rule, center 0 and width 2.
fn numbers(name: &str, count: usize) -> Vec<f32> {
    uniform(7, name, count, 0.0, 1.0)
}

/// The rule of tests/fixtures/make_tiny.
fn uniform(seed: u64, name: &str, count: usize, center: f64, scale: f64) -> Vec<f32> {
    const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
    let start =
        name.bytes().fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)) ^ seed;
    let value = |index: u64| {
        let x = start.wrapping_add(index.wrapping_mul(GOLDEN)).wrapping_add(GOLDEN);
        let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (center + scale * (((x ^ (x >> 31)) >> 40) as f64 / 8_388_608.0 - 1.0)) as f32
    };
    (0..count as u64).map(value).collect()
}

/// Numbers under a name of a file.
fn named(name: &str, shape: &[usize]) -> Named {
    Named { name: name.into(), shape: shape.into(), values: numbers(name, shape.iter().product()) }
}

/// A folder with an adapter_config.json and a file of f32 tensors.
fn folder(config: &Value, file: &str, tensors: &[Named]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("adapter_config.json"), config.to_string()).unwrap();
    write_tensors(&dir.path().join(file), tensors);
    dir
}

fn write_tensors(path: &Path, tensors: &[Named]) {
    let bytes: Vec<Vec<u8>> = tensors.iter().map(|t| t.values.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
    let view = |(t, bytes): (&Named, &Vec<u8>)| -> (String, Vec<usize>, Vec<u8>) {
        (t.name.clone(), t.shape.clone(), bytes.clone())
    };
    let owned: Vec<_> = tensors.iter().zip(&bytes).map(view).collect();
    let views: BTreeMap<&str, TensorView> = owned
        .iter()
        .map(|(name, shape, bytes)| (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()))
        .collect();
    safetensors::serialize_to_file(views, None, path).unwrap();
}

/// mlx-lm's configuration.
fn mlx_config(kind: &str) -> Value {
    json!({"fine_tune_type": kind, "num_layers": 2, "lora_parameters": {"rank": RANK, "scale": SCALE, "dropout": 0.0}})
}

/// PEFT's configuration with the same scale.
fn peft_config() -> Value {
    json!({"peft_type": "LORA", "r": RANK, "lora_alpha": RANK as f64 * SCALE, "fan_in_fan_out": false, "rank_pattern": {}})
}

/// An adapter in mlx-lm's layout.
fn open_mlx(kind: &str, tensors: &[Named]) -> dylm::Result<Adapters> {
    Adapters::open(folder(&mlx_config(kind), "adapters.safetensors", tensors).path())
}

/// An adapter in PEFT's layout.
fn open_peft(config: &Value, tensors: &[Named]) -> dylm::Result<Adapters> {
    Adapters::open(folder(config, "adapter_model.safetensors", tensors).path())
}

/// dylm's kernels, and candle alone, as on a GPU.
fn places() -> [Placement; 2] {
    [
        Placement::new(DeviceChoice::Cpu, DtypeChoice::Float32, DType::F32).unwrap(),
        Placement::new(DeviceChoice::CpuByCandle, DtypeChoice::Float32, DType::F32).unwrap(),
    ]
}

/// Dense, and packed in four bits.
fn formats() -> [Format; 2] {
    [Format::Dense(Float::F32), Format::Affine { bits: 4, group: 32, scales: Float::F32 }]
}

fn weight(values: &[f32], rows: usize, cols: usize, format: Format, place: &Placement) -> Weight {
    Weight::place(Matrix::quantize(values, rows, cols, format).unwrap(), place).unwrap()
}

/// What the weight really holds, once packed.
fn held(weight: &Weight) -> Vec<f32> {
    weight.numbers().unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn linear(adapters: &Adapters, path: &str, weight: Weight, bias: Option<&[f32]>, place: &Placement) -> Linear {
    let adapter = adapters.linear(path, &weight, place).unwrap();
    let bias = bias.map(|b| Tensor::new(b, &Device::Cpu).unwrap());
    Linear { weight, bias, adapter }
}

fn embedding(adapters: &Adapters, path: &str, weight: Weight, place: &Placement) -> Embedding {
    let adapter = adapters.embedding(path, &weight, place).unwrap();
    Embedding { weight, adapter }
}

fn tensor(values: &[f32], shape: &[usize]) -> Tensor {
    Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
}

fn run(layer: &Linear, x: &[f32]) -> Vec<f32> {
    let cols = layer.weight.cols();
    flat(layer.forward(&tensor(x, &[x.len() / cols, cols])).unwrap())
}

fn flat(t: Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

/// `x · wᵀ` in f64: x `[.., cols]`, w `[rows, cols]`.
fn product(x: &[f32], w: &[f64], cols: usize) -> Vec<f64> {
    let dot = |x: &[f32], w: &[f64]| x.iter().zip(w).map(|(x, w)| f64::from(*x) * w).sum::<f64>();
    x.chunks(cols).flat_map(|x| w.chunks(cols).map(move |w| dot(x, w))).collect()
}

/// `w + scale (a b)ᵀ` in f64: w `[rows, cols]`, a `[cols, rank]`, b `[rank, rows]`.
fn adapted(w: &[f32], a: &[f32], b: &[f32], rows: usize, cols: usize, scale: f64) -> Vec<f64> {
    let rank = a.len() / cols;
    let low =
        |r: usize, c: usize| (0..rank).map(|k| f64::from(a[c * rank + k]) * f64::from(b[k * rows + r])).sum::<f64>();
    (0..rows * cols).map(|i| f64::from(w[i]) + scale * low(i / cols, i % cols)).collect()
}

fn assert_near(found: &[f32], expected: &[f64], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let size = expected.iter().fold(1e-6f64, |m, x| m.max(x.abs()));
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let off = (f64::from(*found) - expected).abs() / size;
        assert!(off < 1e-5, "{what}: [{i}] is {found}, not {expected}");
    }
}
