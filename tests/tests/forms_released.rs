//! DeepSeek V4 in the types of its released files: matrices in E4M3 with a power of two for 128 x 128, experts in E2M1 with one for 32,
//! the rest in floats, and a table of whole numbers. What is loaded gives the logits of the numbers that were stored.

use dylm::{
    LoadOptions,
    cache::CacheOptions,
    device::{DeviceChoice, DtypeChoice},
    model::{Input, Want},
};
use safetensors::tensor::Dtype;
use serde_json::json;
use std::path::Path;
use tests::{
    packing::{self, Tensor, e4m3},
    tiny::{self, Expected, TensorSpec},
};

const FP8: [&str; 6] =
    [".wq_a.weight", ".wq_b.weight", ".attn.wkv.weight", ".wo_a.weight", ".wo_b.weight", "_experts."];

/// A tensor as it is released, and the numbers that this stores.
fn released(t: &TensorSpec, w: &[f32]) -> (Vec<Tensor>, Vec<f32>) {
    let tensor =
        |name: &str, dtype, shape: &[usize], bytes| Tensor { name: name.into(), dtype, shape: shape.into(), bytes };
    let scale = t.name.replace(".weight", ".scale");
    match t.shape.as_slice() {
        &[rows, cols] if t.name.contains(".experts.") => {
            // Whole steps of 2^-4, of which E2M1 has these.
            const VALUES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
            let code = |w: &f32| {
                let away = |code: &usize| (VALUES[*code] / 16.0 - w.abs()).abs();
                let code = (0..8).min_by(|a, b| away(a).total_cmp(&away(b))).unwrap();
                if *w < 0.0 { (code as u8 | 8, -VALUES[code] / 16.0) } else { (code as u8, VALUES[code] / 16.0) }
            };
            let coded: Vec<(u8, f32)> = w.iter().map(code).collect();
            let bytes = coded.chunks(2).map(|pair| pair[0].0 | pair[1].0 << 4).collect();
            let parts = vec![
                tensor(&t.name, Dtype::I8, &[rows, cols / 2], bytes),
                tensor(&scale, Dtype::F8_E8M0, &[rows, cols / 32], vec![127 - 4; rows * cols / 32]),
            ];
            (parts, coded.into_iter().map(|(_, x)| x).collect())
        }
        &[rows, cols] if FP8.iter().any(|part| t.name.contains(part)) => {
            let coded: Vec<(u8, f32)> = w.iter().map(|w| e4m3(w * 256.0)).collect();
            let blocks = [rows.div_ceil(128), cols.div_ceil(128)];
            let parts = vec![
                tensor(&t.name, Dtype::F8_E4M3, &t.shape, coded.iter().map(|(byte, _)| *byte).collect()),
                tensor(&scale, Dtype::F8_E8M0, &blocks, vec![127 - 8; blocks[0] * blocks[1]]),
            ];
            (parts, coded.into_iter().map(|(_, x)| x / 256.0).collect())
        }
        shape if t.name.ends_with("tid2eid") => {
            let bytes = w.iter().flat_map(|&id| (id as i64).to_le_bytes()).collect();
            (vec![tensor(&t.name, Dtype::I64, shape, bytes)], w.to_vec())
        }
        shape => {
            let bytes = w.iter().flat_map(|x| x.to_le_bytes()).collect();
            (vec![tensor(&t.name, Dtype::F32, shape, bytes)], w.to_vec())
        }
    }
}

fn logits(folder: &Path, device: DeviceChoice) -> Vec<f32> {
    let prompt = Expected::read(&tiny::fixtures().join("deepseek_v4")).unwrap().prompt;
    let options = LoadOptions { device, dtype: DtypeChoice::Float32, ..Default::default() };
    let lm = dylm::load(folder.to_str(), &options).unwrap_or_else(|e| panic!("{e}"));
    let mut state = lm.model.state(&CacheOptions::default()).unwrap();
    let mut input = [Input { state: &mut state, tokens: &prompt, want: Want::All }];
    lm.model.step(&mut input).unwrap().remove(0).concat()
}

#[test]
fn files_as_released_give_the_logits_of_the_numbers_in_them() {
    let entry = tiny::fixtures().join("deepseek_v4");
    let checkpoint = tiny::Checkpoint::read(&entry).unwrap();
    let (mut packed, mut meant) = (Vec::new(), Vec::new());
    for t in &checkpoint.tensors {
        let (parts, numbers) = released(t, &t.values(checkpoint.seed).collect::<Vec<_>>());
        meant.push(match parts.as_slice() {
            [whole] => whole.clone(),
            _ => {
                let bytes = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
                Tensor { name: t.name.clone(), dtype: Dtype::F32, shape: t.shape.clone(), bytes }
            }
        });
        packed.extend(parts);
    }
    let folders = [&packed, &meant].map(|tensors| {
        let folder = tempfile::tempdir().unwrap();
        tiny::write(&entry, folder.path()).unwrap();
        packing::write(tensors, &folder.path().join("model.safetensors")).unwrap();
        folder
    });
    let mut config = tiny::config(&entry).unwrap();
    config["expert_dtype"] = "fp4".into();
    config["quantization_config"] = json!({
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]
    });
    std::fs::write(folders[0].path().join("config.json"), config.to_string()).unwrap();
    let want = logits(folders[1].path(), DeviceChoice::Cpu);
    let scale = want.iter().fold(0f32, |m, x| m.max(x.abs()));
    for device in [DeviceChoice::Cpu, DeviceChoice::CpuByCandle] {
        let got = logits(folders[0].path(), device);
        let worst = got.iter().zip(&want).map(|(x, y)| (x - y).abs()).fold(0f32, f32::max) / scale;
        assert!(got.len() == want.len() && worst < 2e-5, "logits are off by {worst:.1e}");
    }
    assert!(packed.len() > meant.len() + 100 && scale > 0.1);
}
