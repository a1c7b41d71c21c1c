//! The extensions by which `dylm check` asks a plugin for what it is tried with, and for what no call could report. `export_plugin!` offers
//! both; a plugin without them is checked with less.

use super::extension::Extension;
use abi_stable::std_types::{RSlice, RStr, RString};

/// Small configurations that the architecture must be able to build: `export_plugin!(Llama, examples = ["config.json"])`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Examples {
    /// The text of a config.json each.
    pub texts: RSlice<'static, RStr<'static>>,
}

// SAFETY: `repr(C)`, and there are no later fields.
unsafe impl Extension for Examples {
    const ID: &'static str = "examples/1";
}

/// Panics on any thread since the plugin was first called: in `drop`, which can report nothing, or on a thread of the plugin's own.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Panics {
    /// The text and place of the last one, which is then forgotten; empty if there was none. Thread: any.
    pub take: extern "C" fn() -> RString,
}

// SAFETY: `repr(C)`, and there are no later fields.
unsafe impl Extension for Panics {
    const ID: &'static str = "panics/1";
}
