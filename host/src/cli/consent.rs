//! The question that comes before a plugin which is not dylm's own: shown once, on a terminal, with what there is to judge by. Without a
//! terminal the answer is no, unless `--trust-plugin` has given it before.

use super::{Done, printing::Paint};
use crate::{
    error::Error,
    plugin::{
        first_opening,
        note::is_unseen,
        trust::{Trust, Unknown, pins::is_meant},
    },
};
use clap::Args;
use std::{
    io::{BufRead, IsTerminal, Write, stderr, stdin},
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
};

/// What the flags `--trust-plugin[=WHICH]` say; an empty one means whichever plugin this run opens.
pub fn policy(trusted: &[String]) -> Trust {
    let trusted = trusted.to_vec();
    Trust::Ask(Arc::new(move |unknown| {
        let Unknown { path, note, sha256, .. } = unknown;
        if trusted.iter().any(|what| what.is_empty() || is_meant(what, path, &note.name, sha256)) {
            return first_opening::try_out(unknown).map(|()| true);
        }
        if let Some(other) = trusted.first() {
            let file = path.display();
            return Err(Error::plugin(format!(
                "{file}: --trust-plugin={other} is neither its name ({}) nor its file nor its SHA-256 ({sha256}); say which you mean",
                note.name
            )));
        }
        if !stdin().is_terminal() || !stderr().is_terminal() {
            return Err(unknown.refusal());
        }
        match ask(unknown).map_err(Error::io("the terminal"))? {
            true => first_opening::try_out(unknown).map(|()| true),
            false => Err(Error::plugin(format!("{}: was not agreed to, so it was not opened", path.display()))),
        }
    }))
}

/// Shows the plugin and waits for a line; only y and yes are a yes.
fn ask(unknown: &Unknown) -> std::io::Result<bool> {
    let mut out = stderr();
    writeln!(out, "{}", text(unknown))?;
    write!(out, "{} [y/N] ", Paint::Bold.err("Open it, now and whenever its bytes are these?"))?;
    out.flush()?;
    let mut answer = String::new();
    stdin().lock().read_line(&mut answer)?;
    if !answer.ends_with('\n') {
        writeln!(out)?;
    }
    Ok(["y", "yes"].contains(&answer.trim().to_lowercase().as_str()))
}

fn text(unknown: &Unknown) -> String {
    let Unknown { path, note, sha256, before } = unknown;
    let heading = match before {
        None => "This plugin is not dylm's own, and you were not asked about it before.".to_owned(),
        Some(pin) => {
            let since = pin.since.as_deref().map(|date| format!(" on {date}")).unwrap_or_default();
            format!("This plugin has changed since you trusted it{since}; then its SHA-256 was\n  {}", pin.sha256)
        }
    };
    let path: String = path.display().to_string().chars().filter(|&c| !is_unseen(c)).collect();
    let url = Some(format!(", {}", note.url)).filter(|_| !note.url.is_empty()).unwrap_or_default();
    format!(
        "{}\n  file      {path}\n  plugin    {} {}, {}{url}\n  serves    {}\n  built by  {}\n  SHA-256   {sha256}\n\
         A plugin can do whatever you can: read, change and send your files. dylm does not confine it.",
        Paint::Bold.err(&heading),
        note.name,
        note.version,
        note.license,
        note.model_types.join(", "),
        note.rustc,
    )
}

/// The hidden command that opens a plugin for the first time.
#[derive(Args)]
pub struct Child {
    folder: PathBuf,
}

impl Child {
    /// Runs the command.
    pub fn run(&self) -> Done {
        first_opening::child(&self.folder).map(|()| ExitCode::SUCCESS)
    }
}
