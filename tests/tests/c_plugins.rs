//! The second door: a plugin in plain C, from `dylm.h` alone, computes what the one in Rust computes, and is listed without being run.

use dylm::{
    GenerateOptions, LanguageModel, LoadOptions, Trust,
    cache::CacheOptions,
    model::{Input, Want},
};
use plugin_api::abi::{self, At, AttendSpec, BlockChoiceSpec, CacheSpec, ExpertsSpec, Pair, c};
use serde_json::{Value, json};
use std::{fs, mem::offset_of, path::Path};
use tests::{
    binary::{self, dylm},
    c_header,
    in_c::{self, Language},
    tiny::{self, Expected},
};

fn load(model: &Path, plugins: &Path) -> LanguageModel {
    let options = LoadOptions { plugins: vec![plugins.to_owned()], trust: Trust::All, ..Default::default() };
    dylm::load(model.to_str(), &options).unwrap_or_else(|e| panic!("{e}"))
}

/// An entry of the tiny checkpoints with keys of its config.json changed.
fn checkpoint(entry: &str, changes: &[(&str, Value)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    tiny::write(&tiny::fixtures().join(entry), folder.path()).unwrap();
    let mut config = tiny::config(folder.path()).unwrap();
    changes.iter().for_each(|(key, value)| config[*key] = value.clone());
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    folder
}

/// Logits of the prompt's every token, then of three more that were fed one by one; and the tokens of a generation.
fn computed(lm: &LanguageModel, prompt: &[u32]) -> (Vec<Vec<f32>>, Vec<u32>) {
    let mut state = lm.model.state(&CacheOptions::default()).unwrap();
    let mut rows = Vec::new();
    for tokens in [prompt, &[5], &[9], &[31]] {
        let mut logits = lm.model.step(&mut [Input { state: &mut state, tokens, want: Want::All }]).unwrap();
        rows.extend(logits.remove(0));
    }
    let options = GenerateOptions { max_tokens: 24, ignore_eos: true, ..Default::default() };
    let generation = dylm::Generation::new(lm, prompt, &options, None, None).unwrap();
    (rows, generation.map(|response| response.unwrap().token).collect())
}

fn hold_to_rust(plugins: &Path, entry: &str, changes: &[(&str, Value)]) {
    let ours = checkpoint(entry, changes);
    let theirs = checkpoint(entry, &[changes, &[("model_type", json!("llama_c"))]].concat());
    let prompt = Expected::read(&tiny::fixtures().join(entry)).unwrap().prompt;
    let ours = computed(&load(ours.path(), &binary::target()), &prompt);
    let theirs = computed(&load(theirs.path(), plugins), &prompt);
    assert_eq!(ours.0.len(), prompt.len() + 3);
    // Equal to the last bit: both ask the same host for the same ops.
    assert_eq!(ours, theirs, "{entry} {changes:?}");
}

#[test]
fn a_llama_in_c_gives_the_logits_and_tokens_of_the_one_in_rust() {
    if !in_c::can(Language::C99) {
        return;
    }
    let plugins = in_c::plugin(Language::C99, &[], "llama.c");
    // Grouped heads and a head of its own; the same with the embedding as head; biases; scaled and renamed angles.
    hold_to_rust(plugins.path(), "llama", &[]);
    hold_to_rust(plugins.path(), "llama", &[("tie_word_embeddings", json!(true))]);
    hold_to_rust(plugins.path(), "llama", &[("tie_word_embeddings", json!(null)), ("num_key_value_heads", json!(2.0))]);
    for entry in ["llama-bias", "llama-llama3", "llama-yarn", "llama-rope-parameters"] {
        hold_to_rust(plugins.path(), entry, &[]);
    }
}

#[test]
fn the_same_file_is_a_plugin_in_c_plus_plus_and_in_newer_c() {
    for language in [Language::C17, Language::Cpp11] {
        if in_c::can(language) {
            hold_to_rust(in_c::plugin(language, &[], "llama.c").path(), "llama", &[]);
        }
    }
}

#[test]
fn two_models_of_one_plugin_in_c_do_not_mix() {
    if !in_c::can(Language::C99) {
        return;
    }
    let plugins = in_c::plugin(Language::C99, &[], "llama.c");
    let c = json!("llama_c");
    let folders = [
        checkpoint("llama", &[("model_type", c.clone())]),
        checkpoint("llama", &[("model_type", c), ("tie_word_embeddings", json!(true))]),
    ];
    let alone = folders.each_ref().map(|folder| computed(&load(folder.path(), plugins.path()), &[3, 4, 5]));
    let models = folders.each_ref().map(|folder| load(folder.path(), plugins.path()));
    assert_ne!(alone[0], alone[1]);
    let together = models.each_ref().map(|lm| computed(lm, &[3, 4, 5]));
    assert_eq!(alone, together);
}

#[test]
fn a_recurrence_of_an_author_s_own_in_c_gives_the_numbers_of_the_built_in_one() {
    if !in_c::can(Language::C99) {
        return;
    }
    let plugins = in_c::plugin(Language::C99, &[], "recurrence.c");
    let [by_scan, built_in] = [true, false].map(|by_scan| {
        let model = checkpoint("llama", &[("model_type", json!("recurrence_c")), ("by_scan", json!(by_scan))]);
        let lm = load(model.path(), plugins.path());
        let mut state = lm.model.state(&CacheOptions::default()).unwrap();
        // In chunks, so that states are carried on.
        [&[3, 4, 5][..], &[6], &[7, 8]]
            .map(|tokens| lm.model.step(&mut [Input { state: &mut state, tokens, want: Want::All }]).unwrap().remove(0))
    });
    let numbers = |rows: &[Vec<Vec<f32>>]| rows.concat().concat();
    let (by_scan, built_in) = (numbers(&by_scan), numbers(&built_in));
    let largest = built_in.iter().fold(0f32, |most, x| most.max(x.abs()));
    let apart = by_scan.iter().zip(&built_in).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
    // f32 sums in another order.
    assert!(largest > 0.1 && apart <= 2e-5 * largest, "{apart} apart, of {largest}");
}

#[test]
fn a_plugin_in_c_is_listed_from_its_note_and_not_opened() {
    if !in_c::can(Language::C99) {
        return;
    }
    let marker = tempfile::tempdir().unwrap();
    let marker = marker.path().join("sprung");
    let spring = format!("-DMARKER=\"{}\"", marker.display());
    let plugins = in_c::plugin(Language::C99, &[&spring], "trap.c");
    let output = dylm().args(["plugins", "--json", "--plugins"]).arg(plugins.path()).output().unwrap();
    let listed: Value = serde_json::from_slice(&output.stdout).unwrap();
    let note = &listed["plugins"][0]["note"];
    let wanted = json!({ "name": "llama in C", "version": "0.1.0", "license": "MIT OR Apache-2.0", "abi": "1.0" });
    for (key, value) in wanted.as_object().unwrap() {
        assert_eq!(&note[key], value, "{listed}");
    }
    assert_eq!(note["model_types"], json!(["llama_c"]));
    assert_eq!(listed["plugins"][0]["refused"], json!(null));
    assert!(!marker.exists(), "listing opened it");
    // And it does leave a marker once it is opened.
    load(checkpoint("llama", &[("model_type", json!("llama_c"))]).path(), plugins.path());
    assert!(marker.exists());
}

#[test]
fn dylm_check_finds_nothing_wrong_with_a_llama_in_c() {
    if !in_c::can(Language::C99) {
        return;
    }
    let plugins = in_c::plugin(Language::C99, &[], "llama.c");
    let library = plugins.path().join(tests::outside::file_name("llama"));
    // Called after what it serves, as a check wants it.
    let file = plugins.path().join(tests::outside::file_name("llama_c"));
    fs::rename(library, &file).unwrap();
    let output = dylm().args(["check", "--json"]).arg(&file).output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(output.status.success(), "{report:#}");
}

#[test]
fn the_header_is_the_one_that_the_op_tables_give() {
    let is = fs::read_to_string(c_header::path()).unwrap();
    assert!(is == c_header::text().unwrap(), "plugin-api/dylm.h: run cargo run -p tests --bin c-header");
    for name in abi::ops::NAMES {
        assert!(is.contains(&format!("#define dylm_{name}(d")), "dylm.h has no word for {name}");
    }
}

#[test]
fn the_c_compiler_lays_everything_that_crosses_out_as_rust_does() {
    if !in_c::can(Language::C17) {
        return;
    }
    let mut lines = Vec::new();
    let mut wanted = Vec::new();
    for (table, places) in c::ops::TABLES {
        let table = format!("dylm_{}_ops", table.trim_end_matches('s'));
        for (op, place) in *places {
            lines.push(format!("offsetof({table}, {op})"));
            wanted.push(*place);
        }
        let (_, last) = places.last().unwrap();
        lines.push(format!("sizeof({table})"));
        wanted.push(last + size_of::<usize>());
    }
    macro_rules! places {
        ($rust:ty, $c:literal: $($field:ident),*) => {
            lines.extend([$(concat!("offsetof(", $c, ", ", stringify!($field), ")")),*].map(str::to_owned));
            wanted.extend([$(offset_of!($rust, $field)),*]);
            lines.push(concat!("sizeof(", $c, ")").to_owned());
            wanted.push(size_of::<$rust>());
        };
    }
    places!(c::Host, "dylm_host": size, major, minor, build, layers, tensors, config, error, failed, extension);
    places!(c::ConfigOps, "dylm_config_ops": size, whole, number, flag, text, json, count);
    places!(c::Model, "dylm_model": size, data, caches, cache_count, forward, head, drop, extension);
    places!(c::Plugin, "dylm_plugin": size, major, minor, note, create, extension);
    places!(c::Text, "dylm_text": start, len);
    places!(c::Lent, "dylm_lent": size, start);
    places!(At, "dylm_at": file, line);
    places!(Pair, "dylm_pair": first, second);
    places!(Pair, "dylm_raw_pair": first, second);
    places!(CacheSpec, "dylm_cache_spec": kind, flags, window, dims);
    places!(BlockChoiceSpec, "dylm_block_choice_spec": flags, reserved, block, count, local);
    places!(ExpertsSpec, "dylm_experts_spec": activation, flags, experts, dim, hidden, identity, limit, alpha);
    places!(AttendSpec, "dylm_attend_spec": flags, scale, softcap, reserved, window, sinks, selection, chunk, value_lanes, block, local_blocks, stride);
    let prints: String = lines.iter().map(|line| format!("    printf(\"%zu\\n\", {line});\n")).collect();
    let text = format!("#include \"dylm.h\"\nint main(void)\n{{\n{prints}    return 0;\n}}\n");
    let output = in_c::printed(Language::C17, &text);
    let said: Vec<usize> = String::from_utf8(output.stdout).unwrap().lines().map(|n| n.parse().unwrap()).collect();
    assert_eq!(said.len(), wanted.len());
    for ((line, said), wanted) in lines.iter().zip(said).zip(wanted) {
        assert_eq!(said, wanted, "{line}");
    }
}
