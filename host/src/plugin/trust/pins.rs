//! `trust.toml`: the hashes of plugins that the user has agreed to. Read by people too, so what they wrote into it stays.
//!
//! A file that cannot be read is an error, never an empty list; writing is a new file that takes the old one's place in one move, under a
//! lock that other dylms wait for.

use super::Unknown;
use crate::{
    error::{Error, Result},
    plugin::permissions::refuse_others,
};
use std::{
    env, fs,
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
};
use toml_edit::{ArrayOfTables, DocumentMut, Item, Table, value};

/// The list's key: each entry is a `[[plugin]]`.
const LIST: &str = "plugin";

const PREFACE: &str = "\
# Plugins that dylm may open, besides its own, by the SHA-256 of their bytes. Written when you agree to one;
# `dylm plugins` compares it with what is there, `dylm plugins --forget FILE` takes a plugin out.

";

/// A plugin that the user has agreed to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pin {
    /// Where it lay then.
    pub path: PathBuf,
    /// Its hash, in lower-case hexadecimal.
    pub sha256: String,
    /// What its note called it.
    pub name: String,
    /// The day of the consent, if known, as `2026-01-31`.
    pub since: Option<String>,
}

/// What stands in `trust.toml`.
#[derive(Clone, Debug)]
pub struct Pins {
    file: PathBuf,
    document: DocumentMut,
    pins: Vec<Pin>,
}

/// The file: `DYLM_TRUST`, or `dylm/trust.toml` in the user's folder for settings.
pub fn file() -> Result<PathBuf> {
    if let Some(named) = env::var_os("DYLM_TRUST").filter(|name| !name.is_empty()).map(PathBuf::from) {
        // A relative one would let the working directory, which may be a model's, say what is trusted.
        return match named.is_absolute() {
            true => Ok(named),
            false => Err(Error::Usage(format!("DYLM_TRUST={}: must be an absolute path", named.display()))),
        };
    }
    let absolute = |name: &str| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let home = || absolute("HOME").or(absolute("USERPROFILE"));
    let settings = match absolute("XDG_CONFIG_HOME") {
        Some(settings) => Some(settings),
        None if cfg!(target_os = "macos") => home().map(|home| home.join("Library/Application Support")),
        None => home().map(|home| home.join(".config")),
    };
    settings.map(|settings| settings.join("dylm/trust.toml")).ok_or_else(|| {
        Error::plugin("there is no home folder to keep trust.toml in; set HOME, or name a file with DYLM_TRUST")
    })
}

impl Pins {
    /// The list as it is now; empty where nothing was ever agreed to.
    pub fn read() -> Result<Self> {
        Self::from_file(file()?)
    }

    fn from_file(file: PathBuf) -> Result<Self> {
        let text = match fs::read_to_string(&file) {
            Ok(text) => {
                refuse_others(&file, "nothing in it is believed")?;
                text
            }
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => String::new(),
            Err(e) if e.kind() == ErrorKind::InvalidData => return Err(damaged(&file, "it is not UTF-8")),
            Err(e) => return Err(Error::io(&file)(e)),
        };
        let document: DocumentMut = text.parse().map_err(|e: toml_edit::TomlError| {
            let before = e.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
            let line = before.matches('\n').count() + 1;
            damaged(&file, &format!("line {line}: {}", e.message().lines().collect::<Vec<_>>().join(", ")))
        })?;
        let tables = match document.get(LIST) {
            None => Vec::new(),
            Some(Item::ArrayOfTables(tables)) => tables.iter().collect(),
            Some(_) => return Err(damaged(&file, "plugin is not a list of [[plugin]] tables")),
        };
        let pins = (1..).zip(tables).map(|(number, table)| {
            Pin::from_table(table).map_err(|what| damaged(&file, &format!("[[plugin]] number {number}: {what}")))
        });
        let pins = pins.collect::<Result<_>>()?;
        Ok(Pins { file, document, pins })
    }

    /// All that was agreed to.
    pub fn all(&self) -> &[Pin] {
        &self.pins
    }

    /// The consent to these bytes, wherever they lie.
    pub fn of_hash(&self, sha256: &str) -> Option<Pin> {
        self.pins.iter().find(|pin| pin.sha256 == sha256).cloned()
    }

    /// The latest consent to what lay there.
    pub fn of_path(&self, path: &Path) -> Option<Pin> {
        self.pins.iter().rev().find(|pin| pin.path == path).cloned()
    }

    /// Writes a consent down, in place of one to what the file was before.
    pub(super) fn pin(unknown: &Unknown) -> Result<()> {
        Self::rewrite(|pins| {
            let mut table = Table::new();
            table.insert("path", value(unknown.path.display().to_string()));
            table.insert("sha256", value(&unknown.sha256));
            table.insert("name", value(&unknown.note.name));
            table.insert("version", value(&unknown.note.version));
            let now = chrono::Utc::now().format("%Y-%m-%dT%H:%M:%SZ").to_string();
            if let Ok(now) = now.parse::<toml_edit::Datetime>() {
                table.insert("trusted", value(now));
            }
            let before = pins.positions(|pin| pin.path == unknown.path);
            let tables = pins.tables();
            // What the user added to the entry stays with it.
            if let Some(old) = before.last().and_then(|&at| tables.get_mut(at)) {
                table.iter().for_each(|(key, item)| drop(old.insert(key, item.clone())));
            } else {
                tables.push(table);
            }
            before.iter().rev().skip(1).for_each(|&at| drop(tables.remove(at)));
            true
        })
        .map(drop)
    }

