//! `dylm pull MODEL`: brings a model onto this disk and prints where it is, for scripts and for the other commands' `--model`.

use std::io::Write;

use crate::error::{Error, Result};
use crate::source::{self, Fetch};

/// Fetches `spec` (see [`source::resolve`]) and prints the path of the folder or GGUF file, one line on stdout.
///
/// # Errors
/// Those of [`source::resolve`].
pub fn run(spec: Option<&str>, fetch: &Fetch) -> Result<()> {
    let found = source::resolve(spec, fetch)?;
    writeln!(std::io::stdout(), "{}", found.files.path().display()).map_err(Error::io("standard output"))
}
