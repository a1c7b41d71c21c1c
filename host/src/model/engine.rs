//! One call of a plugin: `forward` on the new tokens, then `head` on the rows whose logits are wanted; loaded, or on shapes alone.

use super::Model;
use crate::{
    device::Placement,
    error::{Error, Result},
    layers::Layer,
    ops::{
        last_rows::{LastRows, looks},
        lending::Call,
        noting::{Noted, Notes, Word},
        running::{CacheShapes, Part, Places, Running},
        value::Value,
        watch::Watch,
    },
    parallel::ranks::Seat,
    plugin::library::Object,
    weights::plan::Wanted,
};
use candle_core::Tensor;
use plugin_api::abi::Handle;
use std::{cell::RefCell, collections::hash_map::Entry, sync::PoisonError};

impl Model {
    /// Where a step's tokens stand, for the kernels that read it on the device.
    pub(super) fn places(&self, parts: &[Part], count: usize) -> Result<Option<Places>> {
        if !self.place.device.is_cuda() {
            return Ok(None);
        }
        let of = |p: &Part| (p.state.offset as u32..).take(p.tokens.len()).collect::<Vec<_>>();
        let positions: Vec<u32> = parts.iter().flat_map(of).collect();
        let positions = Tensor::from_vec(positions, count, &self.place.device)?;
        Ok(Some(Places { positions, recorded: false }))
    }

    /// The logits `[tokens, vocab]` of a step whose ids and positions lie on the device.
    #[cfg(feature = "cuda")]
    pub(crate) fn logits(&self, parts: Vec<Part>, ids: Tensor, places: Places) -> Result<Tensor> {
        let engine = Engine { seat: self.seat.as_ref(), places: Some(places), ..self.engine() };
        match engine.run(parts, Value::Real(ids), |all| Ok(Some(all.clone())))?.0 {
            Some(Value::Real(logits)) => Ok(logits),
            _ => Err(Error::plugin("the plugin's head gave no logits".to_owned())),
        }
    }
}

impl Model {
    /// What the plugin does in a step of so many tokens, each of another sequence, all of whose logits are wanted; and what the caches that
    /// it feeds hold of a token.
    pub(crate) fn note(&self, tokens: usize) -> Result<(Vec<Noted>, CacheShapes)> {
        let notes = RefCell::new(Vec::new());
        let engine = Engine { layers: &[], notes: Some(&notes), ..self.engine() };
        let (_, shapes) = engine.run(Vec::new(), Value::planned(&[tokens]), |all| Ok(Some(all.clone())))?;
        Ok((notes.into_inner(), shapes))
    }
}

impl Model {
    /// This model's calls, alone and unwatched.
    pub(super) fn engine(&self) -> Engine<'_> {
        Engine::new(&self.object, &self.wanted, &self.layers, &self.place)
    }

    /// How a step of so many tokens can go on with these rows alone at some time; none if it cannot, or if they are all.
    pub(super) fn last_rows(&self, tokens: usize, rows: &[u32]) -> Option<LastRows> {
        // On NVIDIA's GPUs it has not been tried: launches that wait there would have to go first.
        if rows.len() >= tokens || self.watch.is_some() || self.place.device.is_cuda() {
            return None;
        }
        // Where no row is wanted, one keeps the plugin's shapes whole.
        let rows = if rows.is_empty() { vec![tokens as u32 - 1] } else { rows.to_vec() };
        self.looks_across(tokens).map(|left| LastRows { left, rows })
    }

    /// How many ops of a step of so many tokens look from one to another, after which it goes on with those whose logits are wanted; none if
    /// it goes on with all.
    pub fn looks_across(&self, tokens: usize) -> Option<usize> {
        // A plugin may look at the shapes that it is given. One that fails on shapes alone may do well with numbers.
        let look = || looks(&self.note(tokens).ok()?.0, tokens);
        match self.looks.lock().unwrap_or_else(PoisonError::into_inner).entry(tokens) {
            Entry::Occupied(known) => *known.get(),
            Entry::Vacant(new) => *new.insert(look()),
        }
    }
}

