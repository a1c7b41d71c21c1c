//! Every way dylm can fail, each as one sentence for the person at the terminal: subject, what is wrong, cure.
//! Long texts that only a developer reads (a layout report, a backtrace) travel in `detail` and show up with `--debug`.

use std::path::{Path, PathBuf};

/// What every fallible function of this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure, sorted by the part of the journey in which it happened. The text is already complete: print it with `{}`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The request itself makes no sense: a flag's value, a combination of flags.
    #[error("{0}")]
    Usage(String),
    /// Fetching a model: the Hub, the network, the cache, a Python package.
    #[error("{0}")]
    Fetch(String),
    /// config.json and its relatives.
    #[error("{0}")]
    Config(String),
    /// Finding, opening or running an architecture plugin.
    #[error("{text}")]
    Plugin {
        /// The sentence.
        text: String,
        /// The long form, for `--debug`.
        detail: Option<String>,
    },
    /// Tensor files: damaged, incomplete, or not what the architecture asks for.
    #[error("{0}")]
    Weights(String),
    /// LoRA, DoRA or full adapters.
    #[error("{0}")]
    Adapter(String),
    /// tokenizer.json, the chat template.
    #[error("{0}")]
    Tokenizer(String),
    /// Running the model: an op that failed, logits that are not finite, a cache that does not fit.
    #[error("{0}")]
    Generate(String),
    /// A file that could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A device's own complaint (out of memory, no driver).
    #[error("{0}")]
    Device(String),
}

impl Error {
    /// A plugin failure without a long form.
    pub fn plugin(text: impl Into<String>) -> Self {
        Error::Plugin { text: text.into(), detail: None }
    }

    /// Turns a system error about `path` into one sentence that names it.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Error::Io { path, source }
    }

    /// The long form, if there is one.
    pub fn detail(&self) -> Option<&str> {
        match self {
            Error::Plugin { detail, .. } => detail.as_deref(),
            _ => None,
        }
    }
}

impl From<candle_core::Error> for Error {
    fn from(e: candle_core::Error) -> Self {
        Error::Device(e.to_string())
    }
}
