//! Holds the tree itself to its rules: what stands at the top, how long a file may be, how it opens, where code may give up.
//! What compilers and clippy can tell (docs, SAFETY comments, unused code) is left to them.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Everything that stands at the top, so that a stranger sees the parts at once.
const TOP: [&str; 13] = [
    ".ci",
    ".github",
    ".gitignore",
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE-APACHE",
    "LICENSE-MIT",
    "README.md",
    "host",
    "plugin-api",
    "plugins",
    "rustfmt.toml",
    "tests",
];

/// A file that one person can hold in mind.
const LINES: usize = 400;

/// `expect` where no input leads: the file, a part of the line, and why it may.
const MAY_GIVE_UP: [(&str, &str, &str); 1] = [(
    "plugin-api/src/tensor.rs",
    "CALL.get().expect(",
    "an author's mistake, which export_plugin! turns into an error with its place",
)];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ has a parent").to_owned()
}

/// The files that git has or would take. Where there is no git (an unpacked archive), nothing but the sources' folders.
fn files() -> Vec<String> {
    let git = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output()
        .ok()
        .filter(|out| out.status.success());
    let mut files: Vec<String> = match git {
        Some(out) => String::from_utf8(out.stdout).unwrap().lines().map(str::to_owned).collect(),
        None => ["host", "plugin-api", "plugins", "tests"].iter().flat_map(|folder| walk(Path::new(folder))).collect(),
    };
    // Deleted, not yet committed.
    files.retain(|file| root().join(file).is_file());
    assert!(files.len() > 100, "only {} files in {}", files.len(), root().display());
    files
}

fn walk(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(root().join(folder)).unwrap().map(|e| folder.join(e.unwrap().file_name()));
    entries
        .flat_map(|path| match root().join(&path).is_dir() {
            true => walk(&path),
            false => vec![path.to_str().unwrap().to_owned()],
        })
        .collect()
}

fn rust_files() -> impl Iterator<Item = (String, String)> {
    files().into_iter().filter(|f| f.ends_with(".rs")).map(|f| {
        let text = fs::read_to_string(root().join(&f)).unwrap();
        (f, text)
    })
}

fn none(what: &str, found: Vec<String>) {
    assert!(found.is_empty(), "{what}:\n  {}", found.join("\n  "));
}

#[test]
fn the_top_holds_what_it_should_and_nothing_else() {
    let mut tops: Vec<String> = files().iter().map(|f| f.split('/').next().unwrap().to_owned()).collect();
    tops.sort();
    tops.dedup();
    tops.retain(|top| !TOP.contains(&top.as_str()));
    none("names at the top that no list in this test has", tops);
}

#[test]
fn no_rust_file_is_longer_than_one_person_can_hold_in_mind() {
    let long = rust_files().map(|(f, text)| (f, text.lines().count())).filter(|(_, lines)| *lines > LINES);
    none("files to split", long.map(|(f, lines)| format!("{f}: {lines} lines, {LINES} at most")).collect());
}

#[test]
fn every_rust_file_opens_by_saying_what_it_is() {
    let mute = rust_files().filter(|(_, text)| !text.starts_with("//! "));
    none("files that do not open with //!", mute.map(|(f, _)| f).collect());
}

#[test]
fn nothing_names_a_folder_of_one_machine() {
    // Put together here, so that this file does not name one itself.
    let folders: Vec<String> = ["work", "home", "Users", "root"].iter().map(|name| format!("/{name}/")).collect();
    let mut found = Vec::new();
    for file in files() {
        let Ok(text) = fs::read_to_string(root().join(&file)) else { continue };
        for (n, line) in text.lines().enumerate() {
            // Part of a longer path or of an address otherwise.
            let stands = |folder: &String| {
                line.match_indices(folder.as_str())
                    .any(|(at, _)| !line[..at].ends_with(|c: char| c.is_alphanumeric() || "._-}/".contains(c)))
            };
            if folders.iter().any(stands) {
                found.push(format!("{file}:{}: {}", n + 1, line.trim()));
            }
        }
    }
    none("paths that only one machine has", found);
}

#[test]
fn the_host_and_the_plugin_api_never_give_up_on_input() {
    let mut found = Vec::new();
    let of_users = |f: &str| f.starts_with("host/src/") || f.starts_with("plugin-api/src/");
    for (file, text) in rust_files().filter(|(f, _)| of_users(f) && !f.ends_with("/tests.rs")) {
        // Tests stand last in a file.
        let code = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
        for (n, line) in code.lines().enumerate() {
            let gives_up = [".unwrap()", ".expect(", "panic!(", "todo!(", "unimplemented!("];
            let allowed = MAY_GIVE_UP.iter().any(|(f, part, _)| *f == file && line.contains(part));
            if gives_up.iter().any(|call| line.contains(call)) && !line.trim_start().starts_with("//") && !allowed {
                found.push(format!("{file}:{}: {}", n + 1, line.trim()));
            }
        }
    }
    none("places that panic outside of tests", found);
}
