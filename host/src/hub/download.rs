//! Turns one file of a commit into a blob of the cache, or into nothing: bytes collect in `ETAG.incomplete`, survive a cut
//! connection or a killed process, and get their final name only when size and, where the Hub tells one, SHA-256 are right.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use indicatif::{HumanBytes, MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use reqwest::Url;
use reqwest::header::{CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap};
use sha2::{Digest, Sha256};

use super::cache::{Repo, make_parent};
use super::names::{is_hex, is_plain_relative};
use super::transfer::{Transfer, Trouble};
use crate::error::{Error, Result};

/// Tries in a row that bring no new byte before a transfer is given up.
const MOST_STALLS: u32 = 4;

/// One file that the cache lacks.
pub(super) struct Wanted {
    /// Plain relative name in the repository.
    pub name: String,
    /// The blob's name.
    pub etag: String,
    url: Url,
    size: Option<u64>,
    sha256: Option<String>,
}

/// Asks for etag, size and hash of one file.
pub(super) fn ask(transfer: &Transfer, id: &str, commit: &str, name: &str) -> Result<Wanted> {
    let url = transfer.file_url(id, commit, name)?;
    let headers = insist(id, name, || transfer.head(&url, id, name))?;
    let linked = text_of(&headers, "x-linked-etag").map(bare_etag);
    let etag = linked.or_else(|| text_of(&headers, ETAG.as_str()).map(bare_etag)).unwrap_or_default();
    let is_name = etag.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if etag.len() > 128 || etag.ends_with(".incomplete") || !is_name || !is_plain_relative(etag) {
        return Err(Error::Fetch(format!("{id}: {name} has the ETag {etag:?}, which cannot name a file in the cache")));
    }
    // A Git LFS file is named by its SHA-256, any other by the hash of its git object.
    let sha256 = linked.filter(|etag| is_hex(etag, 64)).map(str::to_ascii_lowercase);
    let size = text_of(&headers, "x-linked-size").or_else(|| text_of(&headers, CONTENT_LENGTH.as_str()));
    let size = size.and_then(|text| text.parse().ok());
    Ok(Wanted { name: name.to_owned(), etag: etag.to_owned(), url, size, sha256 })
}

/// Fetches the file unless its blob is there.
pub(super) fn fetch(file: &Wanted, repo: &Repo, transfer: &Transfer, bars: &Bars) -> Result<()> {
    let blob = repo.blob(&file.etag);
    make_parent(&blob)?;
    let _lock = repo.lock(&file.etag)?;
    let is_whole = |found: fs::Metadata| found.is_file() && file.size.is_none_or(|size| size == found.len());
    if fs::metadata(&blob).is_ok_and(is_whole) {
        bars.total.inc(file.size.unwrap_or(0));
        return Ok(());
    }
    let mut part = Part::open(file, repo, bars)?;
    let was_resumed = part.have > 0;
    receive(&mut part, transfer)?;
    if was_resumed && !part.has_right_hash() {
        part.restart()?;
        receive(&mut part, transfer)?;
    }
    part.finish(&blob)
}

/// Appends until the file is complete, however often the connection breaks, as long as each one brings something.
fn receive(part: &mut Part, transfer: &Transfer) -> Result<()> {
    let mut stalls = 0;
    while part.file.size != Some(part.have) {
        let before = part.have;
        match receive_once(part, transfer) {
            Ok(()) => break,
            Err(Trouble::Final(error)) => return Err(error),
            Err(Trouble::Passing(why)) => {
                stalls = if part.have > before { 0 } else { stalls + 1 };
                if stalls > MOST_STALLS {
                    return Err(gave_up(&part.repo.id, &part.file.name, &why));
                }
                pause(stalls);
            }
        }
    }
    Ok(())
}

fn receive_once(part: &mut Part, transfer: &Transfer) -> Result<(), Trouble> {
    let Part { file, repo, .. } = *part;
    if file.sha256.is_none() && part.have > 0 {
        part.restart().map_err(Trouble::Final)?;
    }
    let mut response = transfer.get(&file.url, &repo.id, &file.name, part.have)?;
    let starts_at = match response.status().as_u16() {
        206 => text_of(response.headers(), CONTENT_RANGE.as_str()).and_then(range_start),
        416 => None,
        _ => Some(0),
    };
    if starts_at != Some(part.have) {
        part.restart().map_err(Trouble::Final)?;
        if starts_at != Some(0) {
            return Err(Trouble::Passing("the server cannot continue a partial file".to_owned()));
        }
    }
    let coming = text_of(response.headers(), CONTENT_LENGTH.as_str()).and_then(|text| text.parse::<u64>().ok());
    if let (Some(size), Some(coming)) = (file.size, coming) {
        let offered = part.have.saturating_add(coming);
        if offered != size {
            return Err(Trouble::Final(
                part.reject(format!("the Hub announces {size} bytes, the server sends {offered}")),
            ));
        }
    }
    let mut buffer = vec![0; 256 << 10];
    loop {
        transfer.check_stop()?;
        match response.read(&mut buffer) {
            Ok(0) if file.size.is_some_and(|size| part.have < size) => {
                return Err(Trouble::Passing("the connection ended early".to_owned()));
            }
            Ok(0) => return Ok(()),
            Ok(n) if file.size.is_some_and(|size| part.have + n as u64 > size) => {
                return Err(Trouble::Final(
                    part.reject("the server sends more bytes than the Hub announces".to_owned()),
                ));
            }
            Ok(n) => part.append(&buffer[..n]).map_err(Trouble::Final)?,
            Err(e) => return Err(Trouble::Passing(super::transfer::root_cause(&e))),
        }
    }
}

