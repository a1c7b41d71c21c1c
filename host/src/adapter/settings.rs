//! adapter_config.json -> its values, each refused in a sentence that names the key. Nothing in it names a file that is opened.

use crate::error::{Error, Result};
use serde_json::{Map, Value};

/// Larger than any layer's smaller side, where a low rank would no longer be one.
const MOST_RANK: u64 = 65536;

/// One object of the configuration.
pub struct Settings {
    /// The file, for messages.
    pub file: String,
    /// The keys.
    pub map: Map<String, Value>,
}

impl Settings {
    /// Parses the file's text.
    pub fn parse(file: String, text: &[u8]) -> Result<Self> {
        match serde_json::from_slice(text) {
            Ok(map) => Ok(Settings { file, map }),
            Err(e) => Err(Error::Adapter(format!("{file}: not an adapter's configuration ({e})"))),
        }
    }

    /// A value that is there and not null.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// An error about `key`.
    pub fn wrong(&self, key: &str, what: impl std::fmt::Display) -> Error {
        Error::Adapter(format!("{}: {key}: {what}", self.file))
    }

    /// A name, if there is one.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong(key, format!("{value} is not a name")))
    }

    /// Whether a flag is set.
    pub fn flag(&self, key: &str) -> Result<bool> {
        let Some(value) = self.get(key) else { return Ok(false) };
        value.as_bool().ok_or_else(|| self.wrong(key, format!("{value} is neither true nor false")))
    }

    /// An object, if there is one.
    pub fn object(&self, key: &str) -> Result<Option<Settings>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let map = value.as_object().ok_or_else(|| self.wrong(key, format!("{value} is not an object")))?.clone();
        Ok(Some(Settings { file: format!("{}: {key}", self.file), map }))
    }

    /// A number that f32 can hold, if there is one.
    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64() {
            Some(number) if (number as f32).is_finite() => Ok(Some(number)),
            _ => Err(self.wrong(key, format!("{value} is not a finite number"))),
        }
    }

    /// A rank, which must be there.
    pub fn rank(&self, key: &str) -> Result<usize> {
        let value = self.get(key).ok_or_else(|| self.wrong(key, "is missing: it says the rank of the adapter"))?;
        match value.as_u64() {
            Some(rank @ 1..=MOST_RANK) => Ok(rank as usize),
            _ => Err(self.wrong(key, format!("{value} is not a rank: it must be from 1 to {MOST_RANK}"))),
        }
    }
}
