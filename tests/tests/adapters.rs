//! Adapters on a whole model, from the folder to the logits: those that mlx-lm computed with them, or such as can only be.

use dylm::{
    LanguageModel, LoadOptions,
    cache::CacheOptions,
    device::{DeviceChoice, DtypeChoice},
    model::{Input, Want},
};
use safetensors::tensor::{Dtype, TensorView};
use std::path::Path;
use tests::tiny::{self, Expected};

/// `tiny/llama` with the adapter in this folder.
fn load(adapter: &Path) -> dylm::Result<LanguageModel> {
    let folder = tempfile::tempdir().unwrap();
    tiny::write(&tiny::fixtures().join("llama"), folder.path()).unwrap();
    let adapter_path = Some(adapter.to_owned());
    let (device, dtype) = (DeviceChoice::Cpu, DtypeChoice::Float32);
    dylm::load(folder.path().to_str(), &LoadOptions { device, dtype, adapter_path, ..Default::default() })
}

/// Logits after the prompt and after each further token.
fn logits(lm: &LanguageModel, prompt: &[u32], steps: &[u32]) -> Vec<Vec<f32>> {
    let mut state = lm.model.state(&CacheOptions::default()).unwrap();
    let mut read =
        |tokens: &[u32]| lm.model.step(&mut [Input { state: &mut state, tokens, want: Want::Last }]).unwrap().remove(0);
    let mut rows = read(prompt);
    rows.extend(steps.iter().flat_map(|&token| read(&[token])));
    rows
}

/// A folder with a full adapter of one tensor.
fn full(name: &str, shape: &[usize], value: f32) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("adapter_config.json"), r#"{"fine_tune_type": "full"}"#).unwrap();
    let bytes = value.to_le_bytes().repeat(shape.iter().product());
    let view = TensorView::new(Dtype::F32, shape.to_vec(), &bytes).unwrap();
    safetensors::serialize_to_file([(name, view)], None, &folder.path().join("adapters.safetensors")).unwrap();
    folder
}

#[test]
fn logits_with_an_adapter_are_those_of_mlx_lm() {
    for name in ["llama-lora", "llama-dora"] {
        let (adapter, folder) = (tiny::adapter(name), tempfile::tempdir().unwrap());
        tiny::write_adapter(&adapter, folder.path()).unwrap();
        let expected = Expected::read(&adapter).unwrap();
        let ours = logits(&load(folder.path()).unwrap(), &expected.prompt, &expected.steps);
        assert_eq!(ours.len(), expected.logits.len());
        for (step, (ours, theirs)) in ours.iter().zip(&expected.logits).enumerate() {
            let size = theirs.iter().fold(0f32, |m, x| m.max(x.abs()));
            let off = ours.iter().zip(theirs).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max) / size;
            assert!(ours.len() == theirs.len() && off < 2e-5, "{name}: step {step} is off by {off:.1e}");
        }
    }
}

#[test]
fn a_full_adapter_s_head_is_the_model_s_head() {
    let lm = load(full("lm_head.weight", &[128, 64], 0.0).path()).unwrap();
    assert!(logits(&lm, &[5, 6, 7], &[8]).iter().flatten().all(|&x| x == 0.0));
}

#[test]
fn an_adapter_of_another_model_is_refused() {
    let refused = |folder: &Path| load(folder).map(drop).unwrap_err().to_string();
    let text = refused(full("lm_head.weight", &[128, 32], 0.0).path());
    assert_eq!(text, "lm_head.weight: adapter has [128, 32], the model has [128, 64]");
    let folder = tempfile::tempdir().unwrap();
    tiny::write_adapter(&tiny::adapter("llama-lora"), folder.path()).unwrap();
    let file = folder.path().join("adapters.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let needle = b"layers.2.mlp.down_proj";
    while let Some(at) = bytes.windows(needle.len()).position(|w| w == needle) {
        bytes[at + 7] = b'9';
    }
    std::fs::write(&file, bytes).unwrap();
    assert_eq!(
        refused(folder.path()),
        "model.layers.9.mlp.down_proj: the adapter changes a layer that this model does not have"
    );
}