    /// Takes consents back: those to this file, to the plugin of this name, or to this hash. Gives them.
    pub fn forget(what: &str) -> Result<Vec<Pin>> {
        let mut forgotten = Vec::new();
        Self::rewrite(|pins| {
            let positions = pins.positions(|pin| pin.is_called(what));
            forgotten.extend(positions.iter().filter_map(|&at| pins.pins.get(at)).cloned());
            let tables = pins.tables();
            positions.iter().rev().for_each(|&at| drop(tables.remove(at)));
            !positions.is_empty()
        })?;
        Ok(forgotten)
    }

    fn positions(&self, which: impl Fn(&Pin) -> bool) -> Vec<usize> {
        self.pins.iter().enumerate().filter(|(_, pin)| which(pin)).map(|(at, _)| at).collect()
    }

    fn tables(&mut self) -> &mut ArrayOfTables {
        let item = self.document.entry(LIST).or_insert_with(|| Item::ArrayOfTables(ArrayOfTables::new()));
        if item.as_array_of_tables().is_none() {
            *item = Item::ArrayOfTables(ArrayOfTables::new());
        }
        match item {
            Item::ArrayOfTables(tables) => tables,
            _ => unreachable!("made so above"),
        }
    }

    /// Changes the file's newest state; writes it if `change` says that there is something to write.
    fn rewrite(change: impl FnOnce(&mut Self) -> bool) -> Result<()> {
        let named = file()?;
        let unwritable = |e: std::io::Error| {
            Error::plugin(format!(
                "{}: cannot be written ({e}), so what you trust would be forgotten; name another file with DYLM_TRUST",
                named.display()
            ))
        };
        let folder = named.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(folder).map_err(unwritable)?;
        // Somebody's settings may be links into a folder that they keep elsewhere.
        let file = named.canonicalize().unwrap_or_else(|_| named.clone());
        let folder = file.parent().unwrap_or(folder);
        // The folder itself is locked, until this function ends. Where the file system knows no locks, of two consents in one moment the
        // later one may be all that is kept.
        let lock = fs::File::open(folder).and_then(|folder| folder.lock().map(|()| folder));
        let mut pins = Self::from_file(file.clone())?;
        if !change(&mut pins) {
            return Ok(());
        }
        let mut text = pins.document.to_string();
        if !pins.file.exists() {
            text.insert_str(0, PREFACE);
        }
        let mut part = tempfile::NamedTempFile::new_in(folder).map_err(unwritable)?;
        part.write_all(text.as_bytes()).and_then(|()| part.as_file().sync_all()).map_err(unwritable)?;
        if let Ok(metadata) = pins.file.metadata() {
            part.as_file().set_permissions(metadata.permissions()).map_err(unwritable)?;
        }
        part.persist(&pins.file).map_err(|e| unwritable(e.error))?;
        drop(lock);
        Ok(())
    }
}

impl Pin {
    fn from_table(table: &Table) -> Result<Self, &'static str> {
        let text = |key: &str| table.get(key).and_then(Item::as_str);
        let sha256 = text("sha256").ok_or("it has no sha256")?.to_ascii_lowercase();
        if sha256.len() != 64 || !sha256.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err("its sha256 is not 64 hexadecimal digits");
        }
        let since =
            table.get("trusted").and_then(Item::as_datetime).and_then(|at| at.date).map(|date| date.to_string());
        let path = PathBuf::from(text("path").unwrap_or_default());
        Ok(Pin { path, sha256, name: text("name").unwrap_or_default().to_owned(), since })
    }

    /// Whether a user who says `what` means this: its file, its hash, or its name.
    fn is_called(&self, what: &str) -> bool {
        is_meant(what, &self.path, &self.name, &self.sha256)
    }
}

/// Whether a user who says `what` means the plugin with this file, name and hash.
pub fn is_meant(what: &str, path: &Path, name: &str, sha256: &str) -> bool {
    let hash = what.strip_prefix("sha256:").unwrap_or(what);
    // The file need not be there any more; the folder is spelled as the search path spells it.
    let said = Path::new(what);
    let folder = said.parent().map(|folder| if folder == Path::new("") { Path::new(".") } else { folder });
    let file = folder.and_then(|folder| Some(folder.canonicalize().ok()?.join(said.file_name()?)));
    what == name || hash.eq_ignore_ascii_case(sha256) || said == path || file.is_some_and(|file| file == path)
}

fn damaged(file: &Path, what: &str) -> Error {
    Error::plugin(format!(
        "{}: {what}, so nothing in it is believed; mend it, or delete it and agree anew",
        file.display()
    ))
}
