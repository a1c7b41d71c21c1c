//! A path -> an open plugin file, judged before anything of it runs: a regular file, whole, a library for this machine. The same open file
//! is then read for its note, hashed, and handed to `dlopen`, so that what was looked at is what is run, whatever the path leads to by then.

use crate::error::{Error, Result};
use object::{Object, ObjectSection, ObjectSegment, ReadCache, SectionKind};
use sha2::{Digest, Sha256};
use std::{
    fs::{File, Metadata, OpenOptions},
    io::{ErrorKind, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    time::SystemTime,
};

/// Plugins are a megabyte or two; larger files are not looked into.
const LARGEST: u64 = 256 << 20;
/// A page of zeros where code should be is how a copy that was never finished shows, if its end was written first.
const PAGE: usize = 4096;

/// What changes when somebody writes to a file or puts another in its place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Stamp {
    device: u64,
    inode: u64,
    length: u64,
    modified: Option<SystemTime>,
    changed: (i64, i64),
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        #[cfg(unix)]
        let (device, inode, changed) = {
            use std::os::unix::fs::MetadataExt;
            (metadata.dev(), metadata.ino(), (metadata.ctime(), metadata.ctime_nsec()))
        };
        #[cfg(not(unix))]
        let (device, inode, changed) = (0, 0, (0, 0));
        Stamp { device, inode, length: metadata.len(), modified: metadata.modified().ok(), changed }
    }
}

/// A library file, open.
pub struct PluginFile {
    path: PathBuf,
    file: File,
    stamp: Stamp,
}

impl PluginFile {
    /// Opens a regular file of a plausible size. Pipes are not waited for and devices not touched.
    pub fn open(path: &Path) -> Result<Self> {
        let refuse = |why: String| Error::plugin(format!("{}: {why}", path.display()));
        let irregular = || refuse("is not a regular file, so it cannot be a plugin; take it out of the folder".into());
        let metadata =
            std::fs::metadata(path).map_err(|e| match path.is_symlink() && e.kind() == ErrorKind::NotFound {
                true => refuse("is a link to a file that is not there; link it anew, or remove it".into()),
                false => Error::io(path)(e),
            })?;
        if !metadata.is_file() {
            return Err(irregular());
        }
        let mut options = OpenOptions::new();
        options.read(true);
        // Should it have become a pipe since, opening it fails instead of waiting.
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NONBLOCK | libc::O_NOCTTY);
        let file = options.open(path).map_err(Error::io(path))?;
        let metadata = file.metadata().map_err(Error::io(path))?;
        if !metadata.is_file() {
            return Err(irregular());
        }
        if metadata.len() > LARGEST {
            return Err(refuse(format!(
                "has {} bytes, which is more than any plugin; take it out of the folder",
                metadata.len()
            )));
        }
        Ok(PluginFile { path: path.to_owned(), file, stamp: Stamp::of(&metadata) })
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the system knows of the open file.
    pub fn metadata(&self) -> Result<Metadata> {
        self.file.metadata().map_err(Error::io(&self.path))
    }

    fn refuse(&self, why: impl std::fmt::Display) -> Error {
        Error::plugin(format!("{}: {why}", self.path.display()))
    }

