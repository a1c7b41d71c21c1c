//! model_type -> plugin file. The search path is explicit, its first match wins, and nothing on it is run before it is chosen.
//!
//! Searched: `--plugins DIR`, `DYLM_PLUGINS`, the folder `plugins` beside the executable, the executable's own folder (where cargo puts
//! workspace plugins), the user's data folder. Never the working directory, never the model's folder: a downloaded model opens no library.

use super::{
    note::Note,
    trust::{self, Trust},
};
use crate::{
    config::{Config, is_model_type},
    error::{Error, Result},
};
use rayon::prelude::*;
use std::{
    env::{self, consts},
    path::{Path, PathBuf},
};

/// A plugin file with what it says of itself.
#[derive(Clone, Debug)]
pub struct Found {
    /// The file, absolute.
    pub path: PathBuf,
    /// Its note.
    pub note: Note,
    /// Whether it may be opened, should it not be dylm's own.
    pub trust: Trust,
}

/// The folders to search, in order.
#[derive(Clone, Debug)]
pub struct Registry {
    folders: Vec<PathBuf>,
    /// Folders that the user named and that are none.
    missing: Vec<PathBuf>,
    trust: Trust,
}

impl Registry {
    /// The search path; `first` is `--plugins`.
    pub fn new(first: &[PathBuf]) -> Self {
        let mut folders: Vec<PathBuf> = first.to_vec();
        folders.extend(env::var_os("DYLM_PLUGINS").iter().flat_map(env::split_paths));
        folders.extend(trust::built_in_folders());
        folders.extend(data_folder());
        // Absolute paths only: dlopen searches for a bare name, and the working directory may change.
        let mut absolute: Vec<PathBuf> = Vec::new();
        for folder in folders.into_iter().filter_map(|f| f.canonicalize().ok()).filter(|f| f.is_dir()) {
            if !absolute.contains(&folder) {
                absolute.push(folder);
            }
        }
        let missing = first.iter().filter(|folder| !folder.is_dir()).cloned().collect();
        Registry { folders: absolute, missing, trust: Trust::default() }
    }

    /// One folder alone, in place of the search path.
    pub fn of_folder(folder: &Path) -> Self {
        Registry { folders: vec![folder.to_owned()], missing: Vec::new(), trust: Trust::default() }
    }

    /// The same, where `trust` says what becomes of plugins that are not dylm's own.
    pub fn trusting(self, trust: Trust) -> Self {
        Registry { trust, ..self }
    }

    fn found(&self, path: PathBuf, note: Note) -> Found {
        Found { path, note, trust: self.trust.clone() }
    }

    /// The folders that exist, in order of search.
    pub fn folders(&self) -> &[PathBuf] {
        &self.folders
    }

    /// Every plugin on the path, in order; files that are none of ours are passed over.
    pub fn list(&self) -> Vec<Found> {
        self.folders
            .iter()
            .flat_map(|folder| {
                Self::in_folder(folder).into_iter().filter_map(|(path, note)| Some(self.found(path, note.ok()?)))
            })
            .collect()
    }

    /// Every library file of a folder with its note, or why it has none, by name.
    pub fn in_folder(folder: &Path) -> Vec<(PathBuf, Result<Note>)> {
        let entries = folder.read_dir().into_iter().flatten().flatten().map(|e| e.path());
        let is_library = |path: &PathBuf| {
            let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            name.starts_with(consts::DLL_PREFIX) && name.ends_with(consts::DLL_SUFFIX)
        };
        let mut files: Vec<PathBuf> = entries.filter(is_library).collect();
        files.sort();
        files.into_par_iter().map(|path| (path.clone(), Note::read(&path))).collect()
    }

