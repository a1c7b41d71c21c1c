//! The real binary, as a user runs it.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

/// The folder that cargo builds into: binaries, and plugins beside them.
pub fn target() -> PathBuf {
    let test = std::env::current_exe().expect("a test has a file");
    let folder = test.ancestors().find(|folder| folder.join(name()).is_file());
    folder.expect("the binary dylm is built (cargo build --workspace)").to_owned()
}

/// A tiny checkpoint, written out, and the folder of the built plugins: for an example in documentation, which runs from a folder of
/// rustdoc's own.
pub fn tiny_model_and_plugins(name: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    crate::tiny::write(&crate::tiny::fixtures().join(name), folder.path()).expect("the fixtures are whole");
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    let target = target.unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target"));
    (folder, target.join("debug"))
}

fn name() -> String {
    format!("dylm{}", std::env::consts::EXE_SUFFIX)
}

/// `dylm`, without arguments, and without a home: what a user has set and installed is no part of a test.
pub fn dylm() -> Command {
    let mut command = Command::new(target().join(name()));
    for name in ["DYLM_PLUGINS", "DYLM_TRUST", "XDG_DATA_HOME", "XDG_CONFIG_HOME"] {
        command.env_remove(name);
    }
    command.env("HOME", "/nonexistent").env("NO_COLOR", "1");
    command
}

/// The command with `--plugins`, of a user who agrees to what lies there; the consent is kept there too, and so ends with the test.
pub fn trusting<'a>(command: &'a mut Command, plugins: &Path) -> &'a mut Command {
    command.arg("--plugins").arg(plugins).arg("--trust-plugin").env("DYLM_TRUST", plugins.join("trust.toml"))
}

/// The one sentence with which a failed run ended.
///
/// # Panics
/// If the run succeeded, was killed by a signal, or said anything else.
pub fn one_sentence(output: &Output, what: &str) -> String {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(1), "{what}: {}\n{out}\n{err}", output.status);
    assert_eq!(out, "", "{what}: something was generated");
    let sentence = err.trim_end().trim_end_matches("(--debug tells more)").trim_end();
    let sentence = sentence.strip_prefix("error: ").unwrap_or_else(|| panic!("{what}: {err}"));
    assert!(!sentence.contains('\n') && sentence.len() < 600, "{what}: not one sentence: {err}");
    sentence.to_owned()
}
