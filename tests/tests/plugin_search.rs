//! Which file a model_type means: the search path is explicit, its first match wins, and nothing off it is opened at all. What must not be
//! opened here are libraries whose constructor leaves a marker, so that a marker is proof.

#![cfg(target_os = "linux")]

use dylm::{Trust, plugin::registry::Registry};
use serde_json::{Value, json};
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};
use tests::{
    binary::{dylm, one_sentence, target},
    outside::{checkpoint, file_name, generate, run_with_plugins},
    trap::{patched, trap},
};

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
    let (folder, marker) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let marker = marker.path().join("sprung");
    for name in ["bad", "good"] {
        trap(folder.path(), name, Some("Bad-2.0"), &marker);
    }
    let sentence = one_sentence(&run_with_plugins("Bad-2.0", folder.path()), "two claimants");
    assert!(sentence.contains("libbad.so and ") && sentence.contains("libgood.so both serve"), "{sentence}");
    assert!(sentence.contains("remove one of them") && !marker.exists(), "{sentence}");
}

#[test]
fn the_first_folder_on_the_path_wins_and_the_others_are_said_to_be_shadowed() {
    let (home, marker) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let named = ["flag", "flag too", "variable", "variable too"].map(|name| home.path().join(name));
    let data = home.path().join(".local/share/dylm/plugins");
    for folder in named.iter().chain([&data]) {
        fs::create_dir_all(folder).unwrap();
        trap(folder, "trap", Some("trap"), &marker.path().join("sprung"));
    }
    let own = target();
    let mut order: Vec<_> = named.iter().chain([&own, &data]).map(|f| f.canonicalize().unwrap()).collect();
    let model = checkpoint(&[("model_type", json!("trap"))]);
    let variable = std::env::join_paths(&named[2..]).unwrap();
    while order[0] != own.canonicalize().unwrap() {
        let flags = order.iter().filter(|f| named[..2].iter().any(|n| n.canonicalize().ok().as_ref() == Some(*f)));
        let flags: Vec<String> = flags.flat_map(|f| ["--plugins".into(), f.display().to_string()]).collect();
        let with = |args: &[&str]| {
            let mut command = dylm();
            command.args(args).args(&flags).env("HOME", home.path()).env("DYLM_PLUGINS", &variable);
            command.output().unwrap()
        };
        let list: Value = serde_json::from_slice(&with(&["plugins", "--json"]).stdout).unwrap();
        assert_eq!(list["folders"], json!(order));
        let first = order[0].join(file_name("trap"));
        let traps = list["plugins"].as_array().unwrap().iter().filter(|p| p["note"]["name"] == "trap");
        for plugin in traps {
            let wins = plugin["path"] == json!(first);
            let by = if wins { Value::Null } else { json!(first) };
            assert_eq!(plugin["shadowed"]["trap"], by, "{plugin}");
        }
        let sentence = one_sentence(&with(&["generate", "--model", model.path().to_str().unwrap()]), "no consent");
        assert!(sentence.starts_with(first.to_str().unwrap()), "{sentence}");
        fs::remove_dir_all(order.remove(0)).unwrap();
    }
    assert!(!marker.path().join("sprung").exists());
}

#[test]
fn a_type_that_nobody_serves_is_told_with_the_nearest_names_and_every_folder() {
    let folder = tempfile::tempdir().unwrap();
    trap(folder.path(), "trap", Some("falcon_trap"), &folder.path().join("sprung"));
    let sentence = one_sentence(&run_with_plugins("falcon-trap", folder.path()), "a type that nobody serves");
    let folders = [folder.path().canonicalize().unwrap(), target().canonicalize().unwrap()];
    for part in ["no plugin serves model_type \"falcon-trap\"", "the nearest of those that have one are falcon_trap,"] {
        assert!(sentence.contains(part), "{sentence}");
    }
    let cure = "to add one, put libfalcon_trap.so into one of these folders or name its folder with --plugins";
    assert!(folders.iter().all(|f| sentence.contains(f.to_str().unwrap())) && sentence.contains(cure), "{sentence}");
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
#[test]
fn a_link_to_a_folder_is_that_folder() {
    let (real, other, marker) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let marker = marker.path().join("sprung");
    trap(real.path(), "trap", Some("trap"), &marker);
    let link = other.path().join("plugins");
    std::os::unix::fs::symlink(real.path(), &link).unwrap();
    let found = Registry::new(std::slice::from_ref(&link)).resolve("trap").unwrap();
    assert_eq!(found.path, real.path().canonicalize().unwrap().join(file_name("trap")));
    // Its permissions are those that count.
    fs::set_permissions(real.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let sentence = one_sentence(&run_with_plugins("trap", &link), "a link to a folder open to all");
    assert!(sentence.contains("everybody may write to this folder"), "{sentence}");
    assert!(!marker.exists());
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
fn a_hundred_and_twenty_plugins_are_listed_and_none_is_run() {
    let (folder, marker) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let marker = marker.path().join("sprung");
    let first = fs::read(trap(folder.path(), "trap", Some("trap_000"), &marker)).unwrap();
    fs::remove_file(folder.path().join(file_name("trap"))).unwrap();
    for n in 0..120 {
        let copy = patched(first.clone(), "trap_000", &format!("trap_{n:03}"));
        fs::write(folder.path().join(file_name(&format!("trap_{n:03}"))), copy).unwrap();
    }
    // Known hashes, so that they are hashed too.
    let list = folder.path().join("trust.toml");
    fs::write(&list, format!("[[plugin]]\nsha256 = \"{}\"\n", "0".repeat(64))).unwrap();
    let output = dylm().args(["plugins", "--json", "--plugins"]).arg(folder.path()).env("DYLM_TRUST", &list).output();
    let listed: serde_json::Value = serde_json::from_slice(&output.unwrap().stdout).unwrap();
    let traps = listed["plugins"].as_array().unwrap().iter().filter(|p| p["note"]["name"] == "trap");
    let traps: Vec<_> = traps.map(|p| (&p["note"]["model_types"][0], &p["trust"]["state"], &p["refused"])).collect();
    assert_eq!(traps.len(), 120, "{listed}");
    for (n, trap) in traps.iter().enumerate() {
        assert_eq!(*trap, (&json!(format!("trap_{n:03}")), &json!("unknown"), &json!(null)));
    }
    assert!(!marker.exists(), "one was opened");
    // And these are traps indeed.
    one_sentence(&run_with_plugins("trap_119", folder.path()), "the last");
    assert!(marker.exists(), "the trap does not work");
}
