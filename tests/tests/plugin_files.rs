//! What lies on the search path is judged before it is opened, and nothing off the path is opened at all. What must not be opened here are
//! libraries whose constructor leaves a marker, so that a marker is proof.

#![cfg(target_os = "linux")]

use dylm::{Trust, plugin::registry::Registry};
use serde_json::json;
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output},
};
use tests::{
    binary::{dylm, one_sentence, trusting},
    outside::{self, checkpoint, file_name},
    trap::trap,
};

fn generate(model: &Path, plugins: &Path, from: &Path) -> Output {
    let mut command = dylm();
    command.args(["generate", "--max-tokens", "4", "--verbose", "false", "--model"]).arg(model);
    trusting(&mut command, plugins).current_dir(from).output().unwrap()
}

fn run_with_plugins(model_type: &str, plugins: &Path) -> Output {
    let model = checkpoint(&[("model_type", json!(model_type))]);
    generate(model.path(), plugins, Path::new("/"))
}

fn good() -> Vec<u8> {
    fs::read(outside::build(&outside::workspace(), "bad", "bad", None)).unwrap()
}

/// `of` with the first `from` replaced: the note's section comes before the code's own copy.
fn patched(mut of: Vec<u8>, from: &str, to: &str) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let at = of.windows(from.len()).position(|w| w == from.as_bytes()).expect("the text to be patched");
    of[at..at + to.len()].copy_from_slice(to.as_bytes());
    of
}

fn with_bytes(mut of: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
    of[at..at + bytes.len()].copy_from_slice(bytes);
    of
}

#[test]
fn every_file_that_is_no_plugin_is_refused_in_one_sentence() {
    let good = good();
    let marker = tempfile::tempdir().unwrap();
    let aarch64 = with_bytes(good.clone(), 18, &[183, 0]);
    let abort = "\"panic\":\"abort\" ";
    let cases: &[(&str, Vec<u8>, &str)] = &[
        ("a text", b"I am a plugin, believe me.\n".repeat(99), "is not a library"),
        ("an empty file", Vec::new(), "is not a library"),
        ("another machine", aarch64, "is built for Aarch64, this machine is X86_64"),
        ("32 bits", with_bytes(good.clone(), 4, &[1]), "is not a library"),
        ("big endian", with_bytes(good.clone(), 5, &[2]), "is not a library"),
        (
            "ABI 2.0",
            patched(good.clone(), "\"abi\":\"1.0\"", "\"abi\":\"2.0\""),
            "speaks ABI 2.0, this dylm speaks 1.0; update dylm",
        ),
        (
            "ABI 0.9",
            patched(good.clone(), "\"abi\":\"1.0\"", "\"abi\":\"0.9\""),
            "speaks ABI 0.9, this dylm speaks 1.0; rebuild the plugin",
        ),
        ("no ABI", patched(good.clone(), "\"abi\":\"1.0\"", "\"abi\":\"one\""), "speaks ABI one"),
        ("abort", patched(good.clone(), "\"panic\":\"unwind\"", abort), "rebuild it with panic = \"unwind\""),
        (
            "another name",
            patched(good.clone(), "\"name\":\"bad\"", "\"name\":\"mad\""),
            "its note and its code disagree",
        ),
        ("no JSON", patched(good.clone(), "{\"abi\":", "{'abi':"), "its note cannot be read"),
        (
            "another vendor",
            patched(good.clone(), "dylm\0\0\0\0{\"abi\"", "dalm\0\0\0\0{\"abi\""),
            "its note is damaged",
        ),
        (
            "note too long",
            patched(good.clone(), "\u{1}\0\0\0dylm\0\0\0\0{", "\u{2}\0\0\0dylm\0\0\0\0{"),
            "its note is damaged",
        ),
    ];
    for (what, bytes, expected) in cases {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(file_name("bad")), bytes).unwrap();
        let sentence = one_sentence(&run_with_plugins("bad", folder.path()), what);
        assert!(sentence.contains(expected) && sentence.contains("libbad.so"), "{what}: {sentence}");
    }

    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join(file_name("bad"))).unwrap();
    let sentence = one_sentence(&run_with_plugins("bad", folder.path()), "a folder");
    assert!(sentence.contains("is not a regular file"), "{sentence}");

    let folder = tempfile::tempdir().unwrap();
    assert!(Command::new("mkfifo").arg(folder.path().join(file_name("bad"))).status().unwrap().success());
    let sentence = one_sentence(&run_with_plugins("bad", folder.path()), "a FIFO");
    assert!(sentence.contains("is not a regular file"), "{sentence}");

    let folder = tempfile::tempdir().unwrap();
    trap(folder.path(), "bad", None, &marker.path().join("sprung"));
    let sentence = one_sentence(&run_with_plugins("bad", folder.path()), "a library without a note");
    assert!(sentence.contains("it has no note"), "{sentence}");
    assert!(!marker.path().join("sprung").exists(), "a library without a note was opened");
}

