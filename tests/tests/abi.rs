//! The promise of the plugin ABI: a library built elsewhere, by another compiler, against an older or newer plugin-api, either computes
//! what the plugin of this workspace computes or is refused in one sentence.

use dylm::{GenerateOptions, LanguageModel, LoadOptions, Trust, plugin::registry::Registry};
use std::path::{Path, PathBuf};
use tests::{
    another_api::{AnotherApi, replaced},
    binary::{self, dylm, one_sentence, trusting},
    outside::{self, checkpoint, install},
    tiny::Expected,
};

fn load(model: &Path, plugins: &Path) -> dylm::Result<LanguageModel> {
    let options = LoadOptions { plugins: vec![plugins.to_owned()], trust: Trust::All, ..Default::default() };
    dylm::load(model.to_str(), &options)
}

/// Greedy tokens after a fixed prompt.
fn tokens(lm: &LanguageModel) -> Vec<u32> {
    let options = GenerateOptions { max_tokens: 24, ignore_eos: true, ..Default::default() };
    let prompt = Expected::read(&tests::tiny::fixtures().join("llama")).unwrap().prompt;
    let generation = dylm::Generation::new(lm, &prompt, &options, None, None).unwrap();
    generation.map(|response| response.unwrap().token).collect()
}

fn tokens_of_the_plugin_in_tree() -> Vec<u32> {
    let model = checkpoint(&[]);
    tokens(&load(model.path(), &binary::target()).unwrap())
}

fn outsider(toolchain: Option<&str>) -> PathBuf {
    outside::build(&outside::workspace(), "outsider", "outsider", toolchain)
}

#[test]
fn a_plugin_built_in_its_own_workspace_generates_what_ours_does() {
    let (plugins, model) = (install(&outsider(None)), checkpoint(&[("model_type", "outsider".into())]));
    let theirs = tokens(&load(model.path(), plugins.path()).unwrap());
    assert_eq!(theirs.len(), 24);
    assert_eq!(theirs, tokens_of_the_plugin_in_tree());
}

