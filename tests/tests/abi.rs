//! The promise of the plugin ABI: a library built elsewhere, by another compiler, against an older or newer plugin-api, either computes
//! what the plugin of this workspace computes or is refused in one sentence.

use dylm::{
    GenerateOptions, LanguageModel, LoadOptions, Trust,
    plugin::{library::play_newer_host, registry::Registry},
};
use std::{
    path::{Path, PathBuf},
    sync::Mutex,
};
use tests::{
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

/// The host that this process plays: `play_newer_host` is for all of its threads.
static HOST: Mutex<()> = Mutex::new(());

#[test]
fn a_plugin_built_in_its_own_workspace_generates_what_ours_does() {
    let _today = HOST.lock();
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

#[test]
fn a_plugin_does_not_notice_that_the_host_has_one_op_more() {
    let _later = HOST.lock();
    let plugins = install(&outsider(None));
    let (theirs, ours) = (checkpoint(&[("model_type", "outsider".into())]), checkpoint(&[]));
    let before = tokens(&load(theirs.path(), plugins.path()).unwrap());
    play_newer_host(true);
    let after = [(theirs.path(), plugins.path()), (ours.path(), &binary::target())]
        .map(|(model, plugins)| load(model, plugins).map(|lm| tokens(&lm)));
    play_newer_host(false);
    for tokens in after {
        assert_eq!(tokens.unwrap(), before);
    }
}

/// The outsider, built against a plugin-api that somebody changed: a version of it that does not exist yet.
fn against_another_api(name: &str, change: impl Fn(&str, String) -> String) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let folder = binary::target().with_file_name("outside").join("changed").join(name);
    let copy = |from: &Path, to: &str, edit: &mut dyn FnMut(String) -> String| {
        let (text, to) = (std::fs::read_to_string(from).unwrap(), folder.join(to));
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        let text = edit(text);
        // An unchanged file keeps its time, and cargo its patience.
        if std::fs::read_to_string(&to).ok().as_ref() != Some(&text) {
            std::fs::write(to, text).unwrap();
        }
    };
    let mut changed = false;
    for path in files_below(&root.join("plugin-api")) {
        let file = path.strip_prefix(&root).unwrap().display().to_string().replace('\\', "/");
        copy(&path, &format!("{name}/{file}"), &mut |before| {
            let after = change(&file["plugin-api/".len()..], before.clone());
            changed |= before != after;
            after
        });
    }
    // What plugin-api no longer has must not stay behind from an earlier run.
    for stale in files_below(&folder.join(name).join("plugin-api")) {
        let file = stale.strip_prefix(folder.join(name)).unwrap();
        if !root.join(file).exists() {
            std::fs::remove_file(&stale).unwrap();
        }
    }
    assert!(changed, "{name}: the text to be changed is not in plugin-api any more");
    let own = outside::workspace();
    copy(&own.join("outsider/src/lib.rs"), &format!("{name}/src/lib.rs"), &mut |text| text);
    let named = format!("[lib]\nname = \"outsider_{name}\"");
    copy(&own.join("outsider/Cargo.toml"), &format!("{name}/Cargo.toml"), &mut |text| text.replace("[lib]", &named));
    copy(&own.join("Cargo.lock"), "Cargo.lock", &mut |text| text);
    copy(&root.join("Cargo.toml"), "Cargo.toml", &mut |text| {
        // The host is not among them, and profiles are those of the plugins' own workspace.
        let text = text.split("[profile").next().unwrap_or_default();
        let keep = |line: &&str| !["exclude", "default-members", "dylm ="].iter().any(|key| line.starts_with(key));
        let text = text.lines().filter(keep).collect::<Vec<_>>().join("\n");
        // Cargo tells packages apart by their paths below the workspace, and all of these share a target folder.
        let text = text.replace("path = \"plugin-api\"", &format!("path = \"{name}/plugin-api\""));
        let members = format!("members = [\"{name}\", \"{name}/plugin-api\"]");
        let text = text.replace("members = [\"host\", \"plugin-api\", \"plugins/*\", \"tests\"]", &members);
        text + "\n[profile.dev]\ndebug = false\n"
    });
    outside::build(&folder, "outsider", &format!("outsider_{name}"), None)
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] }).collect()
}

fn replaced(file: &str, text: String, of: &str, from: &str, to: &str) -> String {
    if file == of { text.replacen(from, to, 1) } else { text }
}

#[test]
fn a_plugin_of_a_later_minor_version_without_new_ops_works() {
    let _today = HOST.lock();
    let library = against_another_api("minor", |file, text| {
        let text = replaced(file, text, "Cargo.toml", "version = \"1.0.0\"", "version = \"1.3.0\"");
        let text = replaced(file, text, "src/abi/mod.rs", "MINOR: u32 = 0", "MINOR: u32 = 3");
        // A field at the end of a struct that ops take.
        let text = replaced(
            file,
            text,
            "src/abi/spec.rs",
            "    pub stride: u64,\n",
            "    pub stride: u64,\n    pub later: u64,\n",
        );
        replaced(file, text, "src/step.rs", "reserved: 0,", "reserved: 0,\n            later: 0,")
    });
    let (plugins, model) = (install(&library), checkpoint(&[("model_type", "outsider".into())]));
    assert_eq!(tokens(&load(model.path(), plugins.path()).unwrap()), tokens_of_the_plugin_in_tree());
}

#[test]
fn a_struct_field_from_the_future_is_refused_only_when_it_is_used() {
    let library = against_another_api("field", |file, text| {
        let text = replaced(
            file,
            text,
            "src/abi/spec.rs",
            "    pub stride: u64,\n",
            "    pub stride: u64,\n    pub later: u64,\n",
        );
        replaced(file, text, "src/step.rs", "reserved: 0,", "reserved: 0,\n            later: 7,")
    });
    let sentence = refusal(&library);
    assert!(sentence.starts_with("attend: the plugin asks for a kind of attention"), "{sentence}");
    assert!(sentence.contains("src/lib.rs:"), "no place: {sentence}");
}

#[test]
fn a_plugin_that_knows_more_ops_than_the_host_is_refused_in_one_sentence() {
    let sentence = refusal(&against_another_api("longer", |file, text| {
        replaced(file, text, "src/abi/ops.rs", "ops_1_0! {}", "ops_1_0! { appended invented_later; }")
    }));
    assert!(sentence.contains("the plugin outsider expects ops that this dylm (ABI 1.0) lacks"), "{sentence}");
    assert!(sentence.contains("update dylm"), "{sentence}");
}

#[test]
fn a_plugin_to_which_an_op_looks_different_is_refused_in_one_sentence() {
    let sentence = refusal(&against_another_api("changed", |file, text| {
        replaced(file, text, "src/abi/ops.rs", "low: f64, high: f64", "low: f32, high: f32")
    }));
    assert!(sentence.contains("lacks or has in another form"), "{sentence}");
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
