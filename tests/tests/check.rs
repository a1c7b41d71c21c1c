//! `dylm check`: the plugins of this repository pass, and what a plugin can do wrong is found by the test that is named for it, with a
//! sentence that says what; nothing that a plugin does to its process ends the check.

use serde_json::{Value, json};
use std::{collections::BTreeMap, path::Path, process::Output};
use tests::{binary::dylm, outside};

/// For those that end by themselves.
const SOON: &str = "60";

fn check(plugin: &Path, args: &[&str]) -> Output {
    dylm().arg("check").arg(plugin).args(args).output().unwrap()
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// Verdict and reason of each test.
fn verdicts(output: &Output) -> BTreeMap<String, (String, String)> {
    let told: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", text(output)));
    let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let one = |test: &Value| (word(&test["name"]), (word(&test["verdict"]), word(&test["reason"])));
    told["tests"].as_array().unwrap().iter().map(one).collect()
}

fn bad() -> std::path::PathBuf {
    outside::build(&outside::workspace(), "bad", "bad", None)
}

/// A configuration file for the plugin `bad`.
fn misbehaving(how: &str) -> tempfile::NamedTempFile {
    let file = tempfile::Builder::new().suffix(".json").tempfile().unwrap();
    let config = json!({ "model_type": "bad", "vocab_size": 128, "hidden_size": 64, "divisor": 1, "misbehave": how });
    std::fs::write(file.path(), config.to_string()).unwrap();
    file
}

/// `misbehave`, the test that finds it, and what its sentence must have in it.
const FOUND: &[(&str, &str, &[&str])] = &[
    (
        "panic in new",
        "config-examples",
        &["the plugin bad panicked: a deliberate panic in new (at ", "bad/src/lib.rs:"],
    ),
    ("panic in forward", "config-examples", &["the plugin bad panicked: a deliberate panic in forward (at "]),
    ("panic in head", "config-examples", &["a deliberate panic in head"]),
    ("panic in drop", "errors-drop", &["it panicked: a deliberate panic in drop (at ", "bad/src/lib.rs:"]),
    ("hide a panic", "errors-panics", &["it panicked: a panic that nobody was to see (at ", "bad/src/worse.rs:"]),
    ("overflow the stack in new", "config-examples", &["it overflowed its stack"]),
    ("overflow the stack in forward", "config-examples", &["it overflowed its stack"]),
    ("exit in new", "config-examples", &["it ended the whole process with exit code 0"]),
    ("exit in drop", "errors-drop", &["dropping a model that never ran: it ended the whole process with exit code 0"]),
    ("abort in forward", "config-examples", &["it died of SIGABRT"]),
    ("use a null pointer in forward", "config-examples", &["it died of SIGSEGV"]),
    ("return a forged handle", "config-examples", &["returned no tensor of this step", "made up"]),
    ("use a released handle", "config-examples", &["dropped twice", "(at bad/src/lib.rs:"]),
    ("release twice", "resources-handles", &["it released 2 tensors that were not its own any more: dropped twice"]),
    ("leak a tensor", "resources-handles", &["it still owns 1 tensors: it forgot to release them"]),
    ("keep a tensor", "shapes-logits", &["kept from another step", "(at bad/src/lib.rs:"]),
    ("compute off the thread", "config-examples", &["the plugin bad panicked: the other thread panicked"]),
    ("compute off the thread, quietly", "threads-ops", &["or on another thread (at bad/src/worse.rs:"]),
    ("count the calls", "replay-values", &["gave other ops than an earlier one", "sub at bad/src/worse.rs:"]),
    ("count the calls", "shapes-counts", &["tokens give other ops than 1"]),
    ("drift", "numerics-repeats", &["the same text gave other logits the second time"]),
    ("count the models", "build-repeats", &["the second model asks for Norm"]),
    ("divide by a key", "config-extremes", &["with divisor = 0: the plugin bad panicked: attempt to divide by zero"]),
    ("divide by zero", "numerics-finite", &["of the 128 logits of token 0, 128 are no numbers"]),
    ("refuse with a report", "config-extremes", &["it refuses with a message of several lines"]),
    ("ignore everything", "build-unused", &["what it ignores is too much"]),
    ("declare a cache too many", "shapes-caches-used", &["caches() declares 2 caches; a step leaves unused [1]"]),
    ("look ahead", "numerics-causal", &["a later token was changed: the logits of token 0 are off by"]),
    ("forget the text", "numerics-causal", &["token 6 was changed, and its logits stayed the same"]),
    ("print in forward", "resources-silent", &["it printed \"forward was here"]),
    ("complain in forward", "resources-silent", &["it printed \"forward was there"]),
    #[cfg(target_os = "linux")]
    (
        "allocate for ever in new",
        "config-examples",
        &["it asked for more memory than it may have", "memory allocation of"],
    ),
    #[cfg(target_os = "linux")]
    ("leave a file open", "resources-files", &["open files: /dev/null"]),
    #[cfg(target_os = "linux")]
    ("leave a thread running", "resources-threads", &["a model and three steps left"]),
    // 112 bytes each; what is told is a mean, into which a stray byte of the allocator's own may fall.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    ("leak a model", "resources-models", &["each model, built and dropped, leaves 11"]),
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    ("leak memory in forward", "resources-steps", &["each step leaves 11"]),
];

#[test]
fn each_mistake_is_found_by_the_test_that_is_named_for_it() {
    let plugin = bad();
    for (misbehave, test, parts) in FOUND {
        let config = misbehaving(misbehave);
        let config = config.path().to_str().unwrap();
        let args = ["--json", "--only", test, "--config", config, "--timeout", SOON, "--memory", "512"];
        let output = check(&plugin, &args);
        assert_eq!(output.status.code(), Some(1), "{misbehave}: {}", text(&output));
        let (verdict, reason) = &verdicts(&output)[*test];
        assert_eq!(verdict, "fail", "{misbehave}: {test}: {reason}");
        for part in *parts {
            assert!(reason.contains(part), "{misbehave}: {test}: no {part:?} in: {reason}");
        }
        assert!(reason.starts_with(config) || !test.starts_with("config-examples"), "{misbehave}: of which? {reason}");
    }
}

#[test]
fn what_never_ends_is_ended() {
    let plugin = bad();
    for (misbehave, test) in [("never end in new", "config-examples"), ("never end in drop", "errors-drop")] {
        let config = misbehaving(misbehave);
        let args = ["--json", "--only", test, "--timeout", "5", "--config", config.path().to_str().unwrap()];
        let (verdict, reason) = &verdicts(&check(&plugin, &args))[test];
        assert_eq!(verdict, "fail", "{misbehave}");
        assert!(reason.contains("it did not end within 5 s"), "{misbehave}: {reason}");
    }
}

#[test]
fn a_plugin_without_mistakes_passes_and_one_that_lies_in_its_note_is_not_asked_further() {
    let plugin = bad();
    let output = check(&plugin, &["--json", "--cases", "50"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    let mut bytes = std::fs::read(&plugin).unwrap();
    let said = b"\"version\":\"0.1.0\"";
    let at = bytes.windows(said.len()).position(|window| window == said).unwrap();
    bytes[at + said.len() - 2] = b'7';
    let folder = tempfile::tempdir().unwrap();
    let liar = folder.path().join(outside::file_name("bad"));
    std::fs::write(&liar, bytes).unwrap();
    let output = check(&liar, &["--json"]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    let verdicts = verdicts(&output);
    let (verdict, reason) = &verdicts["load-now"];
    assert!(verdict == "fail" && reason.contains("its note and its code disagree about what it is"), "{reason}");
    for (test, (verdict, reason)) in &verdicts {
        let of_the_file = test.starts_with("note-") || test.starts_with("file-");
        match test.as_str() {
            "load-now" => {}
            _ if of_the_file => assert_eq!(verdict, "pass", "{test}: {reason}"),
            _ => assert_eq!((verdict.as_str(), reason.as_str()), ("skip", "load-now fails"), "{test}"),
        }
    }
}

#[test]
fn a_file_that_is_no_plugin_fails_and_is_not_opened() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join(outside::file_name("text"));
    std::fs::write(&file, "not a library").unwrap();
    let output = check(&file, &[]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    let told = text(&output);
    assert!(told.contains("FAIL  note-present") && told.contains("is not a library"), "{told}");
    assert!(told.contains("skip  load-now                 note-present fails"), "{told}");
    assert!(told.contains("mend      Build it as a cdylib that calls export_plugin!"), "{told}");
}

#[test]
fn plugins_of_this_repository_pass_by_their_names_alone() {
    for name in ["llama", "gemma4", "mamba2", "deepseek_v3", "rwkv7"] {
        let output = dylm().args(["check", name, "--cases", "60"]).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{name}: {}", text(&output));
        let told = text(&output);
        assert!(told.contains(" passed, 0 failed, 1 skipped"), "{name}: {told}");
    }
}

#[test]
fn every_plugin_of_this_repository_carries_an_example() {
    let plugins = Path::new(env!("CARGO_MANIFEST_DIR")).join("../plugins");
    for folder in std::fs::read_dir(plugins).unwrap().map(|entry| entry.unwrap().path()) {
        let source = std::fs::read_to_string(folder.join("src/lib.rs")).unwrap();
        let export = source.lines().find(|line| line.starts_with("export_plugin!(")).unwrap_or_default();
        assert!(export.contains(", examples = [\""), "{}: {export:?}", folder.display());
    }
}

#[test]
fn a_failure_tells_how_to_see_it_again_and_the_seed_decides_what_is_tried() {
    let (plugin, config) = (bad(), misbehaving("divide by a key"));
    let config = config.path().to_str().unwrap();
    let run = |seed: &str| {
        let args = ["--only", "config-fuzz", "--cases", "400", "--config", config, "--seed", seed];
        let output = check(&plugin, &args);
        assert_eq!(output.status.code(), Some(1), "{}", text(&output));
        text(&output)
    };
    let (first, again, other) = (run("5"), run("5"), run("6"));
    assert_eq!(first, again);
    assert_ne!(first, other);
    assert!(first.contains("case ") && first.contains(" of seed 5, with "), "{first}");
    assert!(first.contains(&format!("--only config-fuzz --config {config} --cases 400 --seed 5")), "{first}");
    // What it says works.
    let line = first.lines().find_map(|line| line.trim().strip_prefix("again")).unwrap().trim();
    let words: Vec<&str> = line.split(' ').skip(1).collect();
    let output = dylm().args(words).output().unwrap();
    let found = |text: &str| text.lines().find(|line| line.trim().starts_with("found")).map(str::to_owned);
    assert_eq!(found(&text(&output)), found(&first));
}

#[test]
fn wrong_usage_is_told_from_a_failing_plugin() {
    let cases: [(&[&str], &str); 5] = [
        (&["check"], "FILE|NAME"),
        (&["check", "llama", "--only", "no-such-test"], "--only no-such-test: there is no such test"),
        (&["check", "./libnothing.so"], "./libnothing.so: "),
        (&["check", "no_such_type"], "no plugin serves model_type \"no_such_type\""),
        (&["check", "llama", "--reference", "logits.safetensors"], "--model"),
    ];
    for (args, part) in cases {
        let output = dylm().args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", text(&output));
        assert!(text(&output).contains(part), "{args:?}: {}", text(&output));
    }
}

#[test]
fn a_list_names_every_test_once_and_a_prefix_chooses_some() {
    let names = |args: &[&str]| -> Vec<String> {
        let output = dylm().arg("check").args(args).args(["--list", "--json"]).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", text(&output));
        let list: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
        list.iter().map(|test| test["name"].as_str().unwrap().to_owned()).collect()
    };
    let all = names(&[]);
    assert!(all.len() >= 40, "{}", all.len());
    let kebab = |name: &str| name.bytes().all(|b| b.is_ascii_lowercase() || b == b'-') && name.contains('-');
    assert!(all.iter().all(|name| kebab(name)), "{all:?}");
    let mut once = all.clone();
    once.sort();
    once.dedup();
    assert_eq!(once.len(), all.len());
    let some = names(&["--only", "caches,note-names"]);
    assert!(some.len() > 4 && some.iter().all(|name| name.starts_with("caches-") || name == "note-names"), "{some:?}");
}

#[test]
fn logits_of_another_program_are_compared() {
    let folder = tempfile::tempdir().unwrap();
    let entry = tests::tiny::fixtures().join("llama");
    tests::tiny::write(&entry, folder.path()).unwrap();
    let expected = tests::tiny::Expected::read(&entry).unwrap();
    let verdict = |logits: &[f32]| {
        let file = folder.path().join("logits.safetensors");
        let ids: Vec<u8> = expected.prompt.iter().flat_map(|&id| i64::from(id).to_le_bytes()).collect();
        let bytes: Vec<u8> = logits.iter().flat_map(|x| x.to_le_bytes()).collect();
        let view =
            |dtype, shape: &[usize], bytes| safetensors::tensor::TensorView::new(dtype, shape.to_vec(), bytes).unwrap();
        let tensors = [
            ("input_ids", view(safetensors::Dtype::I64, &[expected.prompt.len()], &ids)),
            ("logits", view(safetensors::Dtype::F32, &[1, logits.len()], &bytes)),
        ];
        safetensors::serialize_to_file(tensors, None, &file).unwrap();
        let output = dylm()
            .args(["check", "llama", "--json", "--only", "numerics-reference", "--model"])
            .arg(folder.path())
            .arg("--reference")
            .arg(&file)
            .output()
            .unwrap();
        verdicts(&output)["numerics-reference"].clone()
    };
    let mut logits = expected.logits[0].clone();
    let (right, reason) = verdict(&logits);
    assert_eq!(right, "pass", "{reason}");
    logits[7] += 0.5;
    let (wrong, reason) = verdict(&logits);
    assert!(wrong == "fail" && reason.contains("against the reference: the logits of token 0 are off by"), "{reason}");
}
