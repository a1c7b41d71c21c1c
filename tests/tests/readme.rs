//! Holds README.md to the code: what it lists is there, and what is there it lists. Its Rust is compiled by this crate's doctests.

use std::{fs, path::Path};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn readme() -> String {
    fs::read_to_string(root().join("README.md")).unwrap()
}

#[test]
fn the_readme_lists_every_model_type_of_every_plugin() {
    let mut types = 0;
    for plugin in fs::read_dir(root().join("plugins")).unwrap() {
        let plugin = plugin.unwrap().path();
        let source = fs::read_to_string(plugin.join("src/lib.rs")).unwrap();
        let list = source.split_once("MODEL_TYPES: &'static [&'static str] = &[").unwrap().1.split_once(']').unwrap().0;
        let name = plugin.file_name().unwrap().to_str().unwrap();
        for model_type in list.split(',').map(|text| text.trim().trim_matches('"')).filter(|text| !text.is_empty()) {
            types += 1;
            let listed = |line: &str| line.contains(&format!("`{model_type}`")) && line.contains(&format!("`{name}`"));
            assert!(readme().lines().any(listed), "README.md: no row of the models table has {model_type} and {name}");
        }
    }
    assert!(types >= 5);
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
