//! `dylm plugins`: what is on the search path, told from the notes in the files. Nothing is opened, so this is safe with any file.

use super::{
    Done,
    printing::{Paint, json, line},
};
use crate::{
    error::{Error, Result},
    plugin::{
        file::PluginFile,
        note::Note,
        permissions::refuse_others,
        registry::Registry,
        trust::{
            Standing,
            pins::{self, Pin, Pins},
        },
    },
};
use clap::Args;
use rayon::prelude::*;
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::LazyLock,
};

/// Flags of `dylm plugins`.
#[derive(Args)]
#[command(after_help = "\
Folders are searched in this order, and the first plugin that serves a model_type is used: --plugins, DYLM_PLUGINS, the folder \
`plugins` beside the executable, the executable's own folder, the user's data folder. A plugin says what it is in a section of its \
file, which is read without running it.

Plugins beside the executable are dylm's own. Any other is opened only once you have agreed to it, on a terminal or with \
--trust-plugin, and asks again when a byte of it has changed. What you agreed to is kept in trust.toml, in your settings folder or \
where DYLM_TRUST says.")]
pub struct Plugins {
    /// Folder with plugins, searched before all others (may be repeated)
    #[arg(long, value_name = "DIR")]
    plugins: Vec<PathBuf>,
    /// Take back the trust in a plugin: its file, its name or its SHA-256
    #[arg(long, value_name = "WHICH")]
    forget: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A library file on the search path.
pub(super) struct Listed {
    path: PathBuf,
    /// `None` for a library that is no plugin.
    note: Option<Note>,
    /// Why it is not used at all, in one sentence.
    refused: Option<String>,
    /// model_types for which an earlier file is used.
    shadowed: BTreeMap<String, PathBuf>,
    /// Whether it may be opened; `None` for what is refused anyway, or where `trust.toml` cannot be read.
    standing: Option<Standing>,
}

impl Plugins {
    /// Runs the command.
    pub fn run(&self) -> Done {
        if let Some(what) = &self.forget {
            return forget(what, self.json);
        }
        let registry = Registry::new(&self.plugins);
        let mut listed = list(&registry);
        // What else there is to say of plugins does not hang on it.
        let pins = judge(&mut listed);
        if self.json {
            let files: Vec<Value> = listed.iter().map(Listed::json).collect();
            let trust = pins::file().ok();
            json(&json!({ "folders": registry.folders(), "trust_file": trust, "plugins": files }))?;
            return pins.map(|()| ExitCode::SUCCESS);
        }
        for folder in registry.folders() {
            line(Paint::Bold.out(&folder.display().to_string()))?;
            let mut files = listed.iter().filter(|file| file.path.parent() == Some(folder)).peekable();
            if files.peek().is_none() {
                line(Paint::Dim.out("  no plugins"))?;
            }
            for file in files {
                line(file.text())?;
            }
        }
        if registry.folders().is_empty() {
            line("No folder of the search path exists; name one with --plugins.")?;
        }
        pins.map(|()| ExitCode::SUCCESS)
    }
}

/// Takes consents back and says which.
fn forget(what: &str, as_json: bool) -> Done {
    let forgotten = Pins::forget(what)?;
    if forgotten.is_empty() {
        return Err(Error::plugin(format!(
            "{what}: no plugin of this file, name or SHA-256 is trusted; `dylm plugins` shows which are"
        )));
    }
    if as_json {
        let pins = forgotten.iter().map(|Pin { path, sha256, .. }| json!({ "path": path, "sha256": sha256 }));
        json(&json!({ "forgotten": pins.collect::<Vec<_>>() }))?;
    } else {
        forgotten.iter().try_for_each(|pin| line(format_args!("no longer trusted: {}", pin.path.display())))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Where each plugin stands. The trust file is read, and files hashed, only if there are plugins that are not dylm's own.
fn judge(listed: &mut [Listed]) -> Result<()> {
    let pins = LazyLock::new(|| Pins::read().map_err(|e| e.to_string()));
    let read = || pins.as_ref().map_err(Error::plugin);
    listed.par_iter_mut().filter(|file| file.refused.is_none()).try_for_each(|file| {
        let hash = || PluginFile::open(&file.path)?.sha256();
        file.standing = Some(Standing::of(&file.path, hash, read)?);
        Ok(())
    })
}

/// Every library on the search path, judged by what can be read of it.
pub(super) fn list(registry: &Registry) -> Vec<Listed> {
    let mut serving: BTreeMap<String, PathBuf> = BTreeMap::new();
    let mut listed = Vec::new();
    for folder in registry.folders() {
        let mut here: Vec<Listed> = Registry::in_folder(folder)
            .into_par_iter()
            .map(|(path, note)| match note {
                Ok(note) => {
                    let writable = || refuse_others(&path, "no plugin is opened from it").err().map(|e| e.to_string());
                    let refused = note.refusal(&path).or_else(writable);
                    Listed { path, note: Some(note), refused, shadowed: BTreeMap::new(), standing: None }
                }
                Err(why) => {
                    let refused = Some(why.to_string());
                    Listed { path, note: None, refused, shadowed: BTreeMap::new(), standing: None }
                }
            })
            .collect();
        let mut claimants: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (index, file) in here.iter().enumerate().filter(|(_, file)| file.refused.is_none()) {
            file.types().iter().for_each(|t| claimants.entry(t.clone()).or_default().push(index));
        }
        for (model_type, files) in claimants {
            let paths: Vec<PathBuf> = files.iter().map(|&i| here[i].path.clone()).collect();
            if let Some(earlier) = serving.get(&model_type) {
                files.iter().for_each(|&i| drop(here[i].shadowed.insert(model_type.clone(), earlier.clone())));
            } else if let [first, second, ..] = paths.as_slice() {
                // Two in one folder are an order that nobody chose: the model is refused until one of them goes.
                let (a, b) = (first.display(), second.display());
                let why = format!("{a} and {b} both serve model_type {model_type:?}: remove one of them");
                files.iter().for_each(|&i| here[i].refused = Some(why.clone()));
            }
            serving.entry(model_type).or_insert_with(|| paths[0].clone());
        }
        listed.append(&mut here);
    }
    listed
}

impl Listed {
    fn types(&self) -> &[String] {
        self.note.as_ref().map_or(&[], |note| &note.model_types)
    }

    fn json(&self) -> Value {
        let mut object = json!({ "path": self.path, "refused": self.refused, "shadowed": self.shadowed });
        if let (Some(note), Value::Object(object)) = (&self.note, &mut object) {
            object.insert("note".into(), serde_json::to_value(note).unwrap_or_default());
        }
        object["trust"] = match &self.standing {
            None => Value::Null,
            Some(Standing::BuiltIn) => json!({ "state": "built-in" }),
            Some(Standing::Unknown) => json!({ "state": "unknown" }),
            Some(Standing::Trusted(pin)) => json!({ "state": "trusted", "since": pin.since, "sha256": pin.sha256 }),
            Some(Standing::Changed(pin)) => json!({ "state": "changed", "since": pin.since, "was": pin.sha256 }),
        };
        object
    }

    fn text(&self) -> String {
        let name = self.path.file_name().map(Path::new).unwrap_or(&self.path).display();
        let Some(note) = &self.note else {
            return Paint::Dim
                .out(&format!("  {name}  not a plugin\n    {}", self.refused.as_deref().unwrap_or_default()));
        };
        let Note { name: package, version, license, abi, rustc, model_types, .. } = note;
        let mut text = format!(
            "  {name}  {package} {version}, {license}, ABI {abi}, {rustc}\n    serves {}",
            model_types.join(", ")
        );
        if let Some(why) = &self.refused {
            text += &format!("\n    {} {why}", Paint::Red.out("refused:"));
        }
        match &self.standing {
            None | Some(Standing::BuiltIn) => {}
            Some(Standing::Trusted(pin)) => text += &format!("\n    trusted since {}", since(pin)),
            Some(Standing::Unknown) => {
                text += &format!("\n    {}: opening it asks first", Paint::Bold.out("not trusted yet"));
            }
            Some(Standing::Changed(pin)) => {
                let changed = Paint::Red.out("changed");
                text += &format!("\n    {changed} since it was trusted ({}): opening it asks again", since(pin));
            }
        }
        for (model_type, by) in &self.shadowed {
            text += &format!("\n    {model_type}: shadowed by {}", by.display());
        }
        text
    }
}

fn since(pin: &Pin) -> &str {
    pin.since.as_deref().unwrap_or("a day that trust.toml does not say")
}
