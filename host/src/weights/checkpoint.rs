//! All tensors of a model by name, over all of its files. Nothing is read yet: the bytes are mapped, pages come when touched.
//! Names are unique over the shards; where an index file lies beside them it must say exactly what the headers say.

use crate::{
    error::{Error, Result},
    repo::{self, Folder},
    weights::{
        bytes::Bytes,
        safetensors::{read_head, read_header},
        stored::Stored,
    },
};
use serde::Deserialize;
use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    path::{Path, PathBuf},
    sync::Arc,
};

/// Which tensor is in which shard.
pub const INDEX: &str = "model.safetensors.index.json";

/// The beginning of a shard that is elsewhere.
#[derive(Debug, Clone)]
pub struct Head {
    /// The shard's name.
    pub name: String,
    /// Its first bytes, to the end of the header at least.
    pub bytes: Vec<u8>,
    /// Its whole length.
    pub len: u64,
}

/// Tensor names -> stored tensors.
#[derive(Debug, Clone, Default)]
pub struct Checkpoint {
    tensors: BTreeMap<String, Stored>,
}

impl Checkpoint {
    /// Opens every `model*.safetensors` of a folder (as mlx-lm does), checked against `model.safetensors.index.json` if there is one.
    pub fn open_folder(dir: &Path) -> Result<Self> {
        let folder = Folder::open(dir)?;
        let mut shards: BTreeSet<String> = folder.file_names()?.into_iter().filter(|name| is_shard(name)).collect();
        let index = read_index(&folder)?;
        if let Some(weight_map) = &index {
            for (tensor, shard) in weight_map {
                check_shard_name(dir, tensor, shard)?;
                if shards.contains(shard) {
                    continue;
                }
                if folder.resolve(shard)?.is_none() {
                    return Err(Error::Weights(format!(
                        "{}: {tensor} is in {shard}, which is not in the folder: download it again",
                        dir.join(INDEX).display()
                    )));
                }
                shards.insert(shard.clone());
            }
        }
        if shards.is_empty() {
            return Err(no_shards(&folder));
        }
        let mut checkpoint = Checkpoint::default();
        for shard in &shards {
            checkpoint.add_shard(&folder, shard)?;
        }
        if let Some(weight_map) = &index {
            checkpoint.check_index(dir, weight_map)?;
        }
        Ok(checkpoint)
    }

    /// From the headers of shards that are elsewhere, and their index if they have one, with the checks of [`Checkpoint::open_folder`].
    /// `place` stands for the folder in messages.
    pub fn from_heads(place: &Path, heads: &[Head], index: Option<&[u8]>) -> Result<Self> {
        let index = index.map(|text| parse_index(text, place)).transpose()?;
        for (tensor, shard) in index.iter().flatten() {
            check_shard_name(place, tensor, shard)?;
        }
        let mut checkpoint = Checkpoint::default();
        for head in heads {
            let file: Arc<Path> = place.join(&head.name).into();
            for (name, tensor) in read_head(&head.bytes, head.len, &file)? {
                checkpoint.insert(name, tensor)?;
            }
        }
        if let Some(weight_map) = &index {
            checkpoint.check_index(place, weight_map)?;
        }
        Ok(checkpoint)
    }

    /// Opens one safetensors file, wherever it lies (adapters, prompt caches).
    pub fn open_file(path: &Path) -> Result<Self> {
        let mut checkpoint = Checkpoint::default();
        checkpoint.add_mapped(Bytes::map(path)?, path)?;
        Ok(checkpoint)
    }

    /// Opens one safetensors file of a folder; `None` where there is none.
    pub fn open_in(folder: &Folder, name: &str) -> Result<Option<Self>> {
        if folder.resolve(name)?.is_none() {
            return Ok(None);
        }
        let mut checkpoint = Checkpoint::default();
        checkpoint.add_shard(folder, name)?;
        Ok(Some(checkpoint))
    }

    fn add_shard(&mut self, folder: &Folder, shard: &str) -> Result<()> {
        let path = folder.path().join(shard);
        let Some(file) = folder.open_file(shard)? else {
            return Err(Error::Weights(format!("{}: not a file", path.display())));
        };
        self.add_mapped(Bytes::map_file(&file, &path)?, &path)
    }

    fn add_mapped(&mut self, bytes: Bytes, path: &Path) -> Result<()> {
        let file: Arc<Path> = path.into();
        for (name, tensor) in read_header(&bytes, &file)? {
            self.insert(name, tensor)?;
        }
        Ok(())
    }

