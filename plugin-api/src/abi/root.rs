//! The frozen objects: the factory that a plugin exports and the model that it makes. They never change within ABI major 1; whatever a
//! later version needs is a named extension, asked for by `extension(id)` in both directions and null where it is not known.

use super::{CacheSpec, Ctx, Handle, ops::OpsRef};
use abi_stable::{
    StableAbi,
    library::RootModule,
    package_version_strings,
    sabi_types::VersionStrings,
    std_types::{RResult, RStr, RString, RVec},
    type_layout::TypeLayout,
};

/// What the host hands to every call of a plugin.
#[repr(C)]
#[derive(StableAbi, Clone, Copy)]
pub struct Host {
    /// The op table. Opaque to the host's own layout check: see `abi::ops`.
    #[sabi(unsafe_opaque_field)]
    pub ops: OpsRef,
    /// The layout of that table, for the plugin to check against the one that it was compiled with.
    #[sabi(unsafe_opaque_field)]
    pub layout: &'static TypeLayout,
    /// A named extension of the host, or null. Thread: any.
    pub extension: extern "C" fn(RStr<'_>) -> *const (),
}

/// Why a plugin could not do what it was asked.
#[repr(C)]
#[derive(StableAbi, Clone, Debug)]
pub struct PluginError {
    /// One of the `ERROR_*` constants.
    pub code: u32,
    /// One sentence.
    pub message: RString,
    /// The long form, for a developer; often empty.
    pub detail: RString,
}

/// The configuration does not make sense to the architecture.
pub const ERROR_CONFIG: u32 = 1;
/// The plugin panicked; the message has the panic's text and place.
pub const ERROR_PANIC: u32 = 2;
/// Host and plugin do not fit.
pub const ERROR_ABI: u32 = 3;

/// A model that a plugin built. `data` is the plugin's; only these functions may touch it.
///
/// Threads: `forward` and `head` run on one thread at a time and are never re-entered; `drop` may run on any thread, once.
#[repr(C)]
#[derive(StableAbi)]
pub struct ModelObject {
    /// The plugin's own model.
    pub data: *mut (),
    /// What each cache must remember, in the order of `Step::layers`. Thread: any, one call at a time.
    pub caches: extern "C" fn(*const ()) -> RVec<CacheSpec>,
    /// ids `[tokens]` -> hidden `[tokens, dim]`. Thread: any, one call at a time, never re-entered.
    pub forward: extern "C" fn(*const (), &Host, Ctx, Handle) -> RResult<Handle, PluginError>,
    /// hidden `[rows, dim]` -> logits `[rows, vocab]`. Thread: any, one call at a time, never re-entered.
    pub head: extern "C" fn(*const (), &Host, Ctx, Handle) -> RResult<Handle, PluginError>,
    /// Ends the model. Thread: any, once, last.
    pub drop: extern "C" fn(*mut ()),
    /// A named extension of the model, or null. Thread: any, one call at a time.
    pub extension: extern "C" fn(*const (), RStr<'_>) -> *const (),
}

/// What a plugin exports: how to make a model from a configuration.
#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = FactoryRef)))]
pub struct ModelFactory {
    /// `abi::MAJOR` of the plugin.
    pub major: u32,
    /// The plugin's note, to be compared with the one read from the file.
    pub note: RStr<'static>,
    /// Builds the architecture for `config` (JSON text) with the building ops. Thread: any, one call at a time per context.
    pub create: extern "C" fn(&Host, Ctx, config: RStr<'_>) -> RResult<ModelObject, PluginError>,
    /// A named extension of the factory, or null. Thread: any.
    #[sabi(last_prefix_field)]
    pub extension: extern "C" fn(RStr<'_>) -> *const (),
}

impl RootModule for FactoryRef {
    abi_stable::declare_root_module_statics! {FactoryRef}
    const BASE_NAME: &'static str = "dylm_plugin";
    const NAME: &'static str = "dylm_plugin";
    const VERSION_STRINGS: VersionStrings = package_version_strings!();
}
