//! A range of bytes that nobody copies: part of a memory-mapped file, or a buffer of our own behind the same face.
//! Cloning shares. Checkpoint files are mapped read-only; see `map` for what that asks of the user.

use super::moving::Moving;
use crate::{
    error::{Error, Result},
    kernels::cpu,
};
use memmap2::{Mmap, MmapMut};
use std::{
    fs::File,
    ops::{Deref, Range},
    path::Path,
    sync::{Arc, Mutex, Weak},
};

#[derive(Clone)]
enum Owner {
    File(Arc<Mapped>),
    Memory(Arc<Vec<u8>>),
    Room(Arc<Room>),
    Moving(Arc<Moving>),
}

/// A mapped file.
struct Mapped(Mmap);

impl Drop for Mapped {
    /// What takes a process of one thread as long as ten tokens, to give back the pages of a large file, is shared by several.
    fn drop(&mut self) {
        const PIECE: usize = 4 << 20;
        #[cfg(unix)]
        if self.0.len() > 4 * PIECE {
            cpu::each(self.0.len().div_ceil(PIECE), |i| {
                let len = PIECE.min(self.0.len() - i * PIECE);
                // SAFETY: nobody has a reference into the map any more. Refusal costs nothing: all goes with the map.
                let _ = unsafe { self.0.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, i * PIECE, len) };
            });
        }
    }
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
        Ok(Self { owner: Owner::File(Arc::new(Mapped(map))), range })
    }

    /// Whether they are still where the file was mapped.
    pub fn is_of_file(&self) -> bool {
        matches!(self.owner, Owner::File(_))
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
        if let Owner::Moving(moving) = &self.owner {
            moving.let_go();
        }
        #[cfg(unix)]
        if let Owner::File(map) = &self.owner {
            const PAGE: usize = 1 << 14;
            let (start, end) = (self.range.start.next_multiple_of(PAGE), self.range.end / PAGE * PAGE);
            if start < end {
                // SAFETY: the map is of a file and read-only, so dropped pages come back as they were. Refusal would only cost memory.
                let _ = unsafe { map.0.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start) };
            }
        }
    }
}

impl Bytes {
    /// Has the system map them, if they lie in a file, so that nobody who reads them has to wait for that.
    pub fn map_now(&self) {
        #[cfg(target_os = "linux")]
        if let Owner::File(map) = &self.owner {
            // Refusal would only cost time.
            let _ = map.0.advise_range(memmap2::Advice::PopulateRead, self.range.start, self.range.len());
        }
    }
}

/// Zeros to be written over before anybody shares them: on cache lines of their own, and beside other such on huge pages where the system
/// has them, which are read a third faster.
pub struct Room {
    chunk: Arc<Chunk>,
    range: Range<usize>,
}

/// Memory that several rooms lie in.
struct Chunk {
    /// What `start` points into; only rooms read or write it.
    _map: MmapMut,
    start: *mut u8,
}

// SAFETY: memory as such; rooms are disjoint parts of it.
unsafe impl Send for Chunk {}
// SAFETY: as above.
unsafe impl Sync for Chunk {}

/// Rooms up to half this size share a chunk.
const SHARED: usize = 32 << 20;
const HUGE_PAGE: usize = 2 << 20;

impl Chunk {
    fn new(len: usize) -> std::io::Result<Self> {
        let size = len.next_multiple_of(HUGE_PAGE);
        let mut map = MmapMut::map_anon(size + HUGE_PAGE)?;
        let start = map.as_mut_ptr().wrapping_add(map.as_ptr().align_offset(HUGE_PAGE));
        #[cfg(target_os = "linux")]
        // SAFETY: whole pages of our own memory; it is advice, which changes no byte.
        unsafe {
            libc::madvise(start.cast(), size, libc::MADV_HUGEPAGE)
        };
        Ok(Self { _map: map, start })
    }
}

impl Room {
    /// So many bytes, if the system has them.
    pub fn new(len: usize) -> std::io::Result<Self> {
        // The chunk with room left, while anybody has a room in it.
        static LAST: Mutex<(Weak<Chunk>, usize)> = Mutex::new((Weak::new(), 0));
        if len > SHARED / 2 {
            return Ok(Self { chunk: Arc::new(Chunk::new(len)?), range: 0..len });
        }
        let mut last = LAST.lock().unwrap_or_else(|e| e.into_inner());
        let (chunk, start) = match last.0.upgrade().filter(|_| last.1 + len <= SHARED) {
            Some(chunk) => (chunk, last.1),
            None => (Arc::new(Chunk::new(SHARED)?), 0),
        };
        *last = (Arc::downgrade(&chunk), (start + len).next_multiple_of(64));
        Ok(Self { chunk, range: start..start + len })
    }
}

impl Deref for Room {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the range lies inside the chunk and is no other room's.
        unsafe { std::slice::from_raw_parts(self.chunk.start.add(self.range.start), self.range.len()) }
    }
}

impl std::ops::DerefMut for Room {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.chunk.start.add(self.range.start), self.range.len()) }
    }
}

impl From<Room> for Bytes {
    fn from(room: Room) -> Self {
        let range = 0..room.len();
        Self { owner: Owner::Room(Arc::new(room)), range }
    }
}

impl From<Arc<Moving>> for Bytes {
    fn from(moving: Arc<Moving>) -> Self {
        let range = 0..moving.bytes().len();
        Self { owner: Owner::Moving(moving), range }
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
            Owner::File(m) => &m.0,
            Owner::Memory(v) => v,
            Owner::Room(room) => room,
            Owner::Moving(moving) => moving.bytes(),
        };
        &all[self.range.clone()]
    }
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.range.len())
    }
}
