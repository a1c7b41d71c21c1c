//! A library that tells when it is opened: what must not be run here are plugins whose constructor leaves a marker, so that a marker is proof.

use crate::outside::file_name;
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// A library whose constructor writes `marker`; with a note for `model_type`, but no plugin in it.
///
/// # Panics
/// Without a C compiler.
pub fn trap(folder: &Path, name: &str, model_type: Option<&str>, marker: &Path) -> PathBuf {
    build(folder, name, model_type.map(|model_type| json!({ "model_types": [model_type] })), &leaves(marker))
}

/// As `trap`, with these facts in its note besides those that every note has.
///
/// # Panics
/// Without a C compiler.
pub fn trap_with(folder: &Path, name: &str, facts: &Value, marker: &Path) -> PathBuf {
    build(folder, name, Some(facts.clone()), &leaves(marker))
}

/// As `trap`, with this C in its constructor.
///
/// # Panics
/// Without a C compiler.
pub fn trap_that(folder: &Path, name: &str, model_type: &str, code: &str) -> PathBuf {
    build(folder, name, Some(json!({ "model_types": [model_type] })), code)
}

fn leaves(marker: &Path) -> String {
    format!("fclose(fopen(\"{}\", \"w\"));", marker.display())
}

fn build(folder: &Path, name: &str, facts: Option<Value>, code: &str) -> PathBuf {
    let note = facts.map(|facts| {
        let mut all = json!({ "abi": "1.0", "name": "trap", "version": "1", "panic": "unwind" });
        facts.as_object().into_iter().flatten().for_each(|(key, fact)| all[key] = fact.clone());
        let text = all.to_string();
        let words = format!("{},{},{},{},{}", 5, text.len(), 1, 0x6d6c7964, 0);
        let bytes = text.bytes().map(|b| b.to_string()).collect::<Vec<_>>().join(",");
        format!(
            "struct {{ unsigned head[5]; char text[{}]; }} note __attribute__((section(\".note.dylm\"), used, aligned(4))) = {{ {{{words}}}, {{{bytes}}} }};",
            text.len()
        )
    });
    let code = format!(
        "#include <stdio.h>\n#include <stdlib.h>\nconst {}\n__attribute__((constructor)) static void spring(void) {{ {code} }}\n",
        note.unwrap_or_else(|| "int nothing = 0;".into()),
    );
    let (source, library) = (folder.join("trap.c"), folder.join(file_name(name)));
    fs::write(&source, code).unwrap();
    let cc = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).output().unwrap();
    assert!(cc.status.success(), "{}", String::from_utf8_lossy(&cc.stderr));
    fs::remove_file(source).unwrap();
    library
}

/// `of` with the first `from` replaced, which in a plugin is the one in its note: that section comes before the code's own copy.
///
/// # Panics
/// If there is none, or `to` is of another length.
pub fn patched(mut of: Vec<u8>, from: &str, to: &str) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let at = of.windows(from.len()).position(|w| w == from.as_bytes()).expect("the text to be patched");
    of[at..at + to.len()].copy_from_slice(to.as_bytes());
    of
}
