//! Files of every kind, good and damaged, through the readers: what they give, and with which sentence they are refused.

mod config;
mod damage;
mod folder;
mod gguf;
mod gguf_file;
mod real;
mod repo;
mod tokenizer;

use std::{fs, path::Path};

/// The text of an error; the test fails where there is none.
#[track_caller]
fn refusal<T>(result: dylm::Result<T>) -> String {
    match result {
        Ok(_) => panic!("accepted"),
        Err(e) => e.to_string(),
    }
}

/// The refusal says each of these.
#[track_caller]
fn says<T>(result: dylm::Result<T>, words: &[&str]) {
    let text = refusal(result);
    for word in words {
        assert!(text.contains(word), "{word:?} is not in: {text}");
    }
    assert_eq!(text.lines().count(), 1, "one sentence: {text}");
}

/// A safetensors file with this header and so many bytes of data.
fn write_safetensors(path: &Path, header: &str, data: &[u8]) {
    let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat();
    fs::write(path, bytes).unwrap();
}
