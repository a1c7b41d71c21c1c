//! Every mistake that a plugin can make costs one sentence: no signal, no text of a panic hook, no damage to what runs beside it.

use dylm::{
    GenerateOptions, LanguageModel, LoadOptions, Trust,
    model::{Input, Want},
};
use serde_json::json;
use std::path::{Path, PathBuf};
use tests::{
    binary::{dylm, one_sentence, trusting},
    outside::{self, checkpoint, install},
};

/// `misbehave`, and what the sentence must have in it.
const IN_NEW: &[(&str, &[&str])] = &[
    ("panic in new", &["the plugin bad panicked: a deliberate panic in new (at ", "bad/src/lib.rs:"]),
    ("assert in new", &["a deliberate assertion, left: 1, right: 2"]),
    ("throw a bomb", &["the plugin bad panicked: a panic without text"]),
    ("panic in caches", &["a deliberate panic in caches"]),
    ("refuse", &["this model is refused on purpose"]),
    ("run while building", &["parameter: called while the model was being built (at bad/src/lib.rs:"]),
    ("ask for endless layers", &["asks for 1000000000 blocks; at most 10000"]),
    ("ask for two million layers", &["more than 1000000"]),
    ("ask for a million experts", &["1000000 experts are more than any model has"]),
    ("ask for a wrong shape", &["lm_head.weight", "[128, 65]", "[128, 64]"]),
    ("ask for a huge shape", &["lm_head.weight", "[128, 64]"]),
    ("reshape to a huge shape", &["model.norm.weight", "[64]"]),
    ("forge a source", &["a source that it was never given"]),
    ("transform without end", &["model.embed_tokens.weight: the plugin puts too many transforms on one tensor"]),
    ("stack without end", &["model.embed_tokens.weight: the plugin puts too many transforms on one tensor"]),
    ("build off the thread", &["the other thread panicked"]),
    ("ask for a million caches", &["1000000 caches"]),
    ("ask for a huge state", &["numbers of state, more than any model has; look at config.json"]),
];

const STALE: &str = "a tensor that is not of this step";
const NO_TENSOR: &str = "the plugin's forward returned no tensor of this step";

const IN_FORWARD: &[(&str, &[&str])] = &[
    ("panic in forward", &["the plugin bad panicked: a deliberate panic in forward (at ", "bad/src/lib.rs:"]),
    ("panic in head", &["a deliberate panic in head"]),
    ("return no handle", &[NO_TENSOR]),
    ("return a forged handle", &[NO_TENSOR]),
    ("return a released handle", &[NO_TENSOR]),
    ("use a released handle", &["add: ", STALE, "(at bad/src/lib.rs:"]),
    ("release the argument", &[STALE, "bad/src/lib.rs:"]),
    ("keep a tensor", &["add: ", STALE, "bad/src/lib.rs:"]),
    ("compute off the thread", &["the plugin bad panicked: the other thread panicked"]),
    ("narrow too far", &["narrow: entries 60..60+10 of an axis of 64 (at bad/src/lib.rs:"]),
    ("add unlike shapes", &["add: [3, 64] against [3, 3] (at bad/src/lib.rs:"]),
    ("use an unknown layer", &["linear", "a layer that this model does not have (at bad/src/lib.rs:"]),
    ("use a layer as another", &["linear of model.embed_tokens: this layer is not linear (at bad/src/lib.rs:"]),
    ("give a layer a wrong width", &["linear of lm_head: input [3, 8], it takes [.., 64] (at bad/src/lib.rs:"]),
    ("give sinks of a wrong size", &["attend: sinks [3, 3] for 4 heads (at bad/src/lib.rs:"]),
    ("feed a cache twice", &["attend: cache 0 is fed twice in one step (at bad/src/lib.rs:"]),
    ("attend more often than declared", &["attend: the layer declares no further keys and values in caches()"]),
    ("recur without a state", &["shift: the layer's caches() declares no further state (at bad/src/lib.rs:"]),
    (
        "recur with a state of another shape",
        &["shift: needs a state of [1, 64], the layer's caches() declares one of [1, 65]"],
    ),
    ("recur twice with one state", &["shift: the state 1 is used twice in one step"]),
    ("recur over other tokens", &["shift: [64, 3] in a step of 3 tokens"]),
    ("attend to fewer tokens", &["attend: 1 tokens in a step of 3"]),
    ("rotate other tokens", &["rotate", "is not [3 tokens, heads, at least 16]"]),
    ("build while running", &["source: called while the model was running (at bad/src/lib.rs:"]),
    ("return a tensor of another shape", &["the plugin's forward returned [64, 3], it should be [3, ..]"]),
    ("return three axes", &["the plugin's forward returned [3, 4, 16]"]),
    ("fail with words", &["fail: a deliberate failure (at bad/src/lib.rs:"]),
    ("attend in head", &["attend: cache 0 is fed twice"]),
    ("return too few logits", &["the plugin's head returned [0, 128], it should be [3, ..]"]),
    ("return logits of three axes", &["the plugin's head returned [3, 8, 16]"]),
];

