//! The question about a plugin that is not dylm's own, as a person at a terminal sees it, and what can happen while they think.

#![cfg(target_os = "linux")]

use serde_json::json;
use std::{
    fs::{self, File},
    io::{Read, Write},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::Child,
};
use tempfile::TempDir;
use tests::{
    binary::{dylm, target},
    outside::{checkpoint, file_name},
    trap::{trap, trap_with},
};

/// dylm on a terminal of its own.
struct Terminal {
    child: Child,
    screen: File,
    seen: String,
}

impl Terminal {
    fn generate(model: &Path, plugins: &Path) -> Self {
        let ends = nix::pty::openpty(None, None).unwrap();
        let end = || -> OwnedFd { ends.slave.try_clone().unwrap() };
        let mut command = dylm();
        command.args(["generate", "--prompt", "hello", "--max-tokens", "4", "--model"]).arg(model);
        command.arg("--plugins").arg(plugins).env("DYLM_TRUST", plugins.join("trust.toml"));
        let child = command.stdin(end()).stdout(end()).stderr(end()).spawn().unwrap();
        Terminal { child, screen: File::from(ends.master), seen: String::new() }
    }

    /// Reads until the text is there, or the end.
    fn see(&mut self, text: &str) -> bool {
        let mut piece = [0; 4096];
        while !self.seen.contains(text) {
            // A terminal whose other side is gone gives an error in place of an end.
            match self.screen.read(&mut piece) {
                Ok(0) | Err(_) => return false,
                Ok(n) => self.seen += &String::from_utf8_lossy(&piece[..n]),
            }
        }
        true
    }

    fn answer(mut self, line: &str) -> (Option<i32>, String) {
        assert!(self.see("[y/N]"), "no question: {}", self.seen);
        self.screen.write_all(line.as_bytes()).unwrap();
        self.end()
    }

    fn end(mut self) -> (Option<i32>, String) {
        self.see("\0nothing that is ever printed\0");
        (self.child.wait().unwrap().code(), self.seen)
    }
}

/// The llama plugin, where it is a stranger's.
fn stranger() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let library = folder.path().canonicalize().unwrap().join(file_name("llama"));
    fs::copy(target().join(file_name("llama")), &library).unwrap();
    (folder, library)
}

#[test]
fn a_person_is_asked_once_and_told_what_about() {
    let ((plugins, library), model) = (stranger(), checkpoint(&[]));
    let (code, seen) = Terminal::generate(model.path(), plugins.path()).answer("y\n");
    assert_eq!(code, Some(0), "{seen}");
    let version = format!("llama {}, MIT OR Apache-2.0", env!("CARGO_PKG_VERSION"));
    for part in [library.to_str().unwrap(), &version, "mistral", "rustc 1.", "SHA-256", "can do whatever you can"] {
        assert!(seen.contains(part), "no {part} in: {seen}");
    }
    let (code, seen) = Terminal::generate(model.path(), plugins.path()).end();
    assert!(code == Some(0) && !seen.contains("[y/N]"), "{seen}");
}

#[test]
fn any_other_answer_is_a_no() {
    let (plugins, marker) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (model, marker) = (checkpoint(&[]), marker.path().join("sprung"));
    trap(plugins.path(), "llama", Some("llama"), &marker);
    // The last one ends the input.
    for answer in ["n\n", "\n", "yeah\n", "\u{4}"] {
        let (code, seen) = Terminal::generate(model.path(), plugins.path()).answer(answer);
        assert!(code == Some(1) && seen.contains("was not agreed to, so it was not opened"), "{answer:?}: {seen}");
    }
    assert!(!marker.exists() && !plugins.path().join("trust.toml").exists());
    let (_, seen) = Terminal::generate(model.path(), plugins.path()).answer("Yes\n");
    assert!(seen.contains("has a note, but is no plugin") && marker.exists(), "{seen}");
}

#[test]
fn a_changed_plugin_is_asked_about_again_as_a_changed_one() {
    let ((plugins, library), model) = (stranger(), checkpoint(&[]));
    assert_eq!(Terminal::generate(model.path(), plugins.path()).answer("y\n").0, Some(0));
    let mut bytes = fs::read(&library).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::remove_file(&library).unwrap();
    fs::write(&library, bytes).unwrap();
    let (code, seen) = Terminal::generate(model.path(), plugins.path()).answer("y\n");
    assert!(code == Some(0) && seen.contains("has changed since you trusted it on 20"), "{seen}");
    assert!(!Terminal::generate(model.path(), plugins.path()).end().1.contains("[y/N]"));
}

#[test]
fn what_is_put_in_its_place_while_a_person_thinks_is_not_what_is_opened() {
    let ((plugins, library), model) = (stranger(), checkpoint(&[]));
    let marker = tempfile::tempdir().unwrap();
    let marker = marker.path().join("sprung");
    let mut terminal = Terminal::generate(model.path(), plugins.path());
    assert!(terminal.see("[y/N]"), "{}", terminal.seen);
    fs::remove_file(&library).unwrap();
    trap(plugins.path(), "llama", Some("llama"), &marker);
    let (code, seen) = terminal.answer("y\n");
    assert_eq!(code, Some(0), "the file that was asked about: {seen}");
    assert!(!marker.exists(), "the other one was opened");
    let (code, seen) = Terminal::generate(model.path(), plugins.path()).answer("n\n");
    assert!(code == Some(1) && seen.contains("has changed since you trusted it"), "{seen}");
    assert!(!marker.exists());
}

#[test]
fn a_file_that_is_written_to_while_a_person_thinks_is_not_opened() {
    let ((plugins, library), model) = (stranger(), checkpoint(&[]));
    let mut terminal = Terminal::generate(model.path(), plugins.path());
    assert!(terminal.see("[y/N]"), "{}", terminal.seen);
    let mut bytes = fs::read(&library).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    // The same file, other bytes.
    fs::write(&library, bytes).unwrap();
    let (code, seen) = terminal.answer("y\n");
    assert!(code == Some(1) && seen.contains("was written to while it was being looked at"), "{seen}");
}

#[test]
fn a_note_cannot_paint_over_the_question() {
    let marker = tempfile::tempdir().unwrap();
    let marker = marker.path().join("sprung");
    let model = checkpoint(&[("model_type", json!("stranger"))]);
    for name in ["good\u{1b}[2J", "a\nb", "\u{202e}dog", "bell\u{7}"] {
        let plugins = tempfile::tempdir().unwrap();
        trap_with(plugins.path(), "stranger", &json!({ "model_types": ["stranger"], "name": name }), &marker);
        let (code, seen) = Terminal::generate(model.path(), plugins.path()).end();
        assert!(code == Some(1) && seen.contains("its note cannot be read: it has control characters"), "{seen:?}");
        assert!(!seen.contains("[y/N]") && !seen.contains(name));
    }
    assert!(!marker.exists(), "it was opened");
}
