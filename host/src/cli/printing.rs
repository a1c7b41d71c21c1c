//! Standard output and error, as a command line should treat them: a reader who has had enough (`dylm .. | head -1`) is no failure, a
//! terminal gets no control characters that a model made up, and colour is for terminals whose user does not mind (<https://no-color.org>).

use crate::error::{Error, Result};
use std::io::{self, ErrorKind, IsTerminal, Write, stderr, stdout};

/// Writes a piece of generated text at once.
pub fn show(text: &str) -> Result<()> {
    let mut out = stdout();
    if !out.is_terminal() {
        return settle(out.write_all(text.as_bytes()).and_then(|()| out.flush()));
    }
    let clean: String = text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect();
    settle(out.write_all(clean.as_bytes()).and_then(|()| out.flush()))
}

/// Writes a line of dylm's own.
pub fn line(text: impl std::fmt::Display) -> Result<()> {
    let mut out = stdout();
    settle(writeln!(out, "{text}").and_then(|()| out.flush()))
}

/// Writes a value as JSON, for programs.
pub fn json(value: &serde_json::Value) -> Result<()> {
    line(format_args!("{value:#}"))
}

fn settle(written: io::Result<()>) -> Result<()> {
    match written {
        // Whoever read the text has had enough of it, which is no failure.
        Err(e) if e.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        other => other.map_err(Error::io("standard output")),
    }
}

/// What is painted.
#[derive(Clone, Copy)]
pub enum Paint {
    /// A failure.
    Red,
    /// What can be passed over.
    Dim,
    /// What to look at.
    Bold,
}

impl Paint {
    /// `text` for standard output.
    pub fn out(self, text: &str) -> String {
        self.over(text, stdout().is_terminal())
    }

    /// `text` for standard error.
    pub fn err(self, text: &str) -> String {
        self.over(text, stderr().is_terminal())
    }

    fn over(self, text: &str, terminal: bool) -> String {
        let unwanted = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
        if !terminal || unwanted {
            return text.to_owned();
        }
        let code = match self {
            Paint::Red => "1;31",
            Paint::Dim => "2",
            Paint::Bold => "1",
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }
}
