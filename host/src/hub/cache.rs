//! huggingface_hub's cache folder: `models--owner--name/{blobs/ETAG, refs/BRANCH, snapshots/COMMIT/FILE -> ../../blobs/ETAG}`.
//! Locks are huggingface_hub's too (`.locks/models--owner--name/ETAG.lock`, flock), so that both may fetch at the same time.
//! The layout: <https://huggingface.co/docs/huggingface_hub/guides/manage-cache>.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::names::{is_commit, is_plain_relative};
use crate::error::{Error, Result};

/// One model repository in the cache.
pub(super) struct Repo {
    /// `owner/name`
    pub id: String,
    root: PathBuf,
    locks: PathBuf,
}

impl Repo {
    pub(super) fn new(cache_dir: &Path, id: &str) -> Self {
        let folder = format!("models--{}", id.replace('/', "--"));
        Repo { id: id.to_owned(), root: cache_dir.join(&folder), locks: cache_dir.join(".locks").join(&folder) }
    }

    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(etag)
    }

    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    /// The commit a branch or tag led to when it was last fetched. A commit hash is its own answer.
    pub(super) fn read_ref(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        let text = fs::read_to_string(self.root.join("refs").join(revision)).ok()?;
        Some(text.trim().to_owned()).filter(|commit| is_commit(commit))
    }

    /// Notes what `revision` leads to now.
    pub(super) fn write_ref(&self, revision: &str, commit: &str) -> Result<()> {
        if is_commit(revision) || self.read_ref(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        let path = self.root.join("refs").join(revision);
        let folder = make_parent(&path)?;
        let written = tempfile::NamedTempFile::new_in(folder).and_then(|mut file| {
            file.write_all(commit.as_bytes())?;
            file.persist(&path)?;
            Ok(())
        });
        written.map_err(|e| self.explain_write(&path, e))
    }

    /// Makes `name` of the snapshot point to its blob.
    pub(super) fn link(&self, commit: &str, name: &str, etag: &str) -> Result<()> {
        let pointer = self.snapshot(commit).join(name);
        make_parent(&pointer)?;
        let up = "../".repeat(2 + name.matches('/').count());
        // A pointer that leads somewhere was made by another process since.
        if pointer.exists() {
            return Ok(());
        }
        // It is put there in one move, lest a process that reads through another one's pointer find it gone.
        static MADE: AtomicUsize = AtomicUsize::new(0);
        let fresh = format!(".{}-{}", std::process::id(), MADE.fetch_add(1, Ordering::Relaxed));
        let fresh = pointer.with_file_name(fresh);
        point(Path::new(&format!("{up}blobs/{etag}")), &self.blob(etag), &fresh)
            .and_then(|()| fs::rename(&fresh, &pointer))
            .map_err(|e| self.explain_write(&pointer, e))
    }

    /// Waits until no other process fetches this blob. Where the file system knows no locks, there is none.
    pub(super) fn lock(&self, etag: &str) -> Result<File> {
        let path = self.locks.join(format!("{etag}.lock"));
        make_parent(&path)?;
        let file = File::create(&path).map_err(|e| self.explain_write(&path, e))?;
        for tries in 0.. {
            match file.try_lock() {
                Err(TryLockError::WouldBlock) if tries == 10 => {
                    eprintln!("{}: waiting for another process that fetches the same file", self.id);
                }
                Err(TryLockError::WouldBlock) => {}
                Ok(()) | Err(TryLockError::Error(_)) => break,
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(file)
    }

    /// One sentence for a write that failed; a full disk is by far the likeliest reason.
    pub(super) fn explain_write(&self, path: &Path, error: io::Error) -> Error {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::Fetch(format!(
                "{}: the disk is full ({}); make room or move the cache with HF_HOME, then run again: it goes on where it stopped",
                self.id,
                self.root.display()
            )),
            _ => Error::io(path)(error),
        }
    }
}

/// What keeps a snapshot folder from being a whole model: the name of one missing file. Only the folder itself can be asked.
pub(super) fn find_gap(folder: &Path) -> Option<String> {
    if !folder.join("config.json").exists() {
        return Some("config.json".to_owned());
    }
    let entries: Vec<PathBuf> = fs::read_dir(folder).ok()?.filter_map(|entry| Some(entry.ok()?.path())).collect();
    let name_of = |path: &PathBuf| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    if let Some(dangling) = entries.iter().find(|path| !path.exists()) {
        return Some(name_of(dangling));
    }
    let has_weights =
        entries.iter().map(name_of).any(|name| name.starts_with("model") && name.ends_with(".safetensors"));
    let shards = read_shards(folder);
    let (there, gone): (Vec<_>, Vec<_>) =
        shards.into_iter().partition(|shard| is_plain_relative(shard) && folder.join(shard).exists());
    // An index that names no file of the folder is a leftover of another format; the loader does not ask it either.
    match gone.into_iter().next() {
        Some(shard) if !there.is_empty() || !has_weights => Some(shard),
        None if !has_weights => Some("model.safetensors".to_owned()),
        _ => None,
    }
}

/// The file names in model.safetensors.index.json; none without a readable one.
fn read_shards(folder: &Path) -> Vec<String> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = fs::read(folder.join("model.safetensors.index.json")).unwrap_or_default();
    let index: Option<Index> = serde_json::from_slice(&text).ok();
    let mut shards: Vec<String> = index.map(|index| index.weight_map.into_values().collect()).unwrap_or_default();
    shards.sort();
    shards.dedup();
    shards
}

pub(super) fn make_parent(path: &Path) -> Result<&Path> {
    let parent = path.parent().unwrap_or(path);
    fs::create_dir_all(parent).map_err(Error::io(parent))?;
    Ok(parent)
}

#[cfg(unix)]
fn point(target: &Path, _blob: &Path, pointer: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, pointer)
}

/// Without the right to make links, huggingface_hub moves the blob into the snapshot; so does this.
#[cfg(windows)]
fn point(target: &Path, blob: &Path, pointer: &Path) -> io::Result<()> {
    let target = target.to_string_lossy().replace('/', "\\");
    std::os::windows::fs::symlink_file(target, pointer).or_else(|_| fs::rename(blob, pointer))
}
