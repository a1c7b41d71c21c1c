//! What a plugin in C does wrong costs one sentence, as long as C lets anybody see it: sizes, nulls, notes, texts, handles, threads.

use serde_json::{Value, json};
use std::{fs, path::Path, process::Output};
use tests::{
    binary::{dylm, one_sentence, trusting},
    c_header,
    in_c::{self, Language},
    outside::checkpoint,
};

fn run(plugins: &Path, changes: &[(&str, Value)]) -> Output {
    let model = checkpoint(&[&[("model_type", json!("bad_c"))], changes].concat());
    let mut command = dylm();
    command.args(["generate", "--max-tokens", "4", "--verbose", "false", "--prompt", "hello", "--model"]);
    trusting(command.arg(model.path()), plugins).output().unwrap()
}

/// What the command line defines, and what the sentence must have in it.
const EXPORTED: &[(&[&str], &str)] = &[
    (&["-DSIZE=24"], "its dylm_c_plugin_1 has 24 bytes of 48; build it again with this dylm's dylm.h"),
    (&["-DSIZE=0"], "its dylm_c_plugin_1 has 0 bytes of 48"),
    (&["-DMAJOR=2"], "its code speaks ABI 2, this dylm speaks 1.0; update dylm"),
    (&["-DMAJOR=0"], "its code speaks ABI 0, this dylm speaks 1.0; rebuild the plugin"),
    (&["-DMINOR=9"], "needs ABI 1.9, this dylm speaks 1.0; update dylm"),
    (&["-DCREATE=NULL"], "its dylm_c_plugin_1 has no create; let DYLM_PLUGIN of dylm.h write it"),
    (&["-DINSIDE=\"{}\""], "its note and its code disagree about what it is; build it again"),
    (&["-DINSIDE=\"\\xff\""], "its note and its code disagree about what it is"),
    (&["-DNO_PLUGIN"], "has a note, but is no plugin"),
    (
        &["-DDYLM_NEEDS=\"\\\"invented_later\\\"\""],
        "needs the op invented_later, which this dylm does not have; update dylm",
    ),
];

/// `misbehave`, and what the sentence must have in it.
const IN_CALLS: &[(&str, &[&str])] = &[
    ("give up without a word", &["the plugin's create gave up with code 77 and did not say why"]),
    ("read a key that is missing", &["config.json: rope_parameters.theta is missing"]),
    ("read a number of a list", &["config.json: listed.1 is \"three\", it should be a whole number from 0 to 2^31"]),
    ("read a key of no name", &["a key of config.json whose name is not UTF-8"]),
    ("read a flag", &["config.json: hidden_size is 64, it should be true or false"]),
    ("read a text", &["config.json: hidden_size is 64, it should be a text"]),
    ("count", &["config.json: hidden_size is 64, it should be a list"]),
    ("name a tensor in no UTF-8", &["source: name: a text that is not UTF-8 (at ", "bad.c:"]),
    ("run while building", &["positions: called while the model was being built (at ", "bad.c:"]),
    ("say a long name", &["a name too long"]),
    ("forget forward", &["made a model without forward, head or drop"]),
    ("put caches nowhere", &["made a model with caches at no address"]),
    ("ask for endless caches", &["its model asks for 100001 caches"]),
    ("fail with words", &["a deliberate failure of 5 words"]),
    ("fail with a tensor", &["fail: a deliberate failure (at ", "bad.c:"]),
    ("fail in no UTF-8", &["fail: message: a text that is not UTF-8 (at ", "bad.c:"]),
    ("add unlike shapes", &["add: [3, 64] against [64, 3] (at ", "bad.c:"]),
    ("build while running", &["source: called while the model was running (at ", "bad.c:"]),
    ("read config.json", &["config.json: hidden_size is read after create"]),
    ("return no tensor", &["the plugin's forward returned no tensor of this step"]),
    ("concatenate nothing from nowhere", &["concat: parts: a list at no address (at ", "bad.c:"]),
    ("attend somehow", &["attend: spec: a struct without a size or an address (at ", "bad.c:"]),
    ("compute off the thread", &["positions: called on another thread than the call's (at ", "bad.c:"]),
    ("keep a tensor", &["a tensor that is not of this step", "bad.c:"]),
];

#[test]
fn an_export_that_does_not_fit_is_refused_in_one_sentence() {
    if !in_c::can(Language::C99) {
        return;
    }
    for (flags, expected) in EXPORTED {
        let plugins = in_c::plugin(Language::C99, flags, "bad.c");
        let sentence = one_sentence(&run(plugins.path(), &[]), &flags.join(" "));
        assert!(sentence.contains(expected) && sentence.contains("libbad"), "{flags:?}: {sentence}");
    }
}

