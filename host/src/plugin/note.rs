//! Reads a plugin's note from its file, running nothing of it, and judges by the note alone whether this dylm can work with the plugin.

use super::file::PluginFile;
use crate::error::{Error, Result};
use crate::ops::table;
use object::{Object, ObjectSection};
use plugin_api::abi::{
    self,
    later::{ASKS_ELF, ASKS_MACHO, ASKS_PE, NEEDS_ELF, NEEDS_MACHO, NEEDS_PE},
    note::{HEADER_ELF, SECTION_ELF, SECTION_MACHO, SECTION_PE, VENDOR},
};
use serde::{Deserialize, Serialize};
use std::{fmt::Display, path::Path};

/// What a plugin says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// The lowest ABI that it needs, `major.minor`.
    pub abi: String,
    /// The `model_type`s of config.json that it serves.
    pub model_types: Vec<String>,
    /// Ops that came after ABI 1.0 and that it cannot do without.
    #[serde(default)]
    pub needs: Vec<String>,
    /// Ops that came after ABI 1.0 and for which it has a way around.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub asks: Vec<String>,
    /// Its package's name.
    pub name: String,
    /// Its package's version.
    pub version: String,
    /// Its licence.
    #[serde(default)]
    pub license: String,
    /// Where it lives.
    #[serde(default)]
    pub url: String,
    /// What compiled it.
    #[serde(default)]
    pub rustc: String,
    /// What for.
    #[serde(default)]
    pub target: String,
    /// "unwind" or "abort"; "none" in plain C.
    #[serde(default)]
    pub panic: String,
}

/// Notes are a few hundred bytes; a longer text is none.
const LONGEST: usize = 1 << 16;

impl Note {
    /// The note of the file, or why it is no plugin, in one sentence.
    pub fn read(path: &Path) -> Result<Self> {
        Self::of(&PluginFile::open(path)?)
    }

    /// As `read`, of a file that is open.
    pub fn of(plugin: &PluginFile) -> Result<Self> {
        plugin.inspect(|file| {
            let refuse = |why: String| Error::plugin(format!("{}: {why}", plugin.path().display()));
            let section = [SECTION_ELF, SECTION_MACHO, SECTION_PE].iter().find_map(|name| file.section_by_name(name));
            let section = section.ok_or_else(|| {
                refuse("is a library, but no dylm plugin: it has no note (was it built with export_plugin!?)".into())
            })?;
            let data = section.data().map_err(|e| refuse(format!("its note cannot be read: {e}")))?;
            let text = match file.format() {
                object::BinaryFormat::Elf => inside_elf(data, file.is_little_endian())
                    .ok_or_else(|| refuse("its note is damaged; build or copy it again".into()))?,
                _ => data,
            };
            let unreadable = |e: &dyn Display| refuse(format!("its note cannot be read: {e}; build or copy it again"));
            if text.len() > LONGEST {
                return Err(unreadable(&format_args!("it has {} bytes", text.len())));
            }
            let mut note = Note::parse(text).map_err(|e| unreadable(&e))?;
            // A plugin in another language has no such sections: its author writes the lists into the note.
            note.needs.extend(stamped(file, [NEEDS_ELF, NEEDS_MACHO, NEEDS_PE]));
            note.asks.extend(stamped(file, [ASKS_ELF, ASKS_MACHO, ASKS_PE]));
            let Note { needs, asks, .. } = &mut note;
            for list in [&mut *needs, &mut *asks] {
                list.sort();
                list.dedup();
            }
            needs.retain(|op| !asks.contains(op));
            // A note is shown on terminals, where these would say something else than what is trusted.
            let unseen = note.texts().any(|text| text.contains(is_unseen));
            if unseen { Err(unreadable(&"it has control characters")) } else { Ok(note) }
        })
    }

    fn texts(&self) -> impl Iterator<Item = &str> {
        let Note { abi, model_types, needs, asks, name, version, license, url, rustc, target, panic } = self;
        let single = [abi, name, version, license, url, rustc, target, panic];
        model_types.iter().chain(needs).chain(asks).chain(single).map(String::as_str)
    }

    /// The same plugin with these ops that came after ABI 1.0.
    pub(super) fn with_ops(self, needs: Vec<String>, asks: Vec<String>) -> Self {
        Note { needs, asks, ..self }
    }

    /// From the section's bytes, which a linker may have padded.
    pub fn parse(data: &[u8]) -> serde_json::Result<Self> {
        let end = data.iter().rposition(|&b| b != 0).map_or(0, |i| i + 1);
        serde_json::from_slice(&data[..end])
    }

    /// Why this dylm will not open the plugin, judged by the note alone.
    pub fn refusal(&self, path: &Path) -> Option<String> {
        let file = path.display();
        let (major, minor) = self.abi.split_once('.').unwrap_or((&self.abi, "0"));
        let [major, minor] = [major, minor].map(|n| n.parse::<u32>().ok());
        if major != Some(abi::MAJOR) || minor.is_none_or(|minor| minor > abi::MINOR) {
            let older = major.is_some_and(|m| m < abi::MAJOR);
            let cure = if older { "rebuild the plugin" } else { "update dylm" };
            return Some(format!(
                "{file}: speaks ABI {}, this dylm speaks {}.{}; {cure}",
                self.abi,
                abi::MAJOR,
                abi::MINOR
            ));
        }
        if let Some(op) = self.needs.iter().find(|op| !table::names().contains(&op.as_str())) {
            let cure = "update dylm, or use an older version of the plugin";
            return Some(format!("{file}: needs the op {op}, which this dylm does not have; {cure}"));
        }
        if self.panic == "abort" {
            return Some(format!(
                "{file}: was built with panic = \"abort\", so its first mistake would end dylm; rebuild it with panic = \"unwind\""
            ));
        }
        None
    }
}

/// The names in the sections that begin with one of these: see `plugin_api::abi::later`.
fn stamped<'a, R: object::ReadRef<'a>>(file: &object::File<'a, R>, sections: [&str; 3]) -> Vec<String> {
    let carries = |name: &str| sections.iter().any(|section| name.starts_with(section));
    let sections = file.sections().filter(|s| s.name().is_ok_and(carries));
    let names = sections.filter_map(|s| String::from_utf8(s.data().ok()?.to_vec()).ok());
    names.flat_map(|names| names.split('\0').filter(|n| !n.is_empty()).map(str::to_owned).collect::<Vec<_>>()).collect()
}

/// The text of an ELF note: see `plugin_api::abi::note::Note`.
fn inside_elf(data: &[u8], little: bool) -> Option<&[u8]> {
    let word = |at: usize| {
        let bytes = data.get(at..at + 4)?.try_into().ok()?;
        Some(if little { u32::from_le_bytes(bytes) } else { u32::from_be_bytes(bytes) } as usize)
    };
    let (name_size, text_size, kind) = (word(0)?, word(4)?, word(8)?);
    let ours = name_size == 5 && kind == 1 && data.get(12..HEADER_ELF)? == VENDOR;
    data.get(HEADER_ELF..HEADER_ELF.checked_add(text_size)?).filter(|_| ours)
}

/// Characters that a terminal obeys instead of showing, or that turn the text around them.
pub fn is_unseen(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}
