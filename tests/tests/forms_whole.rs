//! A whole model in the format of each other tool, through `dylm::load`: no plugin notices, no tensor is left over, and the logits are
//! those of the numbers that were stored. For BitNet, whose layers round what they are given, they are transformers'.

use dylm::{
    LoadOptions,
    cache::CacheOptions,
    device::{DeviceChoice, DtypeChoice},
    model::{Input, Want},
};
use safetensors::{SafeTensors, tensor::Dtype};
use serde_json::{Value, json};
use std::{fs, path::Path};
use tempfile::TempDir;
use tests::{
    packing::{self, Packing, Tensor},
    tiny::{self, Expected, TensorSpec},
};

fn dense(name: &str, shape: &[usize], values: &[f32]) -> Tensor {
    let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    Tensor { name: name.into(), dtype: Dtype::F32, shape: shape.into(), bytes }
}

/// A tiny entry, what `pack` makes of each projection in the place of its weight.
fn model(entry: &str, quantization_config: Value, pack: impl Fn(&TensorSpec, &[f32]) -> Vec<Tensor>) -> TempDir {
    let entry = tiny::fixtures().join(entry);
    let folder = tempfile::tempdir().unwrap();
    tiny::write(&entry, folder.path()).unwrap();
    let checkpoint = tiny::Checkpoint::read(&entry).unwrap();
    let mut tensors = Vec::new();
    for spec in &checkpoint.tensors {
        let values: Vec<f32> = spec.values(checkpoint.seed).collect();
        match spec.name.strip_suffix("_proj.weight") {
            Some(_) => tensors.extend(pack(spec, &values)),
            None => tensors.push(dense(&spec.name, &spec.shape, &values)),
        }
    }
    if !quantization_config.is_null() && quantization_config["quant_method"] != "mxfp4" {
        // Of no use without a cache in FP8, nor are scales of inputs; neither may count as left over.
        tensors.push(dense("model.layers.0.self_attn.k_scale", &[], &[0.5]));
        tensors.push(dense("model.layers.0.self_attn.v_proj.v_scale", &[], &[0.5]));
    }
    packing::write(&tensors, &folder.path().join("model.safetensors")).unwrap();
    let path = folder.path().join("config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    config["quantization_config"] = quantization_config;
    fs::write(path, config.to_string()).unwrap();
    folder
}

fn logits(folder: &Path, device: DeviceChoice) -> Vec<f32> {
    // Of tiny/llama; the other entry has all of its tokens too.
    let prompt = Expected::read(&tiny::fixtures().join("llama")).unwrap().prompt;
    let options = LoadOptions { device, dtype: DtypeChoice::Float32, ..Default::default() };
    let lm = dylm::load(folder.to_str(), &options).unwrap_or_else(|e| panic!("{e}"));
    let mut state = lm.model.state(&CacheOptions::default()).unwrap();
    let mut input = [Input { state: &mut state, tokens: &prompt, want: Want::All }];
    lm.model.step(&mut input).unwrap().remove(0).concat()
}

fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let scale = b.iter().fold(0f32, |m, x| m.max(x.abs()));
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0f32, f32::max) / scale
}

/// Loads `entry` packed, and with the numbers that were packed instead, and compares.
fn hold(entry: &str, packing: Packing) {
    let named = |t: &TensorSpec, part: Tensor| {
        let path = t.name.trim_end_matches(".weight");
        Tensor { name: format!("{path}{}", part.name), ..part }
    };
    let packed = model(entry, packing.config(), |t, w| {
        packing.pack(w, t.shape[1]).tensors.into_iter().map(|part| named(t, part)).collect()
    });
    let unpacked = |t: &TensorSpec, w: &[f32]| vec![dense(&t.name, &t.shape, &packing.pack(w, t.shape[1]).back)];
    let want = logits(model(entry, Value::Null, unpacked).path(), DeviceChoice::Cpu);
    for device in [DeviceChoice::Cpu, DeviceChoice::CpuByCandle] {
        let worst = difference(&logits(packed.path(), device), &want);
        assert!(worst < 2e-5, "{entry}, {packing:?}: logits are off by {worst:.1e}");
    }
    let plain = model(entry, Value::Null, |t, w| vec![dense(&t.name, &t.shape, w)]);
    let moved = difference(&want, &logits(plain.path(), DeviceChoice::Cpu));
    assert!(moved > 1e-4, "{entry}, {packing:?}: the numbers are too near those that were packed");
}

#[test]
fn logits_are_those_of_the_numbers_that_were_stored() {
    for packing in [
        Packing::Gptq { bits: 4, group: 32, act_order: false, less_one: true },
        Packing::Gptq { bits: 4, group: 32, act_order: true, less_one: false },
        Packing::Gptq { bits: 8, group: 32, act_order: true, less_one: true },
        Packing::Gptq { bits: 3, group: 32, act_order: false, less_one: true },
        Packing::Gptq { bits: 4, group: 16, act_order: true, less_one: true },
        Packing::Awq { group: 32 },
        Packing::Ints { bits: 4, group: 32 },
        Packing::Int8,
        Packing::Fp8 { block: [32, 48] },
        Packing::Nvfp4,
    ] {
        hold("llama", packing);
    }
}

