//! A loaded model -> a short text that is the same for the same model and for no other: what a prompt cache is checked against.
//!
//! Hashing all weights would take longer than most prompts. Models of one architecture differ everywhere, so a piece of each weight file
//! tells them apart as well; config.json and the plugin settle the rest.

use crate::{
    error::{Error, Result},
    load::LanguageModel,
    source::Files,
};
use sha2::{Digest, Sha256};
use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

/// Bytes hashed at the end of each weight file.
const PIECE: u64 = 64 << 10;

/// The identity of a model with its adapter, 64 hexadecimal digits.
pub fn fingerprint(lm: &LanguageModel, adapter: Option<&Path>) -> Result<String> {
    let mut hash = Sha256::new();
    let mut part = |name: &str, bytes: &[u8]| {
        hash.update(name.as_bytes());
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    part("config", lm.model.config.text().as_bytes());
    part("plugin", lm.model.plugin.name.as_bytes());
    let mut files = match &lm.source.files {
        Files::Gguf(file) => vec![file.clone()],
        Files::Folder(folder) => weight_files(folder)?,
    };
    if let Some(adapter) = adapter {
        files.extend(weight_files(adapter)?);
    }
    for file in files {
        let (len, piece) = end_of(&file).map_err(Error::io(&file))?;
        part("length", &len.to_le_bytes());
        part("end", &piece);
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn weight_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = folder.read_dir().map_err(Error::io(folder))?;
    let is_weights = |path: &PathBuf| path.extension().is_some_and(|e| e == "safetensors");
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(is_weights).collect();
    files.sort();
    Ok(files)
}

fn end_of(path: &Path) -> std::io::Result<(u64, Vec<u8>)> {
    let mut file = File::open(path)?;
    let len = file.metadata()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(PIECE)))?;
    let mut piece = Vec::new();
    file.take(PIECE).read_to_end(&mut piece)?;
    Ok((len, piece))
}
