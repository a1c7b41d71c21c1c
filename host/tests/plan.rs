//! `dylm plan` against a Hub over real sockets: what it tells without the weights, how little it fetches, and what it refuses.

use serde_json::Value;
use std::{
    fs,
    process::{Command, Output},
};
use tests::{binary, tiny};

#[path = "hub/server.rs"]
#[allow(dead_code)] // what only other tests ask it
mod server;
use server::{Faults, Hub, ID};

/// Enough that nobody could take the whole for a header.
const PADDING: usize = 4 << 20;

/// Safetensors with these tensors of zeros: name, shape in f32.
fn safetensors(tensors: &[(&str, &[usize])]) -> Vec<u8> {
    typed(tensors.iter().map(|(name, shape)| (name.to_string(), "F32", shape.to_vec())))
}

/// The same of any type: name, dtype, shape.
fn typed(tensors: impl IntoIterator<Item = (String, &'static str, Vec<usize>)>) -> Vec<u8> {
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (name, dtype, shape) in tensors {
        let size = shape.iter().product::<usize>() * if dtype == "I64" { 8 } else { 4 };
        header.insert(name, serde_json::json!({ "dtype": dtype, "shape": shape, "data_offsets": [end, end + size] }));
        end += size;
    }
    let header = Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.resize(file.len() + end, 0);
    file
}

/// A hub with the tiny llama in two shards, the second of them large: its tensor is what no llama has.
fn hub() -> Hub {
    let hub = hub_of_llama();
    hub.put("model-extra.safetensors", &safetensors(&[("extra.weight", &[PADDING / 4])]), true);
    hub
}

fn hub_of_llama() -> Hub {
    let hub = Hub::start();
    let folder = tempfile::tempdir().unwrap();
    tiny::write(&tiny::fixtures().join("llama"), folder.path()).unwrap();
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        hub.put(name, &fs::read(folder.path().join(name)).unwrap(), name.ends_with(".safetensors"));
    }
    hub
}

fn plan(hub: &Hub, arguments: &[&str]) -> Output {
    let mut dylm = binary::dylm();
    dylm.args(["plan", ID]).args(arguments);
    run(&mut dylm, hub)
}

fn run(dylm: &mut Command, hub: &Hub) -> Output {
    for name in ["HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN"] {
        dylm.env_remove(name);
    }
    dylm.env("HF_ENDPOINT", hub.endpoint()).env("HF_HOME", hub.dir.path()).output().unwrap()
}

fn facts(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stderr)))
}

/// The one sentence of a run that fails.
fn refusal(output: &Output) -> String {
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert_eq!(err.trim_end().lines().count(), 1, "{err}");
    err
}

