//! Holds README.md to the code: what it lists is there, and what is there it lists. Its Rust is compiled by this crate's doctests.

use std::fs;
use tests::{models, tiny};

fn readme() -> String {
    fs::read_to_string(models::readme()).unwrap()
}

#[test]
fn the_readme_s_table_of_models_is_the_one_that_model_table_writes() {
    let (is, wanted) = (readme(), models::with_table(&readme()).unwrap());
    let lines: Vec<&str> = is.lines().collect();
    if let Some(line) = wanted.lines().find(|line| !lines.contains(line)) {
        panic!("README.md: no line {line:?}: run cargo run -p tests --bin model-table");
    }
    assert_eq!(is, wanted, "run cargo run -p tests --bin model-table");
    assert!(models::served().unwrap().len() >= 7);
}

#[test]
fn every_model_type_of_every_plugin_has_a_tiny_checkpoint() {
    let entries = tiny::all_entries().unwrap();
    let served = models::served().unwrap();
    let tried: Vec<_> = entries.iter().map(|entry| models::type_of(&tiny::config(entry).unwrap(), &served)).collect();
    let untried = served.into_iter().filter(|(model_type, _)| !tried.contains(model_type));
    let untried: Vec<String> = untried.map(|(model_type, plugin)| format!("{model_type} ({plugin})")).collect();
    assert!(untried.is_empty(), "no entry in tests/fixtures/tiny for {}", untried.join(", "));
}

#[test]
fn the_readme_lists_every_command() {
    let out = tests::binary::dylm().arg("--help").output().unwrap();
    let help = String::from_utf8(out.stdout).unwrap();
    let commands = help.split_once("Commands:\n").unwrap().1.split("\n\n").next().unwrap();
    let names: Vec<&str> = commands.lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert!(names.contains(&"generate"), "{help}");
    for name in names.into_iter().filter(|name| *name != "help") {
        assert!(readme().contains(&format!("| `{name}` |")), "README.md: no row of the commands table has {name}");
    }
}

#[test]
fn the_readme_has_the_two_commands_of_a_first_minute() {
    let readme = readme();
    for start in [
        "cargo build --release && target/release/dylm generate --prompt ",
        "cargo build --workspace && cargo nextest run",
    ] {
        assert!(readme.lines().any(|line| line.starts_with(start)), "README.md: no line starts with {start:?}");
    }
}
