//! What happens around every op: a panic of the host stops here, a first failure gets its op's name and the plugin's place, and an op
//! called at the wrong time (a running op while building) is refused. Whose call it is `lending` tells.

use super::{
    building::Building,
    lending::{Call, alone, with_call},
    noting::Word,
    running::Running,
    value::{Fault, Outcome, Value, fault},
    watch::Op,
};
use plugin_api::abi::{At, Ctx, Handle, Slot};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    rc::Rc,
};

/// Runs a running op; whatever goes wrong becomes a failed tensor that says what and where. `said` tells its arguments to who notes them.
pub fn run(
    ctx: Ctx,
    op: &str,
    slot: Option<Slot>,
    at: At,
    said: impl FnOnce(&mut Vec<Word>),
    f: impl FnOnce(&mut Running) -> Outcome,
) -> Handle {
    with_running(ctx, op, at, |running| {
        if let Some(notes) = &mut running.notes {
            notes.said.clear();
            said(&mut notes.said);
        }
        let outcome = catch_unwind(AssertUnwindSafe(|| f(running)))
            .unwrap_or_else(|panic| Err(fault!("the host panicked: {}", text_of(&*panic))));
        finish(running, op, slot, at, outcome)
    })
    .unwrap_or(Handle::NONE)
}

/// The handle of what an op gave, or of why it gave nothing.
pub fn finish(running: &mut Running, op: &str, slot: Option<Slot>, at: At, outcome: Outcome) -> Handle {
    let value = settle(running, op, slot, at, outcome);
    if let Some(ops) = &mut running.ops {
        ops.push(Op::new(op, slot, &value, at));
    }
    if running.notes.is_none() {
        let output = running.arena.put(value);
        if let Err(e) = running.keep_last_rows(op) {
            running.misuse.get_or_insert(format!("{op}: {e}"));
        }
        return output;
    }
    let output = running.arena.put(value.clone());
    if let Some(notes) = &mut running.notes {
        notes.note(op, slot, &value, output);
    }
    output
}

pub fn with_running<T>(ctx: Ctx, op: &str, at: At, f: impl FnOnce(&mut Running) -> T) -> Option<T> {
    with_call(ctx, op, at, |call| match call {
        Call::Running(running) => Some(f(&mut *alone(running, ctx, op, at)?)),
        Call::Building(building) => {
            let building = &mut *alone(building, ctx, op, at)?;
            building.complain(format!("{op}: called while the model was being built (at {at})"));
            None
        }
    })
}

/// The text of a panic.
pub fn text_of(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or(panic.downcast_ref::<&str>().copied())
        .unwrap_or("without a text")
}

fn settle(running: &Running, op: &str, slot: Option<Slot>, at: At, outcome: Outcome) -> Value {
    match outcome {
        Ok(value) => value,
        Err(Fault::Passed(first)) => Value::Failed(first),
        Err(Fault::New(what)) => {
            let of = slot.map(|s| format!(" of {}", running.name(s))).unwrap_or_default();
            Value::Failed(Rc::new(format!("{op}{of}: {what} (at {at})")))
        }
    }
}

/// Runs a building op; outside of `create` it fails the step.
pub fn build<T>(ctx: Ctx, op: &str, otherwise: T, at: At, f: impl FnOnce(&mut Building) -> T) -> T {
    let built = with_call(ctx, op, at, |call| match call {
        Call::Building(building) => {
            let building = &mut *alone(building, ctx, op, at)?;
            catch_unwind(AssertUnwindSafe(|| f(building)))
                .map_err(|panic| building.complain(format!("{op}: the host panicked: {}", text_of(&*panic))))
                .ok()
        }
        Call::Running(running) => {
            let misuse = format!("{op}: called while the model was running (at {at})");
            alone(running, ctx, op, at)?.misuse.get_or_insert(misuse);
            None
        }
    });
    built.unwrap_or(otherwise)
}