#[test]
fn a_plugin_of_the_nightly_compiler_generates_what_ours_does() {
    if !outside::has("nightly") {
        eprintln!("SKIPPED: there is no nightly toolchain; `rustup toolchain install nightly` brings one");
        return;
    }
    let plugins = install(&outsider(Some("nightly")));
    let found = Registry::new(&[plugins.path().to_owned()]).resolve("outsider").unwrap();
    assert!(found.note.rustc.contains("nightly"), "built by {}", found.note.rustc);
    let run = |model: &Path, plugins: &Path| {
        let args = ["generate", "--prompt", "hello", "--max-tokens", "24", "--verbose", "false", "--model"];
        let output = trusting(dylm().args(args).arg(model), plugins).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let theirs = run(checkpoint(&[("model_type", "outsider".into())]).path(), plugins.path());
    assert_eq!(theirs, run(checkpoint(&[]).path(), &binary::target()));
    assert!(theirs.len() > 8, "{theirs:?}");
}

/// The outsider, built against a changed plugin-api.
fn against_another_api(name: &str, change: impl Fn(&str, String) -> String) -> PathBuf {
    AnotherApi::new(name, change).plugin("outsider", None, |text| text)
}

/// A field more at the end of a struct that ops take, and what plugins say in it.
fn with_a_later_field(file: &str, text: String, value: u32) -> String {
    if file == "src/abi/spec.rs" {
        let (before, after) = text.split_once("pub struct AttendSpec {").unwrap();
        let (fields, rest) = after.split_once("\n}\n").unwrap();
        return format!("{before}pub struct AttendSpec {{{fields}\n    pub later: u64,\n}}\n{rest}");
    }
    let later = format!("let spec = AttendSpec {{\n            later: {value},");
    replaced(file, text, "src/step.rs", "let spec = AttendSpec {", &later)
}

#[test]
fn a_plugin_of_a_later_minor_version_without_new_ops_works() {
    let library = against_another_api("minor", |file, text| {
        let text = replaced(file, text, "Cargo.toml", "version = \"1.0.0\"", "version = \"1.3.0\"");
        let text = replaced(file, text, "src/abi/mod.rs", "MINOR: u32 = 0", "MINOR: u32 = 3");
        with_a_later_field(file, text, 0)
    });
    let (plugins, model) = (install(&library), checkpoint(&[("model_type", "outsider".into())]));
    assert_eq!(tokens(&load(model.path(), plugins.path()).unwrap()), tokens_of_the_plugin_in_tree());
}

#[test]
fn a_struct_field_from_the_future_is_refused_only_when_it_is_used() {
    let library = against_another_api("field", |file, text| with_a_later_field(file, text, 7));
    let sentence = refusal(&library);
    assert!(sentence.starts_with("attend: the plugin asks for a kind of attention"), "{sentence}");
    assert!(sentence.contains("src/lib.rs:"), "no place: {sentence}");
}

#[test]
fn a_plugin_to_which_an_op_looks_different_is_refused_in_one_sentence() {
    let sentence = refusal(&against_another_api("changed", |file, text| {
        replaced(file, text, "src/abi/ops.rs", "low: f64, high: f64", "low: f32, high: f32")
    }));
    assert!(sentence.contains("the plugin outsider knows ops in another form or order"), "{sentence}");
}

#[test]
fn a_plugin_to_which_the_ops_stand_in_another_order_is_refused_in_one_sentence() {
    let sentence = refusal(&against_another_api("reordered", |file, text| {
        let exp = "            fn exp(x: Handle) -> Handle;\n";
        let abs = "            fn abs(x: Handle) -> Handle;\n";
        replaced(file, text, "src/abi/ops.rs", &format!("{abs}{exp}"), &format!("{exp}{abs}"))
    }));
    assert!(sentence.contains("the plugin outsider knows ops in another form or order"), "{sentence}");
    assert!(sentence.contains("rebuild it with plugin-api 1.0"), "{sentence}");
}

#[test]
fn a_plugin_with_another_factory_is_refused_in_one_sentence() {
    let sentence = refusal(&against_another_api("factory", |file, text| {
        let text = replaced(file, text, "src/abi/root.rs", "    pub major: u32,", "    pub major: u64,");
        replaced(file, text, "src/export.rs", "major: abi::MAJOR,", "major: abi::MAJOR as u64,")
    }));
    assert!(sentence.contains("was built against another plugin-api than this dylm's"), "{sentence}");
}

/// What `dylm generate` says of this plugin; abi_stable's long text must be there with `--debug`, and only then.
fn refusal(library: &Path) -> String {
    let (plugins, model) = (install(library), checkpoint(&[("model_type", "outsider".into())]));
    let mut command = dylm();
    command.arg("generate").arg("--model").arg(model.path());
    let output = trusting(&mut command, plugins.path()).output().unwrap();
    let sentence = one_sentence(&output, &library.display().to_string());
    if String::from_utf8_lossy(&output.stderr).contains("--debug tells more") {
        let long = command.arg("--debug").output().unwrap();
        assert!(long.stderr.len() > 1000, "no long form: {}", String::from_utf8_lossy(&long.stderr));
    }
    sentence
}

#[cfg(target_os = "linux")]
#[test]
fn a_library_is_opened_once_and_stays_when_its_models_are_gone() {
    let (plugins, model) = (install(&outsider(None)), checkpoint(&[("model_type", "outsider".into())]));
    let mapped = || {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let folder = plugins.path().to_str().unwrap().to_owned();
        maps.lines()
            .filter(|line| line.contains(&folder))
            .map(|line| line.split(' ').next().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(mapped(), [] as [String; 0]);
    let first = load(model.path(), plugins.path()).unwrap();
    let once = mapped();
    assert!(!once.is_empty());
    let second = load(model.path(), plugins.path()).unwrap();
    assert_eq!(mapped(), once);
    drop((first, second));
    assert_eq!(mapped(), once);
    assert!(load(model.path(), plugins.path()).is_ok());
    assert_eq!(mapped(), once);
}
