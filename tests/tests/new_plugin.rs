//! `dylm new-plugin`, as a newcomer meets it: the commands in the new crate's own README.md are taken out of it and run as they stand.

use dylm::scaffold::Scaffold;
use serde_json::Value;
use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};
use tests::{binary, models, outside};

/// A folder for new crates, empty but for what cargo built before: dependencies are built once and not for each run.
struct Desk {
    folder: PathBuf,
    home: tempfile::TempDir,
}

impl Desk {
    fn new(name: &str) -> Self {
        let folder = binary::target().with_file_name("outside").join("new-plugin").join(name);
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        fs::create_dir_all(folder.with_file_name("target")).unwrap();
        Desk { folder, home: tempfile::tempdir().unwrap() }
    }

    /// A line for the shell, with dylm on its PATH, without a network and with a home in which there is nothing.
    fn run(&self, line: &str, within: &Path) -> Output {
        let home = |name: &str, at: &str| {
            env::var_os(name).map(PathBuf::from).or_else(|| Some(env::home_dir()?.join(at))).unwrap_or_default()
        };
        let path = env::var_os("PATH").unwrap_or_default();
        let path = env::join_paths([binary::target()].into_iter().chain(env::split_paths(&path))).unwrap();
        let mut shell = Command::new("sh");
        shell.args(["-c", line]).current_dir(within).stdin(Stdio::null());
        shell.env("PATH", path).env("CARGO_NET_OFFLINE", "true").env("NO_COLOR", "1");
        shell.env("CARGO_HOME", home("CARGO_HOME", ".cargo")).env("RUSTUP_HOME", home("RUSTUP_HOME", ".rustup"));
        shell.env("HOME", self.home.path());
        let of_this_test = ["RUSTC", "RUSTDOC", "RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CARGO_BUILD_TARGET"];
        for name in ["CARGO_TARGET_DIR", "DYLM_PLUGINS", "DYLM_TRUST", "DYLM", "XDG_DATA_HOME", "XDG_CONFIG_HOME"] {
            shell.env_remove(name);
        }
        for name in of_this_test {
            shell.env_remove(name);
        }
        shell.output().unwrap()
    }

    fn new_plugin(&self, arguments: &str) -> Output {
        self.run(&format!("dylm new-plugin {arguments}"), &self.folder)
    }

    /// A new crate that builds into the common target folder.
    fn make(&self, name: &str, flags: &str) -> PathBuf {
        let output = self.new_plugin(&format!("{name} {flags}"));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let made = self.folder.join(name);
        std::os::unix::fs::symlink(self.folder.with_file_name("target"), made.join("target")).unwrap();
        made
    }
}

/// The commands of the `console` blocks, each with the lines that it is said to print.
fn commands(readme: &str) -> Vec<(String, Vec<String>)> {
    let mut commands: Vec<(String, Vec<String>)> = Vec::new();
    for block in readme.split("```console\n").skip(1) {
        for line in block.split("```").next().unwrap().lines() {
            match line.strip_prefix("$ ") {
                Some(command) => commands.push((command.to_owned(), Vec::new())),
                None => commands.last_mut().unwrap().1.push(line.to_owned()),
            }
        }
    }
    commands
}

#[test]
fn the_five_minutes_in_a_new_crate_s_readme_work_as_they_stand() {
    let desk = Desk::new("five-minutes");
    let made = desk.make("five_minutes", "");
    let lock = fs::read_to_string(made.join("Cargo.lock")).unwrap();
    let commands = commands(&fs::read_to_string(made.join("README.md")).unwrap());
    let mut spoken = Vec::new();
    for (command, prints) in &commands {
        let output = desk.run(command, &made);
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{command}: {}\n{out}\n{err}", output.status);
        if !prints.is_empty() {
            assert_eq!(out.lines().collect::<Vec<_>>(), *prints, "{command}");
        }
        if command.starts_with("dylm generate") {
            spoken.push(out.into_owned());
        }
    }
    assert_eq!(spoken.len(), 3, "{commands:?}");
    assert_ne!(spoken[0], spoken[1], "the change of the architecture changes what it says");
    assert_eq!(spoken[1], spoken[2], "the plugin that was put into the user's folder is the one that was built last");
    assert_eq!(fs::read_to_string(made.join("Cargo.lock")).unwrap(), lock, "cargo has nothing to change in Cargo.lock");
    assert!(made.join("tests/said.txt").is_file());
    let size = fs::metadata(made.join("target/release").join(outside::file_name("five_minutes"))).unwrap().len();
    assert!(size < 700_000, "the release library has {size} bytes");
    let format = desk.run("cargo fmt --check", &made);
    assert!(format.status.success(), "{}", String::from_utf8_lossy(&format.stdout));
}

#[test]
fn a_copy_of_one_of_dylm_s_plugins_says_what_the_original_says() {
    let desk = Desk::new("copy");
    // One of three that their plugin tells apart by name.
    let made = desk.make("my-gemma.2", "--from gemma2");
    let built = desk.run("cargo build --locked", &made);
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let says = |flags: &str| {
        let words = "--prompt hello --max-tokens 24 --verbose false";
        let output = desk.run(&format!("dylm generate {flags} --model tiny {words}"), &made);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    };
    let copied = says("--plugins target/debug --trust-plugin");
    let config: Value = serde_json::from_slice(&fs::read(made.join("tiny/config.json")).unwrap()).unwrap();
    assert_eq!(config["model_type"], "my-gemma.2");
    assert_eq!(copied, says("--config model_type=gemma2"));
    assert!(copied.len() > 8);
}