/// Wrong, but of no consequence: the model works.
const HARMLESS: &[&str] = &["release twice", "leave a tensor to a thread", "panic in drop"];

fn bad() -> PathBuf {
    outside::build(&outside::workspace(), "bad", "bad", None)
}

fn model(misbehave: &str) -> tempfile::TempDir {
    checkpoint(&[("model_type", json!("bad")), ("misbehave", json!(misbehave))])
}

fn load(model: &Path, plugins: &Path) -> dylm::Result<LanguageModel> {
    dylm::load(
        model.to_str(),
        &LoadOptions { plugins: vec![plugins.to_owned()], trust: Trust::All, ..Default::default() },
    )
}

fn generate(model: &Path, plugins: &Path) -> dylm::Result<String> {
    let options = GenerateOptions { max_tokens: 12, ignore_eos: true, ..Default::default() };
    dylm::generate(&load(model, plugins)?, "hello world", &options)
}

#[test]
fn every_mistake_ends_the_run_with_one_sentence_and_code_1() {
    let plugins = install(&bad());
    for (misbehave, expected) in IN_NEW.iter().chain(IN_FORWARD) {
        let model = model(misbehave);
        let mut command = dylm();
        command.args(["generate", "--max-tokens", "4", "--verbose", "false", "--model"]).arg(model.path());
        let output = trusting(&mut command, plugins.path()).output().unwrap();
        let sentence = match IN_NEW.iter().any(|(new, _)| new == misbehave) {
            // The report on a checkpoint is a list.
            true => String::from_utf8_lossy(&output.stderr).into_owned(),
            false => one_sentence(&output, misbehave),
        };
        assert_eq!(output.status.code(), Some(1), "{misbehave}: {} {sentence}", output.status);
        for part in *expected {
            assert!(sentence.contains(part), "{misbehave}: no {part:?} in: {sentence}");
        }
        assert!(!sentence.contains("thread '"), "{misbehave}: a panic hook spoke: {sentence}");
    }
}

#[test]
fn a_mistake_leaves_the_process_and_its_other_models_intact() {
    let (plugins, good) = (install(&bad()), model(""));
    let expected = generate(good.path(), plugins.path()).unwrap();
    assert!(!expected.is_empty());
    let running = load(good.path(), plugins.path()).unwrap();
    let options = GenerateOptions { max_tokens: 12, ignore_eos: true, ..Default::default() };
    for (misbehave, parts) in IN_NEW.iter().chain(IN_FORWARD) {
        let error = generate(model(misbehave).path(), plugins.path()).expect_err(misbehave).to_string();
        assert!(error.contains(parts[0]), "{misbehave}: {error}");
        assert_eq!(dylm::generate(&running, "hello world", &options).unwrap(), expected, "after {misbehave:?}");
    }
    assert_eq!(generate(good.path(), plugins.path()).unwrap(), expected);
}

#[test]
fn a_mistake_without_consequence_changes_nothing() {
    let (plugins, good) = (install(&bad()), model(""));
    let run = |model: &Path| {
        let args = ["generate", "--max-tokens", "12", "--verbose", "false", "--prompt", "hello", "--model"];
        let output = trusting(dylm().args(args).arg(model), plugins.path()).output().unwrap();
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned(), err)
    };
    let expected = run(good.path());
    assert_eq!((expected.0, expected.2.as_str()), (Some(0), ""), "{}", expected.2);
    for misbehave in HARMLESS {
        assert_eq!(run(model(misbehave).path()), expected, "{misbehave}");
    }
}

