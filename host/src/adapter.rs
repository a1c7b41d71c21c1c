//! A folder with an adapter -> low-rank parts that layers take as they are loaded, and whole tensors that replace the checkpoint's.
//! Formats are mlx-lm's and PEFT's. Layers load in parallel and ask by path; what nobody asked for is an error at the end.

mod low_rank;
mod mlx;
mod overlay;
mod peft;
mod settings;

use crate::{
    device::Placement,
    error::{Error, Result},
    layers::{adapted::Adapter, weight::Weight},
    repo::{CONFIG_CAP, Folder},
    weights::{checkpoint::Checkpoint, stored::Stored},
};
use low_rank::LowRank;
use settings::Settings;
use std::{
    collections::BTreeMap,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

const CONFIG: &str = "adapter_config.json";
/// Unknown layers named before the rest is only counted.
const LISTED: usize = 4;

/// An adapter by module path, as plugins name their layers; empty by default.
#[derive(Debug, Default)]
pub struct Adapters {
    parts: Parts,
    overlaid: AtomicBool,
}

/// What a folder holds.
#[derive(Debug, Default)]
struct Parts {
    /// Low-rank parts by module path.
    layers: BTreeMap<String, LowRank>,
    /// Whole tensors by name.
    full: BTreeMap<String, Stored>,
}

impl Adapters {
    /// Reads what `mlx_lm.lora` or PEFT's `save_pretrained` wrote: `adapter_config.json` and one file of tensors beside it, of which only
    /// the header is read yet.
    pub fn open(dir: &Path) -> Result<Self> {
        let folder = Folder::open(dir)?;
        let Some(config) = folder.read(CONFIG, CONFIG_CAP)? else {
            return Err(Error::Adapter(format!(
                "{}: no {CONFIG}: --adapter-path takes a folder that mlx_lm.lora or PEFT wrote",
                dir.display()
            )));
        };
        let settings = Settings::parse(dir.join(CONFIG).display().to_string(), &config)?;
        let is_peft = settings.get("peft_type").is_some();
        let file = if is_peft { peft::TENSORS } else { mlx::TENSORS };
        let tensors = Checkpoint::open_in(&folder, file)?.ok_or_else(|| no_tensors(&folder, file))?;
        let parts = if is_peft { peft::read(&settings, &tensors)? } else { mlx::read(&settings, &tensors)? };
        if parts.layers.is_empty() && parts.full.is_empty() {
            return Err(Error::Adapter(format!(
                "{}: has no tensors: save the adapter again",
                dir.join(file).display()
            )));
        }
        Ok(Adapters { parts, ..Adapters::default() })
    }

    /// Module paths with a low-rank part, and names of whole tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.parts.layers.keys().chain(self.parts.full.keys()).map(String::as_str)
    }

    /// For the linear layer `path` with this weight.
    pub fn linear(&self, path: &str, weight: &Weight, place: &Placement) -> Result<Option<Adapter>> {
        self.linear_rows(path, &(0..weight.rows()).collect::<Vec<_>>(), weight.rows(), weight, place)
    }

    /// For a linear layer that is these of the `of` rows of `path`: all of them, or a part, as architectures cut fused projections.
    pub fn linear_rows(
        &self,
        path: &str,
        rows: &[usize],
        of: usize,
        weight: &Weight,
        place: &Placement,
    ) -> Result<Option<Adapter>> {
        self.parts.layers.get(path).map(|part| part.over_linear(weight, rows, of, place)).transpose()
    }

    /// An error where the adapter changes the module of this tensor, whose numbers the architecture uses in another form.
    pub fn refuse(&self, tensor: &str) -> Result<()> {
        let path = tensor.strip_suffix(".weight").unwrap_or(tensor);
        match self.parts.layers.contains_key(path) {
            false => Ok(()),
            true => Err(Error::Adapter(format!(
                "{path}: the adapter changes this layer, which the architecture uses in another form than it is stored in: merge the adapter into the model first"
            ))),
        }
    }

    /// For the embedding `path` with this table.
    pub fn embedding(&self, path: &str, weight: &Weight, place: &Placement) -> Result<Option<Adapter>> {
        self.parts.layers.get(path).map(|part| part.over_embedding(weight, place)).transpose()
    }

    /// Whether anything changes what single layers compute; new weights in place of old ones do not.
    #[cfg(feature = "cuda")]
    pub fn lie_over_layers(&self) -> bool {
        !self.parts.layers.is_empty()
    }

    /// For expert `expert.0` of `expert.1`. `paths` are those of the stack (`mlp.switch_mlp.up_proj`) or of the one expert
    /// (`mlp.experts.3.up_proj`); the first that the adapter has counts, and it may have one expert's under the stack's name.
    pub fn expert<'a>(
        &self,
        paths: impl IntoIterator<Item = &'a str>,
        expert: (usize, usize),
        weight: &Weight,
        place: &Placement,
    ) -> Result<Option<Adapter>> {
        let layers = &self.parts.layers;
        let single = format!(".experts.{}.", expert.0);
        let find = |path: &str| {
            layers
                .get(path)
                .or_else(|| layers.get(&path.replacen(".switch_mlp.", &single, 1)))
                .or_else(|| layers.get(&path.replacen(&single, ".switch_mlp.", 1)))
        };
        let part = paths.into_iter().find_map(find);
        part.map(|part| part.over_expert(weight, expert, place)).transpose()
    }

    /// An error that names the parts which no layer asked for, once all layers are loaded.
    pub fn refuse_unused(&self) -> Result<()> {
        if let (Some(name), false) = (self.parts.full.keys().next(), self.overlaid.load(Ordering::Relaxed)) {
            return Err(Error::Adapter(format!(
                "{name}: the adapter's whole tensors were not laid over the checkpoint"
            )));
        }
        let unused: Vec<&str> =
            self.parts.layers.iter().filter(|(_, part)| !part.is_used()).map(|(path, _)| path.as_str()).collect();
        let listed = unused.iter().take(LISTED).copied().collect::<Vec<_>>().join(", ");
        let changes = "the adapter changes";
        match unused.len() {
            0 => Ok(()),
            1 => Err(Error::Adapter(format!("{listed}: {changes} a layer that this model does not have"))),
            2..=LISTED => Err(Error::Adapter(format!("{listed}: {changes} layers that this model does not have"))),
            more => Err(Error::Adapter(format!(
                "{listed} and {} more: {changes} layers that this model does not have",
                more - LISTED
            ))),
        }
    }
}

fn no_tensors(folder: &Folder, file: &str) -> Error {
    let names = folder.file_names().unwrap_or_default();
    let dir = folder.path().display();
    let other = names.iter().find(|n| n.ends_with(".bin") || n.ends_with(".safetensors") || n.ends_with(".npz"));
    Error::Adapter(match other {
        Some(other) if other.ends_with(".safetensors") => {
            format!("{dir}: no {file}, only {other}: rename the one that is meant to {file}")
        }
        Some(other) => format!("{dir}: no {file}, only {other}, which is not read: save the adapter as safetensors"),
        None => format!("{dir}: no {file} beside {CONFIG}: copy the whole folder"),
    })
}
