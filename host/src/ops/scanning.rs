//! `scan`: a recurrence whose step is the plugin's. One token at a time, one sequence after the other, so that the plugin sees the same
//! calls however a text is cut into prompts and batches; between the calls the host holds nothing of the step, for the plugin's step is
//! made of ops itself.

use super::{
    call::{finish, text_of, with_running},
    noting::Argument,
    running::Running,
    value::{Outcome, Value, fault},
};
use crate::cache::{memory, numbers::Numbers};
use abi_stable::std_types::{RSlice, RSliceMut};
use candle_core::{DType, Tensor};
use plugin_api::abi::{At, Ctx, Handle, ScanStep};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// What a scan needs to know before its first token.
struct Plan {
    caches: Vec<usize>,
    /// The shapes of their states, with a first axis of 1.
    shapes: Vec<Vec<usize>>,
    inputs: Vec<Value>,
    /// For each token its sequence.
    parts: Vec<usize>,
    /// For each token whether its sequence was longer than this once: the state before it must be kept.
    midway: Vec<bool>,
}

impl Running<'_> {
    fn plan_scan(&mut self, caches: &[u32], inputs: &[Handle]) -> Outcome<Plan> {
        if self.places.as_ref().is_some_and(|places| places.recorded) {
            return Err(fault!("states that the plugin's own step makes have no place to stay"));
        }
        let inputs = inputs.iter().map(|&x| self.arena.get(x)).collect::<Outcome<Vec<_>>>()?;
        for input in &inputs {
            if input.dims()?.first() != Some(&self.tokens) {
                return Err(fault!("{:?} in a step of {} tokens", input.dims()?, self.tokens));
            }
        }
        let mut shapes = Vec::with_capacity(caches.len());
        for &cache in caches {
            let shape = self.caches.get(cache as usize).map(memory::dims).unwrap_or_default();
            self.claim(cache, &shape)?;
            shapes.push([&[1], shape.as_slice()].concat());
        }
        self.arena.begin_exact()?;
        let tokens = |(i, part): (usize, &super::running::Part)| (0..part.tokens.len()).map(move |t| (i, t));
        let all: Vec<(usize, usize)> = self.parts.iter().enumerate().flat_map(tokens).collect();
        let midway = |&(i, t): &(usize, usize)| t > 0 && t == self.parts[i].replayed;
        Ok(Plan {
            caches: caches.iter().map(|&c| c as usize).collect(),
            shapes,
            inputs: inputs.iter().map(exact).collect::<Outcome<_>>()?,
            parts: all.iter().map(|&(i, _)| i).collect(),
            midway: all.iter().map(midway).collect(),
        })
    }

    /// The states of a sequence before its first token of this step.
    fn states_of(&self, plan: &Plan, part: usize) -> Outcome<Vec<Value>> {
        let state = |(&cache, shape): (&usize, &Vec<usize>)| {
            let memory = self.parts.get(part).and_then(|p| p.state.layers.get(cache)?.state());
            let Some(memory) = memory else { return Ok(Value::planned(shape)) };
            Ok(Value::Real(memory.numbers.on(&self.place.device, shape)?))
        };
        plan.caches.iter().zip(&plan.shapes).map(state).collect()
    }

    /// Writes the states down: as those in the middle of the step, or as what the sequence is left with.
    fn keep_states(&mut self, plan: &Plan, part: usize, states: &[Value], midway: bool) -> Outcome<()> {
        for (&cache, state) in plan.caches.iter().zip(states) {
            let memory = self.parts.get_mut(part).and_then(|p| p.state.layers.get_mut(cache)?.state_mut());
            let (Some(memory), Value::Real(state)) = (memory, state) else { continue };
            let numbers = match state.device().is_cpu() {
                true => Numbers::Here(state.flatten_all()?.to_vec1::<f32>()?),
                false => Numbers::There(state.clone()),
            };
            if midway {
                memory.midway = Some(numbers);
            } else {
                memory.numbers = numbers;
            }
        }
        Ok(())
    }

    /// What the plugin's step gave for a token: the states, which must have kept their shapes, and the row.
    fn collect(&mut self, plan: &Plan, made: &[Handle]) -> Outcome<(Vec<Value>, Value)> {
        let values = made.iter().map(|&handle| {
            let value = self.arena.get(handle);
            self.arena.release(handle);
            exact(&value?)
        });
        let mut values = values.collect::<Outcome<Vec<_>>>()?;
        let Some(y) = values.pop() else { return Err(fault!("the step gave no row")) };
        for (state, shape) in values.iter().zip(&plan.shapes) {
            if state.dims()? != shape {
                return Err(fault!("the step made a state of {:?} out of one of {shape:?}", state.dims()?));
            }
        }
        match y.dims()?.first() {
            Some(1) => Ok((values, y)),
            _ => Err(fault!("the step gave {:?}, it should be [1, ..]: one token's row", y.dims()?)),
        }
    }

    fn put_all(&mut self, values: &[Value]) -> Vec<Handle> {
        values.iter().map(|value| self.arena.put(value.clone())).collect()
    }

    /// The rows of all tokens as one tensor.
    fn join(&self, rows: &[Value]) -> Outcome {
        let Some(first) = rows.first() else { return Err(fault!("a step without tokens")) };
        let mut dims = first.own_dims()?;
        for row in rows {
            if *row.dims()? != dims[..] {
                return Err(fault!("the step gave {dims:?} for one token and {:?} for another", row.dims()?));
            }
        }
        dims[0] = self.tokens;
        let real = rows.iter().map(|row| if let Value::Real(t) = row { Some(t) } else { None });
        match real.collect::<Option<Vec<_>>>() {
            Some(rows) => Ok(Value::Real(Tensor::cat(&rows, 0)?.to_dtype(self.place.activations())?)),
            None => Ok(Value::Planned(dims)),
        }
    }
}

