//! A plugin file -> its factory -> models. The only place that opens a library, and it opens each once and for good: code that other
//! threads may still run, or whose errors are still printed, must not be unmapped.

use super::{c_entry::Factory, file::PluginFile, note::Note, permissions::refuse_others, registry::Found};
use crate::cache::memory;
use crate::error::{Error, Result};
use crate::ops::{lending::Call, table};
use abi_stable::{
    library::{AbiHeaderRef, LibraryError},
    std_types::RResult,
};
use plugin_api::abi::{
    self, CacheSpec, Handle, c, checking,
    root::{FactoryRef, Host, ModelObject, PluginError},
};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

/// More layers with a memory than any model has.
pub(super) const MOST_CACHES: usize = 100_000;

/// More numbers of state than any model has: 16 GiB of them.
const MOST_NUMBERS: usize = 1 << 32;

#[doc(hidden)]
pub use crate::ops::table::{Tables, play_host};

/// An opened plugin.
#[derive(Clone)]
pub struct Library {
    /// The file.
    pub path: PathBuf,
    /// What it says of itself.
    pub note: Note,
    pub(super) factory: Factory,
}

/// Opened libraries stay open; a second request for a file gets the first one's factory. With the hash that was agreed to, if one had to be.
static OPENED: Mutex<BTreeMap<PathBuf, (Factory, Option<String>)>> = Mutex::new(BTreeMap::new());

impl Library {
    /// Opens the plugin that the registry found: nothing of it runs before its file is whole, in nobody else's hands, and agreed to.
    pub fn open(found: &Found) -> Result<Self> {
        let Found { path, note, trust } = found;
        if let Some(why) = note.refusal(path) {
            return Err(Error::plugin(why));
        }
        let file = PluginFile::open(path)?;
        refuse_others(path, "no plugin is opened from it")?;
        file.refuse_holes()?;
        let differs = |what: &str| Error::plugin(format!("{}: {what}", path.display()));
        if Note::of(&file)? != *note {
            return Err(differs("has changed since the search path was read; start again"));
        }
        let agreed = trust.consent(&file, note)?;
        let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
        let factory = match opened.get(path) {
            Some((_, Some(before))) if agreed.as_ref().is_some_and(|hash| hash != before) => {
                return Err(differs("has changed since this program opened it; start the program again"));
            }
            Some((factory, _)) => *factory,
            None => {
                let dlopen = |by: &Path| open(path, by);
                // By its bare path, which debuggers and profilers know, unless these very bytes were agreed to.
                let factory = match &agreed {
                    Some(hash) => file.through(hash, dlopen),
                    None => dlopen(path),
                }?;
                opened.insert(path.clone(), (factory, agreed));
                factory
            }
        };
        let inside = Note::parse(factory.note()).ok();
        // Which ops the code calls only the linker knew, so the note inside does not say it.
        let inside = inside.map(|inside| inside.with_ops(note.needs.clone(), note.asks.clone()));
        if factory.major() != abi::MAJOR || inside.as_ref() != Some(note) {
            return Err(Error::plugin(format!(
                "{}: its note and its code disagree about what it is; build it again",
                path.display()
            )));
        }
        Ok(Library { path: path.clone(), note: note.clone(), factory })
    }

    /// Whether the system's loader, asked again, gives the same factory.
    pub(crate) fn is_the_same_again(&self) -> Result<bool> {
        Ok(self.factory.address() == open(&self.path, &self.path)?.address())
    }

    /// Whether it came through the door for plain C, where there are neither panics nor layouts.
    pub(crate) fn is_in_c(&self) -> bool {
        matches!(self.factory, Factory::C(_))
    }

    /// What the factory answers to the name of an extension.
    pub(crate) fn answer(&self, id: &str) -> *const () {
        self.factory.extension(id)
    }

    /// The configurations that the plugin carries for `dylm check`.
    pub fn examples(&self) -> Vec<String> {
        let examples = self.extension::<checking::Examples>();
        examples.iter().flat_map(|e| e.texts.iter()).map(|text| text.as_str().to_owned()).collect()
    }

    /// The last panic on any thread since this was asked before; `None` where the plugin does not tell, empty where there was none.
    pub fn take_panic(&self) -> Option<String> {
        self.extension::<checking::Panics>().map(|panics| (panics.take)().into_string())
    }

    /// Whether the plugin would build for this host at all. Thread: any.
    pub(crate) fn meet(&self, host: &Host, call: &Call, config: &str) -> Result<(), PluginError> {
        let object = call.lend(|ctx| self.factory.create(host, ctx, config).into_result())?;
        (object.drop)(object.data);
        Ok(())
    }

