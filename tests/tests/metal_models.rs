//! Whole models through the Metal kernels, packed and not, against the same models on the CPU. On macOS the GPU runs them. Elsewhere candle's
//! ops on the CPU stand for it, with every kernel of dylm's own played (`tests::metal_stage`): all but the queue is then what runs there.

use dylm::{
    LoadOptions, Trust,
    cache::CacheOptions,
    device::{DeviceChoice, DtypeChoice},
    kernels::{
        cpu::{Float, Format, Matrix},
        metal::device,
    },
    model::{Input, Want},
};
use safetensors::tensor::Dtype;
use serde_json::{Value, json};
use std::{fs, path::Path};
use tests::{
    metal_stage,
    packing::{self, Tensor},
    tiny::{self, Expected, TensorSpec},
};

fn bytes(tensor: &TensorSpec, values: &[f32]) -> Vec<Tensor> {
    let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    vec![Tensor { name: tensor.name.clone(), dtype: Dtype::F32, shape: tensor.shape.clone(), bytes }]
}

/// The tensor in mlx's packing, if it is a weight that mlx packs and its columns fit.
fn packed(tensor: &TensorSpec, values: &[f32], format: Format) -> Option<Vec<Tensor>> {
    let (cols, leading) = tensor.shape.split_last()?;
    let words = ["_proj.", "embed_tokens.", "lm_head.", "embed_q.", "unembed_out.", ".w1.", ".w2.", ".w3."];
    let path = tensor.name.strip_suffix(".weight")?;
    let (group, _) = format.block();
    if leading.is_empty() || !words.iter().any(|w| tensor.name.contains(w)) || cols % group != 0 {
        return None;
    }
    let matrix = Matrix::quantize(values, leading.iter().product(), *cols, format).ok()?;
    let one = |p: usize, name: &str, dtype: Dtype, size: usize| Tensor {
        name: format!("{path}.{name}"),
        dtype,
        shape: [leading, &[format.row_bytes(*cols)[p] / size]].concat(),
        bytes: matrix.parts()[p].to_vec(),
    };
    let mut tensors = vec![one(0, "weight", Dtype::U32, 4)];
    match format {
        Format::Affine { .. } => tensors.extend([one(1, "scales", Dtype::BF16, 2), one(2, "biases", Dtype::BF16, 2)]),
        _ => tensors.push(one(1, "scales", Dtype::U8, 1)),
    }
    Some(tensors)
}

/// A tiny entry, packed if there is a format; and how many of its tensors are.
fn checkpoint(entry: &Path, format: Option<Format>, to: &Path) -> usize {
    tiny::write(entry, to).unwrap();
    let Some(format) = format else { return 0 };
    let checkpoint = tiny::Checkpoint::read(entry).unwrap();
    let (mut tensors, mut count) = (Vec::new(), 0);
    for spec in &checkpoint.tensors {
        let values: Vec<f32> = spec.values(checkpoint.seed).collect();
        let own = packed(spec, &values, format);
        count += usize::from(own.is_some());
        tensors.extend(own.unwrap_or_else(|| bytes(spec, &values)));
    }
    packing::write(&tensors, &to.join("model.safetensors")).unwrap();
    let mut config = tiny::config(to).unwrap();
    config["quantization"] = match format {
        Format::Affine { bits, group, .. } => json!({ "bits": bits, "group_size": group }),
        Format::Mxfp4 => json!({ "bits": 4, "group_size": 32, "mode": "mxfp4" }),
        Format::Mxfp8 => json!({ "bits": 8, "group_size": 32, "mode": "mxfp8" }),
        _ => json!({ "bits": 4, "group_size": 16, "mode": "nvfp4" }),
    };
    fs::write(to.join("config.json"), Value::to_string(&config)).unwrap();
    count
}

