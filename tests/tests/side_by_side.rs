//! `tests/bench/side_by_side.py`, end to end on a tiny model: with dylm alone, and beside a peer that only says figures.

use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};
use tempfile::TempDir;
use tests::{
    binary::{dylm, target},
    tiny,
};

/// A folder with the model `small`, and an empty one for peers.
fn set_up() -> Option<(TempDir, PathBuf, PathBuf)> {
    if !Command::new("python3").arg("--version").output().is_ok_and(|output| output.status.success()) {
        eprintln!("SKIPPED: there is no python3");
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    let (model, peers) = (folder.path().join("small"), folder.path().join("peers"));
    fs::create_dir_all(&model).unwrap();
    fs::create_dir(&peers).unwrap();
    tiny::write(&tiny::fixtures().join("llama"), &model).unwrap();
    Some((folder, model, peers))
}

fn side_by_side(model: &Path, peers: &Path, flags: &[&str]) -> Output {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("bench/side_by_side.py");
    let mut command = Command::new("python3");
    command.arg("-B").arg(script).arg(model).arg("--llama-bin").arg(peers);
    // What the machine has of real peers is no part of a test.
    command.args(["--python", "no-such-python", "--reps", "1", "--trials", "1", "-p", "8", "-g", "4"]).args(flags);
    command.arg("--dylm").arg(target().join(dylm().get_program()));
    command.output().unwrap()
}

fn figures(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stderr)))
}

fn rows(figures: &Value) -> impl Iterator<Item = &Value> {
    figures["rows"].as_array().unwrap().iter()
}

#[test]
fn dylm_alone_is_measured_in_every_test_and_the_others_are_named_as_left_out() {
    let Some((_folder, model, peers)) = set_up() else { return };
    let flags = ["--growth-bits", "16", "-d", "4,9", "-b", "1,2", "--json"];
    let output = side_by_side(&model, &peers, &flags);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let figures = figures(&output);
    let measured: Vec<(String, u64)> =
        rows(&figures).map(|row| (row["test"].as_str().unwrap().to_owned(), row["size"].as_u64().unwrap())).collect();
    let expected =
        [("prefill", 8), ("decode", 4), ("start", 1), ("depth", 4), ("depth", 9), ("batch", 1), ("batch", 2)];
    assert_eq!(measured, expected.map(|(test, size)| (test.to_owned(), size)));
    for row in rows(&figures) {
        assert_eq!((&row["program"], &row["file"]), (&"dylm".into(), &"f32".into()));
        assert!(row["median"].as_f64().unwrap() > 0.0 && row["peak_bytes"].as_u64().unwrap() > 1 << 20, "{row}");
        assert!(row["load"].is_number() && row["times_best_peer"].is_null(), "{row}");
    }
    assert!(rows(&figures).any(|row| row["of_smallest"].is_number()));
    assert!(figures["machine"]["bandwidth_gb_per_s"].as_f64().unwrap() > 0.0);
    let left_out = figures["left_out"].to_string();
    for name in ["llama.cpp: ", "transformers: ", "mlx-lm: ", "small, 8 bits: no MLX folder", "small, 4 bits: no GGUF"]
    {
        assert!(left_out.contains(name), "{name}: {left_out}");
    }
}

#[cfg(unix)]
#[test]
fn a_peer_beside_it_gives_ratios_and_what_fails_is_told() {
    use std::os::unix::fs::PermissionsExt;
    let Some((folder, model, peers)) = set_up() else { return };
    let fake = peers.join("llama-bench");
    fs::write(&fake, "#!/bin/sh\necho '[{\"samples_ts\": [0.5, 0.5, 8.0]}]'\n").unwrap();
    fs::set_permissions(&fake, fs::Permissions::from_mode(0o755)).unwrap();
    // The peer does not mind that this is no model; dylm does.
    fs::write(folder.path().join("small-BF16.gguf"), "nothing").unwrap();

    let output = side_by_side(&model, &peers, &["--tests", "decode", "--json"]);
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
    let figures = figures(&output);
    let row = |program: &str, file: &str| rows(&figures).find(|row| row["program"] == program && row["file"] == file);
    let (ours, theirs) = (row("dylm", "f32").unwrap(), row("llama.cpp", "BF16").unwrap());
    assert_eq!(theirs["median"], 0.5);
    assert_eq!(ours["times_best_peer_which"], "llama.cpp BF16");
    assert!(ours["share_of_read"].as_f64().unwrap() > 0.0, "{ours}");
    let ratio = ours["median"].as_f64().unwrap() / 0.5;
    assert!((ours["times_best_peer"].as_f64().unwrap() / ratio - 1.0).abs() < 1e-9);
    assert!(row("dylm", "BF16").unwrap()["failure"].as_str().unwrap().starts_with("ended with 1: error: "));

    let output = side_by_side(&model, &peers, &["--tests", "decode", "--only", "f32|llama", "--under", "env A=b"]);
    let table = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{table}");
    let line = table.lines().find(|line| line.contains("| dylm ")).unwrap();
    assert!(line.contains(" llama.cpp BF16 "), "{table}");
    assert!(table.contains("## small: decode, tokens/s") && table.contains("left out: transformers"), "{table}");
}
