//! A call of a plugin, and what happens around every op in it: a panic of the host stops here, a first failure gets its op's name and the
//! plugin's place, an op called at the wrong time (a running op while building) is refused, and so is a context that is not the one lent
//! to this thread.

use super::{
    building::Building,
    running::Running,
    value::{Fault, Outcome, Value, fault},
    watch::Op,
};
use plugin_api::abi::{At, Ctx, Handle, Slot};
use std::{
    cell::{Cell, RefCell},
    panic::{AssertUnwindSafe, catch_unwind},
    rc::Rc,
    sync::atomic::{AtomicUsize, Ordering},
};

/// What a context points to.
pub enum Call<'a> {
    /// While `create` runs.
    Building(RefCell<Building<'a>>),
    /// While `forward` or `head` runs.
    Running(RefCell<Running<'a>>),
}

thread_local! {
    static LENT: Cell<*const ()> = const { Cell::new(std::ptr::null()) };
}

impl Call<'_> {
    /// Lets a plugin use this call as its context: on this thread, while `f` runs.
    pub fn lend<T>(&self, f: impl FnOnce(Ctx) -> T) -> T {
        struct Restore(*const ());
        impl Drop for Restore {
            fn drop(&mut self) {
                LENT.set(self.0);
            }
        }
        let here = std::ptr::from_ref(self).cast();
        let _restore = Restore(LENT.replace(here));
        f(Ctx(here))
    }
}

static STRAY: AtomicUsize = AtomicUsize::new(0);

/// How many ops were called with a context that was kept, taken to another thread or made up.
pub fn stray_calls() -> usize {
    STRAY.load(Ordering::Relaxed)
}

/// Runs `f` with the call behind a context; without one if the context was kept from an earlier call, taken to another thread or made up.
fn with_call<T>(ctx: Ctx, f: impl FnOnce(Option<&Call<'_>>) -> T) -> T {
    if ctx.0.is_null() || LENT.get() != ctx.0 {
        STRAY.fetch_add(1, Ordering::Relaxed);
        return f(None);
    }
    // SAFETY: `lend` put this pointer there from a `&Call` on this thread, and takes it away before that borrow ends.
    f(Some(unsafe { &*ctx.0.cast::<Call<'_>>() }))
}

/// Runs a running op; whatever goes wrong becomes a failed tensor that says what and where.
pub fn run(ctx: Ctx, op: &str, slot: Option<Slot>, at: At, f: impl FnOnce(&mut Running) -> Outcome) -> Handle {
    with_running(ctx, op, at, |running| {
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
    running.arena.put(value)
}

pub fn with_running<T>(ctx: Ctx, op: &str, at: At, f: impl FnOnce(&mut Running) -> T) -> Option<T> {
    with_call(ctx, |call| match call? {
        Call::Running(running) => Some(f(&mut *running.try_borrow_mut().ok()?)),
        Call::Building(building) => {
            let building = &mut *building.try_borrow_mut().ok()?;
            building.complain(format!("{op}: called while the model was being built (at {}:{})", at.file, at.line));
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
            Value::Failed(Rc::new(format!("{op}{of}: {what} (at {}:{})", at.file, at.line)))
        }
    }
}

/// Runs a building op; outside of `create` it fails the step.
pub fn build<T>(ctx: Ctx, op: &str, otherwise: T, at: At, f: impl FnOnce(&mut Building) -> T) -> T {
    let built = with_call(ctx, |call| match call? {
        Call::Building(building) => {
            let building = &mut *building.try_borrow_mut().ok()?;
            catch_unwind(AssertUnwindSafe(|| f(building)))
                .map_err(|panic| building.complain(format!("{op}: the host panicked: {}", text_of(&*panic))))
                .ok()
        }
        Call::Running(running) => {
            let misuse = format!("{op}: called while the model was running (at {}:{})", at.file, at.line);
            running.try_borrow_mut().ok()?.misuse.get_or_insert(misuse);
            None
        }
    });
    built.unwrap_or(otherwise)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        device::{DeviceChoice, DtypeChoice, Placement},
        ops::{arena::Arena, table::host},
    };

    #[test]
    fn a_context_is_nothing_on_another_thread_after_the_call_and_when_made_up() {
        let place = Placement::new(DeviceChoice::Cpu, DtypeChoice::Float32, candle_core::DType::F32).unwrap();
        let cell = RefCell::new(Running {
            arena: Arena::default(),
            wanted: &[],
            layers: &[],
            place: &place,
            parts: Vec::new(),
            tokens: 1,
            caches: &[],
            fed: Vec::new(),
            misuse: None,
            angles: Default::default(),
            shapes: Default::default(),
            ops: None,
        });
        let x = cell.borrow_mut().arena.put(Value::planned(&[1]));
        let call = Call::Running(cell);
        let exp = move |ctx: usize| host().ops.exp()(Ctx(ctx as *const ()), x, At::caller());
        let kept = call.lend(|ctx| {
            let ctx = ctx.0 as usize;
            assert_ne!(exp(ctx), Handle::NONE);
            assert_eq!(std::thread::spawn(move || exp(ctx)).join().unwrap(), Handle::NONE);
            assert_eq!(exp(ctx + 8), Handle::NONE);
            assert_eq!(exp(0), Handle::NONE);
            ctx
        });
        assert_eq!(exp(kept), Handle::NONE);
    }
}
