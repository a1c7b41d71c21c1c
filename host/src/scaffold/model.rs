//! A config.json and a plugin -> a model of made-up weights, whatever tensors the plugin asks for.

use crate::{
    config::Config,
    error::{Error, Result},
    plugin::{check::made_up_weights, library::Library, registry::Registry},
    repo::Folder,
    tiny,
};
use ::safetensors::{Dtype, tensor::TensorView};
use std::{fs, path::Path};

/// Writes `model.safetensors` beside the config.json in `folder`, and a tokenizer where there is none. Gives the number of tensors.
///
/// # Errors
/// One sentence: no plugin, one that asks for more than a model to try should have, or weights that are there already and are to stay.
pub fn write(folder: &Path, registry: &Registry, seed: u64, overwrite: bool) -> Result<usize> {
    let files = Folder::open(folder)?;
    let weights =
        files.file_names()?.into_iter().find(|name| name.ends_with(".safetensors") || name.ends_with(".gguf"));
    if let Some(weights) = weights.filter(|name| !overwrite || name != FILE) {
        let cure = if weights == FILE { "--force writes over it" } else { "take another folder" };
        return Err(Error::Usage(format!("{}: there are weights already; {cure}", folder.join(weights).display())));
    }
    let config = Config::from_folder(folder, &[])?;
    let library = Library::open(&registry.resolve_for(&config)?)?;
    let made = made_up_weights(&library, &config, seed)?;
    let path = folder.join(FILE);
    let wrong = |e: ::safetensors::SafeTensorError| Error::Weights(format!("{}: {e}", path.display()));
    let tensors: Vec<_> = made.iter().map(|(name, tensor)| (name, tensor.shape.clone(), tensor.bytes())).collect();
    let views =
        tensors.iter().map(|(name, shape, bytes)| Ok((*name, TensorView::new(Dtype::F32, shape.clone(), bytes)?)));
    let views = views.collect::<Result<Vec<_>, _>>().map_err(wrong)?;
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    let bytes = ::safetensors::serialize(views, Some(metadata)).map_err(wrong)?;
    fs::write(&path, bytes).map_err(Error::io(&path))?;
    if files.resolve("tokenizer.json")?.is_none() {
        tiny::tokenizer::write(&serde_json::Value::Object(config.json().clone()), folder)?;
    }
    Ok(made.len())
}

const FILE: &str = "model.safetensors";
