//! A plugin through either of the two doors: abi_stable's, or plain C's (plugin-api/dylm.h), whose models get the faces of those in Rust.
//!
//! C has no panics to catch and no layout to compare: what can be told from sizes, nulls and the note is told here, and a crash is a crash.

use super::c_calls::{self, Conversation, Reason};
use crate::error::{Error, Result};
use abi_stable::std_types::{RErr, ROk, RResult, RStr, RString, RVec};
use plugin_api::abi::{
    self, CacheSpec, Ctx, Handle,
    c::{self, Text},
    root::{ERROR_ABI, FactoryRef, Host, ModelObject, PluginError},
};
use std::path::Path;

/// What makes models, of either kind.
#[derive(Clone, Copy)]
pub enum Factory {
    /// Of a plugin in Rust.
    Rust(FactoryRef),
    /// Of a plugin in C.
    C(&'static c::Plugin),
}

impl Factory {
    /// The factory behind a `dylm_c_plugin_1`.
    pub fn of_c(symbol: *const c::Plugin, path: &Path) -> Result<Self> {
        let refuse = |why: String| Err(Error::plugin(format!("{}: {why}", path.display())));
        // SAFETY: the symbol's name promises a `c::Plugin` of some version, and all of them begin with size and major.
        let (size, major) = unsafe { ((&raw const (*symbol).size).read(), (&raw const (*symbol).major).read()) };
        if major != abi::MAJOR {
            let cure = if major < abi::MAJOR { "rebuild the plugin" } else { "update dylm" };
            return refuse(format!(
                "its code speaks ABI {major}, this dylm speaks {}.{}; {cure}",
                abi::MAJOR,
                abi::MINOR
            ));
        }
        if size < size_of::<c::Plugin>() as u64 {
            let whole = size_of::<c::Plugin>();
            return refuse(format!(
                "its dylm_c_plugin_1 has {size} bytes of {whole}; build it again with this dylm's dylm.h"
            ));
        }
        // SAFETY: it is at least as long as we know it; a library's constants stay, for libraries are never closed.
        let plugin = unsafe { &*symbol };
        if plugin.minor > abi::MINOR {
            let needed = plugin.minor;
            return refuse(format!("needs ABI {major}.{needed}, this dylm speaks {major}.{}; update dylm", abi::MINOR));
        }
        if plugin.create.is_none() {
            return refuse("its dylm_c_plugin_1 has no create; let DYLM_PLUGIN of dylm.h write it".into());
        }
        Ok(Factory::C(plugin))
    }

    /// `abi::MAJOR` of the plugin.
    pub fn major(&self) -> u32 {
        match self {
            Factory::Rust(factory) => factory.major(),
            Factory::C(plugin) => plugin.major,
        }
    }

    /// The note that its code has; empty if there is none.
    pub fn note(&self) -> &'static [u8] {
        match self {
            Factory::Rust(factory) => factory.note().as_str().as_bytes(),
            // SAFETY: a constant of a library that stays open.
            Factory::C(plugin) => unsafe { plugin.note.entries() }.unwrap_or_default(),
        }
    }

    /// A named extension of the factory, or null. Thread: any.
    pub fn extension(&self, id: &str) -> *const () {
        match self {
            Factory::Rust(factory) => factory.extension()(id.into()),
            Factory::C(plugin) => {
                plugin.extension.map_or(std::ptr::null(), |extension| extension(Text::of(id.as_bytes())))
            }
        }
    }

    /// Where it lies.
    pub fn address(&self) -> *const () {
        match self {
            Factory::Rust(factory) => factory.0.to_raw_ptr().cast(),
            Factory::C(plugin) => std::ptr::from_ref(*plugin).cast(),
        }
    }

    /// Builds a model, for this host; a plugin in C sees the one that is.
    pub fn create(&self, host: &Host, ctx: Ctx, config: &str) -> RResult<ModelObject, PluginError> {
        match self {
            Factory::Rust(factory) => factory.create()(host, ctx, config.into()),
            Factory::C(plugin) => create(plugin, ctx, config).into(),
        }
    }
}