#[test]
fn a_step_that_panics_half_way_leaves_the_sequence_as_it_was() {
    let plugins = install(&bad());
    let (good, broken) = (model(""), model("panic after attention, later"));
    let (good, broken) = (load(good.path(), plugins.path()).unwrap(), load(broken.path(), plugins.path()).unwrap());
    let step = |lm: &LanguageModel, state: &mut dylm::cache::State, tokens: &[u32]| {
        // All rows are wanted, so that no step is compiled and each calls the plugin.
        lm.model.step(&mut [Input { state, tokens, want: Want::All }])
    };
    let mut expected = good.model.state(&Default::default()).unwrap();
    let mut state = broken.model.state(&Default::default()).unwrap();
    // The dry run was call 0.
    assert_eq!(step(&good, &mut expected, &[5, 6, 7]).unwrap(), step(&broken, &mut state, &[5, 6, 7]).unwrap());
    let error = step(&broken, &mut state, &[8]).unwrap_err().to_string();
    assert!(error.contains("a deliberate panic in call 2"), "{error}");
    assert_eq!(step(&good, &mut expected, &[8]).unwrap(), step(&broken, &mut state, &[8]).unwrap());
    assert_eq!(step(&good, &mut expected, &[9]).unwrap(), step(&broken, &mut state, &[9]).unwrap());
}

#[test]
fn a_panic_while_a_step_is_taken_down_for_later_makes_it_run_op_by_op() {
    let plugins = install(&bad());
    let (good, broken) = (model(""), model("panic after attention, later"));
    let (good, broken) = (load(good.path(), plugins.path()).unwrap(), load(broken.path(), plugins.path()).unwrap());
    let step = |lm: &LanguageModel, state: &mut dylm::cache::State, tokens: &[u32]| {
        // A prompt of whose tokens only the last one's logits are wanted would be taken down too.
        let want = if tokens.len() > 1 { Want::All } else { Want::Last };
        lm.model.step(&mut [Input { state, tokens, want }])
    };
    let mut expected = good.model.state(&Default::default()).unwrap();
    let mut state = broken.model.state(&Default::default()).unwrap();
    for tokens in [&[5, 6, 7][..], &[8], &[9]] {
        assert_eq!(step(&good, &mut expected, tokens).unwrap(), step(&broken, &mut state, tokens).unwrap());
    }
    assert_eq!(good.model.not_replayed(), None);
    // The dry run was call 0, the prompt call 1.
    let why = broken.model.not_replayed().unwrap();
    assert!(why.contains("a deliberate panic in call 2"), "{why}");
}

#[test]
fn a_panic_while_a_prompt_is_looked_through_makes_it_go_on_with_all_rows() {
    let plugins = install(&bad());
    let (good, broken) = (model(""), model("panic after attention, later"));
    let (good, broken) = (load(good.path(), plugins.path()).unwrap(), load(broken.path(), plugins.path()).unwrap());
    let mut expected = good.model.state(&Default::default()).unwrap();
    let mut state = broken.model.state(&Default::default()).unwrap();
    // The dry run was call 0, the first prompt is call 1, and call 2 looks through the second one.
    for (tokens, want) in [([5, 6, 7], Want::All), ([8, 9, 10], Want::Last)] {
        let step = |lm: &LanguageModel, state| lm.model.step(&mut [Input { state, tokens: &tokens, want }]).unwrap();
        assert_eq!(step(&good, &mut expected), step(&broken, &mut state));
    }
    assert_eq!([&good, &broken].map(|lm| lm.model.looks_across(3).is_some()), [true, false]);
}

#[test]
fn a_step_that_panics_after_a_recurrence_leaves_its_state_as_it_was() {
    let plugins = install(&bad());
    let recurring = model("recur and panic later");
    let lm = load(recurring.path(), plugins.path()).unwrap();
    let step = |state: &mut dylm::cache::State, tokens: &[u32]| {
        lm.model.step(&mut [Input { state, tokens, want: Want::All }]).map(|mut rows| rows.remove(0))
    };
    let (mut broken, mut whole) =
        (lm.model.state(&Default::default()).unwrap(), lm.model.state(&Default::default()).unwrap());
    // The dry run was call 0.
    step(&mut broken, &[5, 6, 7]).unwrap();
    step(&mut broken, &[8]).unwrap();
    let error = step(&mut broken, &[1, 2]).unwrap_err().to_string();
    assert!(error.contains("a deliberate panic in call 3"), "{error}");
    assert_eq!(broken.offset, 4);
    let after = step(&mut broken, &[9]).unwrap();
    assert_eq!(after, step(&mut whole, &[5, 6, 7, 8, 9]).unwrap()[4..]);
}
