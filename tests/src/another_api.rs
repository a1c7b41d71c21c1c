//! The outsider, built against a plugin-api that somebody changed: a version of it that does not exist yet, or one that never should.

use crate::{binary, outside};
use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

/// A changed copy of plugin-api, in a workspace of its own.
pub struct AnotherApi {
    folder: PathBuf,
    name: String,
    // Tests are processes, and several may want the same copy at a time.
    _alone: File,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// An unchanged file keeps its time, and cargo its patience.
fn write(path: &Path, text: &str) {
    if fs::read_to_string(path).ok().as_deref() != Some(text) {
        let done = fs::create_dir_all(path.parent().unwrap_or(path)).and_then(|()| fs::write(path, text));
        done.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }
}

/// `text` with the first `from` replaced, if this is the file.
pub fn replaced(file: &str, text: String, of: &str, from: &str, to: &str) -> String {
    if file == of { text.replacen(from, to, 1) } else { text }
}

impl AnotherApi {
    /// A copy under this name; `change` gets each file's path below plugin-api and its text.
    ///
    /// # Panics
    /// If it changes nothing: then what it looks for is not in plugin-api any more.
    pub fn new(name: &str, change: impl Fn(&str, String) -> String) -> Self {
        let folder = binary::target().with_file_name("outside").join("other-api").join(name);
        let lock = folder.join("lock");
        write(&lock, "");
        let alone = File::open(&lock).and_then(|file| file.lock().map(|()| file));
        let alone = alone.unwrap_or_else(|e| panic!("{}: {e}", lock.display()));
        let mut changed = false;
        let (api, copied) = (root().join("plugin-api"), folder.join(name).join("plugin-api"));
        for path in files_below(&api) {
            let file = path.strip_prefix(&api).unwrap_or(&path).display().to_string().replace('\\', "/");
            let before = read(&path);
            let after = change(&file, before.clone());
            changed |= before != after;
            write(&copied.join(file), &after);
        }
        // What plugin-api no longer has must not stay behind from an earlier run.
        for stale in files_below(&copied) {
            if stale.strip_prefix(&copied).is_ok_and(|file| !api.join(file).exists()) {
                fs::remove_file(&stale).unwrap_or_else(|e| panic!("{}: {e}", stale.display()));
            }
        }
        assert!(changed, "{name}: the text to be changed is not in plugin-api any more");
        // The host is not among them, and profiles are those of plugins from outside.
        let text = read(&root().join("Cargo.toml"));
        let (text, release) = text.split_once("[profile.dev]").unwrap_or((&text, ""));
        let release = release.split_once("[profile.release]").map_or("", |(_, release)| release);
        let release = release.split("[profile").next().unwrap_or_default();
        let keep = |line: &&str| !["exclude", "default-members", "dylm ="].iter().any(|key| line.starts_with(key));
        let text = text.lines().filter(keep).collect::<Vec<_>>().join("\n");
        // Cargo tells packages apart by their paths below the workspace, and all of these share a target folder.
        let text = text.replace("path = \"plugin-api\"", &format!("path = \"{name}/plugin-api\""));
        let members = format!("members = [\"{name}/*\"]");
        let text = text.replace("members = [\"host\", \"plugin-api\", \"plugins/*\", \"tests\"]", &members);
        write(
            &folder.join("Cargo.toml"),
            &format!("{text}\n[profile.dev]\ndebug = false\n\n[profile.release]{release}"),
        );
        if !folder.join("Cargo.lock").exists() {
            write(&folder.join("Cargo.lock"), &read(&outside::workspace().join("Cargo.lock")));
        }
        AnotherApi { folder, name: name.to_owned(), _alone: alone }
    }

    /// The outsider with a changed text, built against this copy.
    ///
    /// # Panics
    /// With cargo's words if it does not build.
    pub fn plugin(&self, plugin: &str, toolchain: Option<&str>, change: impl Fn(String) -> String) -> PathBuf {
        self.plugin_as("dev", plugin, toolchain, change)
    }

    /// The same with a profile: "dev" or "release", which is the one of dylm's own plugins.
    ///
    /// # Panics
    /// With cargo's words if it does not build.
    pub fn plugin_as(
        &self,
        profile: &str,
        plugin: &str,
        toolchain: Option<&str>,
        change: impl Fn(String) -> String,
    ) -> PathBuf {
        let (own, to) = (outside::workspace().join("outsider"), self.folder.join(&self.name).join(plugin));
        write(&to.join("src/lib.rs"), &change(read(&own.join("src/lib.rs"))));
        let library = format!("outsider_{}_{plugin}", self.name);
        let text = read(&own.join("Cargo.toml")).replace("name = \"outsider\"", &format!("name = \"{plugin}\""));
        write(&to.join("Cargo.toml"), &text.replace("[lib]", &format!("[lib]\nname = \"{library}\"")));
        outside::build_as(profile, &self.folder, plugin, &library, toolchain)
    }
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let paths = entries.flatten().map(|entry| entry.path());
    paths.flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] }).collect()
}