#[test]
fn a_plan_of_a_model_on_the_hub_is_that_of_its_files_and_fetches_only_headers() {
    let hub = hub_of_llama();
    let output = plan(&hub, &["--json", "--ctx", "100"]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let there = facts(&output);
    let served = hub.served();
    let whole = there["download_bytes"].as_u64().unwrap();
    assert!(served < 48 << 10 && whole > 4 * served as u64, "{served} of {whole} bytes were sent");
    assert!(there["fetched_bytes"].as_u64().unwrap() <= served as u64);
    assert!(!hub.repo().exists(), "nothing is written to the cache");
    for key in ["agrees", "fits"] {
        assert_eq!(there[key], true, "{key}: {there}");
    }
    let pulled = run(binary::dylm().args(["pull", ID]), &hub);
    let folder = String::from_utf8(pulled.stdout).unwrap();
    let here = facts(&plan(&hub, &["--json", "--ctx", "100"]));
    assert_eq!(here["download_bytes"], Value::Null, "what is in the cache needs no download");
    assert_eq!(here["path"].as_str().unwrap(), folder.trim());
    for key in
        ["path", "revision", "model_type", "plugin", "parameters", "weight_bytes", "kv_bytes", "memory", "tensors"]
    {
        assert_eq!(there[key], here[key], "{key}");
    }
    assert_eq!(whole, fs::metadata(format!("{}/model.safetensors", folder.trim())).unwrap().len());
}

#[test]
fn a_server_that_ignores_ranges_is_hung_up_on() {
    let hub = hub_of_llama();
    // More than the buffers of two sockets hold.
    let large = safetensors(&[("vision.weight", &[16 << 20])]);
    hub.put("model-large.safetensors", &large, true);
    for name in ["model.safetensors", "model-large.safetensors"] {
        hub.spoil(name, Faults { no_ranges: true, ..Faults::default() });
    }
    let there = facts(&plan(&hub, &["--json"]));
    assert_eq!(there["unused"], serde_json::json!(["vision.weight"]));
    assert!(there["fetched_bytes"].as_u64().unwrap() < 16 << 10);
    assert!(hub.served() < large.len() / 2, "{} of {} bytes were sent", hub.served(), large.len());
}

#[test]
fn a_header_longer_than_the_first_request_is_fetched_whole() {
    let hub = hub_of_llama();
    let names: Vec<String> = (0..2000).map(|n| format!("vision.blocks.{n}.weight")).collect();
    let tensors: Vec<(&str, &[usize])> = names.iter().map(|name| (name.as_str(), &[8usize, 8][..])).collect();
    let shard = safetensors(&tensors);
    hub.put("model-vision.safetensors", &shard, true);
    let there = facts(&plan(&hub, &["--json"]));
    assert_eq!(there["unused"].as_array().unwrap().len(), 2000);
    let header = shard.len() - 2000 * 256;
    assert!(header > 64 << 10 && hub.served() < header + (64 << 10), "{header}: {} bytes were sent", hub.served());
    let ranges =
        hub.seen().into_iter().filter(|seen| seen.by_storage).filter_map(|seen| seen.range).collect::<Vec<_>>();
    assert!(ranges.contains(&format!("bytes=32768-{}", header - 1)), "{ranges:?}");
}

#[test]
fn a_plan_names_every_tensor_that_is_missing_left_over_or_of_another_shape() {
    let hub = hub();
    let output = plan(&hub, &["--json", "--config", "intermediate_size=95", "--config", "num_hidden_layers=4"]);
    assert_eq!(output.status.code(), Some(1));
    let told = facts(&output);
    let has = |key: &str, part: &str| {
        let list = told[key].as_array().unwrap();
        assert!(list.iter().any(|text| text.as_str().unwrap().contains(part)), "{key}: {list:?}");
    };
    has("missing", "model.layers.3.mlp.up_proj.weight");
    has("misshapen", "model.layers.0.mlp.up_proj.weight: config says [95, 64], file has [96, 64]");
    has("unused", "extra.weight");
    let said = plan(&hub, &[]);
    assert_eq!(said.status.code(), Some(1));
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(
        said.contains("extra.weight: not used by the architecture") && said.contains("2 files of weights"),
        "{said}"
    );
}

#[test]
fn an_architecture_without_a_plugin_is_said_before_anything_is_downloaded() {
    let hub = hub();
    let said = plan(&hub, &["--config", "model_type=llamo"]);
    assert!(
        refusal(&said).contains("no plugin serves model_type \"llamo\"; the nearest of those that have one are llama")
    );
    let out = String::from_utf8_lossy(&said.stdout);
    assert!(out.contains("4.7 MB in 2 files of weights"), "{out}");
    let told = facts(&plan(&hub, &["--json", "--config", "model_type=llamo"]));
    assert!(told["error"].as_str().unwrap().contains("no plugin serves"), "{told}");
    assert_eq!(told["model_type"], "llamo");
}

#[test]
fn a_model_that_will_not_fit_is_said_not_to_and_fails_only_where_that_was_asked_for() {
    let hub = hub_of_llama();
    // A context that no machine has memory for: 1152 bytes a token.
    let endless = ["--ctx", "1000000000000"];
    let said = plan(&hub, &endless);
    assert_eq!(said.status.code(), Some(0));
    assert!(
        String::from_utf8_lossy(&said.stdout).contains("this will not fit: as stored it takes about 15"),
        "{said:?}"
    );
    assert_eq!(plan(&hub, &[&endless[..], &["--strict"]].concat()).status.code(), Some(1));
    assert_eq!(plan(&hub, &["--strict"]).status.code(), Some(0));
    let told = facts(&plan(&hub, &[&endless[..], &["--json"]].concat()));
    assert_eq!((&told["fits"], &told["memory"]["4_bit"]["fits"]), (&false.into(), &false.into()));
}

#[cfg(unix)]
#[test]
fn on_a_gpu_the_weights_count_unpacked_and_against_its_own_memory() {
    use std::os::unix::fs::PermissionsExt;
    let hub = hub_of_llama();
    let folder = tempfile::tempdir().unwrap();
    let tool = folder.path().join("nvidia-smi");
    fs::write(&tool, "#!/bin/sh\necho 'Toy GPU, 1, 1'\n").unwrap();
    fs::set_permissions(&tool, fs::Permissions::from_mode(0o755)).unwrap();
    let mut dylm = binary::dylm();
    dylm.args(["plan", ID, "--device", "cuda"]).env("PATH", folder.path());
    let said = run(&mut dylm, &hub);
    let out = String::from_utf8_lossy(&said.stdout);
    assert_eq!(said.status.code(), Some(0));
    assert!(
        out.contains("this will not fit: in bf16 it takes about ") && out.contains("this machine's Toy GPU has 1.0 MB"),
        "{out}"
    );
}

#[test]
fn packed_forms_take_what_their_bits_say() {
    let hub = hub_of_llama();
    let told = facts(&plan(&hub, &["--json"]));
    let weights = |form: &str| told["memory"][form]["weights"].as_u64().unwrap();
    let parameters = told["parameters"].as_u64().unwrap();
    assert_eq!((weights("as_stored"), weights("bf16")), (4 * parameters, 2 * parameters));
    // Seven norms of 64, and three matrices of rows of 96, stay as they are; of the rest, 64 numbers share two of 16 bits.
    let plain = 7 * 64 + 3 * (64 * 96) + 3 * (64 * 96);
    for (form, bits) in [("8_bit", 8), ("4_bit", 4)] {
        assert_eq!(
            weights(form),
            (parameters - plain) * bits / 8 + (parameters - plain) / 64 * 4 + 2 * plain,
            "{form}"
        );
    }
}

#[test]
fn a_bad_header_is_refused_in_one_sentence_that_names_the_file() {
    let sound = safetensors(&[("a.weight", &[2, 2])]);
    let with_header = |header: &str| [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 16]].concat();
    let entry = |shape: &str, offsets: &str| {
        with_header(&format!(r#"{{"a.weight": {{"dtype": "F32", "shape": {shape}, "data_offsets": {offsets}}}}}"#))
    };
    let cases: [(Vec<u8>, &str); 9] = [
        (vec![0; 4], "too short for a safetensors file"),
        ([&u64::MAX.to_le_bytes()[..], &[0; 64]].concat(), "header of 18446744073709551615 bytes"),
        ([&5000u64.to_le_bytes()[..], &[b' '; 64]].concat(), "cut short within its header (72 bytes of 5008)"),
        (with_header("[1, 2]"), "header is not as it should be"),
        (entry("[2, 2]", "[16, 0]"), "a.weight: data_offsets [16, 0] run backwards"),
        (entry("[2, 2]", "[0, 32]"), "a.weight: data ends at 32, the file has 16 bytes of data"),
        (
            entry("[4294967296, 4294967296]", "[0, 16]"),
            "a.weight: F32 [4294967296, 4294967296] does not take the 16 bytes",
        ),
        (entry("[2, 1]", "[0, 8]"), "8 bytes after the last tensor belong to none"),
        (sound[..sound.len() - 1].to_vec(), "a.weight: data ends at 16, the file has 15 bytes of data"),
    ];
    for (file, says) in cases {
        let hub = hub_of_llama();
        hub.put("model.safetensors", &file, true);
        let said = refusal(&plan(&hub, &["--json"]));
        assert!(said.contains("someone/tiny/model.safetensors: ") && said.contains(says), "{says}: {said}");
    }
}

#[test]
fn an_index_that_lies_is_refused() {
    for (index, says) in [
        (r#"{"weight_map": {"x": "../model.safetensors"}}"#, "not a plain file name"),
        (r#"{"weight_map": {"x": "model.safetensors"}}"#, "x should be in model.safetensors and is in no shard"),
        (r#"{"weight_map": {}}"#, "is not listed"),
        ("{", "not an index of shards"),
    ] {
        let hub = hub_of_llama();
        hub.put("model.safetensors.index.json", index.as_bytes(), false);
        let said = refusal(&plan(&hub, &[]));
        assert!(said.contains(says), "{says}: {said}");
    }
}

#[test]
fn a_server_that_lies_about_a_range_is_refused() {
    for (content_range, says) in [
        ("bytes 7-100/4000", "does not say how long it is"),
        ("bytes 0-100/*", "does not say how long it is"),
        ("nonsense", "does not say how long it is"),
        ("bytes 0-100/9", "cut short within its header (9 bytes of"),
    ] {
        let hub = hub_of_llama();
        hub.spoil("model.safetensors", Faults { content_range: Some(content_range.into()), ..Faults::default() });
        let said = refusal(&plan(&hub, &[]));
        assert!(said.contains(says), "{content_range}: {said}");
    }
}

#[test]
fn a_config_larger_than_any_is_not_read() {
    let hub = hub_of_llama();
    hub.put("config.json", &vec![b' '; 9 << 20], false);
    assert!(refusal(&plan(&hub, &[])).contains("someone/tiny/config.json: larger than 8 MB"));
}

#[test]
fn packed_weights_are_planned_from_headers_alone() {
    let hub = hub_of_llama();
    let folder = tempfile::tempdir().unwrap();
    tests::variant::pack(&tiny::fixtures().join("llama"), folder.path(), tempfile::tempdir().unwrap().path()).unwrap();
    for name in ["config.json", "model.safetensors"] {
        hub.put(name, &fs::read(folder.path().join(name)).unwrap(), name.ends_with(".safetensors"));
    }
    let output = plan(&hub, &["--json"]);
    let told = facts(&output);
    assert_eq!((output.status.code(), &told["agrees"]), (Some(0), &true.into()), "{told}");
    let stored = told["memory"]["as_stored"]["weights"].as_u64().unwrap();
    assert_eq!(stored, told["weight_bytes"].as_u64().unwrap());
    assert!(stored < told["memory"]["bf16"]["weights"].as_u64().unwrap());
}

#[test]
fn a_shape_that_only_data_tells_is_told_by_the_bits_of_the_config() {
    // compressed-tensors keeps the shape of packed weights in a tensor, whose data is not fetched.
    let hub = hub_of_llama();
    let entry = tiny::fixtures().join("llama");
    let mut tensors = Vec::new();
    for tiny::TensorSpec { name, shape, .. } in tiny::Checkpoint::read(&entry).unwrap().tensors {
        match shape[..] {
            [rows, cols] if name.contains("_proj") => tensors.extend([
                (format!("{name}_packed"), "I32", vec![rows, cols * 4 / 32]),
                (format!("{name}_scale"), "F32", vec![rows, cols / 32]),
                (format!("{name}_shape"), "I64", vec![2]),
            ]),
            _ => tensors.push((name, "F32", shape)),
        }
    }
    hub.put("model.safetensors", &typed(tensors), true);
    let quantization = r#"quantization_config={"quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32}}}}"#;
    let output = plan(&hub, &["--json", "--config", quantization]);
    let told = facts(&output);
    assert_eq!((output.status.code(), &told["agrees"]), (Some(0), &true.into()), "{told}");
    assert_eq!(told["parameters"], facts(&plan(&hub_of_llama(), &["--json"]))["parameters"]);
}
