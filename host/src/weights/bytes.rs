//! A range of bytes that nobody copies: part of a memory-mapped file, or a buffer of our own behind the same face.
//! Cloning shares. Checkpoint files are mapped read-only; see `map` for what that asks of the user.

use crate::error::{Error, Result};
use memmap2::Mmap;
use std::{fs::File, ops::Deref, ops::Range, path::Path, sync::Arc};

#[derive(Clone)]
enum Owner {
    File(Arc<Mmap>),
    Memory(Arc<Vec<u8>>),
}

/// Shared, immutable bytes.
#[derive(Clone)]
pub struct Bytes {
    owner: Owner,
    range: Range<usize>,
}

impl Bytes {
    /// Maps a whole file. A file that another program shortens while it is mapped ends the process (SIGBUS), as in every
    /// program that maps its weights; checkpoints in a cache are never rewritten in place.
    pub fn map(path: &Path) -> Result<Self> {
        Self::map_file(&File::open(path).map_err(Error::io(path))?, path)
    }

    /// Maps a file that is already open; `path` is only for the message.
    pub fn map_file(file: &File, path: &Path) -> Result<Self> {
        // SAFETY: the map is read-only and private to this process; see above for files that shrink.
        let map = unsafe { Mmap::map(file) }.map_err(Error::io(path))?;
        let range = 0..map.len();
        Ok(Self { owner: Owner::File(Arc::new(map)), range })
    }

    /// A part of these bytes, `range` counted from their start; `None` where it does not fit.
    pub fn slice(&self, range: Range<usize>) -> Option<Self> {
        let (start, end) = (self.range.start.checked_add(range.start)?, self.range.start.checked_add(range.end)?);
        (start <= end && end <= self.range.end).then(|| Self { owner: self.owner.clone(), range: start..end })
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(v: Vec<u8>) -> Self {
        let range = 0..v.len();
        Self { owner: Owner::Memory(Arc::new(v)), range }
    }
}

impl Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        let all: &[u8] = match &self.owner {
            Owner::File(m) => m,
            Owner::Memory(v) => v,
        };
        &all[self.range.clone()]
    }
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.range.len())
    }
}
