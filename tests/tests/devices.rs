//! `--devices` as a user gives it: the real binary, whose ranks are the CPU's, and what it says where a model cannot be shared.

use serde_json::Value;
use std::process::Output;
use tempfile::TempDir;
use tests::{binary::dylm, tiny};

fn model(name: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    tiny::write(&tiny::fixtures().join(name), folder.path()).unwrap();
    folder
}

fn run(command: &str, model: &TempDir, flags: &[&str]) -> Output {
    let flags = flags.iter().copied();
    dylm().arg(command).arg("--model").arg(model.path()).args(flags).output().unwrap()
}

fn generated(model: &TempDir, flags: &[&str]) -> Value {
    let always = ["--json", "--ignore-chat-template", "--prompt", "a b c d", "--max-tokens", "12", "--device", "cpu"];
    let output = run("generate", model, &[&always[..], &["--dtype", "float32"], flags].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The sentence of a run that fails.
fn refused(command: &str, model: &TempDir, flags: &[&str]) -> String {
    let output = run(command, model, flags);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.starts_with("error: ") && text.trim_end().lines().count() == 1, "{text}");
    text
}

#[test]
fn a_model_on_two_devices_writes_what_it_writes_on_one() {
    for name in ["llama", "mixtral"] {
        let model = model(name);
        let one = generated(&model, &[]);
        assert_eq!(one["tokens"].as_array().unwrap().len(), 12);
        for more in [&["--devices", "0,1"][..], &["--devices", "1,0", "--prefill-step-size", "3"]] {
            assert_eq!(generated(&model, more)["tokens"], one["tokens"], "{name} {more:?}");
        }
        // Sampled with one seed, the same: the first device chooses for both.
        let sampled = ["--temp", "0.8", "--seed", "7", "--repetition-penalty", "1.2"];
        let shared = [&sampled[..], &["--devices", "0,1"]].concat();
        assert_eq!(generated(&model, &shared)["tokens"], generated(&model, &sampled)["tokens"], "{name}");
    }
}

#[test]
fn what_is_shared_stands_above_the_answer() {
    let output = run("generate", &model("llama"), &["--device", "cpu", "--devices", "0,1", "--max-tokens", "2"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.starts_with("2 devices share 21 of "), "{text}");
}

#[test]
fn a_bench_runs_on_two_devices_and_goes_back_after_each_trial() {
    let flags =
        ["--device", "cpu", "--devices", "0,1", "-p", "8", "-g", "4", "-n", "2", "-d", "4", "-b", "2", "--json"];
    let output = run("bench", &model("llama"), &flags);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["trials"].as_array().unwrap().len(), 2);
}

#[test]
fn a_model_that_cannot_be_shared_so_says_why_and_what_helps() {
    let llama = model("llama");
    let cpu = |devices: &str| refused("generate", &llama, &["--device", "cpu", "--devices", devices]);
    assert!(cpu("0,0").contains("--devices 0,0: each device can be named once"));
    let many = (0..200).map(|n| n.to_string()).collect::<Vec<_>>().join(",");
    assert!(cpu(&many).contains("can be cut in 200") && cpu(&many).contains("name fewer devices"));
    let mamba = refused("generate", &model("mamba"), &["--device", "cpu", "--devices", "0,1"]);
    assert!(mamba.contains("can be cut in 2"), "{mamba}");
    let metal = refused("generate", &llama, &["--device", "metal", "--devices", "0,1"]);
    assert!(metal.contains("Metal has one GPU"), "{metal}");
}

#[test]
fn a_prompt_cache_is_made_and_read_on_one_device() {
    let (llama, folder) = (model("llama"), tempfile::tempdir().unwrap());
    let file = folder.path().join("cache.safetensors");
    let file = file.to_str().unwrap();
    let made = ["--device", "cpu", "--prompt", "a b c", "--ignore-chat-template", "--prompt-cache-file", file];
    let shared = [&made[..], &["--devices", "0,1"]].concat();
    assert!(refused("cache-prompt", &llama, &shared).contains("make it without --devices"));
    assert!(run("cache-prompt", &llama, &made).status.success());
    let read = ["--device", "cpu", "--devices", "0,1", "--prompt-cache-file", file, "--max-tokens", "2"];
    assert!(refused("generate", &llama, &read).contains("leave --devices out"));
}
