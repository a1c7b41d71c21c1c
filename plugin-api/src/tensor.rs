//! A tensor of the running step, as the author sees it: a handle with arithmetic. The numbers live in the host.
//!
//! Errors stick: a failed op gives a failed tensor, every later op passes it on, and the host reports the first failure with the
//! author's file and line. So math is written without `?`. Shapes cannot be asked for: a pure function of shapes needs none.

use crate::abi::{At, Ctx, Handle, ops::OpsRef, root::Host};
use abi_stable::std_types::{RSlice, RStr};
use std::{
    cell::Cell,
    marker::PhantomData,
    ops::{Add, Div, Mul, Neg, Sub},
};

/// The host's side of the call that is running on this thread.
#[derive(Clone, Copy)]
pub(crate) struct Call {
    pub ops: OpsRef,
    pub ctx: Ctx,
    extension: extern "C" fn(RStr<'_>) -> *const (),
}

thread_local! {
    static CALL: Cell<Option<Call>> = const { Cell::new(None) };
}

impl Call {
    pub fn new(host: &Host, ctx: Ctx) -> Self {
        Call { ops: host.ops, ctx, extension: host.extension }
    }

    /// The host's answer to that name: a table, or null.
    pub fn extension(self, id: &str) -> *const () {
        (self.extension)(id.into())
    }

    /// Runs `f` with this call as the thread's current one.
    pub fn enter<R>(self, f: impl FnOnce() -> R) -> R {
        Self::swap(Some(self), f)
    }

    fn swap<R>(call: Option<Self>, f: impl FnOnce() -> R) -> R {
        struct Restore(Option<Call>);
        impl Drop for Restore {
            fn drop(&mut self) {
                CALL.set(self.0);
            }
        }
        let _restore = Restore(CALL.replace(call));
        f()
    }

    /// Runs `f` as if no call were running.
    pub fn outside<R>(f: impl FnOnce() -> R) -> R {
        Self::swap(None, f)
    }

    /// The thread's current call, if there is one.
    pub fn running() -> Option<Self> {
        CALL.try_with(Cell::get).ok().flatten()
    }

    /// The thread's current call. Panics outside of one, with the author's place, which the export macro turns into an error.
    #[inline]
    #[track_caller]
    pub fn current() -> Self {
        CALL.get().expect("an op was called outside of new, forward or head, or on another thread")
    }
}

/// A tensor of the running step. Cheap to clone; cannot leave the call, nor its thread.
pub struct Tensor {
    handle: Handle,
    _on_this_thread: PhantomData<*const ()>,
}

impl Tensor {
    pub(crate) fn own(handle: Handle) -> Self {
        Tensor { handle, _on_this_thread: PhantomData }
    }

    pub(crate) fn handle(&self) -> Handle {
        self.handle
    }

    pub(crate) fn into_handle(self) -> Handle {
        let handle = self.handle;
        std::mem::forget(self);
        handle
    }

    /// A failed tensor: what the author found wrong, carried to the host like the failure of an op. Thread: step.
    #[track_caller]
    pub fn failed(message: &str) -> Self {
        let call = Call::current();
        Tensor::own(call.ops.fail()(call.ctx, message.into(), At::caller()))
    }

    /// Joins tensors along the last axis. Thread: step.
    #[track_caller]
    pub fn concat(parts: &[&Tensor]) -> Tensor {
        let (call, handles) = (Call::current(), parts.iter().map(|t| t.handle).collect::<Vec<_>>());
        Tensor::own(call.ops.concat()(call.ctx, RSlice::from_slice(&handles), At::caller()))
    }

    /// The k largest entries of the last axis, largest first, and where they stood: `[.., n]` -> two of `[.., k]`. Thread: step.
    #[track_caller]
    pub fn topk(&self, k: usize) -> (Tensor, Tensor) {
        let call = Call::current();
        let pair = call.ops.topk()(call.ctx, self.handle, k as u64, At::caller());
        (Tensor::own(pair.first), Tensor::own(pair.second))
    }
}

impl Tensor {
    /// Each vector of the last axis as a matrix of one row: `[.., n]` -> `[.., 1, n]`. Thread: step.
    #[track_caller]
    pub fn row(&self) -> Tensor {
        self.unflatten(1)
    }

