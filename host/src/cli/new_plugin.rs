//! `dylm new-plugin NAME`: a crate with an architecture of one's own, which builds and speaks at once.

use super::{Done, printing::line};
use crate::{
    error::{Error, Result},
    plugin::registry::Registry,
    scaffold::Scaffold,
};
use clap::Args;
use std::{path::PathBuf, process::ExitCode};

/// Flags of `dylm new-plugin`.
#[derive(Args)]
#[command(after_help = "\
The crate needs nothing of dylm's sources: plugin-api, the words that architectures are written in, is written into it. It comes with
a model of a few KB to try it on, a test, a CI file, and a README.md that leads from here to a plugin in use.

  dylm new-plugin my_llama                   # a llama small enough to be read in a minute
  dylm new-plugin my_gemma --from gemma2     # any architecture that dylm has (`dylm plugins` lists them)")]
pub struct NewPlugin {
    /// The model_type that config.json will say; crate and library are called after it
    name: String,
    /// Begin with the source of this plugin or model_type, instead of a plain llama
    #[arg(long, value_name = "NAME")]
    from: Option<String>,
    /// The folder to make [default: ./NAME]
    #[arg(long, value_name = "DIR")]
    path: Option<PathBuf>,
    /// Depend on plugin-api in this folder, instead of writing a copy of it
    #[arg(long, value_name = "DIR")]
    plugin_api: Option<PathBuf>,
    /// Take the name even if a plugin that dylm finds serves it
    #[arg(long)]
    force: bool,
}

impl NewPlugin {
    /// Runs the command.
    pub fn run(&self) -> Done {
        if let Some(folder) = self.plugin_api.as_ref().filter(|folder| !folder.join("Cargo.toml").is_file()) {
            return Err(Error::Usage(format!("--plugin-api {}: there is no Cargo.toml in it", folder.display())));
        }
        let folder = self.path.clone().unwrap_or_else(|| PathBuf::from(&self.name));
        let scaffold =
            Scaffold { name: self.name.clone(), from: self.from.clone(), folder, plugin_api: self.plugin_api.clone() };
        self.refuse_served()?;
        scaffold.write()?;
        let folder = scaffold.folder.display();
        line(format_args!("{folder}: a plugin for model_type {:?}; now", self.name))?;
        line(format_args!("  cd {folder}"))?;
        line("  cargo build")?;
        line("  dylm generate --plugins target/debug --trust-plugin --model tiny --prompt hello")?;
        line(format_args!("{folder}/README.md leads on from there."))?;
        Ok(ExitCode::SUCCESS)
    }

    fn refuse_served(&self) -> Result<()> {
        let found = Registry::new(&[]).list();
        match found.iter().find(|found| found.note.model_types.contains(&self.name)) {
            Some(found) if !self.force => Err(Error::Usage(format!(
                "{} serves model_type {:?} already; take another name, or --force: `--plugins` then puts yours first",
                found.path.display(),
                self.name
            ))),
            _ => Ok(()),
        }
    }
}
