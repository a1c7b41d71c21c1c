//! The memories that a recorded step reads and writes: whether they are there, room ahead in them, and where they lie.

use crate::{
    cache::{State, memory::Memory},
    kernels::cuda::step::address,
    layers::Layer,
    model::{Input, Model},
};
use candle_core::Device;

/// Rows that caches have room for before a step: its own, and that of a step ahead.
const ROWS_AHEAD: usize = 2;

/// Whether each cache that has ever been fed holds a token: what the step writes into is there then.
pub(super) fn has_begun(state: &State) -> bool {
    let mut kept = state.layers.iter().filter_map(Memory::key_value).filter(|kv| kv.shape.is_some());
    state.offset > 0 && kept.all(|kv| !kv.positions.is_empty())
}

pub(super) fn make_room(state: &mut State, device: &Device) -> candle_core::Result<()> {
    let offset = state.offset;
    state.layers.iter_mut().try_for_each(|memory| match memory {
        Memory::KeyValue(kv) => kv.make_room(ROWS_AHEAD),
        Memory::State(state) if state.numbers.count() > 0 => state.numbers.in_turn(device, offset).map(drop),
        Memory::State(_) => Ok(()),
    })
}

/// Everything about the caches, and the lengths of the texts, that a recorded step takes as given.
pub(super) fn caches(model: &Model, inputs: &[Input]) -> candle_core::Result<Vec<u64>> {
    let ropes = model.layers.iter().filter_map(|layer| if let Layer::Rope(rope) = layer { Some(rope) } else { None });
    let by_length: Vec<_> = ropes.filter(|rope| rope.looks_at_length()).collect();
    let text = |state: &State| (state.offset + 1).max(state.horizon);
    let sets = |input: &Input| {
        by_length.iter().map(|rope| rope.set(text(input.state)).map_or(2, |set| set as u64)).collect::<Vec<_>>()
    };
    let mut all: Vec<u64> = inputs.iter().flat_map(sets).collect();
    for input in inputs {
        for memory in &input.state.layers {
            let kv = match memory {
                Memory::KeyValue(kv) => kv,
                Memory::State(state) => {
                    all.extend(state.numbers.place().map(address).transpose()?);
                    continue;
                }
            };
            for table in [&kv.keys, &kv.values] {
                let Some(whole) = table.whole() else { continue };
                all.extend([address(whole)?, whole.dim(0)? as u64]);
                // Another sequence's memory may come to lie where that of one with other options lay.
                all.extend(table.form().map_or([0; 2], |form| [form.bits, form.group]).map(|n| n as u64));
            }
            let rule = kv.rule();
            all.extend([rule.window.unwrap_or(0), rule.keep].map(|n| n as u64));
            all.push(kv.origin(input.state.offset)?.into());
        }
    }
    Ok(all)
}

/// What a step changes in each memory of the first sequence: how many entries it has, or which half of its place holds a state.
pub(super) fn lengths(inputs: &[Input]) -> Vec<usize> {
    let of = |memory: &Memory| match memory {
        Memory::KeyValue(kv) => kv.positions.len(),
        Memory::State(state) => state.numbers.turn(),
    };
    inputs.first().map_or(Vec::new(), |input| input.state.layers.iter().map(of).collect())
}
