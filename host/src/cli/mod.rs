//! The command line: words to calls, errors to exit codes (0 done, 1 failed, 2 wrong usage, 130 interrupted). Flags are called what
//! mlx-lm calls them.

pub mod flags;
pub mod generate;
pub mod interrupt;
pub mod pull;

use crate::error::{Error, Result};
use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Generates text with language models whose architectures are plugins.
#[derive(Parser)]
#[command(name = "dylm", version, about, max_term_width = 100, arg_required_else_help = true)]
struct Cli {
    /// Print the long form of errors, and what dylm does
    #[arg(long, global = true)]
    debug: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Continue a prompt
    Generate(Box<generate::Generate>),
}

/// Runs the command line.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Generate(generate) => generate.run(),
    };
    match result {
        Ok(code) => code,
        Err(e) => report(&e, cli.debug),
    }
}

fn report(e: &Error, debug: bool) -> ExitCode {
    eprintln!("error: {e}");
    if let Some(detail) = e.detail() {
        if debug {
            eprintln!("\n{detail}");
        } else {
            eprintln!("(--debug tells more)");
        }
    }
    ExitCode::from(if matches!(e, Error::Usage(_)) { 2 } else { 1 })
}

/// What a command ends with when nothing went wrong.
pub type Done = Result<ExitCode>;