#[test]
fn a_variant_with_other_tensors_gets_a_model_of_its_own() {
    let desk = Desk::new("variant");
    let made = desk.make("variant", "");
    let lib = made.join("src/lib.rs");
    let source = fs::read_to_string(&lib).unwrap();
    // Normalized queries and keys, as in Qwen3.
    let rope = ".rope(w.rope(head_dim, c.rope_theta, &c.rope_scaling));";
    let norms = "let [q_norm, k_norm] =\n        [\"q_norm\", \"k_norm\"].map(|name| w.at(\"self_attn\").rms_norm(name, head_dim, c.rms_norm_eps));\n";
    let variant = source
        .replace(rope, &rope.replace(';', "\n        .head_norms(q_norm, k_norm);"))
        .replace("    let attention = ", &format!("    {norms}    let attention = "));
    assert_ne!(source, variant);
    fs::write(&lib, variant).unwrap();
    let run = |line: &str, code: i32| {
        let output = desk.run(line, &made);
        let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
        assert_eq!(output.status.code(), Some(code), "{line}: {text}");
        text
    };
    run("cargo build --locked", 0);
    let plugins = "--plugins target/debug --trust-plugin";
    assert!(
        run(&format!("dylm plan tiny {plugins}"), 1)
            .contains("model.layers.0.self_attn.q_norm.weight: not in the checkpoint")
    );
    assert!(
        run(&format!("dylm new-model tiny {plugins}"), 2).contains("there are weights already; --force writes over it")
    );
    run(&format!("dylm new-model tiny {plugins} --force"), 0);
    run(&format!("dylm plan tiny {plugins}"), 0);
    let words = "--prompt hello --max-tokens 12 --verbose false";
    assert!(run(&format!("dylm generate {plugins} --model tiny {words}"), 0).len() > 4);
    run(&format!("dylm check target/debug/{} --only caches,shapes,build", outside::file_name("variant")), 0);
}

#[test]
fn a_crate_can_begin_with_any_model_type_that_dylm_serves() {
    let folder = tempfile::tempdir().unwrap();
    let api = Path::new(env!("CARGO_MANIFEST_DIR")).join("../plugin-api");
    let types: Vec<(String, String)> = models::served().unwrap().into_iter().collect();
    assert!(types.len() > 100);
    // A name with a dot stands for a wrapper with one text model in it: which names there are is config.json's to say, not an author's.
    for (model_type, plugin) in types.into_iter().filter(|(model_type, _)| !model_type.contains('.')) {
        let made = folder.path().join(&model_type);
        let (from, plugin_api) = (Some(model_type.clone()), Some(api.clone()));
        Scaffold { name: "mine".into(), from, folder: made.clone(), plugin_api }.write().unwrap();
        let source = fs::read_to_string(made.join("src/lib.rs")).unwrap();
        assert!(source.contains("MODEL_TYPES: &'static [&'static str] = &[\"mine\"];"), "{model_type} of {plugin}");
        for file in ["tiny/model.safetensors", "tiny/tokenizer.json"] {
            assert!(made.join(file).is_file(), "{model_type}: {file}");
        }
    }
}

#[test]
fn a_name_or_folder_that_is_taken_or_none_is_refused_and_nothing_is_written() {
    let desk = Desk::new("refused");
    fs::create_dir(desk.folder.join("there")).unwrap();
    let before = fs::read_dir(&desk.folder).unwrap().count();
    for (arguments, says) in [
        ("../x", "cannot be the name of a plugin"),
        ("3llama", "begins with a letter"),
        ("async", "Rust uses this word itself"),
        ("there", "there: is there already"),
        ("new --path there", "there: is there already"),
        ("llama", "serves model_type \"llama\" already"),
        ("new --from lllama", "the nearest of those that it has are llama"),
        ("new --plugin-api there", "there is no Cargo.toml in it"),
    ] {
        let output = desk.new_plugin(arguments);
        let err = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments}: {err}");
        assert!(err.contains(says) && err.trim_end().lines().count() == 1, "{arguments}: {err}");
        assert_eq!(fs::read_dir(&desk.folder).unwrap().count(), before, "{arguments}");
    }
    assert!(desk.new_plugin("llama --force").status.success());
}

#[test]
fn an_author_may_use_a_plugin_api_of_their_own() {
    let desk = Desk::new("own-api");
    let api = Path::new(env!("CARGO_MANIFEST_DIR")).join("../plugin-api").canonicalize().unwrap();
    let output = desk.new_plugin(&format!("mine --plugin-api {}", api.display()));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let manifest = fs::read_to_string(desk.folder.join("mine/Cargo.toml")).unwrap();
    assert!(manifest.contains(&format!("plugin-api = {{ path = \"{}\" }}", api.display())), "{manifest}");
    assert!(!desk.folder.join("mine/plugin-api").exists());
}
