//! Holds the contract's page to the sources: the tests that it names exist, none of its thirty properties lacks one, and every function
//! that has a rule about threads states it.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn page() -> String {
    fs::read_to_string(root().join("plugin-api/src/contract.md")).unwrap()
}

fn sources(folder: &str) -> Vec<(PathBuf, String)> {
    let entries = fs::read_dir(root().join(folder)).unwrap().map(|entry| entry.unwrap().path());
    let mut files = Vec::new();
    for path in entries {
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if path.is_dir() && name != "target" && name != "fixtures" {
            files.extend(sources(&format!("{folder}/{name}")));
        } else if name.ends_with(".rs") {
            let text = fs::read_to_string(&path).unwrap();
            files.push((path, text));
        }
    }
    files
}

/// The tests that a text names: `file::function`.
fn named(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.split('`').filter_map(|word| word.split_once("::")).filter(|(file, test)| {
        let plain = |word: &str| {
            !word.is_empty() && word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
        };
        plain(file) && plain(test) && test.contains('_')
    })
}

#[test]
fn every_test_that_the_contract_names_exists() {
    let mut tests = BTreeSet::new();
    for (path, text) in
        ["tests/tests", "host/src", "host/tests", "plugin-api/src", "plugin-api/tests"].iter().flat_map(|f| sources(f))
    {
        let stem = path.file_stem().unwrap().to_str().unwrap();
        // A folder's tests go by the folder's name.
        let file = if stem == "main" || stem == "mod" {
            path.parent().unwrap().file_name().unwrap().to_str().unwrap()
        } else {
            stem
        };
        let marked = text.split("#[test]\n").skip(1);
        for test in marked.filter_map(|after| after.split_once("fn ")?.1.split_once("()")) {
            tests.insert((file.to_owned(), test.0.to_owned()));
        }
    }
    assert!(tests.len() > 200, "only {} tests found", tests.len());
    let page = page();
    let missing: Vec<String> = named(&page)
        .filter(|(file, test)| !tests.contains(&((*file).to_owned(), (*test).to_owned())))
        .map(|(file, test)| format!("{file}::{test}"))
        .collect();
    assert!(missing.is_empty(), "contract.md names tests that do not exist:\n  {}", missing.join("\n  "));
    assert!(named(&page).count() > 40, "contract.md is no longer read right");
}

#[test]
fn each_of_the_thirty_properties_is_held_by_a_test() {
    let page = page();
    let list = page.split_once("# The thirty properties").expect("the list").1;
    for property in 1..=30 {
        let row = list.lines().find(|line| line.starts_with(&format!("| {property} |")));
        let row = row.unwrap_or_else(|| panic!("property {property} is not on the list"));
        assert!(named(row).next().is_some(), "property {property} names no test: {row}");
    }
    let table = page.split_once("# What others have").expect("the table").1.split_once("\n# ").unwrap().0;
    for row in table.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| |")) {
        assert!(named(row).next().is_some(), "names no test: {row}");
    }
}

/// What a tag may say, as the contract's page explains it.
const TAGS: [&str; 4] = ["any", "new", "step", "call"];

/// The documentation above a line, and the attributes there.
fn above<'a>(lines: &[&'a str], at: usize) -> Vec<&'a str> {
    let open = |line: &&&str| {
        let line = line.trim_start();
        line.starts_with("///") || line.starts_with("#[") || line.starts_with("$(#[") || line.starts_with("last fn")
    };
    lines[..at].iter().rev().take_while(open).copied().collect()
}

fn states_a_thread(above: &[&str], line: &str) -> bool {
    above.iter().chain([&line]).any(|line| {
        let says = |tag: &str| line.split_once("Thread: ").is_some_and(|(_, rest)| rest.starts_with(tag));
        TAGS.iter().any(|tag| says(&format!("{tag}.")) || says(&format!("{tag},"))) || line.contains("#[doc = thread!(")
    })
}

/// The signature that begins at a line, up to its body.
fn signature(lines: &[&str], at: usize) -> String {
    let end = lines[at..].iter().position(|line| line.contains('{') || line.trim_end().ends_with(';')).unwrap_or(0);
    let whole = lines[at..=at + end].join(" ");
    whole.split('{').next().unwrap_or_default().to_owned()
}

fn mentions(text: &str, types: &[&str]) -> bool {
    text.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| types.contains(&word))
}

#[test]
fn every_function_with_a_rule_about_threads_states_it() {
    let (mut mute, mut stated) = (Vec::new(), 0);
    for (path, text) in sources("plugin-api/src") {
        let file = path.strip_prefix(root().join("plugin-api/src")).unwrap().display().to_string();
        let text = text.split("#[cfg(test)]").next().unwrap();
        let lines: Vec<&str> = text.lines().collect();
        let mut of = "";
        for (at, line) in lines.iter().enumerate() {
            let code = line.trim_start();
            if code.starts_with("impl") || code.starts_with("pub trait") {
                of = code;
            }
            let pointer = code.starts_with("pub ")
                && !code.contains("fn header(")
                && code.contains("extern \"C\" fn(")
                && code.contains(": ");
            // Words take or give what lives during a call; the rest are plain values.
            let live = ["Tensor", "Weights", "Source", "Layer", "Step", "Slot", "Handle"];
            let public = code.starts_with("pub fn ") || (of.starts_with("pub trait") && code.starts_with("fn "));
            let inside = code.contains("pub fn $") || code.contains("pub fn ");
            let signature = if public || inside { signature(&lines, at) } else { String::new() };
            let own = of.split_whitespace().nth(1).is_some_and(|name| mentions(name, &live)) && of.starts_with("impl ");
            let word = (public || inside) && !file.starts_with("abi/") && (mentions(&signature, &live) || own);
            // `call.rs` and the like: what no author sees.
            let hidden = of.starts_with("impl Call")
                || of.starts_with("impl<A: Architecture> Exported")
                || of.starts_with("impl Places");
            if (pointer || word) && !hidden {
                match states_a_thread(&above(&lines, at), line) {
                    true => stated += 1,
                    false => mute.push(format!("{file}:{}: {}", at + 1, code)),
                }
            }
        }
    }
    assert!(mute.is_empty(), "functions that do not say `Thread: any|new|step|call`:\n  {}", mute.join("\n  "));
    assert!(stated > 100, "only {stated} found");
}