    /// Each vector of the last axis as a matrix of one column: `[.., n]` -> `[.., n, 1]`. Thread: step.
    #[track_caller]
    pub fn column(&self) -> Tensor {
        self.row().transpose()
    }
}

impl Clone for Tensor {
    fn clone(&self) -> Self {
        let call = Call::current();
        Tensor::own(call.ops.retain()(call.ctx, self.handle, At { file: "".into(), line: 0 }))
    }
}

impl Drop for Tensor {
    fn drop(&mut self) {
        // Outside of a call there is nothing left to release: the host ends a step's tensors with the step.
        if let Some(call) = Call::running() {
            call.ops.release()(call.ctx, self.handle, At { file: "".into(), line: 0 });
        }
    }
}

macro_rules! words {
    ($($(#[$doc:meta])* $name:ident($($arg:ident: $ty:ty => $pass:expr),*);)*) => {
        impl Tensor {
            $($(#[$doc])* #[doc = "Thread: step."] #[track_caller] pub fn $name(&self $(, $arg: $ty)*) -> Tensor {
                let call = Call::current();
                Tensor::own(call.ops.$name()(call.ctx, self.handle $(, $pass)*, At::caller()))
            })*
        }
    };
}

words! {
    /// `[tokens, heads * head_dim]` -> `[tokens, heads, head_dim]`
    split_heads(head_dim: usize => head_dim as u64);
    /// `[tokens, heads, head_dim]` -> `[tokens, heads * head_dim]`
    merge_heads();
    /// `len` entries of the last axis, from `start`.
    narrow(start: usize => start as u64, len: usize => len as u64);
    /// The last axis in `n` parts: `[.., n * m]` -> `[.., n, m]`.
    unflatten(n: usize => n as u64);
    /// The last two axes as one: `[.., n, m]` -> `[.., n * m]`.
    flatten();
    /// The last two axes exchanged.
    transpose();
    /// The larger of the two, elementwise.
    maximum(other: &Tensor => other.handle);
    /// The smaller of the two, elementwise.
    minimum(other: &Tensor => other.handle);
    /// 1 where this is larger, else 0.
    greater(other: &Tensor => other.handle);
    /// `scale * x + offset`
    affine(scale: f32 => scale.into(), offset: f32 => offset.into());
    /// Held between `low` and `high`.
    clamp(low: f32 => low.into(), high: f32 => high.into());
    /// `[.., n, k] · [.., k, m]` -> `[.., n, m]`
    matmul(other: &Tensor => other.handle);
    /// The largest whole number that is not above x.
    floor();
    /// The nearest whole number; halves go to the even one.
    round();
    /// |x|
    abs();
    /// eˣ
    exp();
    /// The natural logarithm.
    log();
    /// √x
    sqrt();
    /// 1 / √x
    rsqrt();
    /// x²
    square();
    /// 1 / (1 + e⁻ˣ)
    sigmoid();
    /// The hyperbolic tangent.
    tanh();
    /// max(x, 0)
    relu();
    /// x · sigmoid(x)
    silu();
    /// x · Φ(x), by the error function.
    gelu();
    /// GELU by its tanh approximation.
    gelu_tanh();
    /// log(1 + eˣ)
    softplus();
    /// `silu(self) * up`
    swiglu(up: &Tensor => up.handle);
    /// `gelu_tanh(self) * up`
    geglu(up: &Tensor => up.handle);
    /// Over the last axis, in f32.
    softmax();
    /// Over the last axis, which stays with length 1.
    sum();
    /// Over the last axis, which stays with length 1.
    mean();
    /// Over the last axis, which stays with length 1.
    max();
    /// 1 for the k largest entries of the last axis, 0 for the rest.
    top_mask(k: usize => k as u64);
    /// Matrices `[.., n, n]`, nearly doubly stochastic: columns divided by their sums plus `eps`, then `rounds - 1` times rows and columns.
    sinkhorn(rounds: usize => rounds as u64, eps: f32 => eps.into());
    /// Entries of the last axis by index: x `[.., n]`, indices `[.., k]` -> `[.., k]`.
    gather(indices: &Tensor => indices.handle);
}

macro_rules! operator {
    ($($trait:ident $method:ident $scalar:expr;)*) => {$(
        operator!(@tensors $trait $method, &Tensor, &Tensor);
        operator!(@tensors $trait $method, &Tensor, Tensor);
        operator!(@tensors $trait $method, Tensor, &Tensor);
        operator!(@tensors $trait $method, Tensor, Tensor);
        operator!(@number $trait $method, &Tensor, $scalar);
        operator!(@number $trait $method, Tensor, $scalar);
    )*};
    (@tensors $trait:ident $method:ident, $a:ty, $b:ty) => {
        impl $trait<$b> for $a {
            type Output = Tensor;
            #[track_caller]
            fn $method(self, other: $b) -> Tensor {
                let call = Call::current();
                Tensor::own(call.ops.$method()(call.ctx, self.handle, other.handle, At::caller()))
            }
        }
    };
    (@number $trait:ident $method:ident, $a:ty, $scalar:expr) => {
        impl $trait<f32> for $a {
            type Output = Tensor;
            #[track_caller]
            fn $method(self, number: f32) -> Tensor {
                let (call, (scale, offset)) = (Call::current(), $scalar(number as f64));
                Tensor::own(call.ops.affine()(call.ctx, self.handle, scale, offset, At::caller()))
            }
        }
    };
}

operator! {
    Add add |n: f64| (1.0, n);
    Sub sub |n: f64| (1.0, -n);
    Mul mul |n: f64| (n, 0.0);
    Div div |n: f64| (1.0 / n, 0.0);
}

impl Neg for &Tensor {
    type Output = Tensor;
    #[track_caller]
    fn neg(self) -> Tensor {
        let call = Call::current();
        Tensor::own(call.ops.neg()(call.ctx, self.handle, At::caller()))
    }
}

impl Neg for Tensor {
    type Output = Tensor;
    #[track_caller]
    fn neg(self) -> Tensor {
        -&self
    }
}
