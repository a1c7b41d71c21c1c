//! The archive that build.rs made: plugin-api, the plugins' sources, tiny checkpoints, templates.

use crate::{
    error::{Error, Result},
    plugin::registry::nearest,
};
use std::io::{Cursor, Read};

const BYTES: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/scaffold.zip"));

/// Read-only.
pub(super) struct Archive(zip::ZipArchive<Cursor<&'static [u8]>>);

impl Archive {
    pub(super) fn open() -> Result<Self> {
        zip::ZipArchive::new(Cursor::new(BYTES)).map(Self).map_err(|e| damaged("its archive", e))
    }

    /// A file.
    pub(super) fn text(&mut self, name: &str) -> Result<String> {
        let mut text = String::new();
        let mut file = self.0.by_name(name).map_err(|e| damaged(name, e))?;
        file.read_to_string(&mut text).map_err(|e| damaged(name, e))?;
        Ok(text)
    }

    /// The files below a folder, sorted.
    pub(super) fn names(&self, folder: &str) -> Vec<String> {
        let all = self.0.file_names().filter_map(|name| Some(name.ok()?.into_owned()));
        let mut names: Vec<String> = all.filter(|name| name.starts_with(folder)).collect();
        names.sort();
        names
    }

    /// The model_type and the plugin that `from`, either of them, means.
    pub(super) fn find(&mut self, from: &str) -> Result<(String, String)> {
        let types = self.text("types")?;
        let pairs: Vec<(&str, &str)> = types.lines().filter_map(|line| line.split_once(' ')).collect();
        let found = pairs.iter().find(|(model_type, _)| *model_type == from);
        if let Some((model_type, plugin)) = found.or_else(|| pairs.iter().find(|(_, plugin)| *plugin == from)) {
            return Ok((model_type.to_string(), plugin.to_string()));
        }
        let known = pairs.iter().map(|(model_type, _)| model_type.to_string()).collect();
        Err(Error::Usage(format!(
            "--from {from}: dylm has no plugin of this name; the nearest of those that it has are {}",
            nearest(known, from)
        )))
    }
}

fn damaged(what: &str, e: impl std::fmt::Display) -> Error {
    Error::Usage(format!("this dylm is damaged: {what} cannot be read ({e}); install it again"))
}
