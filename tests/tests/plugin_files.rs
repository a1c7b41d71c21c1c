//! What lies on the search path is judged before it is opened: each kind of file that is no plugin, or only a part of one, costs one
//! sentence and never a signal.

#![cfg(target_os = "linux")]

use std::{fs, process::Command};
use tests::{
    binary::{dylm, one_sentence},
    outside::{self, file_name, run_with_plugins},
    trap::{patched, trap},
};

fn good() -> Vec<u8> {
    fs::read(outside::build(&outside::workspace(), "bad", "bad", None)).unwrap()
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

/// Offset, length and whether it is code, of each section that lies in the file; of a 64-bit little-endian ELF.
fn sections(of: &[u8]) -> Vec<(usize, usize, bool)> {
    let number = |at: usize, len: usize| of[at..at + len].iter().rev().fold(0, |n, &b| n << 8 | b as usize);
    let (table, size, count) = (number(40, 8), number(58, 2), number(60, 2));
    let headers = (0..count).map(|i| table + i * size).filter(|&at| number(at + 4, 4) != 8);
    headers.map(|at| (number(at + 24, 8), number(at + 32, 8), number(at + 8, 8) & 4 != 0)).collect()
}

#[test]
fn a_library_with_zeros_in_place_of_its_end_or_its_code_is_refused() {
    let good = good();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join(file_name("bad"));
    let refused = |what: &str, bytes: &[u8]| {
        fs::write(&file, bytes).unwrap();
        let sentence = one_sentence(&run_with_plugins("bad", folder.path()), what);
        assert!(sentence.contains("copy it again"), "{what}: {sentence}");
    };
    // As a download leaves it that makes room first and is broken off.
    for from in (1..8).map(|n| good.len() * n / 8).chain([4096, good.len() - 4096, good.len() - 64]) {
        let mut bytes = good.clone();
        bytes[from..].fill(0);
        refused(&format!("zeros from {from} of {}", good.len()), &bytes);
    }
    // As one in pieces leaves it: the headers are whole.
    let (start, len, _) = sections(&good).into_iter().filter(|s| s.2).max_by_key(|s| s.1).unwrap();
    let mut bytes = good.clone();
    bytes[start..start + len].fill(0);
    refused("no code", &bytes);
    let mut bytes = good.clone();
    let page = start.next_multiple_of(4096) + len / 2 / 4096 * 4096;
    bytes[page - 4096..page + 4096].fill(0);
    refused("a hole in the code", &bytes);
}

#[test]
fn what_is_no_regular_file_is_refused_and_not_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join(file_name("bad"));
    let link = |to: &str| std::os::unix::fs::symlink(to, &file).unwrap();
    let refused = |what: &str, expected: &str| {
        let sentence = one_sentence(&run_with_plugins("bad", folder.path()), what);
        assert!(sentence.contains(expected) && sentence.contains("libbad.so"), "{what}: {sentence}");
        let listed = dylm().args(["plugins", "--plugins"]).arg(folder.path()).output().unwrap();
        assert!(String::from_utf8_lossy(&listed.stdout).contains(expected), "{what}");
        if file.is_dir() { fs::remove_dir(&file) } else { fs::remove_file(&file) }.unwrap();
    };
    fs::create_dir(&file).unwrap();
    refused("a folder", "is not a regular file");
    assert!(Command::new("mkfifo").arg(&file).status().unwrap().success());
    refused("a pipe", "is not a regular file");
    let socket = std::os::unix::net::UnixListener::bind(&file).unwrap();
    refused("a socket", "is not a regular file");
    drop(socket);
    for device in ["/dev/zero", "/dev/null", "/dev/tty"] {
        link(device);
        refused(device, "is not a regular file");
    }
    link("nowhere");
    refused("a link to nothing", "is a link to a file that is not there");
    link(&file_name("bad"));
    refused("a link to itself", "libbad.so: ");
}