#[test]
fn a_truncated_library_is_refused_wherever_it_ends() {
    let good = good();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join(file_name("bad"));
    let lengths =
        (1..12).map(|n| good.len() * n / 12).chain([1, 16, 63, 64, 100, 4096, good.len() - 4096, good.len() - 1]);
    for length in lengths {
        fs::write(&file, &good[..length]).unwrap();
        let sentence =
            one_sentence(&run_with_plugins("bad", folder.path()), &format!("{length} of {} bytes", good.len()));
        assert!(sentence.contains("only a part of one") || sentence.contains("is truncated"), "{length}: {sentence}");
    }
    // The tables moved to the front, as other linkers have them: then only the ends of sections and segments tell.
    let header = u64::from_le_bytes(good[40..48].try_into().unwrap()) as usize;
    let mut front = good.clone();
    let table = front[header..].to_vec();
    let place = 4096.max(good.len() / 8 / 4096 * 4096);
    front[place..place + table.len()].copy_from_slice(&table);
    let front = with_bytes(front, 40, &(place as u64).to_le_bytes());
    for length in [good.len() / 4, good.len() / 2] {
        fs::write(&file, &front[..length]).unwrap();
        one_sentence(&run_with_plugins("bad", folder.path()), &format!("tables in front, {length} bytes"));
    }
}

