//! A model's first step multiplies packed weights from where they lie in their file; from the second one on they are packed for the
//! processor. Nothing that comes out may tell which.

use dylm::{
    GenerateOptions, Generation, LanguageModel, LoadOptions,
    cache::CacheOptions,
    device::{DeviceChoice, DtypeChoice},
    model::{Input, Want},
};
use serde_json::Value;
use std::path::Path;
use tests::{
    smollm2::{self, Form},
    tiny, variant,
};

const PROMPT: [u32; 9] = [5, 17, 42, 8, 33, 60, 21, 13, 7];

fn load(path: &Path) -> LanguageModel {
    let options = LoadOptions { device: DeviceChoice::Cpu, dtype: DtypeChoice::Bfloat16, ..Default::default() };
    dylm::load(path.to_str(), &options).unwrap_or_else(|e| panic!("{e}"))
}

/// The bits of all of the prompt's logits, as a new text.
fn logits(lm: &LanguageModel, prompt: &[u32]) -> Vec<u32> {
    let mut state = lm.model.state(&CacheOptions::default()).unwrap();
    let rows = lm.model.step(&mut [Input { state: &mut state, tokens: prompt, want: Want::All }]).unwrap().remove(0);
    rows.concat().into_iter().map(f32::to_bits).collect()
}

fn text(lm: &LanguageModel) -> Vec<u32> {
    let options = GenerateOptions { max_tokens: 24, ignore_eos: true, ..Default::default() };
    Generation::new(lm, &PROMPT, &options, None, None).unwrap().map(|r| r.unwrap().token).collect()
}

fn hold(path: &Path) {
    let what = path.display();
    let lm = load(path);
    for count in [1, 2, 5, 9] {
        let first = logits(&load(path), &PROMPT[..count]);
        assert!(first == logits(&lm, &PROMPT[..count]), "{what}: {count} tokens, alone");
    }
    let long: Vec<u32> = PROMPT.iter().copied().cycle().take(40).collect();
    assert!(logits(&load(path), &long) == logits(&lm, &long), "{what}: a prompt of many tokens");
    assert_eq!(text(&load(path)), text(&lm), "{what}: a text over the first steps, and one after them");
}

/// The same for a model that takes long.
fn hold_first(path: &Path) {
    let lm = load(path);
    assert!(logits(&lm, &PROMPT[..3]) == logits(&lm, &PROMPT[..3]), "{}", path.display());
}

#[test]
fn a_first_step_over_weights_in_their_file_gives_the_bits_of_later_ones() {
    for entry in ["llama", "mixtral", "gemma3_text"] {
        let folders = [(); 2].map(|()| tempfile::tempdir().unwrap());
        variant::pack(&tiny::fixtures().join(entry), folders[0].path(), folders[1].path()).unwrap();
        hold(folders[0].path());
    }
}

#[test]
fn a_real_model_s_first_step_gives_the_bits_of_later_ones_in_every_form() {
    for form in [Form::Mlx8bit, Form::MlxMxfp4] {
        let Some(folder) = smollm2::folder(form) else { return };
        hold_first(&folder);
    }
    if let Some(gguf) = smollm2::gguf() {
        hold_first(&gguf);
    }
}

#[test]
fn a_real_model_in_bfloat16_has_the_same_bits_before_and_after_its_weights_move() {
    let Some(folder) = smollm2::folder(Form::Bf16) else { return };
    let (before, lm) = (load(&folder), load(&folder));
    let prompt: Vec<u32> = PROMPT.iter().copied().cycle().take(20).collect();
    let first = [1, 3, 20].map(|count| logits(&before, &prompt[..count]));
    dylm::weights::moving::all();
    assert!(first == [1, 3, 20].map(|count| logits(&lm, &prompt[..count])));
}

#[test]
fn weights_are_in_memory_once_while_they_are_packed() {
    for (form, tokens) in [(Form::Mlx8bit, "1"), (Form::Mlx8bit, "3"), (Form::Bf16, "1"), (Form::Bf16, "20")] {
        let Some(folder) = smollm2::folder(form) else { return };
        let weights = std::fs::metadata(folder.join("model.safetensors")).unwrap().len();
        let run = tests::binary::dylm()
            .args(["generate", "-m", tokens, "--ignore-chat-template", "--json", "--model"])
            .arg(&folder)
            .output()
            .unwrap();
        let told: Value = serde_json::from_slice(&run.stdout).unwrap_or_else(|e| panic!("{e}: {run:?}"));
        let peak = told["statistics"]["peak_memory_bytes"].as_u64().unwrap();
        // Beside the weights: a cache, the tokenizer, the program itself.
        assert!(peak < weights + (100 << 20), "{form:?}, {tokens} tokens: {peak} at the peak for {weights} of weights");
    }
}
