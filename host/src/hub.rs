//! Turns a Hub id and a revision into a local snapshot folder, fetching only what is missing.
//! The cache is the one of Python's huggingface_hub, in both directions. `hf-hub` resolves the revision and lists the files;
//! the transfer itself is ours, because it must resume, check every byte it keeps, and trust no name that a server sends.

mod cache;
mod download;
mod heads;
mod listing;
mod names;
mod transfer;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};
use crate::source::{Fetch, Files, Source};
use cache::Repo;
use download::{Bars, Wanted};
use listing::Listing;
use transfer::Transfer;

pub use heads::Heads;
pub use names::{is_model_file, is_model_id, is_plain_relative};

/// Where models come from unless `HF_ENDPOINT` says otherwise.
pub const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// The Hub limits connections, and a disk gains nothing from more.
const PARALLEL_TRANSFERS: usize = 4;

/// Why there is no snapshot. The first kind is worth another source, the second is for the user to solve.
#[derive(Debug)]
pub enum Failure {
    /// The Hub could not be asked (network, or it is out of order, or we are offline) and the cache has no full copy.
    Unreachable(String),
    /// Everything else.
    Final(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Final(error)
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Unreachable(why) => Error::Fetch(why),
            Failure::Final(error) => error,
        }
    }
}

/// Brings `id` (`owner/name`) at `fetch.revision` onto this disk and returns its snapshot folder.
///
/// # Errors
/// [`Failure`], each with one sentence.
pub fn snapshot(id: &str, fetch: &Fetch) -> Result<Source, Failure> {
    let revision = plain_revision(fetch)?;
    let repo = Repo::new(&fetch.cache_dir, id);
    if fetch.offline {
        return repo.cached(revision).map_err(|gap| {
            Failure::Unreachable(format!(
                "{id}@{revision}: {gap}, and offline mode (HF_HUB_OFFLINE) forbids fetching it"
            ))
        });
    }
    match listing::list(id, revision, fetch) {
        Ok(listing) => Ok(complete(&repo, revision, &listing, fetch)?),
        Err(Failure::Unreachable(why)) => repo.cached_instead(revision, why),
        Err(failure) => Err(failure),
    }
}

/// A model on the Hub: in the cache as a whole, or as much of it as its headers tell.
pub enum Found {
    /// Nothing has to be fetched.
    Here(Source),
    /// Only headers were.
    There(Box<Heads>),
}

/// What `id` at `fetch.revision` is, without its weights. Nothing is written to the cache.
///
/// # Errors
/// [`Failure`], each with one sentence.
pub fn peek(id: &str, fetch: &Fetch) -> Result<Found, Failure> {
    if fetch.offline {
        return snapshot(id, fetch).map(Found::Here);
    }
    let revision = plain_revision(fetch)?;
    let repo = Repo::new(&fetch.cache_dir, id);
    match listing::list(id, revision, fetch) {
        Ok(listing) => {
            let folder = repo.snapshot(&listing.commit);
            match cache::find_gap(&folder) {
                None => Ok(Found::Here(repo.source(folder, &listing.commit))),
                Some(_) => heads::fetch(id, &listing, folder, fetch).map(|heads| Found::There(heads.into())),
            }
        }
        Err(Failure::Unreachable(why)) => repo.cached_instead(revision, why).map(Found::Here),
        Err(failure) => Err(failure),
    }
}

fn plain_revision(fetch: &Fetch) -> Result<&str> {
    let revision = fetch.revision.as_deref().unwrap_or("main");
    match is_plain_relative(revision) {
        true => Ok(revision),
        false => Err(Error::Usage(format!("{revision:?} is not the name of a branch, tag or commit"))),
    }
}

/// Adds to the cache what `listing` names and the cache lacks. The branch is noted last: a ref never leads to a partial copy.
fn complete(repo: &Repo, revision: &str, listing: &Listing, fetch: &Fetch) -> Result<Source> {
    let id = &repo.id;
    let names = listing.model_files(id)?;
    let folder = repo.snapshot(&listing.commit);
    let missing: Vec<&str> = names.into_iter().filter(|name| !folder.join(name).exists()).collect();
    if !missing.is_empty() {
        let transfer = Transfer::new(fetch)?;
        let wanted: Vec<Wanted> =
            in_parallel(missing, &transfer.stop, |name| download::ask(&transfer, id, &listing.commit, name))?;
        let bars = Bars::new(id, &wanted, fetch.progress);
        // Weights come last, so that a folder with all its weights has everything else too, even after a power cut.
        let (weights, rest): (Vec<_>, Vec<_>) = wanted.iter().partition(|file| file.name.ends_with(".safetensors"));
        for group in [rest, weights] {
            in_parallel(group, &transfer.stop, |file| {
                download::fetch(file, repo, &transfer, &bars)?;
                repo.link(&listing.commit, &file.name, &file.etag)
            })?;
        }
        bars.finish();
    }
    repo.write_ref(revision, &listing.commit)?;
    Ok(repo.source(folder, &listing.commit))
}

/// Runs `work` on every job, a few at a time. The first error ends it: `stop` is set, and no further job starts.
fn in_parallel<J: Send, T: Send>(
    jobs: Vec<J>,
    stop: &AtomicBool,
    work: impl Fn(J) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let total = jobs.len();
    let queue = Mutex::new(jobs.into_iter().enumerate().collect::<VecDeque<_>>());
    let done = Mutex::new(Vec::with_capacity(total));
    let take = || if stop.load(Ordering::Relaxed) { None } else { queue.lock().ok()?.pop_front() };
    let run = || {
        while let Some((place, job)) = take() {
            let result = work(job);
            let is_error = result.is_err();
            done.lock().map(|mut done| done.push((place, result))).ok();
            if is_error {
                stop.store(true, Ordering::Relaxed);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..PARALLEL_TRANSFERS.min(total) {
            scope.spawn(run);
        }
    });
    let done = done.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    // Still in the order of time: the first error is the reason, later ones its consequence.
    let mut done = done.into_iter().map(|(place, result)| Ok((place, result?))).collect::<Result<Vec<_>>>()?;
    done.sort_by_key(|(place, _)| *place);
    Ok(done.into_iter().map(|(_, value)| value).collect())
}

impl Repo {
    fn source(&self, folder: PathBuf, commit: &str) -> Source {
        Source { files: Files::Folder(folder), name: self.id.clone(), revision: Some(commit.to_owned()) }
    }

    /// The full copy in the cache, where the Hub cannot be asked.
    fn cached_instead(&self, revision: &str, why: String) -> Result<Source, Failure> {
        match self.cached(revision) {
            Ok(source) => {
                eprintln!("{why}; using the copy in the cache");
                Ok(source)
            }
            Err(gap) => Err(Failure::Unreachable(format!("{why}, and {gap}"))),
        }
    }

    /// The full copy in the cache, or what is missing, as a clause.
    fn cached(&self, revision: &str) -> Result<Source, String> {
        let commit = self.read_ref(revision).ok_or("the cache has no copy")?;
        let folder = self.snapshot(&commit);
        match cache::find_gap(&folder) {
            None => Ok(self.source(folder, &commit)),
            Some(gap) => Err(format!("the copy in the cache lacks {gap}")),
        }
    }
}
