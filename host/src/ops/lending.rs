//! A running call -> the context that a plugin gets for it, and back. A context is good on the thread that it was lent to, while the call
//! runs, and for one op at a time. All else is no call at all; but where it can be told which call was meant, that call fails and says so.

use super::{building::Building, running::Running};
use plugin_api::abi::{At, Ctx};
use std::{
    cell::{Cell, RefCell, RefMut},
    collections::BTreeMap,
    ptr,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

/// What a context points to.
#[expect(clippy::large_enum_variant, reason = "there is one of them at a time, on the stack")]
pub enum Call<'a> {
    /// While `create` runs.
    Building(RefCell<Building<'a>>),
    /// While `forward` or `head` runs.
    Running(RefCell<Running<'a>>),
}

thread_local! {
    static LENT: Cell<*const ()> = const { Cell::new(ptr::null()) };
}

/// The contexts that are lent, on all threads, and the first misuse of each.
static ABROAD: Mutex<BTreeMap<usize, Option<String>>> = Mutex::new(BTreeMap::new());

static STRAY: AtomicUsize = AtomicUsize::new(0);

/// How many ops were called with a context that was kept, taken to another thread or made up.
pub fn stray_calls() -> usize {
    STRAY.load(Ordering::Relaxed)
}

fn abroad() -> MutexGuard<'static, BTreeMap<usize, Option<String>>> {
    ABROAD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Fails the call of this context, if it still runs.
fn blame(ctx: *const (), misuse: impl FnOnce() -> String) {
    if let Some(of_call) = abroad().get_mut(&ctx.addr()) {
        of_call.get_or_insert_with(misuse);
    }
}

impl Call<'_> {
    /// Lets a plugin use this call as its context: on this thread, while `f` runs. A misuse of the context is an error of the call even where
    /// the plugin does not notice it.
    pub fn lend<T>(&self, f: impl FnOnce(Ctx) -> T) -> T {
        struct Restore {
            lent: *const (),
            outer: *const (),
        }
        impl Drop for Restore {
            fn drop(&mut self) {
                LENT.set(self.outer);
                abroad().remove(&self.lent.addr());
            }
        }
        let here = ptr::from_ref(self).cast::<()>();
        abroad().insert(here.addr(), None);
        let restore = Restore { lent: here, outer: LENT.replace(here) };
        let result = f(Ctx(here));
        let misuse = abroad().get_mut(&here.addr()).and_then(Option::take);
        drop(restore);
        match (misuse, self) {
            (Some(misuse), Call::Building(call)) => call.borrow_mut().complain(misuse),
            (Some(misuse), Call::Running(call)) => {
                call.borrow_mut().misuse.get_or_insert(misuse);
            }
            (None, _) => {}
        }
        result
    }
}

/// Runs `f` with the call behind a context, or says no: the context was taken to another thread, kept from an earlier call or made up.
pub fn with_call<T>(ctx: Ctx, op: &str, at: At, f: impl FnOnce(&Call<'_>) -> Option<T>) -> Option<T> {
    let lent = LENT.get();
    if ctx.0.is_null() || lent != ctx.0 {
        // Handles may be dropped anywhere; where there is no call, there is nothing left to free.
        if op == "release" {
            return None;
        }
        STRAY.fetch_add(1, Ordering::Relaxed);
        blame(ctx.0, || format!("{op}: called on another thread than the call's (at {at})"));
        blame(lent, || format!("{op}: called with a context that is not this call's (at {at})"));
        return None;
    }
    // SAFETY: `lend` put this pointer there from a `&Call` on this thread, and takes it away before that borrow ends.
    f(unsafe { &*ctx.0.cast::<Call<'_>>() })
}

/// The inside of a call, unless an op called it while another op of it was running: then the call fails.
pub fn alone<'a, T>(call: &'a RefCell<T>, ctx: Ctx, op: &str, at: At) -> Option<RefMut<'a, T>> {
    let inside = call.try_borrow_mut();
    if inside.is_err() {
        blame(ctx.0, || format!("{op}: called while another op was running (at {at})"));
    }
    inside.ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        device::{DeviceChoice, DtypeChoice, Placement},
        ops::{table::host, value::Value},
    };
    use plugin_api::abi::Handle;

    /// Runs `f` as a plugin's call, with the op `exp` on a tensor of the call; what the call's error is.
    fn calling(f: impl FnOnce(usize, &dyn Fn(usize) -> Handle, &(dyn Fn(usize) -> Handle + Sync))) -> String {
        let place = Placement::new(DeviceChoice::Cpu, DtypeChoice::Float32, candle_core::DType::F32).unwrap();
        let cell = RefCell::new(Running::new(&[], &[], &[], &place, Vec::new(), 1));
        let x = cell.borrow_mut().arena.put(Value::planned(&[1]));
        let call = Call::Running(cell);
        let exp = move |ctx: usize| host().ops.exp()(Ctx(ctx as *const ()), x, At::caller());
        let while_borrowed = |ctx: usize| match &call {
            Call::Running(cell) => {
                let _running = cell.borrow_mut();
                exp(ctx)
            }
            Call::Building(_) => Handle::NONE,
        };
        call.lend(|ctx| f(ctx.0.addr(), &while_borrowed, &exp));
        match &call {
            Call::Running(cell) => cell.borrow_mut().misuse.take().unwrap_or_default(),
            Call::Building(_) => String::new(),
        }
    }

    #[test]
    fn a_context_is_good_on_its_own_thread_during_its_own_call() {
        assert_eq!(calling(|ctx, _, exp| assert_ne!(exp(ctx), Handle::NONE)), "");
    }

    #[test]
    fn an_op_called_on_another_thread_does_nothing_and_fails_the_call() {
        let error = calling(|ctx, _, exp| {
            let other = std::thread::scope(|s| s.spawn(|| exp(ctx)).join().unwrap());
            assert_eq!(other, Handle::NONE);
        });
        assert!(error.starts_with("exp: called on another thread than the call's (at "), "{error}");
        assert!(error.contains("lending.rs:"), "{error}");
    }

    #[test]
    fn an_op_called_inside_of_another_op_does_nothing_and_fails_the_call() {
        let error = calling(|ctx, inside, _| assert_eq!(inside(ctx), Handle::NONE));
        assert!(error.starts_with("exp: called while another op was running (at "), "{error}");
    }

    #[test]
    fn an_op_called_with_a_context_of_another_call_does_nothing_and_fails_the_call() {
        for other in [0, 8, 4711] {
            let error = calling(|_, _, exp| assert_eq!(exp(other), Handle::NONE));
            assert!(error.starts_with("exp: called with a context that is not this call's (at "), "{error}");
        }
    }

    #[test]
    fn an_op_called_outside_of_any_call_does_nothing() {
        let mut kept = 0;
        assert_eq!(calling(|ctx, _, _| kept = ctx), "");
        for ctx in [kept, 0, 8] {
            assert_eq!(host().ops.exp()(Ctx(ctx as *const ()), Handle(1), At::caller()), Handle::NONE);
        }
    }

    #[test]
    fn a_tensor_may_be_dropped_on_any_thread() {
        let error = calling(|ctx, _, _| {
            let drop_it = move || host().ops.release()(Ctx(ctx as *const ()), Handle(1), At::caller());
            std::thread::spawn(drop_it).join().unwrap();
        });
        assert_eq!(error, "");
    }
}
