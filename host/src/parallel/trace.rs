//! What a plugin was noted to ask for -> a graph: each op with the tensors that it took, by their shapes, and the one that it gave.

use crate::ops::noting::{Noted, Word};
use plugin_api::abi::{AttendSpec, Handle};
use std::collections::HashMap;

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
    pub inputs: Vec<Option<(Handle, Vec<usize>)>>,
    /// What it gave.
    pub output: Handle,
    /// The shape of that.
    pub dims: Vec<usize>,
}

/// The ops of a step, in order. Tensors that no op gave, such as a scan's states, have no shape.
pub fn graph(notes: Vec<Noted>) -> Vec<Node> {
    let (mut shapes, mut nodes) = (HashMap::new(), Vec::with_capacity(notes.len()));
    for Noted { op, slot, said, gives, dims } in notes {
        let (mut handles, mut cache) = (Vec::new(), None);
        for word in &said {
            match word {
                Word::Tensor(x) => handles.push(*x),
                Word::Whole(number) if cache.is_none() => cache = u32::try_from(*number).ok(),
                Word::Attend(spec) => handles.extend(named_by(spec)),
                _ => {}
            }
        }
        let alike = said.iter().any(|word| matches!(word, Word::Attend(spec) if spec.block == 0));
        let shape = |x: Handle| (x != Handle::NONE).then(|| (x, shapes.get(&x.0).cloned().unwrap_or_default()));
        let inputs = handles.into_iter().map(shape).collect();
        shapes.insert(gives.0, dims.clone());
        let cache = cache.map(|cache| (cache, alike));
        nodes.push(Node { op, slot: slot.map(|s| s.0), cache, inputs, output: gives, dims });
    }
    nodes
}

/// The tensors of an attention that are none of its arguments.
fn named_by(spec: &AttendSpec) -> [Handle; 6] {
    let AttendSpec { sinks, selection, slopes, pooled_keys, pooled_values, pooled_selection, .. } = *spec;
    [sinks, selection, slopes, pooled_keys, pooled_values, pooled_selection]
}
