//! Containment and size caps of a model's folder.

use crate::says;
use dylm::repo::Folder;
use std::fs;
use tempfile::tempdir;

#[test]
fn names_with_a_way_out_are_refused() {
    let dir = tempdir().unwrap();
    let folder = Folder::open(dir.path()).unwrap();
    for name in ["../config.json", "/etc/passwd", "a/b", "a\\b", "..", ".", "", "a\0b", "C:x"] {
        says(folder.read(name, 10), &["is not a plain file name"]);
    }
    assert!(folder.read("config.json", 10).unwrap().is_none());
}

#[test]
fn a_file_over_its_cap_is_refused() {
    let dir = tempdir().unwrap();
    fs::write(dir.path().join("config.json"), vec![b' '; (8 << 20) + 1]).unwrap();
    let folder = Folder::open(dir.path()).unwrap();
    says(folder.read("config.json", 8 << 20), &["config.json: larger than 8 MB"]);
    assert_eq!(folder.read("config.json", (8 << 20) + 1).unwrap().unwrap().len(), (8 << 20) + 1);
}

#[cfg(unix)]
#[test]
fn links_may_leave_the_folder_only_within_a_hub_cache() {
    use std::os::unix::fs::symlink;
    let dir = tempdir().unwrap();
    let repo = dir.path().join("models--owner--name");
    let snapshot = repo.join("snapshots/abc");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(repo.join("blobs")).unwrap();
    fs::write(repo.join("blobs/1"), "{}").unwrap();
    fs::write(dir.path().join("secret"), "secret").unwrap();
    symlink("../../blobs/1", snapshot.join("config.json")).unwrap();
    symlink("../../../secret", snapshot.join("tokenizer.json")).unwrap();
    symlink("/etc/passwd", snapshot.join("generation_config.json")).unwrap();
    let folder = Folder::open(&snapshot).unwrap();
    assert_eq!(folder.read_text("config.json", 10).unwrap().unwrap(), "{}");
    says(folder.read("tokenizer.json", 10), &["tokenizer.json: a link that leaves"]);
    says(folder.read("generation_config.json", 10), &["a link that leaves"]);

    let plain = dir.path().join("plain");
    fs::create_dir(&plain).unwrap();
    symlink("../secret", plain.join("config.json")).unwrap();
    symlink(&plain, dir.path().join("link")).unwrap();
    says(Folder::open(&plain).unwrap().read("config.json", 10), &["a link that leaves"]);
    fs::write(plain.join("inside"), "x").unwrap();
    symlink("inside", plain.join("also")).unwrap();
    assert!(Folder::open(&dir.path().join("link")).unwrap().read("also", 10).unwrap().is_some());
}

#[cfg(unix)]
#[test]
fn a_pipe_in_place_of_a_file_is_refused_without_waiting() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("config.json");
    assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
    says(Folder::open(dir.path()).unwrap().read("config.json", 10), &["not a regular file"]);
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    says(Folder::open(dir.path()).unwrap().read("config.json", 10), &["not a regular file"]);
}
