//! A range of bytes that nobody copies: part of a memory-mapped file, or a buffer of our own behind the same face.
//! Cloning shares. Checkpoint files are mapped read-only; see `map` for what that asks of the user.

use crate::error::{Error, Result};
use memmap2::Mmap;
use std::{fs::File, ops::Deref, ops::Range, path::Path, sync::Arc};

#[derive(Clone)]
enum Owner {
    File(Arc<Mmap>),
    Memory(Arc<Vec<u8>>),
    Room(Arc<Room>),
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

impl Bytes {
    /// Says that nobody will read these bytes soon: pages of a file that lie wholly among them stop counting as this process's memory. They
    /// would be read again if somebody did.
    pub fn let_go(&self) {
        #[cfg(unix)]
        if let Owner::File(map) = &self.owner {
            const PAGE: usize = 1 << 14;
            let (start, end) = (self.range.start.next_multiple_of(PAGE), self.range.end / PAGE * PAGE);
            if start < end {
                // SAFETY: the map is of a file and read-only, so dropped pages come back as they were. Refusal would only cost memory.
                let _ = unsafe {
                    map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start)
                };
            }
        }
    }
}

/// Zeros to be written over before anybody shares them, on cache lines of their own, and on huge pages where the system has them and there
/// is enough.
pub struct Room {
    lines: Vec<Line>,
    len: usize,
}

/// A cache line.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Line([u8; 64]);

impl Room {
    /// So many bytes.
    pub fn new(len: usize) -> Self {
        let lines = vec![Line([0; 64]); len.div_ceil(64)];
        #[cfg(target_os = "linux")]
        {
            const HUGE: usize = 1 << 21;
            let start = (lines.as_ptr() as usize).next_multiple_of(HUGE);
            let end = (lines.as_ptr() as usize + 64 * lines.len()) / HUGE * HUGE;
            if start < end {
                // SAFETY: whole pages of our own memory; it is advice, which changes no byte.
                unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE) };
            }
        }
        Self { lines, len }
    }
}

impl Deref for Room {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: lines are bytes, at least `len` of them.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }
}

impl std::ops::DerefMut for Room {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

impl From<Room> for Bytes {
    fn from(room: Room) -> Self {
        let range = 0..room.len;
        Self { owner: Owner::Room(Arc::new(room)), range }
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
            Owner::Room(room) => room,
        };
        &all[self.range.clone()]
    }
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.range.len())
    }
}