    /// Calls `read` with the file's sections, once it is sure that none of them reaches past the end. Of the file only headers are read, and
    /// what `read` asks for.
    pub fn inspect<T>(&self, read: impl FnOnce(&object::File<'_, &ReadCache<&File>>) -> Result<T>) -> Result<T> {
        let cache = ReadCache::new(&self.file);
        let file = object::File::parse(&cache).map_err(|e| {
            self.refuse(format_args!("is not a library, or only a part of one ({e}); build or copy it again"))
        })?;
        // Parts that reach past the end are how a truncated file shows. Segments are what the loader maps, and touching one that is not
        // there is a signal, not an error.
        let sections = file.sections().filter_map(|s| s.file_range());
        let ends =
            sections.chain(file.segments().map(|s| s.file_range())).map(|(start, len)| start.saturating_add(len));
        if let Some(end) = ends.max().filter(|&end| end > self.stamp.length) {
            let len = self.stamp.length;
            return Err(self.refuse(format_args!("is truncated: it has {len} bytes of at least {end}; copy it again")));
        }
        // Every section has a name, so one without shows that the table itself was never written.
        if file.sections().any(|section| section.name().map_or(true, str::is_empty)) {
            return Err(
                self.refuse("has a hole in its table of sections, as a copy has that was broken off; copy it again")
            );
        }
        if file.architecture() != machine() {
            let (built, here) = (file.architecture(), machine());
            return Err(
                self.refuse(format_args!("is built for {built:?}, this machine is {here:?}; build it for this one"))
            );
        }
        read(&file)
    }

    /// Refuses a library whose code or linking tables are zeros: its headers may be whole, and running it would still be a signal. Reads the
    /// code, so this is for a file that is about to be opened, not for a listing.
    pub fn refuse_holes(&self) -> Result<()> {
        self.inspect(|file| {
            for section in file.sections().filter(|s| s.file_range().is_some_and(|(_, len)| len > 0)) {
                let name = section.name().unwrap_or("?");
                let is_code = section.kind() == SectionKind::Text;
                if !is_code && ![".dynamic", ".dynsym", ".gnu.hash"].contains(&name) {
                    continue;
                }
                let data = section.data().map_err(|e| self.refuse(format_args!("{name} cannot be read: {e}")))?;
                let zero = |bytes: &[u8]| bytes.iter().all(|&b| b == 0);
                let hole = if is_code { data.chunks_exact(PAGE).any(zero) || zero(data) } else { zero(data) };
                if hole {
                    return Err(self.refuse(format_args!(
                        "has zeros in place of its section {name}, as a copy has that was broken off; copy it again"
                    )));
                }
            }
            Ok(())
        })
    }

    /// The SHA-256 of its bytes, in hexadecimal.
    pub fn sha256(&self) -> Result<String> {
        let (mut hasher, mut piece, mut file) = (Sha256::new(), vec![0; 1 << 16], &self.file);
        file.seek(SeekFrom::Start(0)).map_err(Error::io(&self.path))?;
        loop {
            match file.read(&mut piece).map_err(Error::io(&self.path))? {
                0 => break,
                n => hasher.update(piece.get(..n).unwrap_or_default()),
            }
        }
        Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Lets `open` have a path that leads to this very file, whose hash was agreed to, not to whatever lies at its path by now.
    ///
    /// Where the system has a path for open files (Linux), that is the one, and the file stays open for good: the loader knows a library by
    /// its path, and would take a later file of the same number for this one. Elsewhere the path is used and looked at again, before and
    /// after. What neither can see is the file's own owner writing into it in that very moment.
    pub fn through<T>(self, sha256: &str, open: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
        // The stamp changes with the file's name too, so that it tells when to look, not what there is.
        if Stamp::of(&self.metadata()?) != self.stamp && self.sha256()? != sha256 {
            return Err(self.refuse("was written to while it was being looked at; try again when that is done"));
        }
        if let Some(fixed) = self.fixed_path() {
            let result = open(&fixed);
            std::mem::forget(self.file);
            return result;
        }
        let is_still = || std::fs::metadata(&self.path).is_ok_and(|now| Stamp::of(&now) == self.stamp);
        let moved = || self.refuse("was replaced while it was being opened; start again when that is done");
        if !is_still() {
            return Err(moved());
        }
        let result = open(&self.path)?;
        if is_still() { Ok(result) } else { Err(moved()) }
    }

    #[cfg(target_os = "linux")]
    fn fixed_path(&self) -> Option<PathBuf> {
        use std::os::fd::AsRawFd;
        let path = PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()));
        let same = |there: Metadata| {
            (Stamp::of(&there).device, Stamp::of(&there).inode) == (self.stamp.device, self.stamp.inode)
        };
        std::fs::metadata(&path).is_ok_and(same).then_some(path)
    }

    #[cfg(not(target_os = "linux"))]
    fn fixed_path(&self) -> Option<PathBuf> {
        None
    }
}

fn machine() -> object::Architecture {
    match std::env::consts::ARCH {
        "x86_64" => object::Architecture::X86_64,
        "aarch64" => object::Architecture::Aarch64,
        "x86" => object::Architecture::I386,
        "arm" => object::Architecture::Arm,
        "riscv64" => object::Architecture::Riscv64,
        _ => object::Architecture::Unknown,
    }
}
