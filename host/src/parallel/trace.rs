//! What `forward` and `head` ask for, as a graph: each op of a dry run with the tensors that it took and the one that it gave. The ops
//! themselves say nothing; the arena notes whose handle was looked at, and the next result claims what was noted.

use crate::ops::value::{Dims, Value};
use plugin_api::abi::{Handle, Slot};
use std::cell::{Cell, RefCell};

/// One op.
#[derive(Debug)]
pub struct Node {
    /// Its name in the table.
    pub op: String,
    /// The layer that it was called on.
    pub slot: Option<u32>,
    /// The keys and values that it looked at, and whether all heads see the same of them.
    pub cache: Option<(u32, bool)>,
    /// What it took, in the order of its arguments; `None` for an argument that was left out.
    pub inputs: Vec<Option<(Handle, Dims)>>,
    /// What it gave.
    pub output: Handle,
    /// The shape of that.
    pub dims: Dims,
}

/// The ops of one step, in order.
#[derive(Debug, Default)]
pub struct Trace {
    /// Those that are done.
    pub nodes: Vec<Node>,
    looked: RefCell<Vec<Option<(Handle, Dims)>>>,
    cache: Cell<Option<(u32, bool)>>,
}

/// What stands for an op where a plugin gives a tensor back to the host.
pub const RETURN: &str = "return";

impl Trace {
    /// An op took this tensor; an argument that was left out is no handle.
    pub fn looked_at(&self, handle: Handle, value: Option<&Value>) {
        let dims = value.and_then(|v| v.own_dims().ok());
        self.looked.borrow_mut().push(dims.map(|dims| (handle, dims)));
    }

    /// The op works on this cache, of which all heads see the same, or each what its number tells.
    pub fn on_cache(&self, cache: u32, alike: bool) {
        self.cache.set(Some((cache, alike)));
    }

    /// The op is done.
    pub fn done(&mut self, op: &str, slot: Option<Slot>, output: Handle, value: &Value) {
        let (inputs, cache) = (self.looked.take(), self.cache.take());
        let dims = value.own_dims().unwrap_or_default();
        self.nodes.push(Node { op: op.to_owned(), slot: slot.map(|s| s.0), cache, inputs, output, dims });
    }
}
