//! Ops that carry a state from token to token, in a compiled step: asked of the op itself, as a plugin would, with each sequence's state.

use super::Input;
use crate::{
    layers::slices::with_f32,
    model::Model,
    ops::{
        running::{Part, Running},
        value::{Fault, Value},
    },
};
use candle_core::{Device, Result, Tensor, bail};
use plugin_api::abi::{Handle, Slot};

/// Which of them.
#[derive(Clone, Copy)]
pub(super) enum Rule {
    Conv1d(Slot),
    Shift,
    Ssd,
    SelectiveScan,
    GatedDelta,
    LinearAttention,
    Wkv7,
    RgLru,
}

impl Rule {
    /// An op by its name in the table.
    pub(super) fn named(op: &str, slot: Option<Slot>) -> Option<Rule> {
        Some(match op {
            "conv1d" => Rule::Conv1d(slot?),
            "shift" => Rule::Shift,
            "ssd" => Rule::Ssd,
            "selective_scan" => Rule::SelectiveScan,
            "gated_delta" => Rule::GatedDelta,
            "linear_attention" => Rule::LinearAttention,
            "wkv7" => Rule::Wkv7,
            "rg_lru" => Rule::RgLru,
            _ => return None,
        })
    }
}

/// One of them on a cache.
pub(super) struct Recurring {
    pub(super) rule: Rule,
    pub(super) cache: u32,
    /// Of what is read.
    pub(super) dims: Vec<Vec<usize>>,
}

impl Recurring {
    pub(super) fn run<'b>(
        &self,
        model: &Model,
        inputs: &mut [Input],
        reads: &dyn Fn(usize) -> &'b [f32],
        out: &mut [f32],
    ) -> Result<()> {
        let tokens = inputs.len();
        let mut parts = Vec::with_capacity(tokens);
        for (i, input) in inputs.iter_mut().enumerate() {
            parts.push(Part { state: &mut *input.state, tokens: i..i + 1, replayed: 0 });
        }
        let caches = &model.object.caches;
        let mut running = Running::new(caches, &model.wanted, &model.layers, &model.place, parts, tokens);
        let mut handles = [Handle::NONE; 6];
        for (i, (dims, handle)) in self.dims.iter().zip(&mut handles).enumerate() {
            *handle = running.arena.put(Value::Real(Tensor::from_slice(reads(i), &dims[..], &Device::Cpu)?));
        }
        let [a, b, c, d, e, f] = handles;
        let (cache, five) = (self.cache, [a, b, c, d, e]);
        let made = match self.rule {
            Rule::Conv1d(slot) => running.conv1d(slot, cache, a),
            Rule::Shift => running.shift(cache, a),
            Rule::Ssd => running.ssd(cache, five),
            Rule::SelectiveScan => running.selective_scan(cache, five),
            Rule::GatedDelta => running.gated_delta(cache, five),
            Rule::LinearAttention => running.linear_attention(cache, [a, b, c, d]),
            Rule::Wkv7 => running.wkv7(cache, [a, b, c, d, e, f]),
            Rule::RgLru => running.rg_lru(cache, [a, b]),
        };
        match made {
            Ok(Value::Real(y)) => with_f32(&y, |y| out.copy_from_slice(y)),
            Err(Fault::New(why)) => bail!("{why}"),
            _ => bail!("an op gave nothing"),
        }
    }
}
