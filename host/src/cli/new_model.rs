//! `dylm new-model FOLDER`: weights for a config.json that nobody has trained, so that an architecture can be tried at once.

use super::{Done, consent, printing::line};
use crate::{plugin::registry::Registry, scaffold::model};
use clap::Args;
use std::{path::PathBuf, process::ExitCode};

/// Flags of `dylm new-model`.
#[derive(Args)]
#[command(after_help = "\
The plugin is asked which tensors it wants for the config.json in FOLDER, and these are written with made-up numbers, the same for the same
seed; a tokenizer too, if FOLDER has none. It is for small configurations: at most 16 million numbers.

  dylm new-model tiny --plugins target/debug --trust-plugin --force")]
pub struct NewModel {
    /// A folder with a config.json
    folder: PathBuf,
    /// Folder with plugins, searched before all others (may be repeated)
    #[arg(long, value_name = "DIR")]
    plugins: Vec<PathBuf>,
    /// Open a plugin that is not dylm's own without asking, and remember its SHA-256; with a value, the one of that name, file or hash
    #[arg(long, value_name = "WHICH", num_args = 0..=1, require_equals = true, default_missing_value = "")]
    trust_plugin: Vec<String>,
    /// Where the numbers come from
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Write over a model.safetensors that is there
    #[arg(long)]
    force: bool,
}

impl NewModel {
    /// Runs the command.
    pub fn run(&self) -> Done {
        let registry = Registry::new(&self.plugins).trusting(consent::policy(&self.trust_plugin));
        let tensors = model::write(&self.folder, &registry, self.seed, self.force)?;
        line(format_args!(
            "{}: {tensors} tensors of made-up numbers",
            self.folder.join("model.safetensors").display()
        ))?;
        Ok(ExitCode::SUCCESS)
    }
}
