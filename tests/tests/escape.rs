//! The ways out where dylm lacks a word, by plugins from outside: named extensions in both directions, a recurrence by the author's own
//! step (`layer.scan`), and an op of the plugin's own (`op/1`). Each is held to what the built-in words compute.

use dylm::{
    LanguageModel, LoadOptions, Trust,
    cache::{
        CacheOptions, State,
        prompt::{self, CachedText, Origin, PromptCache},
    },
    device::{DeviceChoice, DtypeChoice},
    model::{Input, Want},
    plugin::{library::Library, registry::Registry},
};
use plugin_api::abi::extension::Extension;
use serde_json::json;
use std::path::Path;
use tests::{
    binary::{self, dylm, one_sentence},
    outside::{self, checkpoint, install},
    tiny::Expected,
};

fn plugin(name: &str) -> tempfile::TempDir {
    install(&outside::build(&outside::workspace(), name, name, None))
}

fn load_on(device: DeviceChoice, model: &Path, plugins: &Path) -> dylm::Result<LanguageModel> {
    let (plugins, dtype, trust) = (vec![plugins.to_owned()], DtypeChoice::Float32, Trust::All);
    dylm::load(model.to_str(), &LoadOptions { plugins, device, dtype, trust, ..Default::default() })
}

fn load(model: &Path, plugins: &Path) -> dylm::Result<LanguageModel> {
    load_on(DeviceChoice::Cpu, model, plugins)
}

fn text() -> Vec<u32> {
    Expected::read(&tests::tiny::fixtures().join("llama")).unwrap().prompt
}

fn read(lm: &LanguageModel, state: &mut State, tokens: &[u32]) -> Vec<Vec<f32>> {
    lm.model.step(&mut [Input { state, tokens, want: Want::All }]).unwrap().remove(0)
}

fn fresh(lm: &LanguageModel) -> State {
    lm.model.state(&CacheOptions::default()).unwrap()
}

/// Logits of each token of the text, read in chunks of these sizes.
fn logits(lm: &LanguageModel, chunks: &[usize]) -> Vec<Vec<f32>> {
    let (mut state, text) = (fresh(lm), text());
    let (mut rows, mut rest) = (Vec::new(), text.as_slice());
    for &size in chunks.iter().chain([&usize::MAX]) {
        let (chunk, after) = rest.split_at(size.min(rest.len()));
        rest = after;
        if !chunk.is_empty() {
            rows.extend(read(lm, &mut state, chunk));
        }
    }
    rows
}

/// The furthest that two lists of logits are apart, relative to the largest.
fn apart(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    assert_eq!((a.len(), a[0].len()), (b.len(), b[0].len()));
    let (a, b) = (a.concat(), b.concat());
    assert!(a.iter().chain(&b).all(|x| x.is_finite()));
    let largest = b.iter().fold(0f32, |m, x| m.max(x.abs()));
    a.iter().zip(&b).map(|(x, y)| (x - y).abs()).fold(0f32, f32::max) / largest
}

/// f32's own noise over three layers: the built-in loops add in another order.
const NOISE: f32 = 2e-6;

// ---- named extensions ----

#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
struct Languages {
    count: u64,
}

