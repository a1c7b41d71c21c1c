//! A Hub id -> config.json and the headers of its weights, by HTTP ranges: kilobytes that tell what gigabytes would be.
//!
//! A server that knows no ranges sends the whole file; then the connection is closed once the header is through.

use super::{
    Failure,
    download::insist,
    in_parallel,
    listing::Listing,
    transfer::{Part, Transfer, Trouble, root_cause},
};
use crate::{
    config::GENERATION,
    error::{Error, Result},
    repo::{CONFIG_CAP, INDEX_CAP},
    source::Fetch,
    weights::{
        checkpoint::{Head, INDEX, is_shard},
        safetensors::header_end,
    },
};
use std::{
    io::Read,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

/// Most headers have room in it, so that one request a shard is enough.
const FIRST: u64 = 32 << 10;

/// Headers of one model, all together: those of the largest known take a tenth of it.
const MOST_BYTES: u64 = 256 << 20;

/// More shards than any model has.
const MOST_SHARDS: usize = 10_000;

/// What a repository's files say of themselves.
pub struct Heads {
    /// `owner/name`
    pub id: String,
    /// 40 hexadecimal digits.
    pub commit: String,
    /// The folder in the cache where `dylm pull` would put it.
    pub folder: PathBuf,
    /// config.json
    pub config: String,
    /// generation_config.json
    pub generation: Option<String>,
    /// model.safetensors.index.json
    pub index: Option<Vec<u8>>,
    /// The shards.
    pub shards: Vec<Head>,
    /// Bytes that were fetched for all this.
    pub fetched: u64,
}

impl Heads {
    /// Bytes of weights that a download would bring.
    pub fn weight_files_bytes(&self) -> u64 {
        self.shards.iter().fold(0, |sum: u64, shard| sum.saturating_add(shard.len))
    }
}

/// Fetches them.
pub(super) fn fetch(id: &str, listing: &Listing, folder: PathBuf, fetch: &Fetch) -> Result<Heads, Failure> {
    let names = listing.model_files(id)?;
    let shards: Vec<&str> = names.iter().copied().filter(|name| is_shard(name)).collect();
    if shards.is_empty() || shards.len() > MOST_SHARDS {
        return Err(
            Error::Fetch(format!("{id}: {} files of weights; a model has 1 to {MOST_SHARDS}", shards.len())).into()
        );
    }
    let peek = Peek { transfer: Transfer::new(fetch)?, id, commit: &listing.commit, fetched: AtomicU64::new(0) };
    let small = |name: &str, cap| names.contains(&name).then(|| peek.whole(name, cap)).transpose();
    let config = peek.text("config.json", small("config.json", CONFIG_CAP)?.unwrap_or_default())?;
    let generation = small(GENERATION, CONFIG_CAP)?.map(|bytes| peek.text(GENERATION, bytes)).transpose()?;
    let index = small(INDEX, INDEX_CAP)?;
    let shards = in_parallel(shards, &peek.transfer.stop, |name| peek.head(name))?;
    let fetched = peek.fetched.load(Ordering::Relaxed);
    Ok(Heads { id: id.to_owned(), commit: listing.commit.clone(), folder, config, generation, index, shards, fetched })
}

struct Peek<'a> {
    transfer: Transfer,
    id: &'a str,
    commit: &'a str,
    fetched: AtomicU64,
}

impl Peek<'_> {
    /// A small file.
    fn whole(&self, name: &str, cap: u64) -> Result<Vec<u8>> {
        let url = self.transfer.file_url(self.id, self.commit, name)?;
        insist(self.id, name, || {
            let Part { mut body, total, .. } = self.transfer.part(&url, self.id, name, 0..cap + 1)?;
            let mut bytes = Vec::new();
            body.by_ref().take(cap + 1).read_to_end(&mut bytes).map_err(|e| Trouble::Passing(root_cause(&e)))?;
            if bytes.len() as u64 > cap || total.is_some_and(|total| total > cap) {
                return Err(self.refuse(name, format!("larger than {} MB", cap >> 20)));
            }
            if total.is_some_and(|total| total != bytes.len() as u64) {
                return Err(Trouble::Passing("the connection ended early".to_owned()));
            }
            self.count(bytes.len())?;
            Ok(bytes)
        })
    }

    fn text(&self, name: &str, bytes: Vec<u8>) -> Result<String> {
        String::from_utf8(bytes).map_err(|e| {
            Error::Config(format!("{}/{name}: not UTF-8 at byte {}", self.id, e.utf8_error().valid_up_to()))
        })
    }

    /// A shard's header, and how long the shard is.
    fn head(&self, name: &str) -> Result<Head> {
        let url = self.transfer.file_url(self.id, self.commit, name)?;
        insist(self.id, name, || {
            let Part { mut body, start, total, url: direct } = self.transfer.part(&url, self.id, name, 0..FIRST)?;
            let Some(len) = total.filter(|_| start == 0) else {
                return Err(self.refuse(name, "the server does not say how long it is".to_owned()));
            };
            let mut bytes = Vec::new();
            read_to(&mut bytes, &mut body, 8.min(len))?;
            let end = header_end(&bytes, len, Path::new(&format!("{}/{name}", self.id))).map_err(Trouble::Final)?;
            // From a server that sends everything, the header is taken as it comes; any other has sent no more than it was asked for.
            let in_this_answer = if body.is_partial { end.min(FIRST) } else { end };
            read_to(&mut bytes, &mut body, in_this_answer)?;
            if (bytes.len() as u64) < end {
                let part = self.transfer.part(&direct, self.id, name, FIRST..end)?;
                if part.start != FIRST || part.total != Some(len) {
                    return Err(self.refuse(name, "the server sends another part than it was asked for".to_owned()));
                }
                let mut body = part.body;
                read_to(&mut bytes, &mut body, end)?;
            }
            self.count(bytes.len())?;
            Ok(Head { name: name.to_owned(), bytes, len })
        })
    }

    fn count(&self, bytes: usize) -> Result<(), Trouble> {
        let before = self.fetched.fetch_add(bytes as u64, Ordering::Relaxed);
        match before + bytes as u64 > MOST_BYTES {
            true => Err(self.refuse("its headers", format!("more than {} MB together", MOST_BYTES >> 20))),
            false => Ok(()),
        }
    }

    fn refuse(&self, name: &str, why: String) -> Trouble {
        Trouble::Final(Error::Fetch(format!("{}/{name}: {why}, so it cannot be looked at without a download", self.id)))
    }
}

/// Reads on until `bytes` has so many.
fn read_to(bytes: &mut Vec<u8>, body: &mut impl Read, wanted: u64) -> Result<(), Trouble> {
    let missing = wanted.saturating_sub(bytes.len() as u64);
    body.take(missing).read_to_end(bytes).map_err(|e| Trouble::Passing(root_cause(&e)))?;
    match bytes.len() as u64 >= wanted {
        true => Ok(()),
        false => Err(Trouble::Passing("the connection ended early".to_owned())),
    }
}
