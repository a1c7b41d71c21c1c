//! A plugin file -> its factory -> models. The only place that opens a library, and it opens each once and for good: code that other
//! threads may still run, or whose errors are still printed, must not be unmapped.

use super::{note::Note, registry::Found};
use crate::error::{Error, Result};
use crate::ops::table;
use abi_stable::{
    library::{AbiHeaderRef, LibraryError},
    std_types::RResult,
};
use plugin_api::abi::{
    self, CacheSpec, Ctx, Handle,
    root::{FactoryRef, Host, ModelObject, PluginError},
};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

/// An opened plugin.
#[derive(Clone)]
pub struct Library {
    /// The file.
    pub path: PathBuf,
    /// What it says of itself.
    pub note: Note,
    factory: FactoryRef,
}

/// Opened libraries stay open; a second request for a file gets the first one's factory.
static OPENED: Mutex<BTreeMap<PathBuf, FactoryRef>> = Mutex::new(BTreeMap::new());

impl Library {
    /// Opens the plugin that the registry found.
    pub fn open(found: &Found) -> Result<Self> {
        let Found { path, note } = found;
        if let Some(why) = note.refusal(path) {
            return Err(Error::plugin(why));
        }
        refuse_writable(path)?;
        let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
        let factory = match opened.get(path) {
            Some(factory) => *factory,
            None => {
                let factory = open(path)?;
                opened.insert(path.clone(), factory);
                factory
            }
        };
        let inside = Note::parse(factory.note().as_bytes()).ok();
        if factory.major() != abi::MAJOR || inside.as_ref() != Some(note) {
            return Err(Error::plugin(format!(
                "{}: its note and its code disagree about what it is; build it again",
                path.display()
            )));
        }
        Ok(Library { path: path.clone(), note: note.clone(), factory })
    }

    /// Builds a model for `config`, with `ctx` as the building call's context.
    pub fn create(&self, ctx: Ctx, config: &str) -> Result<Object> {
        let host = table::host();
        self.create_with(&host, ctx, config)
    }

    /// The same against any host table: how a test plays a later host.
    pub fn create_with(&self, host: &Host, ctx: Ctx, config: &str) -> Result<Object> {
        let object = result(self.factory.create()(host, ctx, config.into()))?;
        let caches = (object.caches)(object.data);
        Ok(Object { object: Mutex::new(object), caches: caches.into_vec() })
    }
}

/// A model that a plugin built.
pub struct Object {
    /// Locked for each call: the ABI promises a plugin one call at a time.
    object: Mutex<ModelObject>,
    /// What each layer must remember.
    pub caches: Vec<CacheSpec>,
}

// SAFETY: the ABI allows `forward`, `head` and `drop` on any thread, one at a time; the mutex sees to the latter.
unsafe impl Send for Object {}
// SAFETY: as above; nothing is reachable without the lock.
unsafe impl Sync for Object {}

impl Object {
    /// ids `[tokens]` -> hidden `[tokens, dim]`
    pub fn forward(&self, ctx: Ctx, tokens: Handle) -> Result<Handle> {
        let object = self.object.lock().unwrap_or_else(PoisonError::into_inner);
        result((object.forward)(object.data, &table::host(), ctx, tokens))
    }

    /// hidden `[rows, dim]` -> logits `[rows, vocab]`
    pub fn head(&self, ctx: Ctx, hidden: Handle) -> Result<Handle> {
        let object = self.object.lock().unwrap_or_else(PoisonError::into_inner);
        result((object.head)(object.data, &table::host(), ctx, hidden))
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        let object = self.object.get_mut().unwrap_or_else(PoisonError::into_inner);
        (object.drop)(object.data);
    }
}

fn result<T>(r: RResult<T, PluginError>) -> Result<T> {
    r.into_result().map_err(|e| match e.code {
        abi::root::ERROR_CONFIG => Error::Config(e.message.into_string()),
        _ => Error::Plugin {
            text: e.message.into_string(),
            detail: Some(e.detail.into_string()).filter(|d| !d.is_empty()),
        },
    })
}

/// A library that anybody may overwrite is anybody's code.
#[cfg(unix)]
fn refuse_writable(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let mode = std::fs::metadata(path).map_err(Error::io(path))?.permissions().mode();
    if mode & 0o002 != 0 {
        return Err(Error::plugin(format!(
            "{}: everybody may write to this file, so it is not opened; chmod o-w it",
            path.display()
        )));
    }
    Ok(())
}

#[cfg(not(unix))]
fn refuse_writable(_: &Path) -> Result<()> {
    Ok(())
}

/// dlopen, then abi_stable's own header, its self-tests, and the layout of the factory: each before the next trusts it.
fn open(path: &Path) -> Result<FactoryRef> {
    let refuse = |what: String| Error::plugin(format!("{}: {what}", path.display()));
    // SAFETY: runs the library's initializers, which is what a user asks for by putting a plugin on the search path.
    #[cfg(unix)]
    let library = unsafe {
        use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
        Library::open(Some(path), RTLD_NOW | RTLD_LOCAL)
    };
    // SAFETY: as above.
    #[cfg(not(unix))]
    let library = unsafe { libloading::Library::new(path) };
    let library = library.map_err(|e| refuse(format!("cannot be opened: {e}")))?;
    let unlike = |e: LibraryError| Error::Plugin {
        text: format!(
            "{}: was built against another plugin-api than this dylm's; rebuild it with plugin-api {}.{}",
            path.display(),
            abi::MAJOR,
            abi::MINOR
        ),
        detail: Some(e.to_string()),
    };
    // SAFETY: `export_plugin!` declares this symbol as a `LibHeader`, which starts with an `AbiHeader`; the type is checked next.
    let header: AbiHeaderRef =
        unsafe { *library.get::<AbiHeaderRef>(abi::SYMBOL).map_err(|e| refuse(format!("is no plugin: {e}")))? };
    std::mem::forget(library);
    let header = header.upgrade().map_err(unlike)?;
    header.ensure_layout::<FactoryRef>().map_err(unlike)?;
    // SAFETY: the layout was checked in the line above.
    unsafe { header.init_root_module_with_unchecked_layout::<FactoryRef>() }.map_err(unlike)
}