/// Logits of every token of the prompt, so many times over, and of each step after it.
fn logits(folder: &Path, device: DeviceChoice, expected: &Expected, times: usize) -> Vec<Vec<f32>> {
    let options = LoadOptions { device, dtype: DtypeChoice::Float32, trust: Trust::All, ..Default::default() };
    let lm = dylm::load(folder.to_str(), &options).unwrap_or_else(|e| panic!("{e}"));
    let mut state = lm.model.state(&CacheOptions::default()).unwrap();
    let prompt = expected.prompt.repeat(times);
    state.horizon = prompt.len();
    let mut rows = Vec::new();
    for tokens in std::iter::once(prompt.as_slice()).chain(expected.steps.chunks(1)) {
        let step = lm.model.step(&mut [Input { state: &mut state, tokens, want: Want::All }]);
        rows.extend(step.unwrap_or_else(|e| panic!("{e}")).remove(0));
    }
    rows
}

fn hold(name: &str, format: Option<Format>) {
    hold_long(name, format, 1);
}

fn hold_long(name: &str, format: Option<Format>, times: usize) {
    let Some(device) = metal_stage::device() else { return };
    let (entry, folder) = (tiny::fixtures().join(name), tempfile::tempdir().unwrap());
    let count = checkpoint(&entry, format, folder.path());
    assert!(format.is_none() || count > 3, "{name}: {format:?} packs {count} tensors");
    let expected = Expected::read(&entry).unwrap();
    // First without the kernels, which the player would take from the CPU's own path too.
    let want = logits(folder.path(), DeviceChoice::Cpu, &expected, times);
    if device == DeviceChoice::CpuByCandle {
        let _ = device::PLAYER.set(metal_stage::play);
    }
    let found = logits(folder.path(), device, &expected, times);
    assert_eq!(found.len(), want.len());
    // A GPU's exp and division are approximations, and its sums have another order.
    let bound = if cfg!(target_os = "macos") { 1e-3 } else { 2e-5f32.max(expected.bound) };
    for (step, (found, want)) in found.iter().zip(&want).enumerate() {
        let scale = want.iter().fold(0f32, |m, x| m.max(x.abs()));
        let worst = found.iter().zip(want).map(|(x, y)| (x - y).abs()).fold(0f32, f32::max) / scale;
        assert!(worst <= bound, "{name}, {format:?}: row {step} is off by {worst:.1e}");
    }
}

/// What every one of these models is made of.
const OF_ALL: [&str; 5] = ["NORM", "ROTATE", "GATE", "ATTEND", "JOIN"];

/// Lest a model that goes around the kernels passes.
fn all_ran(makers: &[&str]) {
    if metal_stage::device() == Some(DeviceChoice::CpuByCandle) {
        let learned = metal_stage::learned();
        let missing: Vec<_> = makers.iter().filter(|maker| !learned.contains(*maker)).collect();
        assert!(missing.is_empty(), "{missing:?} have not run, {learned:?} have");
    }
}

#[test]
fn packed_models_give_the_cpu_s_logits_and_stay_packed() {
    hold("llama", Some(Format::Affine { bits: 4, group: 32, scales: Float::BF16 }));
    for name in ["qwen3", "llama-bias"] {
        hold(name, Some(Format::Nvfp4));
    }
    all_ran(&[OF_ALL.as_slice(), &["FEW", "MANY", "GATHER"]].concat());
}

#[test]
fn packed_experts_and_heads_give_the_cpu_s_logits_and_stay_packed() {
    // So many tokens that experts gather theirs; with biases and sinks; with values that are lanes of the keys.
    hold_long("mixtral-mlx", Some(Format::Nvfp4), 4);
    for name in ["gpt_oss-mlx", "deepseek_v3-mlx"] {
        hold(name, Some(Format::Nvfp4));
    }
    all_ran(&[OF_ALL.as_slice(), &["FEW", "CHOSEN", "MIX"]].concat());
}

#[test]
fn recurrences_give_the_cpu_s_logits_and_their_states_stay_on_the_device() {
    // Gated delta rule and convolution, Mamba 1 and 2, linear attention, RG-LRU, RWKV 7.
    for name in ["qwen3_next", "falcon_mamba", "mamba2", "bailing_moe_linear", "recurrent_gemma", "rwkv7"] {
        hold(name, None);
    }
    all_ran(&["CONV", "SCAN", "RECUR", "RG_LRU"]);
}

#[test]
fn softcaps_windows_slopes_and_layer_norms_give_the_cpu_s_logits() {
    for name in ["gemma2", "cohere2", "bloom", "gpt_neox"] {
        hold(name, None);
    }
    all_ran(&OF_ALL);
}
