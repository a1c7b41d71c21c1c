//! Models that are wrong, through the real binary: each time one sentence that names what is wrong, an exit code, no panic, no signal.

use serde_json::{Value, json};
use std::{fs, path::Path, process::Output};
use tempfile::TempDir;
use tests::tiny;

fn model(name: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    tiny::write(&tiny::fixtures().join(name), folder.path()).unwrap();
    folder
}

fn run(folder: &Path, flags: &[&str]) -> Output {
    let model = folder.to_str().unwrap();
    tests::binary::dylm()
        .args(["generate", "--model", model, "-m", "5", "--prompt", "ab"])
        .args(flags)
        .output()
        .unwrap()
}

/// Fails, says all of `words` in what it says, and says no more than a sentence (a report on tensors may have a line for each).
fn refuses(folder: &Path, flags: &[&str], words: &[&str]) -> String {
    let output = run(folder, flags);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    // 1 for a bad model, 2 for the name of none.
    assert!(matches!(output.status.code(), Some(1 | 2)), "{:?}: {said}", output.status);
    assert!(said.starts_with("error: "), "{said}");
    assert!(!said.contains("panicked") && !said.contains("RUST_BACKTRACE"), "{said}");
    for word in words {
        assert!(said.contains(word), "{word:?} is not in: {said}");
    }
    assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
    said
}

fn edit(folder: &Path, file: &str, change: impl FnOnce(&mut Value)) {
    let path = folder.join(file);
    let mut json: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    change(&mut json);
    fs::write(path, json.to_string()).unwrap();
}

/// Rewrites the shard: the header as JSON, then the bytes.
fn edit_shard(folder: &Path, change: impl FnOnce(&mut Value, &mut Vec<u8>)) {
    let path = folder.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let mut data = bytes[8 + length..].to_vec();
    change(&mut header, &mut data);
    let header = header.to_string();
    fs::write(path, [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()).unwrap();
}

#[test]
fn a_sound_model_generates() {
    let folder = model("llama");
    let output = run(folder.path(), &[]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn no_config() {
    let folder = model("llama");
    fs::remove_file(folder.path().join("config.json")).unwrap();
    refuses(folder.path(), &[], &["config.json"]);
}

#[test]
fn a_config_without_model_type() {
    let folder = model("llama");
    edit(folder.path(), "config.json", |c| drop(c.as_object_mut().unwrap().remove("model_type")));
    refuses(folder.path(), &[], &["config.json", "model_type"]);
}

#[test]
fn a_model_type_that_is_a_path() {
    let folder = model("llama");
    edit(folder.path(), "config.json", |c| c["model_type"] = "../../x".into());
    refuses(folder.path(), &[], &["model_type"]);
}

#[test]
fn an_unknown_model_type_names_the_nearest_and_where_it_looked() {
    let folder = model("llama");
    edit(folder.path(), "config.json", |c| c["model_type"] = "lama".into());
    refuses(folder.path(), &[], &["\"lama\"", "llama", "looked in", "--plugins"]);
}

#[test]
fn a_config_that_is_not_json_or_lacks_a_key() {
    let folder = model("llama");
    edit(folder.path(), "config.json", |c| drop(c.as_object_mut().unwrap().remove("hidden_size")));
    refuses(folder.path(), &[], &["config.json: hidden_size is missing"]);
    edit(folder.path(), "config.json", |c| c["hidden_size"] = "wide".into());
    refuses(folder.path(), &[], &["hidden_size", "wide"]);
    fs::write(folder.path().join("config.json"), "{").unwrap();
    refuses(folder.path(), &[], &["config.json"]);
}

#[test]
fn sizes_that_make_no_sense() {
    for (key, value) in
        [("num_attention_heads", json!(0)), ("num_hidden_layers", json!(1_000_000_000)), ("hidden_size", json!(-4))]
    {
        let folder = model("llama");
        edit(folder.path(), "config.json", |c| c[key] = value);
        refuses(folder.path(), &[], &["config.json"]);
    }
}

#[test]
fn a_truncated_shard() {
    let folder = model("llama");
    let path = folder.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    refuses(folder.path(), &[], &["model.safetensors"]);
}

#[test]
fn overlapping_offsets() {
    let folder = model("llama");
    edit_shard(folder.path(), |header, _| {
        let norm = header["model.norm.weight"]["data_offsets"].clone();
        header["model.layers.0.input_layernorm.weight"]["data_offsets"] = norm;
    });
    refuses(folder.path(), &[], &["model.safetensors"]);
}

#[test]
fn missing_extra_and_misshapen_tensors_come_in_one_report() {
    let folder = model("llama");
    edit_shard(folder.path(), |header, _| {
        let tensors = header.as_object_mut().unwrap();
        let moved = tensors.remove("model.norm.weight").unwrap();
        tensors.insert("model.layers.0.surprise".into(), moved);
        let shape = tensors["model.layers.1.mlp.up_proj.weight"]["shape"].as_array_mut().unwrap();
        shape.swap(0, 1);
    });
    let said = refuses(
        folder.path(),
        &[],
        &[
            "model.norm.weight: not in the checkpoint",
            "model.layers.0.surprise: not used",
            "model.layers.1.mlp.up_proj.weight: config says [",
        ],
    );
    assert_eq!(said.lines().count(), 4, "{said}");
}

#[test]
fn a_group_size_that_no_format_has() {
    let folder = model("llama");
    edit(folder.path(), "config.json", |c| c["quantization"] = json!({"group_size": 3, "bits": 4}));
    refuses(folder.path(), &[], &["group_size", "3"]);
}

#[test]
fn logits_that_are_not_numbers() {
    let folder = model("llama");
    let lm_head = |header: &Value| {
        header.get("lm_head.weight").unwrap_or(&header["model.embed_tokens.weight"])["data_offsets"][0].as_u64()
    };
    edit_shard(folder.path(), |header, data| {
        let at = lm_head(header).unwrap() as usize;
        data[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    // The frame of the text is printed before the first token is chosen.
    refuses(folder.path(), &["--verbose", "false"], &["NaN"]);
}

#[test]
fn a_template_that_loops_for_ever() {
    let folder = model("llama");
    let endless = "{% for i in range(100000) %}{% for j in range(100000) %}{% for k in range(100000) %}x{% endfor %}{% endfor %}{% endfor %}";
    let inline = folder.path().join("tokenizer_config.json");
    if inline.exists() {
        edit(folder.path(), "tokenizer_config.json", |c| c["chat_template"] = endless.into());
    }
    let _ = fs::remove_file(folder.path().join("chat_template.jinja"));
    refuses(folder.path(), &[], &["template"]);
}

#[test]
fn a_folder_that_is_not_there() {
    refuses(Path::new("./no/such/folder"), &[], &["no/such/folder"]);
}

#[test]
fn senseless_flags_are_wrong_usage() {
    let folder = model("llama");
    let senseless: [&[&str]; 6] = [
        &["--top-p", "1.5"],
        &["--temp", "-1"],
        &["--kv-bits", "7"],
        &["--max-kv-size", "2"],
        &["--logit-bias", "x"],
        &["--chat-template-config", "{"],
    ];
    for flags in senseless {
        let output = run(folder.path(), flags);
        assert_eq!(output.status.code(), Some(2), "{flags:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}
