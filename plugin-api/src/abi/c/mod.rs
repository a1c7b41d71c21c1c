//! The second entry, for plugins in plain C: the op tables and the frozen objects once more, as `dylm.h` declares them. Pointers and numbers
//! only; every struct that a pointer leads to begins with its size, so that either side may be the older one.
//!
//! Nothing here owns anything: a text that a plugin hands over is copied before the call ends, and what a model made, its own `drop` frees.

mod argument;
pub mod ops;

pub use argument::{Argument, Lent, List, Step, Text};

use super::{CacheSpec, Ctx, Handle};

/// The exported symbol of a plugin in C; it carries the ABI's major number.
pub const SYMBOL: &[u8] = b"dylm_c_plugin_1\0";

/// What the host hands to every call of a plugin: [`root::Host`](super::root::Host) for C.
#[repr(C)]
pub struct Host {
    /// Its length in bytes.
    pub size: u64,
    /// `abi::MAJOR` of the host.
    pub major: u32,
    /// `abi::MINOR` of the host.
    pub minor: u32,
    /// What a plugin asks for while it describes a model.
    pub build: *const ops::BuildOps,
    /// What stands on weights or on the sequence.
    pub layers: *const ops::LayerOps,
    /// What needs only its arguments.
    pub tensors: *const ops::TensorOps,
    /// config.json's keys, during `create`.
    pub config: *const ConfigOps,
    /// Says why the running call fails, with one of the `ERROR_*` codes. The first one counts.
    pub error: extern "C" fn(Ctx, u32, Text),
    /// Whether `error` was called, by the plugin or by a reader of `config`: its code, or 0.
    pub failed: extern "C" fn(Ctx) -> u32,
    /// A named extension of the host, or null. Thread: any.
    pub extension: extern "C" fn(Text) -> *const (),
}

/// Reads config.json for a plugin that has no JSON parser: what `config!` is in Rust. A key may be a path: `rope_parameters.rope_theta`,
/// `layer_types.3`. An absent or null key takes what stands in `otherwise`; a wrong one is an error of the call that names the key.
#[repr(C)]
pub struct ConfigOps {
    /// Its length in bytes.
    pub size: u64,
    /// A whole number from `least` to `most`; `otherwise` `u64::MAX` demands the key. After an error, `least`.
    pub whole: extern "C" fn(Ctx, Text, least: u64, most: u64, otherwise: u64) -> u64,
    /// A number; `otherwise` NaN demands the key. After an error, 0.
    pub number: extern "C" fn(Ctx, Text, otherwise: f64) -> f64,
    /// 1 for true, 0 for false; `otherwise` 2 demands the key. After an error, 0.
    pub flag: extern "C" fn(Ctx, Text, otherwise: u32) -> u32,
    /// A text, ended by a zero byte that does not count, until `create` returns; null `otherwise` demands the key. After an error, empty.
    pub text: extern "C" fn(Ctx, Text, otherwise: Text) -> Text,
    /// The value as JSON, likewise; empty for an absent key.
    pub json: extern "C" fn(Ctx, Text) -> Text,
    /// Entries of a list; 0 for an absent key.
    pub count: extern "C" fn(Ctx, Text) -> u64,
}

/// A model that a plugin built, into a struct of the host's: [`root::ModelObject`](super::root::ModelObject) for C. Frozen.
#[repr(C)]
pub struct Model {
    /// Its length in bytes, as the host knows it.
    pub size: u64,
    /// The plugin's own model.
    pub data: *mut (),
    /// What each cache must remember; readable until `drop`.
    pub caches: *const CacheSpec,
    /// How many of these there are.
    pub cache_count: u64,
    /// ids `[tokens]` -> hidden `[tokens, dim]`
    pub forward: Option<extern "C" fn(*const (), &Host, Ctx, Handle) -> Handle>,
    /// hidden `[rows, dim]` -> logits `[rows, vocab]`
    pub head: Option<extern "C" fn(*const (), &Host, Ctx, Handle) -> Handle>,
    /// Ends the model. Thread: any, once.
    pub drop: Option<extern "C" fn(*mut ())>,
    /// A named extension of the model, or null. None is as good.
    pub extension: Option<extern "C" fn(*const (), Text) -> *const ()>,
}

impl Model {
    /// What a plugin gets to fill in.
    pub fn empty() -> Self {
        Model {
            size: size_of::<Model>() as u64,
            data: std::ptr::null_mut(),
            caches: std::ptr::null(),
            cache_count: 0,
            forward: None,
            head: None,
            drop: None,
            extension: None,
        }
    }
}

/// What a plugin in C exports: [`root::ModelFactory`](super::root::ModelFactory) for C. Frozen; a longer one is of a later minor version.
#[repr(C)]
pub struct Plugin {
    /// Its length in bytes.
    pub size: u64,
    /// `abi::MAJOR` of the plugin.
    pub major: u32,
    /// The lowest minor version of the host that will do.
    pub minor: u32,
    /// The plugin's note, to be compared with the one read from the file.
    pub note: Text,
    /// Builds the architecture for a configuration (JSON text) with the building ops, into `Model`; gives 0, or an `ERROR_*` after which
    /// the host drops nothing. Thread: any, one call at a time per context.
    pub create: Option<extern "C" fn(&Host, Ctx, Text, &mut Model) -> u32>,
    /// A named extension of the factory, or null. None is as good. Thread: any.
    pub extension: Option<extern "C" fn(Text) -> *const ()>,
}

// SAFETY: constants of a library that stays open, which nobody writes to.
unsafe impl Send for Plugin {}
// SAFETY: as above.
unsafe impl Sync for Plugin {}

// SAFETY: pointers to constants, and functions that check their context.
unsafe impl Send for Host {}
// SAFETY: as above.
unsafe impl Sync for Host {}