#[test]
fn single_experts_are_read_in_every_format() {
    for packing in [
        Packing::Gptq { bits: 4, group: 32, act_order: true, less_one: true },
        Packing::Awq { group: 32 },
        Packing::Ints { bits: 4, group: 32 },
        Packing::Fp8 { block: [128, 128] },
        Packing::Nvfp4,
    ] {
        hold("qwen3_moe", packing);
    }
}

/// `[rows, cols]` in blocks of 16 bytes with a scale of 2^-4, and what they stand for.
fn mxfp4(w: &[f32]) -> (Vec<u8>, Vec<u8>, Vec<f32>) {
    const VALUES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let code = |w: &f32| {
        let away = |code: &usize| (VALUES[*code] / 16.0 - w.abs()).abs();
        let code = (0..8).min_by(|a, b| away(a).total_cmp(&away(b))).unwrap();
        if *w < 0.0 { (code as u8 | 8, -VALUES[code] / 16.0) } else { (code as u8, VALUES[code] / 16.0) }
    };
    let coded: Vec<(u8, f32)> = w.iter().map(code).collect();
    let blocks = coded.chunks(2).map(|pair| pair[0].0 | pair[1].0 << 4).collect();
    (blocks, vec![127 - 4; w.len() / 32], coded.iter().map(|(_, x)| *x).collect())
}

#[test]
fn the_blocks_of_gpt_oss_are_stacks_of_experts_in_mxfp4() {
    let entry = tiny::fixtures().join("qwen3_moe");
    let checkpoint = tiny::Checkpoint::read(&entry).unwrap();
    let values = |name: String| {
        let spec = checkpoint.tensors.iter().find(|t| t.name == name).unwrap();
        spec.values(checkpoint.seed).collect::<Vec<f32>>()
    };
    // Both kinds of files hold all experts of a layer in two tensors, which come with its first expert's.
    let fused = |blocks: bool| {
        model("qwen3_moe", if blocks { json!({"quant_method": "mxfp4"}) } else { Value::Null }, |t, w| {
            let Some((layer, rest)) = t.name.split_once(".experts.") else {
                return vec![dense(&t.name, &t.shape, w)];
            };
            let name = match rest {
                "0.gate_proj.weight" => "gate_up_proj",
                "0.down_proj.weight" => "down_proj",
                _ => return vec![],
            };
            let parts: &[&str] = if name == "down_proj" { &["down_proj"] } else { &["gate_proj", "up_proj"] };
            let all = (0..8).flat_map(|e| parts.iter().map(move |part| (e, part)));
            let all = all.flat_map(|(e, part)| values(format!("{layer}.experts.{e}.{part}.weight")));
            let (data, scales, back) = mxfp4(&all.collect::<Vec<f32>>());
            let (base, shape) = (format!("{layer}.experts.{name}"), [8, t.shape[0] * parts.len(), t.shape[1]]);
            if !blocks {
                return vec![dense(&base, &shape, &back)];
            }
            let [experts, rows, cols] = shape;
            let tensor = |part: &str, shape: &[usize], bytes| Tensor {
                name: format!("{base}_{part}"),
                dtype: Dtype::U8,
                shape: shape.to_vec(),
                bytes,
            };
            vec![
                tensor("blocks", &[experts, rows, cols / 32, 16], data),
                tensor("scales", &[experts, rows, cols / 32], scales),
            ]
        })
    };
    let want = logits(fused(false).path(), DeviceChoice::Cpu);
    let worst = difference(&logits(fused(true).path(), DeviceChoice::Cpu), &want);
    assert!(worst < 2e-5, "logits are off by {worst:.1e}");
}

#[test]
fn bitnet_gives_the_logits_of_transformers() {
    let file = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/quant/forms.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&file).unwrap();
    for mode in ["offline", "online"] {
        let config = json!({"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": mode});
        let folder = model("llama", config, |t, w| {
            if mode == "online" {
                return vec![dense(&t.name, &t.shape, w)];
            }
            let mut bytes = vec![0u8; w.len() / 4];
            for (i, w) in w.iter().enumerate() {
                let code = (w / half_width(t) as f32 * 2.0).round_ties_even().clamp(-1.0, 1.0) + 1.0;
                bytes[i % w_quarter(t)] |= (code as u8) << (2 * (i / w_quarter(t)));
            }
            let shape = vec![t.shape[0] / 4, t.shape[1]];
            let scale = dense(&format!("{}_scale", t.name), &[1], &[half_width(t) as f32 / 2.0]);
            vec![Tensor { name: t.name.clone(), dtype: Dtype::U8, shape, bytes }, scale]
        });
        let want = file.tensor(&format!("bitnet.llama.{mode}")).unwrap();
        let want: Vec<f32> = want.data().as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
        let worst = difference(&logits(folder.path(), DeviceChoice::Cpu), &want);
        println!("bitnet, {mode}: {worst:.1e}");
        // An input that two sums bring to either side of a half moves by a whole 127th: sums in another order may do that.
        assert!(worst < 5e-3, "{mode}: logits are off by {worst:.1e}");
    }
}

fn w_quarter(t: &TensorSpec) -> usize {
    t.shape.iter().product::<usize>() / 4
}

/// Half of the width of the distribution that a tensor's numbers come from.
fn half_width(t: &tests::tiny::TensorSpec) -> f64 {
    match t.range {
        tests::tiny::Range::Floats(_, half) => half,
        tests::tiny::Range::Bytes(..) => panic!("{} holds bytes", t.name),
    }
}
