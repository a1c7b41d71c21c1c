//! A plugin that somebody else can write to, or that is somebody else's, is not opened; what a user builds under the usual umasks is.

#![cfg(target_os = "linux")]

use serde_json::json;
use std::{
    fs,
    os::unix::{
        fs::{PermissionsExt, chown},
        process::CommandExt,
    },
    path::{Path, PathBuf},
};
use tempfile::TempDir;
use tests::{
    binary::{dylm, one_sentence, trusting},
    outside::checkpoint,
    trap::trap,
};

/// A user without a name here, and other groups.
const SOMEBODY: u32 = 4242;
const ELSE: u32 = 4343;

struct Traps {
    folder: TempDir,
    markers: TempDir,
    model: TempDir,
    library: PathBuf,
}

impl Traps {
    fn new() -> Self {
        let (folder, markers) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let library = trap(folder.path(), "trap", Some("trap"), &markers.path().join("sprung"));
        let model = checkpoint(&[("model_type", json!("trap"))]);
        for open in [folder.path(), markers.path(), model.path()] {
            mode(open, 0o755);
        }
        fs::read_dir(model.path()).unwrap().for_each(|file| mode(&file.unwrap().path(), 0o644));
        Traps { folder, markers, model, library }
    }

    fn run(&self, user: Option<u32>) -> String {
        let mut command = dylm();
        command.args(["generate", "--model"]).arg(self.model.path());
        if let Some(user) = user {
            command.uid(user).gid(user);
        }
        one_sentence(&trusting(&mut command, self.folder.path()).output().unwrap(), "a trap")
    }

    fn refused(&self, user: Option<u32>, expected: &str) {
        let sentence = self.run(user);
        assert!(sentence.contains(expected) && sentence.contains("so no plugin is opened from it; "), "{sentence}");
        assert!(!self.marker().exists(), "it was opened");
    }

    fn opened(&self, user: Option<u32>) {
        let sentence = self.run(user);
        assert!(sentence.contains("has a note, but is no plugin") && self.marker().exists(), "{sentence}");
        fs::remove_file(self.marker()).unwrap();
        fs::remove_file(self.folder.path().join("trust.toml")).unwrap();
    }

    fn marker(&self) -> PathBuf {
        self.markers.path().join("sprung")
    }

    fn give(&self, user: u32, group: u32) {
        for path in [self.folder.path(), &self.library, self.markers.path()] {
            chown(path, Some(user), Some(group)).unwrap();
        }
    }
}

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// Only root can give files away.
fn is_root() -> bool {
    let root = nix::unistd::Uid::effective().is_root();
    if !root {
        eprintln!("SKIPPED: this takes root, to make files of other users");
    }
    root
}

#[test]
fn a_file_or_folder_that_everybody_may_write_to_is_not_opened() {
    let traps = Traps::new();
    mode(&traps.library, 0o777);
    traps.refused(None, "everybody may write to this file");
    mode(&traps.library, 0o755);
    mode(traps.folder.path(), 0o777);
    traps.refused(None, "everybody may write to this folder");
    // As in /tmp: others can add files there, and change none.
    mode(traps.folder.path(), 0o1777);
    traps.opened(None);
}

#[test]
fn a_file_or_folder_that_another_group_may_write_to_is_not_opened() {
    if !is_root() {
        return;
    }
    let traps = Traps::new();
    chown(&traps.library, None, Some(ELSE)).unwrap();
    mode(&traps.library, 0o664);
    traps.refused(None, "the group 4343 may write to this file");
    mode(&traps.library, 0o644);
    chown(traps.folder.path(), None, Some(ELSE)).unwrap();
    mode(traps.folder.path(), 0o775);
    traps.refused(None, "the group 4343 may write to this folder");
    mode(traps.folder.path(), 0o755);
    traps.opened(None);
}

#[test]
fn what_a_user_builds_under_umask_002_is_opened() {
    if !is_root() {
        return;
    }
    let traps = Traps::new();
    mode(&traps.library, 0o775);
    mode(traps.folder.path(), 0o775);
    // root's group is called root.
    traps.opened(None);
    // Somebody in a container where nobody has a name.
    traps.give(SOMEBODY, SOMEBODY);
    traps.opened(Some(SOMEBODY));
    traps.give(SOMEBODY, ELSE);
    traps.refused(Some(SOMEBODY), "the group 4343 may write to this folder");
}

#[test]
fn what_belongs_to_another_user_is_not_opened() {
    if !is_root() {
        return;
    }
    let traps = Traps::new();
    chown(&traps.library, Some(SOMEBODY), None).unwrap();
    traps.refused(None, "this file belongs to user 4242, who is neither you nor root");
    chown(&traps.library, Some(0), None).unwrap();
    chown(traps.folder.path(), Some(SOMEBODY), None).unwrap();
    traps.refused(None, "this folder belongs to user 4242, who is neither you nor root");
    // For its owner it is in order; so is what root has put there.
    traps.give(SOMEBODY, SOMEBODY);
    traps.opened(Some(SOMEBODY));
    chown(&traps.library, Some(0), Some(0)).unwrap();
    traps.opened(Some(SOMEBODY));
    traps.refused(Some(ELSE), "belongs to user 4242");
}

#[test]
fn the_listing_says_so_too() {
    let traps = Traps::new();
    mode(&traps.library, 0o757);
    let listed = dylm().args(["plugins", "--plugins"]).arg(traps.folder.path()).output().unwrap();
    let said = String::from_utf8_lossy(&listed.stdout).into_owned();
    assert!(said.contains("refused:") && said.contains("everybody may write to this file"), "{said}");
    assert!(!traps.marker().exists());
}
