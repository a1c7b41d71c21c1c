//! `dylm plugins`: what is on the search path, told from the notes in the files. Nothing is opened, so this is safe with any file.

use super::{
    Done,
    printing::{Paint, json, line},
};
use crate::plugin::{library::refuse_writable, note::Note, registry::Registry};
use clap::Args;
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::ExitCode,
};

/// Flags of `dylm plugins`.
#[derive(Args)]
#[command(after_help = "\
Folders are searched in this order, and the first plugin that serves a model_type is used: --plugins, DYLM_PLUGINS, the folder
`plugins` beside the executable, the executable's own folder, the user's data folder. A plugin says what it is in a section of its
file, which is read without running it.")]
pub struct Plugins {
    /// Folder with plugins, searched before all others (may be repeated)
    #[arg(long, value_name = "DIR")]
    plugins: Vec<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A library file on the search path.
struct Listed {
    path: PathBuf,
    /// `None` for a library that is no plugin.
    note: Option<Note>,
    /// Why it is not used at all, in one sentence.
    refused: Option<String>,
    /// model_types for which an earlier file is used.
    shadowed: BTreeMap<String, PathBuf>,
}

impl Plugins {
    /// Runs the command.
    pub fn run(&self) -> Done {
        let registry = Registry::new(&self.plugins);
        let listed = list(&registry);
        if self.json {
            let files: Vec<Value> = listed.iter().map(Listed::json).collect();
            json(&json!({ "folders": registry.folders(), "plugins": files }))?;
            return Ok(ExitCode::SUCCESS);
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
        Ok(ExitCode::SUCCESS)
    }
}

fn list(registry: &Registry) -> Vec<Listed> {
    let mut serving: BTreeMap<String, PathBuf> = BTreeMap::new();
    let mut listed = Vec::new();
    for folder in registry.folders() {
        let mut here: Vec<Listed> = Registry::in_folder(folder)
            .into_iter()
            .map(|(path, note)| match note {
                Ok(note) => {
                    let writable = || refuse_writable(&path).err().map(|e| e.to_string());
                    let refused = note.refusal(&path).or_else(writable);
                    Listed { path, note: Some(note), refused, shadowed: BTreeMap::new() }
                }
                Err(why) => Listed { path, note: None, refused: Some(why.to_string()), shadowed: BTreeMap::new() },
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
        for (model_type, by) in &self.shadowed {
            text += &format!("\n    {model_type}: shadowed by {}", by.display());
        }
        text
    }
}
