//! The models table of README.md, from the plugins' sources and the tiny checkpoints: what is served, and what each was held to.
//!
//! A program stands in a row if it gave the logits of an entry, or agreed with the one that did. What people call the models is said by
//! `models` in `entry.json`.

use crate::tiny::{self, Result};
use serde_json::Value;
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

const BEGIN: &str = "<!-- written by `cargo run -p tests --bin model-table` -->\n";
const END: &str = "<!-- end of the table -->\n";
/// Further apart than this, relative to the largest logit, two programs compute something else.
const AGREE: f64 = 1e-4;

/// README.md of this repository.
pub fn readme() -> PathBuf {
    root().join("README.md")
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// Every (model type, plugin), by plugin, in the plugin's own order.
///
/// # Errors
/// If an architecture in a plugin's `src/lib.rs` has no `MODEL_TYPES`.
pub fn served() -> Result<Vec<(String, String)>> {
    let folders = fs::read_dir(root().join("plugins"))?.map(|e| Ok(e?.path())).collect::<Result<BTreeSet<_>>>()?;
    let mut served = Vec::new();
    for folder in folders.iter().filter(|folder| folder.join("Cargo.toml").is_file()) {
        let (plugin, file) = (tiny::name(folder), folder.join("src/lib.rs"));
        let source = fs::read_to_string(&file).map_err(|e| format!("{}: {e}", file.display()))?;
        if !source.contains("impl Architecture for ") {
            continue;
        }
        let list = || source.split_once("const MODEL_TYPES:")?.1.split_once('=')?.1.split_once(']');
        let (list, _) = list().ok_or_else(|| format!("{}: no MODEL_TYPES", file.display()))?;
        let types = list.split('"').skip(1).step_by(2);
        served.extend(types.map(|model_type| (model_type.to_owned(), plugin.clone())));
    }
    Ok(served)
}

/// The name among these by which config.json finds its plugin: a text model that has one of its own in its wrapper goes by both names.
pub fn type_of(config: &Value, served: &[(String, String)]) -> String {
    let name = |config: &Value| config["model_type"].as_str().unwrap_or_default().to_owned();
    let both = format!("{}.{}", name(config), name(&config["text_config"]));
    if served.iter().any(|(name, _)| *name == both) { both } else { name(config) }
}

/// What the entries of one model type show.
#[derive(Default)]
struct Proof {
    models: String,
    forms: BTreeSet<&'static str>,
    /// Programs with their versions.
    held_to: BTreeSet<String>,
}

impl Proof {
    fn of(model_type: &str, entries: &[PathBuf], served: &[(String, String)]) -> Result<Self> {
        let mut proof = Self::default();
        for entry in entries {
            if type_of(&tiny::config(entry)?, served) != model_type {
                continue;
            }
            let facts = tiny::facts(entry)?;
            if let Some(models) = facts["models"].as_str() {
                proof.models = models.to_owned();
            }
            let expected: Value = serde_json::from_str(&fs::read_to_string(entry.join("expected.json"))?)?;
            let programs = expected["references"].as_object().ok_or("expected.json: no references")?;
            let reference = programs.keys().next().map(String::as_str);
            proof.forms.insert(match facts["layout"].as_str().or(reference) {
                Some("mlx" | "mlx-lm") => "mlx",
                _ => "hub",
            });
            if crate::variant::can_pack(entry)? {
                proof.forms.insert("4-bit");
            }
            for (program, said) in programs {
                if Some(program.as_str()) == reference || said["off"].as_f64().is_some_and(|off| off <= AGREE) {
                    proof.held_to.insert(format!("{program} {}", said["version"].as_str().unwrap_or_default()));
                }
            }
        }
        Ok(proof)
    }
}

/// The table, a line for every model type.
pub fn table() -> Result<String> {
    let entries = tiny::all_entries()?;
    let mut table = "| `model_type` in config.json | plugin | models | checkpoints tried | logits held to |\n\
                     |---|---|---|---|---|\n"
        .to_owned();
    let served = served()?;
    for (model_type, plugin) in &served {
        let Proof { models, forms, held_to } = Proof::of(model_type, &entries, &served)?;
        let order = ["hub", "mlx", "4-bit"].into_iter().filter(|form| forms.contains(form));
        let forms = order.collect::<Vec<_>>().join(", ");
        let held_to = held_to.into_iter().rev().collect::<Vec<_>>().join(", ");
        table += &format!("| `{model_type}` | `{plugin}` | {models} | {forms} | {held_to} |\n");
    }
    Ok(table)
}

/// README.md's text with the table that it should have.
///
/// # Errors
/// If one of the two comments around the table is missing.
pub fn with_table(readme: &str) -> Result<String> {
    let (before, rest) = readme.split_once(BEGIN).ok_or_else(|| format!("README.md: no line {BEGIN:?}"))?;
    let (_, after) = rest.split_once(END).ok_or_else(|| format!("README.md: no line {END:?}"))?;
    // A blank line lets Markdown see that the comment has ended.
    Ok(format!("{before}{BEGIN}\n{}\n{END}{after}", table()?))
}