    /// Builds a model for `config`; what the plugin asks for is written down in `call`.
    pub(crate) fn create(&self, call: &Call, config: &str) -> Result<Object> {
        let object = call.lend(|ctx| result(self.factory.create(&table::host(), ctx, config)))?;
        let caches = (object.caches)(object.data).into_vec();
        let object = Object { object: Mutex::new(object), caches };
        // Only now, for the object must be dropped if this fails.
        let known = |c: &CacheSpec| match c.kind {
            abi::CACHE_KEY_VALUE => {
                c.dims == [0; 6] && (c.flags == 0 || c.flags == abi::CACHE_IN_CHUNKS && c.window > 0)
            }
            abi::CACHE_STATE => c.flags == 0 && c.window == 0,
            abi::CACHE_POOLED => {
                (c.flags, c.window) == (0, 0) && (1..1 << 24).contains(&c.dims[0]) && c.dims[1..] == [0; 5]
            }
            _ => false,
        };
        if object.caches.len() > MOST_CACHES || !object.caches.iter().all(known) {
            return Err(Error::plugin(format!(
                "{}: its model asks for {} caches, not all of a kind that this dylm has; update dylm",
                self.path.display(),
                object.caches.len()
            )));
        }
        let sizes = object.caches.iter().map(|c| memory::count(&memory::dims(c)));
        let numbers = sizes.fold(0, usize::saturating_add);
        if numbers > MOST_NUMBERS {
            return Err(Error::plugin(format!(
                "{}: its model asks for {numbers} numbers of state, more than any model has; look at config.json",
                self.path.display()
            )));
        }
        Ok(object)
    }
}

/// A model that a plugin built.
pub struct Object {
    /// Locked for each call: the ABI promises a plugin one call at a time.
    pub(super) object: Mutex<ModelObject>,
    /// What each layer must remember.
    pub caches: Vec<CacheSpec>,
}

// SAFETY: the ABI allows `forward`, `head` and `drop` on any thread, one at a time; the mutex sees to the latter.
unsafe impl Send for Object {}
// SAFETY: as above; nothing is reachable without the lock.
unsafe impl Sync for Object {}

impl Object {
    /// What the model says now of its caches.
    pub(crate) fn declared(&self) -> Vec<CacheSpec> {
        let object = self.object.lock().unwrap_or_else(PoisonError::into_inner);
        (object.caches)(object.data).into_vec()
    }

    /// What the model answers to the name of an extension.
    pub(crate) fn answer(&self, id: &str) -> *const () {
        let object = self.object.lock().unwrap_or_else(PoisonError::into_inner);
        (object.extension)(object.data, id.into())
    }

    /// ids `[tokens]` -> hidden `[tokens, dim]`
    pub(crate) fn forward(&self, call: &Call, tokens: Handle) -> Result<Handle> {
        let object = self.object.lock().unwrap_or_else(PoisonError::into_inner);
        call.lend(|ctx| result((object.forward)(object.data, &table::host(), ctx, tokens)))
    }

    /// hidden `[rows, dim]` -> logits `[rows, vocab]`
    pub(crate) fn head(&self, call: &Call, hidden: Handle) -> Result<Handle> {
        let object = self.object.lock().unwrap_or_else(PoisonError::into_inner);
        call.lend(|ctx| result((object.head)(object.data, &table::host(), ctx, hidden)))
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

/// dlopen, then abi_stable's own header, its self-tests, and the layout of the factory: each before the next trusts it.
/// `path` is for messages, `by` leads to the file.
fn open(path: &Path, by: &Path) -> Result<Factory> {
    let refuse = |what: String| Error::plugin(format!("{}: {what}", path.display()));
    // SAFETY: runs the library's initializers, which is what a user asks for by putting a plugin on the search path.
    #[cfg(unix)]
    let library = unsafe {
        use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
        Library::open(Some(by), RTLD_NOW | RTLD_LOCAL)
    };
    // SAFETY: as above.
    #[cfg(not(unix))]
    let library = unsafe { libloading::Library::new(by) };
    let library = library.map_err(|e| refuse(format!("cannot be opened ({e}); build it again on this machine")))?;
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
    let symbol = unsafe { library.get::<AbiHeaderRef>(abi::SYMBOL).map(|symbol| *symbol) };
    // SAFETY: DYLM_PLUGIN of dylm.h declares this symbol as a `c::Plugin` of some version; its size is looked at next.
    let in_c = unsafe { library.get::<*const c::Plugin>(c::SYMBOL).map(|symbol| *symbol) };
    // Even a library that is none of ours stays: its initializers have run, and may have started threads.
    std::mem::forget(library);
    if let (Err(_), Ok(plugin)) = (&symbol, in_c) {
        return Factory::of_c(plugin, path);
    }
    let header =
        symbol.map_err(|e| refuse(format!("has a note, but is no plugin ({e}); build it with export_plugin!")))?;
    let header = header.upgrade().map_err(unlike)?;
    header.ensure_layout::<FactoryRef>().map_err(unlike)?;
    // SAFETY: the layout was checked in the line above.
    unsafe { header.init_root_module_with_unchecked_layout::<FactoryRef>() }.map(Factory::Rust).map_err(unlike)
}