/// What `ModelObject::data` points to for a model in C.
struct Made {
    model: c::Model,
    forward: Run,
    head: Run,
}

type Run = extern "C" fn(*const (), &c::Host, Ctx, Handle) -> Handle;

impl Drop for Made {
    fn drop(&mut self) {
        if let Some(drop) = self.model.drop {
            drop(self.model.data);
        }
    }
}

fn fault(message: impl Into<String>) -> PluginError {
    PluginError { code: ERROR_ABI, message: RString::from(message.into()), detail: RString::new() }
}

fn create(plugin: &'static c::Plugin, ctx: Ctx, config: &str) -> Result<ModelObject, PluginError> {
    let Some(create) = plugin.create else { return Err(fault("the plugin has no create")) };
    let conversation = Conversation::about(ctx, config).map_err(fault)?;
    let mut model = c::Model::empty();
    let (code, error) = conversation.hold(|| create(c_calls::host(), ctx, Text::of(config.as_bytes()), &mut model));
    if code != 0 {
        let silent = || fault(format!("the plugin's create gave up with code {code} and did not say why"));
        return Err(error.map_or_else(silent, Reason::into_error));
    }
    let (Some(forward), Some(head), Some(_)) = (model.forward, model.head, model.drop) else {
        return Err(fault("the plugin's create made a model without forward, head or drop"));
    };
    // From here on the model is dropped whatever happens.
    let made = Made { model, forward, head };
    if let Some(error) = error {
        return Err(error.into_error());
    }
    if made.model.cache_count > 0 && made.model.caches.is_null() {
        return Err(fault("the plugin's create made a model with caches at no address"));
    }
    let data = Box::into_raw(Box::new(made)).cast();
    Ok(ModelObject {
        data,
        caches: self::caches,
        forward: self::forward,
        head: self::head,
        drop: self::drop,
        extension,
    })
}

/// # Safety
/// `data` is `ModelObject::data` as `create` made it, not yet dropped.
unsafe fn made<'a>(data: *const ()) -> &'a Made {
    // SAFETY: the caller's promise.
    unsafe { &*data.cast::<Made>() }
}

extern "C" fn caches(data: *const ()) -> RVec<CacheSpec> {
    // SAFETY: the library passes `ModelObject::data`.
    let model = &unsafe { made(data) }.model;
    // More than are ever accepted; the count is the plugin's word, and the rest of an endless list is not read.
    let count = model.cache_count.min(super::library::MOST_CACHES as u64 + 1) as usize;
    // SAFETY: `dylm.h` promises so many, until `drop`.
    unsafe { c::List { start: model.caches, len: count }.entries() }.unwrap_or_default().to_vec().into()
}

fn run(data: *const (), ctx: Ctx, which: fn(&Made) -> Run, argument: Handle) -> RResult<Handle, PluginError> {
    // SAFETY: the library passes `ModelObject::data`.
    let made = unsafe { made(data) };
    let call = || which(made)(made.model.data, c_calls::host(), ctx, argument);
    match Conversation::without_config(ctx).hold(call) {
        (_, Some(error)) => RErr(error.into_error()),
        (handle, None) => ROk(handle),
    }
}

extern "C" fn forward(data: *const (), _: &Host, ctx: Ctx, tokens: Handle) -> RResult<Handle, PluginError> {
    run(data, ctx, |made| made.forward, tokens)
}

extern "C" fn head(data: *const (), _: &Host, ctx: Ctx, hidden: Handle) -> RResult<Handle, PluginError> {
    run(data, ctx, |made| made.head, hidden)
}

extern "C" fn drop(data: *mut ()) {
    // SAFETY: the library drops once, last, what `create` boxed.
    std::mem::drop(unsafe { Box::from_raw(data.cast::<Made>()) });
}

extern "C" fn extension(data: *const (), id: RStr<'_>) -> *const () {
    // SAFETY: the library passes `ModelObject::data`.
    let model = &unsafe { made(data) }.model;
    model.extension.map_or(std::ptr::null(), |extension| extension(model.data, Text::of(id.as_str().as_bytes())))
}