#[test]
fn a_file_or_folder_that_everybody_may_write_to_is_not_opened() {
    let (folder, marker) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let marker = marker.path().join("sprung");
    let library = trap(folder.path(), "trap", Some("trap"), &marker);
    fs::set_permissions(&library, fs::Permissions::from_mode(0o777)).unwrap();
    let sentence = one_sentence(&run_with_plugins("trap", folder.path()), "a file open to all");
    assert!(sentence.contains("everybody may write to this file"), "{sentence}");

    fs::set_permissions(&library, fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let sentence = one_sentence(&run_with_plugins("trap", folder.path()), "a folder open to all");
    assert!(sentence.contains("everybody may write to this folder"), "{sentence}");
    assert!(!marker.exists(), "it was opened");
}

#[test]
fn listing_plugins_and_looking_for_another_runs_nothing() {
    let (folder, marker) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let marker = marker.path().join("sprung");
    trap(folder.path(), "trap", Some("trap"), &marker);
    let registry = Registry::new(&[folder.path().to_owned()]);
    assert!(registry.list().iter().any(|found| found.note.name == "trap"), "the trap is not listed");
    // Whether or not this build has the command.
    dylm().args(["plugins", "--plugins"]).arg(folder.path()).output().unwrap();
    let sentence = one_sentence(&run_with_plugins("trapp", folder.path()), "a type that nobody serves");
    assert!(sentence.contains("no plugin serves model_type \"trapp\"") && sentence.contains("trap"), "{sentence}");
    assert!(!marker.exists(), "it was opened");

    // And the trap is one: chosen, it is opened, found to be no plugin, and refused.
    let sentence = one_sentence(&run_with_plugins("trap", folder.path()), "the trap itself");
    assert!(sentence.contains("has a note, but is no plugin"), "{sentence}");
    assert!(marker.exists(), "the trap does not work");
}

#[test]
fn what_lies_beside_a_model_or_in_the_working_directory_is_never_opened() {
    let model = checkpoint(&[("model_type", json!("trap"))]);
    let elsewhere = tempfile::tempdir().unwrap();
    let marker = elsewhere.path().join("sprung");
    for folder in ["", "plugins", "lib", ".local/share/dylm/plugins"].map(|f| model.path().join(f)) {
        fs::create_dir_all(&folder).unwrap();
        trap(&folder, "trap", Some("trap"), &marker);
    }
    for home in ["", "."] {
        let mut command = dylm();
        command.args(["generate", "--max-tokens", "4", "--model", "."]).current_dir(model.path());
        let output = command.env("HOME", home).env("LD_LIBRARY_PATH", ".").env("DYLM_PLUGINS", "").output().unwrap();
        let sentence = one_sentence(&output, home);
        assert!(sentence.contains("no plugin serves model_type \"trap\""), "HOME={home}: {sentence}");
    }
    assert!(!marker.exists(), "a library beside the model was opened");
}

#[test]
fn a_relative_folder_means_the_one_that_was_there_at_the_start() {
    let (start, later) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let marker = later.path().join("sprung");
    for root in [start.path(), later.path()] {
        fs::create_dir(root.join("mine")).unwrap();
        trap(&root.join("mine"), "trap", Some("trap"), &root.join("sprung"));
    }
    std::env::set_current_dir(start.path()).unwrap();
    let registry = Registry::new(&[PathBuf::from("mine")]).trusting(Trust::All);
    std::env::set_current_dir(later.path()).unwrap();
    let found = registry.resolve("trap").unwrap();
    assert_eq!(found.path, start.path().canonicalize().unwrap().join("mine").join(file_name("trap")));
    assert!(dylm::plugin::library::Library::open(&found).is_err());
    assert!(start.path().join("sprung").exists() && !marker.exists());
}

#[test]
fn a_folder_that_does_not_exist_is_named() {
    let sentence = run_with_plugins("llama", Path::new("/no/such/folder"));
    let err = String::from_utf8_lossy(&sentence.stderr);
    assert_eq!(sentence.status.code(), Some(2), "{err}");
    assert!(err.contains("--plugins /no/such/folder: there is no such folder"), "{err}");
}

#[test]
fn two_plugins_for_one_model_type_are_both_named() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["bad", "good"] {
        fs::write(folder.path().join(file_name(name)), good()).unwrap();
    }
    let sentence = one_sentence(&run_with_plugins("Bad-2.0", folder.path()), "two claimants");
    assert!(sentence.contains("libbad.so and ") && sentence.contains("libgood.so both serve"), "{sentence}");
}

#[test]
fn a_model_type_that_is_no_name_opens_nothing() {
    let (folder, marker) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let marker = marker.path().join("sprung");
    let library = trap(folder.path(), "trap", Some("trap"), &marker);
    let absolute = library.with_extension("").display().to_string();
    let bad = [
        json!("../../tmp/x"),
        json!("../trap"),
        json!(absolute),
        json!("/etc/passwd"),
        json!("trap\0"),
        json!("tr\0ap"),
        json!("sub\\trap"),
        json!("C:\\trap"),
        json!("sub/trap"),
        json!(""),
        json!("."),
        json!(".."),
        json!(".trap"),
        json!("trap "),
        json!("trap\n"),
        json!("tr%61p"),
        json!("lláma"),
        // Cyrillic letters that look like Latin ones.
        json!("tr\u{430}\u{440}"),
        json!("\u{202e}part"),
        json!("x".repeat(65)),
        json!("x".repeat(10 << 20)),
        json!(7),
        json!(["trap"]),
        json!({ "name": "trap" }),
        json!(true),
        json!(null),
    ];
    for model_type in bad {
        let mut what = model_type.to_string();
        what.truncate(80);
        let model = checkpoint(&[("model_type", model_type)]);
        let output = generate(model.path(), folder.path(), folder.path());
        let sentence = one_sentence(&output, &what);
        assert!(sentence.contains("model_type") || sentence.contains("config.json"), "{what}: {sentence}");
        assert!(!sentence.contains("no plugin serves"), "{what}: a plugin was looked for: {sentence}");
        assert!(!sentence.chars().any(char::is_control), "{what}: {sentence:?}");
    }
    assert!(!marker.exists(), "it was opened");
}
