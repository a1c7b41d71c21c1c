//! Reads a plugin's note from its file, running nothing of it. The same walk over the section table refuses files that `dlopen` would
//! crash on: truncated ones, libraries of another machine, texts.

use crate::error::{Error, Result};
use crate::ops::table;
use object::{Object, ObjectSection, ObjectSegment};
use plugin_api::abi::{
    self,
    later::{ASKS_ELF, ASKS_MACHO, ASKS_PE, NEEDS_ELF, NEEDS_MACHO, NEEDS_PE},
    note::{HEADER_ELF, SECTION_ELF, SECTION_MACHO, SECTION_PE, VENDOR},
};
use serde::{Deserialize, Serialize};
use std::path::Path;

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
    /// "unwind" or "abort".
    #[serde(default)]
    pub panic: String,
}

/// Plugins are a megabyte or two; larger files are not read for a note.
const LARGEST: u64 = 256 << 20;

impl Note {
    /// The note of the file, or why it is no plugin, in one sentence.
    pub fn read(path: &Path) -> Result<Self> {
        let refuse = |why: String| Error::plugin(format!("{}: {why}", path.display()));
        let meta = std::fs::metadata(path).map_err(Error::io(path))?;
        if !meta.is_file() {
            return Err(refuse("is not a regular file, so it cannot be a plugin".into()));
        }
        if meta.len() > LARGEST {
            return Err(refuse(format!("has {} bytes, which is more than any plugin", meta.len())));
        }
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        let file = object::File::parse(&*bytes)
            .map_err(|e| refuse(format!("is not a library, or only a part of one ({e}); build or copy it again")))?;
        // Parts that reach past the end are how a truncated file shows. Segments are what the loader maps, and touching one that is not
        // there is a signal, not an error.
        let sections = file.sections().filter_map(|s| s.file_range());
        let ends =
            sections.chain(file.segments().map(|s| s.file_range())).map(|(start, len)| start.saturating_add(len));
        if let Some(end) = ends.max().filter(|&end| end > bytes.len() as u64) {
            let len = bytes.len();
            return Err(refuse(format!("is truncated: it has {len} bytes of at least {end}; copy it again")));
        }
        if file.architecture() != machine() {
            return Err(refuse(format!("is built for {:?}, this machine is {:?}", file.architecture(), machine())));
        }
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
        let mut note =
            Note::parse(text).map_err(|e| refuse(format!("its note cannot be read: {e}; build or copy it again")))?;
        // A plugin in another language has no such sections: its author writes the lists into the note.
        note.needs.extend(stamped(&file, [NEEDS_ELF, NEEDS_MACHO, NEEDS_PE]));
        note.asks.extend(stamped(&file, [ASKS_ELF, ASKS_MACHO, ASKS_PE]));
        let Note { needs, asks, .. } = &mut note;
        for list in [&mut *needs, &mut *asks] {
            list.sort();
            list.dedup();
        }
        needs.retain(|op| !asks.contains(op));
        Ok(note)
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
fn stamped(file: &object::File<'_>, sections: [&str; 3]) -> Vec<String> {
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

fn machine() -> object::Architecture {
    match std::env::consts::ARCH {
        "x86_64" => object::Architecture::X86_64,
        "aarch64" => object::Architecture::Aarch64,
        "x86" => object::Architecture::I386,
        "arm" => object::Architecture::Arm,
        "riscv64" => object::Architecture::Riscv64,
        _ => object::Architecture::Unknown,
    }
}