/// What one call of a plugin needs, loaded or not.
pub(super) struct Engine<'a> {
    pub object: &'a Object,
    pub wanted: &'a [Wanted],
    pub layers: &'a [Layer],
    pub place: &'a Placement,
    pub watch: Option<&'a Watch>,
    pub places: Option<Places>,
    /// Where to note the ops.
    pub notes: Option<&'a RefCell<Vec<Noted>>>,
    pub seat: Option<&'a Seat>,
    /// The rows that are wanted, where a step can do with fewer than it has tokens.
    pub last_rows: Option<LastRows>,
}

impl<'a> Engine<'a> {
    /// A call whose ops nobody watches or notes, on one device.
    pub fn new(object: &'a Object, wanted: &'a [Wanted], layers: &'a [Layer], place: &'a Placement) -> Self {
        Engine { object, wanted, layers, place, watch: None, places: None, notes: None, seat: None, last_rows: None }
    }

    /// `forward`, then `head` on the rows that `select` leaves, if any.
    pub fn run(
        &self,
        parts: Vec<Part>,
        tokens: Value,
        select: impl FnOnce(&Value) -> Result<Option<Value>>,
    ) -> Result<(Option<Value>, CacheShapes)> {
        let count = tokens.dims().ok().and_then(|dims| dims.first().copied()).unwrap_or_default();
        let running = Running {
            places: self.places.clone(),
            seat: self.seat,
            ops: self.watch.map(|_| Vec::new()),
            notes: self.notes.map(|_| Notes::default()),
            last_rows: self.last_rows.clone(),
            ..Running::new(&self.object.caches, self.wanted, self.layers, self.place, parts, count)
        };
        let call = Call::Running(RefCell::new(running));
        let Call::Running(cell) = &call else { unreachable!("made as Running above") };

        // What goes between the plugin's two calls is noted as if it were ops.
        let given = |op: &str, from: Handle, value: Value| {
            let running = &mut *cell.borrow_mut();
            let handle = running.arena.put(value.clone());
            if let Some(notes) = &mut running.notes {
                notes.said = vec![Word::Tensor(from)];
                notes.note(op, None, &value, handle);
            }
            handle
        };
        let tokens = given("tokens", Handle::NONE, tokens);
        let made = self.object.forward(&call, tokens)?;
        let rows = cell.borrow().rows();
        let hidden = take(cell, made, "forward", rows)?;
        let Some(chosen) = select(&hidden)? else {
            self.tell(cell);
            return Ok((None, CacheShapes::new()));
        };
        let count = chosen.dims().ok().and_then(|dims| dims.first().copied()).unwrap_or_default();
        let chosen = given("rows", made, chosen);
        let made = self.object.head(&call, chosen)?;
        let logits = take(cell, made, "head", count)?;
        self.tell(cell);
        if self.notes.is_some() {
            given("logits", made, logits.clone());
        }
        if let (Some(to), Some(notes)) = (self.notes, cell.borrow_mut().notes.take()) {
            *to.borrow_mut() = notes.ops;
        }
        let shapes = std::mem::take(&mut cell.borrow_mut().shapes);
        Ok((Some(logits), shapes))
    }

    fn tell(&self, running: &RefCell<Running>) {
        let mut running = running.borrow_mut();
        if let (Some(watch), Some(ops)) = (self.watch, running.ops.take()) {
            watch.put(ops, &running.arena, &running.fed);
        }
    }
}

/// The value that a plugin returned, of as many rows as it was given, or the first failure on the way to it.
fn take(running: &RefCell<Running>, handle: plugin_api::abi::Handle, what: &str, rows: usize) -> Result<Value> {
    let mut running = running.borrow_mut();
    if let Some(misuse) = running.misuse.take() {
        return Err(Error::plugin(misuse));
    }
    match running.arena.get(handle) {
        Ok(Value::Failed(first)) => Err(Error::plugin(first.to_string())),
        Ok(value) => match value.dims() {
            Ok(&[n, width]) if n == rows && width > 0 => {
                running.arena.release(handle);
                Ok(value)
            }
            Ok(dims) => Err(Error::plugin(format!("the plugin's {what} returned {dims:?}, it should be [{rows}, ..]"))),
            Err(_) => Err(Error::plugin(format!("the plugin's {what} failed"))),
        },
        Err(_) => Err(Error::plugin(format!(
            "the plugin's {what} returned no tensor of this step (but one kept from another step, dropped twice, or made up)"
        ))),
    }
}
