//! What a plugin did in its calls, op by op, for `dylm check`: whether equal shapes give equal ops, and whether every handle came back.

use super::{
    arena::Arena,
    value::{Fault, Value},
};
use plugin_api::abi::{At, Slot};
use std::sync::{Mutex, PoisonError};

/// One op, as the plugin called it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Op {
    /// The op's name in the table.
    pub name: String,
    /// The layer that it was called on.
    pub slot: Option<u32>,
    /// The result's shape, or why there is none.
    pub dims: Result<Vec<usize>, String>,
    /// Where in the plugin's source.
    pub at: String,
}

impl Op {
    /// The op that gave `value`.
    pub fn new(name: &str, slot: Option<Slot>, value: &Value, at: At) -> Self {
        let dims = match value.dims() {
            Ok(dims) => Ok(dims.to_vec()),
            Err(Fault::New(why)) => Err(why),
            Err(Fault::Passed(why)) => Err(why.to_string()),
        };
        Op { name: name.to_owned(), slot: slot.map(|s| s.0), dims, at: at.to_string() }
    }
}

/// One step: `forward`, and `head` where it was called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// In the order of the calls.
    pub ops: Vec<Op>,
    /// Tensors that had an owner left when the plugin was done.
    pub left: usize,
    /// Releases of handles that had no owner any more.
    pub stale: usize,
    /// Which of the declared caches were fed.
    pub fed: Vec<bool>,
}

/// The steps of a model that is being watched.
#[derive(Debug, Default)]
pub struct Watch(Mutex<Vec<Trace>>);

impl Watch {
    pub(crate) fn put(&self, ops: Vec<Op>, arena: &Arena, fed: &[bool]) {
        let trace = Trace { ops, left: arena.owned(), stale: arena.stale, fed: fed.to_vec() };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(trace);
    }

    /// The steps since the last time that it was asked.
    pub fn take(&self) -> Vec<Trace> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