/// In f32, as all recurrences are.
fn exact(value: &Value) -> Outcome {
    value.map(|t| t.to_dtype(DType::F32))
}

/// A token's rows of the inputs.
fn rows(inputs: &[Value], token: usize) -> Outcome<Vec<Value>> {
    let row = |input: &Value| {
        let mut dims = input.own_dims()?;
        dims[0] = 1;
        input.make(dims, |t| t.narrow(0, token, 1)?.contiguous())
    };
    inputs.iter().map(row).collect()
}

/// The op itself; every borrow of the running step ends before the plugin is called.
pub extern "C" fn scan(
    ctx: Ctx,
    caches: RSlice<'_, u32>,
    inputs: RSlice<'_, Handle>,
    step: ScanStep,
    at: At,
) -> Handle {
    let nested = with_running(ctx, "scan", at, |running| running.arena.is_exact()).unwrap_or(false);
    // The plugin's own panics stay in the plugin: its step answers 0.
    let walked = catch_unwind(AssertUnwindSafe(|| match nested {
        true => Err(fault!("called by the step of another scan")),
        false => walk(ctx, caches.as_slice(), inputs.as_slice(), step, at),
    }));
    let outcome = walked.unwrap_or_else(|panic| Err(fault!("the host panicked: {}", text_of(&*panic))));
    let put = |running: &mut Running| {
        if !nested {
            running.arena.end_exact();
        }
        if let Some(notes) = &mut running.notes {
            notes.said.clear();
            inputs.say(&mut notes.said);
        }
        finish(running, "scan", None, at, outcome)
    };
    with_running(ctx, "scan", at, put).unwrap_or(Handle::NONE)
}

fn walk(ctx: Ctx, caches: &[u32], inputs: &[Handle], step: ScanStep, at: At) -> Outcome {
    let with = |f: &mut dyn FnMut(&mut Running) -> Outcome<()>| {
        let gone = || fault!("called outside of a running step");
        with_running(ctx, "scan", at, |running| f(running)).ok_or_else(gone)?
    };
    let mut plan = None;
    with(&mut |running| running.plan_scan(caches, inputs).map(|p| plan = Some(p)))?;
    let Some(plan) = plan else { return Err(fault!("no plan")) };
    let dry = plan.parts.is_empty() || plan.inputs.iter().any(|input| !matches!(input, Value::Real(_)));
    // A dry run has shapes alone, and these are the same for every token.
    let tokens = if dry { 1 } else { plan.parts.len() };
    let (mut states, mut joined) = (Vec::new(), Vec::with_capacity(tokens));
    for token in 0..tokens {
        let part = plan.parts.get(token).copied().unwrap_or(usize::MAX);
        let begins = token == 0 || plan.parts[token - 1] != part;
        let (mut before, mut now) = (Vec::new(), Vec::new());
        with(&mut |running| {
            if begins {
                states = running.states_of(&plan, part)?;
            } else if plan.midway[token] {
                running.keep_states(&plan, part, &states, true)?;
            }
            (before, now) = (running.put_all(&states), running.put_all(&rows(&plan.inputs, token)?));
            Ok(())
        })?;
        let mut made = vec![Handle::NONE; before.len() + 1];
        let out = RSliceMut::from_mut_slice(&mut made);
        if (step.run)(step.data, RSlice::from_slice(&before), RSlice::from_slice(&now), out) != 1 {
            return Err(fault!("the plugin's step failed"));
        }
        let ends = plan.parts.get(token + 1) != Some(&part);
        with(&mut |running| {
            let (after, y) = running.collect(&plan, &made)?;
            states = after;
            joined.push(y);
            if ends { running.keep_states(&plan, part, &states, false) } else { Ok(()) }
        })?;
    }
    let mut result = None;
    with(&mut |running| running.join(&joined).map(|y| result = Some(y)))?;
    result.ok_or_else(|| fault!("no result"))
}
