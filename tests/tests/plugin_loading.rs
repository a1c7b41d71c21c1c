//! A library is opened once in a process and stays, whatever becomes of the models that it made: code that other threads may still run, or
//! whose errors are still printed, must not be unmapped.

#![cfg(target_os = "linux")]

use dylm::{GenerateOptions, LanguageModel, LoadOptions, Trust};
use std::{collections::BTreeSet, fs, path::Path};
use tests::{
    binary::target,
    outside::{checkpoint, file_name, install},
};

fn load(model: &Path, plugins: &Path) -> LanguageModel {
    let options = LoadOptions { plugins: vec![plugins.to_owned()], trust: Trust::All, ..Default::default() };
    dylm::load(model.to_str(), &options).unwrap()
}

fn text(lm: &LanguageModel) -> String {
    let options = GenerateOptions { max_tokens: 8, ignore_eos: true, ..Default::default() };
    dylm::generate(lm, "hello", &options).unwrap()
}

/// Where this process has mapped a file's code: start addresses.
fn mapped(library: &Path) -> BTreeSet<String> {
    let library = library.canonicalize().unwrap();
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let ours = maps.lines().filter(|l| l.ends_with(library.to_str().unwrap()) && l.contains(" r-xp "));
    ours.map(|l| l.split('-').next().unwrap().to_owned()).collect()
}

#[test]
fn a_library_is_opened_once_and_stays_when_its_models_are_gone() {
    let (plugins, model) = (install(&target().join(file_name("llama"))), checkpoint(&[]));
    let library = plugins.path().join(file_name("llama"));
    assert!(mapped(&library).is_empty());
    let first = load(model.path(), plugins.path());
    let places = mapped(&library);
    assert_eq!(places.len(), 1, "{places:?}");
    let second = load(model.path(), plugins.path());
    assert_eq!(mapped(&library), places);
    let expected = text(&first);
    drop(first);
    assert_eq!(text(&second), expected);
    drop(second);
    assert_eq!(mapped(&library), places, "it was closed");
    assert_eq!(text(&load(model.path(), plugins.path())), expected);
    assert_eq!(mapped(&library), places);
}

#[test]
fn threads_that_load_in_one_moment_share_one_library() {
    let (plugins, model) = (install(&target().join(file_name("llama"))), checkpoint(&[]));
    let texts: Vec<String> = std::thread::scope(|scope| {
        let load = || text(&load(model.path(), plugins.path()));
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(load)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(texts.iter().all(|text| *text == texts[0]), "{texts:?}");
    assert_eq!(mapped(&plugins.path().join(file_name("llama"))).len(), 1);
}

#[test]
fn two_files_of_one_plugin_are_two_libraries() {
    let (one, other, model) =
        (install(&target().join(file_name("llama"))), install(&target().join(file_name("llama"))), checkpoint(&[]));
    let (a, b) = (load(model.path(), one.path()), load(model.path(), other.path()));
    assert_eq!(text(&a), text(&b));
    let places = |folder: &tempfile::TempDir| mapped(&folder.path().join(file_name("llama")));
    assert_eq!((places(&one).len(), places(&other).len()), (1, 1));
    assert!(places(&one).is_disjoint(&places(&other)));
}