    fn check_index(&self, dir: &Path, weight_map: &BTreeMap<String, String>) -> Result<()> {
        let wrong =
            |what: String| Err(Error::Weights(format!("{}: {what}: download it again", dir.join(INDEX).display())));
        for (tensor, shard) in weight_map {
            match self.tensors.get(tensor) {
                None => return wrong(format!("{tensor} should be in {shard} and is in no shard")),
                Some(stored) if stored.file.file_name() != Some(shard.as_ref()) => {
                    let found = stored.file.file_name().unwrap_or_default().to_string_lossy();
                    return wrong(format!("{tensor} should be in {shard} and is in {found}"));
                }
                Some(_) => {}
            }
        }
        match self.tensors.iter().find(|(name, _)| !weight_map.contains_key(*name)) {
            Some((name, stored)) => wrong(format!(
                "{name} of {} is not listed",
                stored.file.file_name().unwrap_or_default().to_string_lossy()
            )),
            None => Ok(()),
        }
    }

    /// Adds a tensor; a name that is already there is an error that names both files.
    pub fn insert(&mut self, name: impl Into<String>, tensor: Stored) -> Result<()> {
        match self.tensors.entry(name.into()) {
            Entry::Vacant(slot) => {
                slot.insert(tensor);
                Ok(())
            }
            Entry::Occupied(slot) => Err(Error::Weights(format!(
                "{}: in {} and again in {}: keep one of the two",
                slot.key(),
                slot.get().file.display(),
                tensor.file.display()
            ))),
        }
    }

    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Option<&Stored> {
        self.tensors.get(name)
    }

    /// Takes a tensor out.
    pub fn remove(&mut self, name: &str) -> Option<Stored> {
        self.tensors.remove(name)
    }

    /// Renames every tensor; `None` drops it. Two tensors that end up with one name are an error.
    pub fn rename(self, new_name: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let mut renamed = Checkpoint::default();
        for (name, tensor) in self.tensors {
            if let Some(name) = new_name(&name) {
                renamed.insert(name, tensor)?;
            }
        }
        Ok(renamed)
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// All tensors, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Stored)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// How many tensors there are.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Bytes of all tensors together, as stored.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.values().map(|tensor| tensor.len() as u64).sum()
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

fn read_index(folder: &Folder) -> Result<Option<BTreeMap<String, String>>> {
    let text = folder.read(INDEX, repo::INDEX_CAP)?;
    text.map(|text| parse_index(&text, folder.path())).transpose()
}

fn parse_index(text: &[u8], dir: &Path) -> Result<BTreeMap<String, String>> {
    let index: Index = serde_json::from_slice(text).map_err(|e| {
        Error::Weights(format!("{}: not an index of shards ({e}): download it again", dir.join(INDEX).display()))
    })?;
    Ok(index.weight_map)
}

/// Whether this is the name of a file with weights, as mlx-lm names them.
pub fn is_shard(name: &str) -> bool {
    repo::is_plain_name(name) && name.starts_with("model") && name.ends_with(".safetensors")
}

fn check_shard_name(dir: &Path, tensor: &str, shard: &str) -> Result<()> {
    if repo::is_plain_name(shard) && shard.ends_with(".safetensors") {
        return Ok(());
    }
    Err(Error::Weights(format!(
        "{}: {tensor} is said to be in {shard:?}, which is not a plain file name ending in .safetensors",
        dir.join(INDEX).display()
    )))
}

fn no_shards(folder: &Folder) -> Error {
    let names = folder.file_names().unwrap_or_default();
    let dir: PathBuf = folder.path().to_owned();
    let there = |is: &dyn Fn(&str) -> bool| names.iter().find(|name| is(name)).cloned();
    Error::Weights(if let Some(name) = there(&|n| n.ends_with(".gguf")) {
        format!("{}: no model*.safetensors, but {name}: give that file's path instead of the folder's", dir.display())
    } else if let Some(name) = there(&|n| n.starts_with("pytorch_model") && n.ends_with(".bin")) {
        format!(
            "{}: no model*.safetensors, only {name}, which is not read: save the model as safetensors",
            dir.display()
        )
    } else if let Some(name) = there(&|n| n.ends_with(".safetensors")) {
        format!("{}: no model*.safetensors, only {name}: a model's shards begin with \"model\"", dir.display())
    } else {
        format!("{}: no model*.safetensors in the folder: download the model again", dir.display())
    })
}
