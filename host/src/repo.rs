//! A model's folder -> its files, read within bounds: plain names only, no file larger than its cap, no way out by symbolic links.
//! The one exception is the Hugging Face cache, whose `snapshots/REVISION/x` are links to `../../blobs/y`: there the fence is
//! the repository's folder in the cache.

use crate::error::{Error, Result};
use std::{
    fs::{self, File, OpenOptions},
    io::{ErrorKind, Read},
    path::{Path, PathBuf},
};

/// Most bytes of config.json and its like.
pub const CONFIG_CAP: u64 = 8 << 20;
/// Most bytes of tokenizer.json.
pub const TOKENIZER_CAP: u64 = 256 << 20;
/// Most bytes of a chat template.
pub const TEMPLATE_CAP: u64 = 8 << 20;
/// Most bytes of an index of shards.
pub const INDEX_CAP: u64 = 64 << 20;

/// A folder that holds a model.
#[derive(Debug, Clone)]
pub struct Folder {
    path: PathBuf,
    fence: PathBuf,
}

impl Folder {
    /// Opens a folder; an error where there is none.
    pub fn open(dir: &Path) -> Result<Self> {
        let root = dir.canonicalize().map_err(Error::io(dir))?;
        if !root.is_dir() {
            return Err(Error::Config(format!("{}: not a folder", dir.display())));
        }
        let fence = cache_folder(&root).unwrap_or_else(|| root.clone());
        Ok(Self { path: dir.to_owned(), fence })
    }

    /// The folder, as it was given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the file of this name really lies; `None` where there is none.
    pub fn resolve(&self, name: &str) -> Result<Option<PathBuf>> {
        if !is_plain_name(name) {
            return Err(Error::Config(format!("{}: {name:?} is not a plain file name", self.path.display())));
        }
        let path = self.path.join(name);
        let real = match path.canonicalize() {
            Ok(real) => real,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io(path)(e)),
        };
        if !real.starts_with(&self.fence) {
            return Err(Error::Config(format!(
                "{}: a link that leaves the model's folder: copy the file there",
                path.display()
            )));
        }
        if !real.is_file() {
            return Err(Error::Config(format!("{}: not a regular file", path.display())));
        }
        Ok(Some(real))
    }

    /// Opens the file of this name for reading; `None` where there is none.
    pub fn open_file(&self, name: &str) -> Result<Option<File>> {
        let Some(real) = self.resolve(name)? else { return Ok(None) };
        let mut options = OpenOptions::new();
        options.read(true);
        // The path was resolved and found good; should it have become a link or a pipe since, opening it fails instead of following or waiting.
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NOFOLLOW | libc::O_NONBLOCK);
        let file = options.open(&real).map_err(Error::io(self.path.join(name)))?;
        match file.metadata() {
            Ok(metadata) if metadata.is_file() => Ok(Some(file)),
            _ => Err(Error::Config(format!("{}: not a regular file", self.path.join(name).display()))),
        }
    }

    /// The file's bytes; `None` where there is none, an error where it is larger than `cap`.
    pub fn read(&self, name: &str, cap: u64) -> Result<Option<Vec<u8>>> {
        let Some(file) = self.open_file(name)? else { return Ok(None) };
        let path = self.path.join(name);
        let mut bytes = Vec::new();
        file.take(cap + 1).read_to_end(&mut bytes).map_err(Error::io(&path))?;
        if bytes.len() as u64 > cap {
            return Err(Error::Config(format!("{}: larger than {} MB", path.display(), cap >> 20)));
        }
        Ok(Some(bytes))
    }

    /// The file's text; as `read`, and an error where it is not UTF-8.
    pub fn read_text(&self, name: &str, cap: u64) -> Result<Option<String>> {
        let Some(bytes) = self.read(name, cap)? else { return Ok(None) };
        String::from_utf8(bytes).map(Some).map_err(|e| {
            let at = e.utf8_error().valid_up_to();
            Error::Config(format!("{}: not UTF-8 at byte {at}", self.path.join(name).display()))
        })
    }

    /// Names of everything in the folder, sorted; names that are not UTF-8 are left out.
    pub fn file_names(&self) -> Result<Vec<String>> {
        let entries = fs::read_dir(&self.path).map_err(Error::io(&self.path))?;
        let mut names: Vec<String> = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
        names.sort();
        Ok(names)
    }
}

/// Whether a name is one path component and nothing else: no separator, no `..`, no drive, no NUL.
pub fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', ':', '\0'])
}

// CACHE/models--owner--name/snapshots/REVISION -> CACHE/models--owner--name
fn cache_folder(root: &Path) -> Option<PathBuf> {
    let snapshots = root.parent()?;
    let repo = snapshots.parent()?;
    (snapshots.file_name()? == "snapshots" && repo.join("blobs").is_dir()).then(|| repo.to_owned())
}
