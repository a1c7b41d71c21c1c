//! The command line: words to calls, errors to exit codes (0 done, 1 failed, 2 wrong usage, 130 interrupted). Flags are called what
//! mlx-lm calls them.

pub mod bench;
pub mod cache_prompt;
pub mod chat;
pub mod check;
pub mod consent;
pub mod conversation;
pub mod facts;
pub mod flags;
pub mod generate;
pub mod inspect;
pub mod interrupt;
pub mod lines;
pub mod new_model;
pub mod new_plugin;
pub mod plan;
pub mod plugins;
pub mod printing;
pub mod pull;

use crate::error::{Error, Result};
use clap::{Parser, Subcommand};
use printing::Paint;
use std::{
    io::{Read, stdin},
    process::ExitCode,
};

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
    /// Talk with a model
    Chat(Box<chat::Chat>),
    /// Read a long prompt once and keep the model's memory of it in a file
    #[command(alias = "cache_prompt")]
    CachePrompt(Box<cache_prompt::CachePrompt>),
    /// Fetch a model and print where it is
    Pull(pull::Pull),
    /// Tell what a model is and whether it fits its plugin, without reading its weights
    Inspect(Box<inspect::Inspect>),
    /// Tell what a model would need, from its headers alone, before it is downloaded
    Plan(Box<plan::PlanModel>),
    /// List the plugins that are found, and what is wrong with those that are not used
    Plugins(plugins::Plugins),
    /// Try a plugin out and tell its author what to mend
    Check(Box<check::Check>),
    #[command(name = crate::plugin::check::catalog::COMMAND, hide = true)]
    CheckChild(check::Child),
    /// Write a crate with a plugin of your own, which builds and generates at once
    NewPlugin(new_plugin::NewPlugin),
    #[command(name = crate::plugin::first_opening::COMMAND, hide = true)]
    FirstOpening(consent::Child),
    /// Make up small weights for a config.json, as its plugin asks for them
    NewModel(new_model::NewModel),
    /// Measure the speed of a model, or of the boundary between dylm and plugins
    #[command(alias = "benchmark")]
    Bench(Box<bench::Bench>),
}

/// Runs the command line.
pub fn main() -> ExitCode {
    keep_pages();
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Generate(generate) => generate.run(),
        Command::Chat(chat) => chat.run(),
        Command::CachePrompt(cache_prompt) => cache_prompt.run(),
        Command::Pull(pull) => pull.run(),
        Command::Inspect(inspect) => inspect.run(),
        Command::Plan(plan) => plan.run(),
        Command::Plugins(plugins) => plugins.run(),
        Command::Check(check) => check.run(),
        Command::CheckChild(child) => child.run(),
        Command::NewPlugin(new_plugin) => new_plugin.run(),
        Command::FirstOpening(child) => child.run(),
        Command::NewModel(new_model) => new_model.run(),
        Command::Bench(bench) => bench.run(),
    };
    match result {
        Ok(code) => code,
        Err(e) => report(&e, cli.debug),
    }
}

/// A prompt's activations are megabytes that each op takes and gives back: glibc would return them to the system, and get them anew, a page
/// at a time.
fn keep_pages() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: settings of the allocator, before there are other threads.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 256 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 256 << 20);
    }
}

fn report(e: &Error, debug: bool) -> ExitCode {
    eprintln!("{} {e}", Paint::Red.err("error:"));
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

/// A prompt: itself, with \n and \t as a shell user types them, or by `-` what comes from standard input.
fn text_or_stdin(prompt: &str) -> Result<String> {
    if prompt != "-" {
        return Ok(prompt.replace("\\n", "\n").replace("\\t", "\t"));
    }
    let mut text = String::new();
    stdin().read_to_string(&mut text).map_err(Error::io("standard input"))?;
    Ok(text)
}