// SAFETY: `repr(C)`, a number.
unsafe impl Extension for Languages {
    const ID: &'static str = "example.org:languages/1";
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Size {
    numbers: u64,
    double: extern "C" fn(u64) -> u64,
}

// SAFETY: `repr(C)`, a number and a function, both there from the first version on.
unsafe impl Extension for Size {
    const ID: &'static str = "example.org:size/1";
}

#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
struct Panics(u64);

// SAFETY: `repr(C)`, a number.
unsafe impl Extension for Panics {
    const ID: &'static str = "example.org:panic/1";
}

#[test]
fn an_extension_is_found_by_its_name_in_both_directions_and_an_unknown_one_is_none() {
    let (plugins, model) = (plugin("extended"), checkpoint(&[("model_type", "extended".into())]));
    let registry = Registry::new(&[plugins.path().to_owned()]).trusting(Trust::All);
    let library = Library::open(&registry.resolve("extended").unwrap()).unwrap();
    assert_eq!(library.extension::<Languages>(), Some(Languages { count: 3 }));
    assert!(library.extension::<Size>().is_none(), "of the model, not of the architecture");
    assert_eq!(library.extension::<Panics>(), None, "a panic is no answer");

    // Its `new` and `forward` ask the host, and refuse a wrong answer.
    let lm = load(model.path(), plugins.path()).unwrap();
    let size = lm.model.extension::<Size>().unwrap();
    assert_eq!((size.numbers, (size.double)(21)), (128 * 64, 42));
    assert!(lm.model.extension::<Languages>().is_none(), "of the architecture, not of the model");
    assert_eq!(logits(&lm, &[]).len(), text().len());

    let llama = load(checkpoint(&[]).path(), &binary::target()).unwrap();
    assert!(llama.model.extension::<Size>().is_none());
}

// ---- layer.scan ----

fn recurrence(rule: &str) -> tempfile::TempDir {
    checkpoint(&[("model_type", json!("recurrence")), ("rule", json!(rule))])
}

const RULES: [&str; 2] = ["delta", "lru"];

#[test]
fn a_recurrence_by_scan_gives_the_numbers_of_the_built_in_one() {
    let plugins = plugin("recurrence");
    for rule in RULES {
        let [scan, built_in] = ["by scan", "built in"].map(|how| {
            let model = recurrence(&format!("{rule}, {how}"));
            [DeviceChoice::Cpu, DeviceChoice::CpuByCandle]
                .map(|device| logits(&load_on(device, model.path(), plugins.path()).unwrap(), &[]))
        });
        for (scan, built_in) in scan.iter().zip(&built_in) {
            let apart = apart(scan, built_in);
            assert!(apart <= NOISE, "{rule}: {apart:.1e} apart");
        }
    }
}

#[test]
fn a_scan_in_chunks_and_in_a_ragged_batch_gives_what_the_whole_alone_gives() {
    let plugins = plugin("recurrence");
    for rule in RULES {
        let lm = load(recurrence(&format!("{rule}, by scan")).path(), plugins.path()).unwrap();
        let whole = logits(&lm, &[]);
        for chunks in [vec![1; 40], vec![3, 4, 1], vec![7]] {
            let apart = apart(&logits(&lm, &chunks), &whole);
            assert!(apart <= NOISE, "{rule}: {chunks:?}: {apart:.1e} apart");
        }
        let text = text();
        let texts = [text.as_slice(), &text[..5], &text[3..11]];
        let alone: Vec<_> = texts.iter().map(|text| read(&lm, &mut fresh(&lm), text)).collect();
        let mut states = texts.map(|_| fresh(&lm));
        let inputs = states.iter_mut().zip(texts);
        let mut inputs: Vec<_> = inputs.map(|(state, tokens)| Input { state, tokens, want: Want::All }).collect();
        for (together, alone) in lm.model.step(&mut inputs).unwrap().iter().zip(&alone) {
            let apart = apart(together, alone);
            assert!(apart <= NOISE, "{rule}: batched: {apart:.1e} apart");
        }
    }
}

#[test]
fn a_scan_goes_back_in_its_text_and_comes_back_from_a_file() {
    let plugins = plugin("recurrence");
    for rule in RULES {
        let model = recurrence(&format!("{rule}, by scan"));
        let lm = load(model.path(), plugins.path()).unwrap();
        let (text, mut state) = (text(), fresh(&lm));
        let whole = read(&lm, &mut state, &text);
        for back in [5, 1, 9] {
            let rest = &text[text.len() - back..];
            state.trim(back).unwrap();
            let apart = apart(&read(&lm, &mut state, rest), &whole[text.len() - back..]);
            assert!(apart <= NOISE, "{rule}: back by {back}: {apart:.1e} apart");
        }
        // Single tokens, then back between two copies of the states: replayed tokens and new ones in one step.
        let mut state = fresh(&lm);
        for &token in &text {
            read(&lm, &mut state, &[token]);
        }
        state.trim(4).unwrap();
        let apart = apart(&read(&lm, &mut state, &text[text.len() - 4..]), &whole[text.len() - 4..]);
        assert!(apart <= NOISE, "{rule}: replayed: {apart:.1e} apart");

        let (folder, cut) = (tempfile::tempdir().unwrap(), text.len() - 3);
        let file = folder.path().join("prompt.safetensors");
        let mut state = fresh(&lm);
        read(&lm, &mut state, &text[..cut]);
        let told = CachedText::default();
        prompt::save(&file, &state, &Origin { model: "recurrence", fingerprint: "f", text: &told }).unwrap();
        let reopened = PromptCache::open(&file).unwrap().state(&lm.model, "f", &CacheOptions::default());
        let [kept, reopened] = [state, reopened.unwrap()].map(|mut state| read(&lm, &mut state, &text[cut..]));
        assert_eq!(kept, reopened, "{rule}: from a file");
    }
}

/// What `dylm generate` says of a mistake.
fn refusal(model: &Path, plugins: &Path, what: &str) -> String {
    let output = outside::generate(model, plugins, Path::new("/"));
    assert_eq!(output.status.code(), Some(1), "{what}: {}", output.status);
    one_sentence(&output, what)
}

#[test]
fn a_mistake_in_a_scan_is_one_sentence_with_the_place() {
    let plugins = plugin("recurrence");
    let mistakes: [(&str, &[&str]); 7] = [
        ("panic", &["the plugin recurrence panicked: a deliberate panic in the step (at recurrence/src/lib.rs:"]),
        ("narrow too far", &["narrow: entries 1000000..1000000+1 of an axis of 64 (at recurrence/src/lib.rs:"]),
        (
            "another state",
            &["scan: the step made a state of [1, 2, 24, 1] out of one of [1, 2, 24, 48] (at recurrence/src/lib.rs:"],
        ),
        ("another row", &["scan: the step gave [64, 1], it should be [1, ..]: one token's row"]),
        ("no input by tokens", &["scan: [64, 3] in a step of 3 tokens (at recurrence/src/lib.rs:"]),
        ("too many states", &["scan: the layer's caches() declares no further state (at recurrence/src/lib.rs:"]),
        ("panic at the third token", &["the plugin recurrence panicked: the third token (at recurrence/src/lib.rs:"]),
    ];
    for (rule, expected) in mistakes {
        let sentence = refusal(recurrence(rule).path(), plugins.path(), rule);
        for part in expected {
            assert!(sentence.contains(part), "{rule}: no {part:?} in: {sentence}");
        }
    }
}

#[test]
fn dylm_check_finds_nothing_wrong_with_the_ways_out() {
    for (name, key, ways) in
        [("recurrence", "rule", &["delta, by scan", "lru, by scan"][..]), ("activation", "activation", &["own"])]
    {
        let library = outside::build(&outside::workspace(), name, name, None);
        for way in ways {
            let model = checkpoint(&[("model_type", json!(name)), (key, json!(way))]);
            let mut command = dylm();
            command.arg("check").arg(&library).args(["--cases", "20", "--timeout", "300", "--config"]);
            let output = command.arg(model.path().join("config.json")).output().unwrap();
            let told = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success() && !told.contains("FAIL"), "{name}, {way}: {told}");
            assert!(told.contains("replay-values"), "{name}, {way}: {told}");
        }
    }
}

