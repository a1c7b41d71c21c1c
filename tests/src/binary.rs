//! The real `dylm`, as a user runs it.

use std::{
    path::PathBuf,
    process::{Command, Output},
};

/// The folder of the profile that the tests were built with, `target/debug` as a rule: `dylm` and the plugins lie there.
pub fn folder() -> PathBuf {
    let exe = std::env::current_exe().unwrap_or_default();
    exe.ancestors().nth(2).map(PathBuf::from).unwrap_or_default()
}

/// `dylm`, without a home: what a user has installed is no part of a test.
pub fn dylm() -> Command {
    let file = folder().join(format!("dylm{}", std::env::consts::EXE_SUFFIX));
    assert!(file.is_file(), "{}: not built; run `cargo build --workspace` first", file.display());
    let mut command = Command::new(file);
    command.env_remove("DYLM_PLUGINS").env_remove("XDG_DATA_HOME").env("HOME", "/nonexistent");
    command
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