    /// The plugin for a model. A wrapper may hold text models of several architectures; a plugin for one of these serves both names
    /// with a dot between them, `mistral3.mistral4`, and comes before the wrapper's own.
    pub fn resolve_for(&self, config: &Config) -> Result<Found> {
        let text = config.get("text_model_type").and_then(|text| text.as_str());
        let both = text.map(|text| format!("{}.{text}", config.model_type));
        let served = |name: &String| self.list().iter().any(|found| found.note.model_types.contains(name));
        self.resolve(both.filter(served).as_ref().unwrap_or(&config.model_type))
    }

    /// The plugin that serves `model_type`.
    pub fn resolve(&self, model_type: &str) -> Result<Found> {
        if !is_model_type(model_type) {
            return Err(Error::Config(format!(
                "config.json: model_type {model_type:?} is no name; letters, digits, _ - and . may stand in it"
            )));
        }
        if let Some(folder) = self.missing.first() {
            return Err(Error::Usage(format!("--plugins {}: there is no such folder", folder.display())));
        }
        let mut refused = None;
        for folder in &self.folders {
            let mut claimants = Vec::new();
            for (path, note) in Self::in_folder(folder) {
                match note {
                    Ok(note) if note.model_types.iter().any(|t| t == model_type) => match note.refusal(&path) {
                        None => claimants.push(self.found(path, note)),
                        Some(why) => refused = refused.or(Some(why)),
                    },
                    Err(why) if stem(&path) == file_stem(model_type) => refused = refused.or(Some(why.to_string())),
                    _ => {}
                }
            }
            if let [first, second, ..] = claimants.as_slice() {
                let (a, b) = (first.path.display(), second.path.display());
                return Err(Error::plugin(format!(
                    "{a} and {b} both serve model_type {model_type:?}: remove one of them"
                )));
            }
            if let Some(found) = claimants.pop() {
                return Ok(found);
            }
        }
        Err(Error::plugin(refused.unwrap_or_else(|| self.unknown(model_type))))
    }

    fn unknown(&self, model_type: &str) -> String {
        let mut known: Vec<String> = self.list().into_iter().flat_map(|f| f.note.model_types).collect();
        known.sort();
        known.dedup();
        let nearest = match known.is_empty() {
            true => "no plugin is installed".to_owned(),
            false => format!("the nearest of those that have one are {}", nearest(known, model_type)),
        };
        let folders: Vec<String> = self.folders.iter().map(|f| f.display().to_string()).collect();
        let name = format!("{}{}{}", consts::DLL_PREFIX, file_stem(model_type), consts::DLL_SUFFIX);
        format!(
            "no plugin serves model_type {model_type:?}; {nearest}; looked in {}; to add one, put {name} into one of these folders or name its folder with --plugins",
            folders.join(", ")
        )
    }
}

/// The file stem that a model_type's library usually has: lower case, `-` and `.` become `_`.
pub fn file_stem(model_type: &str) -> String {
    model_type.to_lowercase().replace(['-', '.'], "_")
}

fn stem(path: &Path) -> &str {
    let name = path.file_stem().and_then(|n| n.to_str()).unwrap_or_default();
    name.strip_prefix(consts::DLL_PREFIX).unwrap_or(name)
}

/// The user's own plugins.
pub fn data_folder() -> Option<PathBuf> {
    let home = env::var_os("HOME").or(env::var_os("USERPROFILE")).map(PathBuf::from);
    // An empty one would make this a folder below the working directory.
    let home = home.filter(|p| p.is_absolute())?;
    let data = match env::var_os("XDG_DATA_HOME").map(PathBuf::from).filter(|p| p.is_absolute()) {
        Some(data) => data,
        None if cfg!(target_os = "macos") => home.join("Library/Application Support"),
        None => home.join(".local/share"),
    };
    Some(data.join("dylm/plugins"))
}

/// The three names that are most like `name`, for a message.
pub(crate) fn nearest(mut names: Vec<String>, name: &str) -> String {
    names.sort_by_key(|other| distance(other, name));
    names.truncate(3);
    names.join(", ")
}

/// Single-character edits between two names.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &y) in b.iter().enumerate() {
            let change = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