/// A blob in the making.
struct Part<'a> {
    file: &'a Wanted,
    repo: &'a Repo,
    path: PathBuf,
    out: File,
    have: u64,
    hash: Sha256,
    bar: ProgressBar,
    total: &'a ProgressBar,
}

impl<'a> Part<'a> {
    /// Opens what an earlier run left behind. Without a hash nothing could tell whether that is sound, so it starts anew.
    fn open(file: &'a Wanted, repo: &'a Repo, bars: &'a Bars) -> Result<Self> {
        let path = repo.blob(&format!("{}.incomplete", file.etag));
        let out = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let out = out.map_err(|e| repo.explain_write(&path, e))?;
        let bar = bars.add(file);
        let mut part = Part { file, repo, path, out, have: 0, hash: Sha256::new(), bar, total: &bars.total };
        let left = part.out.metadata().map_err(Error::io(&part.path))?.len();
        if file.sha256.is_none() || file.size.is_some_and(|size| left > size) {
            part.restart()?;
            return Ok(part);
        }
        let mut buffer = vec![0; 256 << 10];
        loop {
            match part.out.read(&mut buffer).map_err(Error::io(&part.path))? {
                0 => return Ok(part),
                n => part.count(&buffer[..n]),
            }
        }
    }

    fn restart(&mut self) -> Result<()> {
        let emptied = self.out.set_len(0).and_then(|()| self.out.seek(SeekFrom::Start(0)));
        emptied.map_err(|e| self.repo.explain_write(&self.path, e))?;
        self.total.set_position(self.total.position().saturating_sub(self.have));
        self.bar.set_position(0);
        self.have = 0;
        self.hash = Sha256::new();
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(|e| self.repo.explain_write(&self.path, e))?;
        self.count(bytes);
        Ok(())
    }

    fn count(&mut self, bytes: &[u8]) {
        self.hash.update(bytes);
        self.have += bytes.len() as u64;
        self.bar.inc(bytes.len() as u64);
        self.total.inc(bytes.len() as u64);
    }

    fn has_right_hash(&self) -> bool {
        let found = || self.hash.clone().finalize().iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        self.file.sha256.as_ref().is_none_or(|wanted| *wanted == found())
    }

    fn finish(self, blob: &Path) -> Result<()> {
        if !self.has_right_hash() {
            return Err(self.reject("its SHA-256 is not the one that the Hub announces".to_owned()));
        }
        // Renamed before its bytes are on the disk, a file could be whole by name and empty after a power cut.
        self.out.sync_all().map_err(|e| self.repo.explain_write(&self.path, e))?;
        fs::rename(&self.path, blob).map_err(|e| self.repo.explain_write(blob, e))?;
        self.bar.finish_and_clear();
        Ok(())
    }

    /// Throws the bytes away: a later run must not continue what is wrong already.
    fn reject(&self, why: String) -> Error {
        fs::remove_file(&self.path).ok();
        Error::Fetch(format!("{}: {} is damaged: {why}; it was thrown away, run again", self.repo.id, self.file.name))
    }
}

/// The bars on the terminal: one a file in work, and the total.
pub(super) struct Bars {
    all: MultiProgress,
    total: ProgressBar,
}

impl Bars {
    pub(super) fn new(id: &str, files: &[Wanted], visible: bool) -> Self {
        let bytes = files.iter().filter_map(|file| file.size).sum();
        let all = MultiProgress::with_draw_target(match visible {
            true => ProgressDrawTarget::stderr(),
            false => ProgressDrawTarget::hidden(),
        });
        if visible && all.is_hidden() {
            eprintln!("fetching {id}: {} files, {}", files.len(), HumanBytes(bytes));
        }
        let total = all.add(ProgressBar::new(bytes)).with_style(style()).with_message(id.to_owned());
        Bars { all, total }
    }

    fn add(&self, file: &Wanted) -> ProgressBar {
        let bar = ProgressBar::new(file.size.unwrap_or(0)).with_style(style()).with_message(file.name.clone());
        self.all.insert_before(&self.total, bar)
    }

    pub(super) fn finish(&self) {
        self.total.finish_and_clear();
    }
}

fn style() -> ProgressStyle {
    ProgressStyle::with_template("{msg:40!} {wide_bar} {bytes:>11} of {total_bytes:>11} {bytes_per_sec:>13} {eta:>4}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// Repeats a request that changes nothing until it works or is hopeless.
pub(super) fn insist<T>(id: &str, name: &str, mut request: impl FnMut() -> Result<T, Trouble>) -> Result<T> {
    let mut stalls = 0;
    loop {
        match request() {
            Ok(answer) => return Ok(answer),
            Err(Trouble::Final(error)) => return Err(error),
            Err(Trouble::Passing(why)) if stalls == MOST_STALLS => return Err(gave_up(id, name, &why)),
            Err(Trouble::Passing(_)) => stalls += 1,
        }
        pause(stalls);
    }
}

fn gave_up(id: &str, name: &str, why: &str) -> Error {
    Error::Fetch(format!("{id}: {name} could not be fetched ({why}); run again, it goes on where it stopped"))
}

/// A quarter second, doubled with each try that brought nothing.
fn pause(stalls: u32) {
    std::thread::sleep(Duration::from_millis(125 << stalls.min(6)));
}

fn text_of<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

fn bare_etag(text: &str) -> &str {
    text.trim().trim_start_matches("W/").trim_matches('"')
}

/// The first byte's place in `bytes 100-199/200`.
fn range_start(text: &str) -> Option<u64> {
    text.strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok()
}