#[test]
fn a_mistake_in_a_call_ends_the_run_with_one_sentence() {
    if !in_c::can(Language::C99) {
        return;
    }
    let plugins = in_c::plugin(Language::C99, &[], "bad.c");
    for (misbehave, expected) in IN_CALLS {
        let changes = [("misbehave", json!(misbehave)), ("listed", json!([1, "three"]))];
        let output = run(plugins.path(), &changes);
        let sentence = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{misbehave}: {} {sentence}", output.status);
        for part in *expected {
            assert!(sentence.contains(part), "{misbehave}: no {part:?} in: {sentence}");
        }
    }
    // And without any it works, even if it releases a tensor twice.
    for harmless in ["", "release twice"] {
        let output = run(plugins.path(), &[("misbehave", json!(harmless))]);
        assert!(output.status.success() && output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn a_wrong_config_names_its_key_as_for_a_plugin_in_rust() {
    if !in_c::can(Language::C99) {
        return;
    }
    let plugins = in_c::plugin(Language::C99, &[], "bad.c");
    let cases: &[(&str, Value, &str)] = &[
        ("num_attention_heads", json!(0), "config.json: num_attention_heads is 0, it should be at least 1"),
        ("num_hidden_layers", json!(20_000), "config.json: num_hidden_layers is 20000, it should be at most 10000"),
        (
            "hidden_size",
            json!("wide"),
            "config.json: hidden_size is \"wide\", it should be a whole number from 0 to 2^31",
        ),
        ("hidden_size", json!(null), "config.json: hidden_size is missing"),
        ("rms_norm_eps", json!(null), "config.json: rms_norm_eps is missing"),
        ("rms_norm_eps", json!([1]), "config.json: rms_norm_eps is [1], it should be a number"),
        ("attention_bias", json!("yes"), "config.json: attention_bias is \"yes\", it should be true or false"),
        ("hidden_act", json!("mish"), "config.json: hidden_act is mish, it should be silu"),
    ];
    for (key, value, expected) in cases {
        let sentence = one_sentence(&run(plugins.path(), &[(key, value.clone())]), key);
        assert!(sentence.contains(expected), "{key}: {sentence}");
    }
}

#[test]
fn a_model_that_was_made_is_dropped_once_and_one_that_failed_too() {
    if !in_c::can(Language::C99) {
        return;
    }
    let plugins = in_c::plugin(Language::C99, &[], "bad.c");
    for misbehave in ["", "read a flag", "put caches nowhere", "fail with words"] {
        let folder = tempfile::tempdir().unwrap();
        let marker = folder.path().join("dropped");
        run(plugins.path(), &[("misbehave", json!(misbehave)), ("marker", json!(marker))]);
        assert_eq!(fs::read_to_string(marker).unwrap(), "dropped\n", "{misbehave:?}");
    }
}

/// The sentence of a failed run, or the words of one that went well, with the header of another version of dylm.
fn with_header(header: &str, flags: &[&str], misbehave: &str) -> Result<(), String> {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("dylm.h"), header).unwrap();
    let first = format!("-I{}", folder.path().display());
    let plugins = in_c::plugin(Language::C99, &[&[first.as_str()], flags].concat(), "bad.c");
    let output = run(plugins.path(), &[("misbehave", json!(misbehave))]);
    if output.status.success() {
        assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
        return Ok(());
    }
    Err(one_sentence(&output, misbehave))
}

#[test]
fn a_plugin_of_an_older_header_does_not_notice_the_ops_that_came_later() {
    if !in_c::can(Language::C99) {
        return;
    }
    // The last op of each table is not there yet, and a struct that an op takes is shorter.
    let text = c_header::text_of(|file, text| match file {
        "ops.rs" => {
            let mut lines: Vec<&str> = text.lines().collect();
            lines.retain(|line| !line.trim_start().starts_with("last fn "));
            lines.join("\n")
        }
        "spec.rs" => {
            let (start, rest) = text.split_once("pub struct AttendSpec {").unwrap();
            let (fields, rest) = rest.split_once("\n}").unwrap();
            let (fields, _) = fields.rsplit_once("\n    pub ").unwrap();
            format!("{start}pub struct AttendSpec {{{fields}\n}}{rest}")
        }
        _ => text,
    });
    let text = text.unwrap();
    let words = |text: &str| text.matches("_at(DYLM_HERE, d").count();
    assert_eq!(words(&text) + 3, words(&c_header::text().unwrap()), "an op of each table was to go");
    assert_eq!(with_header(&text, &[], ""), Ok(()));
}

#[test]
fn a_plugin_of_a_later_header_works_unless_it_needs_what_is_not_there() {
    if !in_c::can(Language::C99) {
        return;
    }
    let text = c_header::text_of(|file, text| {
        match file {
        "ops.rs" => text.replace(
            "tensors { $($tensors)* }\n    } };",
            "tensors {\n            /// -x\n            later fn later_neg(x: Handle) -> Handle;\n            $($tensors)*\n        }\n    } };",
        ),
        _ => text,
    }
    });
    let text = text.unwrap();
    assert!(text.contains("dylm_have_later_neg"), "nothing was added");
    assert_eq!(with_header(&text, &[], ""), Ok(()), "it calls nothing that is new");
    let missing = with_header(&text, &["-DLATER_CALLS"], "").unwrap_err();
    assert!(missing.contains("needs the op later_neg, which this dylm does not have; update dylm"), "{missing}");
    assert_eq!(with_header(&text, &["-DLATER_ASKS"], "negate"), Ok(()), "it has a way around");
    let careless = with_header(&text, &["-DLATER_ASKS", "-DLATER_CALLS"], "call what came later").unwrap_err();
    let expected = "the plugin needs the op later_neg, which this dylm (ABI 1.0) does not have; update dylm";
    assert!(careless.contains(expected), "{careless}");
}
