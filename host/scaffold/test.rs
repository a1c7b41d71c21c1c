//! Runs the real dylm on the plugin and the model in tiny/: what it says must be what it said before, in tests/said.txt.
//!
//! Where that file is missing it is written: delete it when the architecture is meant to say something else, and commit the new one.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Builds the plugin, which `cargo test` alone does not do, and gives its folder.
fn plugins() -> PathBuf {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--quiet"]).args((!cfg!(debug_assertions)).then_some("--release")).current_dir(root());
    assert!(cargo.status().expect("cargo runs").success(), "the plugin does not build");
    let test = env::current_exe().expect("a test has a file");
    test.parent().and_then(Path::parent).expect("it lies in target/debug/deps").to_owned()
}

fn dylm(arguments: &[&str]) -> Output {
    let program = env::var_os("DYLM").unwrap_or_else(|| "dylm".into());
    // The test agrees to what it has built; that is nothing to be remembered for you.
    let trust = Path::new(env!("CARGO_TARGET_TMPDIR")).join("trust.toml");
    let mut command = Command::new(&program);
    command.args(arguments).arg("--trust-plugin").env("DYLM_TRUST", trust).current_dir(root());
    let output = command.output();
    let output = output.unwrap_or_else(|e| panic!("{program:?}: {e}; install dylm, or set DYLM to where it is"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output
}

#[test]
fn it_says_what_it_said_before() {
    let plugins = plugins();
    let plugins = plugins.to_str().expect("a path in UTF-8");
    let words = ["--prompt", "hello", "--max-tokens", "32", "--verbose", "false"];
    let generate = [&["generate", "--plugins", plugins, "--model", "tiny"], &words[..]].concat();
    let says = String::from_utf8(dylm(&generate).stdout).expect("text");
    let file = root().join("tests/said.txt");
    match fs::read_to_string(&file) {
        Ok(said) => assert_eq!(says, said, "if that is meant, delete tests/said.txt and run again"),
        Err(_) => fs::write(file, says).expect("tests/ can be written to"),
    }
}

#[test]
fn the_model_in_tiny_has_exactly_the_tensors_that_are_asked_for() {
    let plugins = plugins();
    dylm(&["inspect", "--plugins", plugins.to_str().expect("a path in UTF-8"), "--model", "tiny"]);
}
