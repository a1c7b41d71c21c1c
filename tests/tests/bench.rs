//! `dylm bench` on tiny checkpoints: what it counts, and that a cache which was filled once serves every trial. No speed is judged.

use serde_json::Value;
use std::process::Output;
use tempfile::TempDir;
use tests::{binary::dylm, tiny};

fn model(name: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    tiny::write(&tiny::fixtures().join(name), folder.path()).unwrap();
    folder
}

fn bench(model: &TempDir, flags: &[&str]) -> Output {
    dylm().arg("bench").arg(model.path()).args(flags).output().unwrap()
}

fn figures(model: &TempDir, flags: &[&str]) -> Value {
    let output = bench(model, &[flags, &["--json"]].concat());
    assert_eq!(output.status.code(), Some(0), "{flags:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_filled_cache_serves_every_trial_and_is_not_counted() {
    // Plain attention, a window that moves on and so cannot go back, a recurrence.
    for name in ["llama", "mistral", "mamba2"] {
        let model = model(name);
        let figures = figures(&model, &["-d", "300", "-p", "8", "-g", "3", "-n", "2"]);
        assert_eq!(figures["n_depth"], 300, "{name}");
        for trial in figures["trials"].as_array().unwrap() {
            assert_eq!((&trial["prompt_tokens"], &trial["generation_tokens"]), (&8.into(), &3.into()), "{name}");
            assert!(trial["prompt_tps"].as_f64().unwrap() > 0.0 && trial["generation_tps"].as_f64().unwrap() > 0.0);
        }
    }
}

#[test]
fn several_sequences_count_together() {
    let model = model("llama");
    let figures = figures(&model, &["-b", "3", "--depth", "5", "-p", "8", "-g", "4", "-n", "1"]);
    let median = &figures["median"];
    assert_eq!((&median["prompt_tokens"], &median["generation_tokens"]), (&24.into(), &12.into()));
    // One reading of the weights serves them all.
    assert_eq!(figures["weight_bytes_a_token"], Value::Null);
}

#[test]
fn a_prompt_or_a_generation_can_be_measured_alone() {
    let model = model("llama");
    let speeds = |flags: &[&str]| {
        let median = figures(&model, &[flags, &["-n", "1"]].concat())["median"].clone();
        (median["prompt_tps"].as_f64().unwrap() > 0.0, median["generation_tps"].as_f64().unwrap() > 0.0)
    };
    assert_eq!(speeds(&["-p", "8", "-g", "0"]), (true, false));
    assert_eq!(speeds(&["-p", "0", "-g", "4", "-d", "6"]), (false, true));
    let nothing = bench(&model, &["-p", "0", "-g", "0"]);
    assert_eq!(nothing.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&nothing.stderr).contains("-p 0 and -g 0"));
}

#[test]
fn a_token_reads_all_weights_but_tables_that_are_only_looked_up_and_experts_that_are_not_chosen() {
    let bytes = |folder: &TempDir, flags: &[&str]| {
        let flags = [&["-p", "2", "-g", "2", "-n", "1"], flags].concat();
        figures(folder, &flags)["weight_bytes_a_token"].as_u64().unwrap()
    };
    let stored = |folder: &TempDir, part: &str| {
        let file = std::fs::read(folder.path().join("model.safetensors")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
        let sizes =
            tensors.tensors().into_iter().filter(|(name, _)| name.contains(part)).map(|(_, t)| t.data().len() as u64);
        sizes.sum::<u64>()
    };
    let untied = model("llama");
    assert!(stored(&untied, "embed_tokens") > 0 && stored(&untied, "lm_head") > 0);
    assert_eq!(bytes(&untied, &[]), stored(&untied, "") - stored(&untied, "embed_tokens"));

    let routed = model("mixtral");
    let one = bytes(&routed, &["--config", "num_experts_per_tok=1"]);
    let two = bytes(&routed, &["--config", "num_experts_per_tok=2"]);
    let experts = stored(&routed, "experts");
    let count = tiny::config(routed.path()).unwrap()["num_local_experts"].as_u64().unwrap();
    assert!(count > 2 && experts > 0);
    assert_eq!(two - one, experts / count);
}

#[test]
fn the_memory_is_measured_alone_or_beside_a_model() {
    let output = dylm().args(["bench", "--bandwidth", "--json"]).output().unwrap();
    let alone: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(alone["bandwidth"]["gb_per_s"].as_f64().unwrap() > 0.0 && alone["median"].is_null());
    let model = model("llama");
    let beside = figures(&model, &["--bandwidth", "-p", "2", "-g", "3", "-n", "1"]);
    assert!(beside["bandwidth"]["threads"].as_u64().unwrap() > 0);
    assert!(beside["weights_gb_per_s"].as_f64().unwrap() > 0.0);
    // What was read for that is not the model's.
    if cfg!(target_os = "linux") {
        assert!(beside["median"]["peak_memory_bytes"].as_u64() < beside["bandwidth"]["bytes"].as_u64());
    }
}