// ---- op/1 ----

fn activation(how: &str) -> tempfile::TempDir {
    checkpoint(&[("model_type", json!("activation")), ("activation", json!(how))])
}

#[test]
fn an_op_of_the_plugin_gives_the_numbers_of_the_built_in_one() {
    let plugins = plugin("activation");
    for device in [DeviceChoice::Cpu, DeviceChoice::CpuByCandle] {
        let [own, built_in] = ["own", "built in"]
            .map(|how| logits(&load_on(device, activation(how).path(), plugins.path()).unwrap(), &[3, 4]));
        let apart = apart(&own, &built_in);
        assert!(apart <= NOISE, "{apart:.1e} apart");
    }
}

#[test]
fn an_op_whose_kernel_suits_no_device_here_and_one_that_panics_when_it_ends_do_no_harm() {
    let plugins = plugin("activation");
    let expected = logits(&load(activation("own").path(), plugins.path()).unwrap(), &[]);
    for how in ["a kernel that does not compile", "panic in drop"] {
        let lm = load(activation(how).path(), plugins.path()).unwrap();
        assert_eq!(logits(&lm, &[]), expected, "{how}");
        drop(lm);
    }
}

#[test]
fn a_mistake_in_an_op_is_one_sentence_with_its_name_and_the_place() {
    let plugins = plugin("activation");
    let mistakes: [(&str, &[&str]); 8] = [
        ("panic in shape", &["op gate: the plugin panicked: a deliberate panic in shape (at activation/src/lib.rs:"]),
        (
            "panic in cpu",
            &["op gate: the plugin panicked: a deliberate panic in cpu (at activation/src/lib.rs:", ") (at "],
        ),
        ("refuse in cpu", &["op gate: these numbers are refused on purpose (at activation/src/lib.rs:"]),
        ("call a word in cpu", &["op gate: the plugin panicked: an op was called outside of new, forward or head"]),
        ("a huge output", &["op gate: its output would be [1099511627776, 1099511627776]"]),
        ("an output of nine axes", &["op gate: an output of 9 axes; 8 are possible (at activation/src/lib.rs:"]),
        (
            "unlike shapes",
            &["op gate: takes two tensors of one shape, not [[3, 96], [3, 64]] (at activation/src/lib.rs:"],
        ),
        ("one input", &["op gate: takes two tensors of one shape, not [[3, 96]]"]),
    ];
    for (how, expected) in mistakes {
        let sentence = refusal(activation(how).path(), plugins.path(), how);
        for part in expected {
            assert!(sentence.contains(part), "{how}: no {part:?} in: {sentence}");
        }
    }
}

#[test]
fn an_op_applied_while_the_model_is_built_is_reported() {
    let (plugins, model) = (plugin("activation"), activation("apply while building"));
    let error = load(model.path(), plugins.path()).err().unwrap().to_string();
    assert!(error.contains("op: called while the model was being built (at activation/src/lib.rs:"), "{error}");
}
