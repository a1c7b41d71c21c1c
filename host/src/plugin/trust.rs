//! Which plugins may be opened: dylm's own, and of the others those that the user has agreed to, by the hash of their bytes.
//!
//! A plugin is dylm's own if it lies in the folder `plugins` beside the executable or in the executable's own folder: whoever can write
//! there can replace dylm itself. Everything else, the user's data folder included, is opened only while its SHA-256 stands in `trust.toml`
//! (see [`pins`]), so that one changed byte asks again.

pub mod pins;

use super::{file::PluginFile, note::Note};
use crate::error::{Error, Result};
use pins::{Pin, Pins};
use std::{
    borrow::Borrow,
    env, fmt,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

/// What becomes of a plugin that is not dylm's own.
#[derive(Clone, Default)]
pub enum Trust {
    /// It is opened if its hash is pinned. The default, also of programs that embed dylm: naming a folder in
    /// [`LoadOptions::plugins`](crate::LoadOptions::plugins) says where to look, not that whatever lies there may run.
    #[default]
    Pinned,
    /// As `Pinned`, and of one that is not, this is asked: on `true` its hash is pinned and it is opened.
    Ask(Arc<Asking>),
    /// It is opened if its SHA-256, in lower-case hexadecimal, is one of these. `trust.toml` is not looked at.
    Hashes(Arc<[String]>),
    /// It is opened, whatever it is. For programs that vouch for their plugins themselves, and for tests of plugins that are built anew
    /// all the time.
    All,
}

/// What a [`Trust::Ask`] calls.
pub type Asking = dyn Fn(&Unknown) -> Result<bool> + Send + Sync;

impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Trust::Pinned => "Pinned",
            Trust::Ask(_) => "Ask",
            Trust::Hashes(_) => "Hashes",
            Trust::All => "All",
        })
    }
}

/// A plugin that the user has not agreed to.
#[derive(Clone, Debug)]
pub struct Unknown {
    /// Its file.
    pub path: PathBuf,
    /// What it says of itself; anybody can write anything there.
    pub note: Note,
    /// The SHA-256 of its bytes, in hexadecimal.
    pub sha256: String,
    /// The consent to what this file was before.
    pub before: Option<Pin>,
}

impl Unknown {
    /// Why it is not opened, and what to do about that, in one sentence.
    pub fn refusal(&self) -> Error {
        let (path, hash) = (self.path.display(), &self.sha256);
        Error::plugin(match &self.before {
            Some(Pin { sha256: before, since, .. }) => format!(
                "{path}: has changed since it was trusted{} (its SHA-256 was {before} and is {hash}); if that was you, add --trust-plugin",
                since.as_deref().map(|date| format!(" on {date}")).unwrap_or_default()
            ),
            None => format!(
                "{path}: is not dylm's own and was not trusted yet (SHA-256 {hash}); if you trust where it came from, add --trust-plugin"
            ),
        })
    }
}

/// Where a plugin stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// dylm's own.
    BuiltIn,
    /// Its hash is pinned.
    Trusted(Pin),
    /// Neither it nor another file at its place was ever agreed to.
    Unknown,
    /// Another file at its place was.
    Changed(Pin),
}

impl Standing {
    /// Of a file. Pins are read and the file is hashed only where that can make a difference.
    pub fn of<P: Borrow<Pins>>(
        path: &Path,
        hash: impl FnOnce() -> Result<String>,
        pins: impl FnOnce() -> Result<P>,
    ) -> Result<Self> {
        if is_built_in(path) {
            return Ok(Standing::BuiltIn);
        }
        let pins = pins()?;
        let pins = pins.borrow();
        if pins.all().is_empty() {
            return Ok(Standing::Unknown);
        }
        let hash = hash()?;
        Ok(match (pins.of_hash(&hash), pins.of_path(path)) {
            (Some(pin), _) => Standing::Trusted(pin),
            (None, Some(before)) => Standing::Changed(before),
            (None, None) => Standing::Unknown,
        })
    }
}

impl Trust {
    /// Agrees to the plugin or says why not. Gives the hash that was agreed to; none where any would do.
    pub(crate) fn consent(&self, file: &PluginFile, note: &Note) -> Result<Option<String>> {
        let path = file.path();
        if matches!(self, Trust::All) || is_built_in(path) {
            return Ok(None);
        }
        let sha256 = file.sha256()?;
        if let Trust::Hashes(hashes) = self {
            let unknown =
                || Unknown { path: path.to_owned(), note: note.clone(), sha256: sha256.clone(), before: None };
            return if hashes.contains(&sha256) { Ok(Some(sha256)) } else { Err(unknown().refusal()) };
        }
        let before = match Standing::of(path, || Ok(sha256.clone()), Pins::read)? {
            Standing::BuiltIn | Standing::Trusted(_) => return Ok(Some(sha256)),
            Standing::Unknown => None,
            Standing::Changed(pin) => Some(pin),
        };
        let unknown = Unknown { path: path.to_owned(), note: note.clone(), sha256, before };
        match self {
            Trust::Ask(ask) if ask(&unknown)? => {
                Pins::pin(&unknown)?;
                Ok(Some(unknown.sha256))
            }
            _ => Err(unknown.refusal()),
        }
    }
}

/// The folders whose plugins are dylm's own, first the one that is searched first.
pub fn built_in_folders() -> Vec<PathBuf> {
    static OWN: OnceLock<Option<PathBuf>> = OnceLock::new();
    // Through links: a link to dylm may lie in a folder of anything.
    let own = || env::current_exe().ok()?.canonicalize().ok()?.parent().map(Path::to_owned);
    OWN.get_or_init(own).iter().flat_map(|own| [own.join("plugins"), own.clone()]).collect()
}

/// Whether a plugin, by the folder that it or a link to it lies in, is dylm's own.
pub fn is_built_in(path: &Path) -> bool {
    let folder = path.parent().and_then(|folder| folder.canonicalize().ok());
    folder.is_some_and(|folder| built_in_folders().iter().any(|own| own.canonicalize().is_ok_and(|own| own == folder)))
}
