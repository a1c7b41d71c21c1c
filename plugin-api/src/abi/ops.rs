//! The op table: everything a plugin can ask of the host, one line an op. Append-only: the order below is the ABI.
//!
//! The table belongs to the host, so a newer host's table is longer than the one an old plugin knows. abi_stable would call that an
//! error (it expects the *library* to be the newer side), so the table is hidden from the host's check and the plugin checks it
//! instead, in `export_plugin!`, where "the host has at least the ops that I know" is exactly the question.
//!
//! Threads: a building op may be called while `create` runs, a running op while `forward` or `head` runs, on that thread only.

use super::{At, Ctx, Handle, Pair, Slot, SourceId, SpecRef};
use abi_stable::{
    StableAbi,
    std_types::{RSlice, RStr},
};

/// Declares the table: one struct of function pointers, and the list of their names for notes and `dylm check`.
macro_rules! op_table {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)?;)* last fn $lname:ident($($larg:ident: $lty:ty),*) $(-> $lret:ty)?; $(appended $aname:ident;)?) => {
        /// Function pointers of the host, in ABI order. Every op takes the call's context first and the caller's place last.
        #[repr(C)]
        #[derive(StableAbi)]
        #[sabi(kind(Prefix(prefix_ref = OpsRef)))]
        #[allow(missing_docs)]
        pub struct Ops {
            $($(#[$doc])* pub $name: extern "C" fn(Ctx, $($ty,)* At) $(-> $ret)?,)*
            #[sabi(last_prefix_field)]
            pub $lname: extern "C" fn(Ctx, $($lty,)* At) $(-> $lret)?,
            $(pub $aname: extern "C" fn(Ctx, Handle, At) -> Handle,)?
        }

        /// The ops' names, in ABI order.
        pub const NAMES: &[&str] = &[$(stringify!($name),)* stringify!($lname)];
    };
}

/// The whole table; a macro so that `appended` below can declare it a second time with one op more.
macro_rules! ops_1_0 {
    ($($appended:tt)*) => { op_table! {
        // ---- building: during `create` ----
        /// Whether the checkpoint has a tensor of this full name (1) or not (0).
        fn has(name: RStr<'_>) -> u8;
        /// The stored tensor of this full name.
        fn source(name: RStr<'_>) -> SourceId;
        /// A `TRANSFORM_*` of a source, applied when its bytes are read.
        fn transform(source: SourceId, kind: u32, ints: RSlice<'_, u64>, factor: f64) -> SourceId;
        /// Sources of one shape, stacked along a new first axis.
        fn stack(sources: RSlice<'_, SourceId>) -> SourceId;
        /// Tensors whose full name starts with this are not the architecture's concern.
        fn ignore(prefix: RStr<'_>);
        /// A failure that belongs in the report on the checkpoint.
        fn complain(message: RStr<'_>);
        /// `x · Wᵀ + b`, W `[outputs, inputs]`, b `[outputs]`.
        fn linear_layer(weight: SourceId, bias: SourceId, inputs: u64, outputs: u64) -> Slot;
        /// Linear layers that read one input; the host may run them as one.
        fn fuse(slots: RSlice<'_, Slot>);
        /// A table `[vocab, dim]`.
        fn embedding_layer(weight: SourceId, vocab: u64, dim: u64) -> Slot;
        /// A `NORM_*` over the last axis; weight and bias `[dim]`, each optional.
        fn norm_layer(kind: u32, weight: SourceId, bias: SourceId, dim: u64, eps: f64) -> Slot;
        /// Routed experts below `prefix`, in any of the layouts that checkpoints use; `spec` is an `ExpertsSpec`.
        fn experts_layer(prefix: RStr<'_>, spec: SpecRef<'_>) -> Slot;
        /// A tensor used as it is.
        fn parameter_layer(source: SourceId, dims: RSlice<'_, u64>) -> Slot;
        /// Rotary angles for the first `dims` lanes of a head; `scaling` is config.json's `rope_scaling` as JSON, or empty.
        fn rope_layer(dims: u64, base: f64, scaling: RStr<'_>) -> Slot;

        // ---- handles ----
        /// One more owner of a tensor.
        fn retain(x: Handle) -> Handle;
        /// One owner fewer.
        fn release(x: Handle);
        /// A failed tensor that says so.
        fn fail(message: RStr<'_>) -> Handle;

        // ---- layers with weights ----
        /// ids `[tokens]` -> `[tokens, dim]`
        fn embed(slot: Slot, tokens: Handle) -> Handle;
        /// `[tokens, dim]` -> `[tokens, vocab]`: an embedding used as the output head.
        fn unembed(slot: Slot, x: Handle) -> Handle;
        /// `[.., inputs]` -> `[.., outputs]`
        fn linear(slot: Slot, x: Handle) -> Handle;
        /// Normalizes the last axis, in f32.
        fn norm(slot: Slot, x: Handle) -> Handle;
        /// x `[tokens, dim]`, chosen experts and their weights `[tokens, k]` -> `[tokens, dim]`, the weighted sum.
        fn experts(slot: Slot, x: Handle, chosen: Handle, weights: Handle) -> Handle;
        /// The tensor itself.
        fn parameter(slot: Slot) -> Handle;

        // ---- ops that know the sequence ----
        /// x `[tokens, heads, head_dim]` turned by each token's position; flag 1 = neighbouring lanes pair up.
        fn rotate(slot: Slot, x: Handle, flags: u32) -> Handle;
        /// q `[tokens, heads, d]`, k `[tokens, kv_heads, d]`, v `[tokens, kv_heads, e]` -> `[tokens, heads, e]`; k and v join the cache, once a
        /// step; `spec` is an `AttendSpec`.
        fn attend(cache: u32, q: Handle, k: Handle, v: Handle, spec: SpecRef<'_>) -> Handle;

        // ---- shapes ----
        /// `[tokens, heads * head_dim]` -> `[tokens, heads, head_dim]`
        fn split_heads(x: Handle, head_dim: u64) -> Handle;
        /// `[tokens, heads, head_dim]` -> `[tokens, heads * head_dim]`
        fn merge_heads(x: Handle) -> Handle;
        /// `len` entries of the last axis from `start`.
        fn narrow(x: Handle, start: u64, len: u64) -> Handle;
        /// Joined along the last axis.
        fn concat(parts: RSlice<'_, Handle>) -> Handle;
        /// The last axis split into `[.., n, len / n]`.
        fn unflatten(x: Handle, n: u64) -> Handle;
        /// The last two axes joined.
        fn flatten(x: Handle) -> Handle;
        /// The last two axes exchanged.
        fn transpose(x: Handle) -> Handle;

        // ---- arithmetic, with broadcasting ----
        fn add(a: Handle, b: Handle) -> Handle;
        fn sub(a: Handle, b: Handle) -> Handle;
        fn mul(a: Handle, b: Handle) -> Handle;
        fn div(a: Handle, b: Handle) -> Handle;
        fn maximum(a: Handle, b: Handle) -> Handle;
        fn minimum(a: Handle, b: Handle) -> Handle;
        /// 1 where a > b, else 0.
        fn greater(a: Handle, b: Handle) -> Handle;
        /// `scale * x + offset`
        fn affine(x: Handle, scale: f64, offset: f64) -> Handle;
        /// x held between `low` and `high`.
        fn clamp(x: Handle, low: f64, high: f64) -> Handle;
        /// `[.., n, k] · [.., k, m]`
        fn matmul(a: Handle, b: Handle) -> Handle;

        // ---- elementwise ----
        fn neg(x: Handle) -> Handle;
        fn abs(x: Handle) -> Handle;
        fn exp(x: Handle) -> Handle;
        fn log(x: Handle) -> Handle;
        fn sqrt(x: Handle) -> Handle;
        fn rsqrt(x: Handle) -> Handle;
        fn square(x: Handle) -> Handle;
        fn sigmoid(x: Handle) -> Handle;
        fn tanh(x: Handle) -> Handle;
        fn relu(x: Handle) -> Handle;
        fn silu(x: Handle) -> Handle;
        /// Exact, by the error function.
        fn gelu(x: Handle) -> Handle;
        /// The tanh approximation.
        fn gelu_tanh(x: Handle) -> Handle;
        fn softplus(x: Handle) -> Handle;
        /// `silu(gate) * up`
        fn swiglu(gate: Handle, up: Handle) -> Handle;
        /// `gelu_tanh(gate) * up`
        fn geglu(gate: Handle, up: Handle) -> Handle;

        // ---- over the last axis ----
        /// In f32.
        fn softmax(x: Handle) -> Handle;
        fn sum(x: Handle) -> Handle;
        fn mean(x: Handle) -> Handle;
        fn max(x: Handle) -> Handle;
        /// The k largest, largest first (equal values: lower index first), and where they stood.
        fn topk(x: Handle, k: u64) -> Pair;
        // x `[.., n]`, indices `[.., k]` -> `[.., k]`
        last fn gather(x: Handle, indices: Handle) -> Handle;
        $($appended)*
    } };
}

ops_1_0! {}

/// The table as a later host might have it, one op longer: what the test of "an old plugin never notices" hands to a plugin.
#[doc(hidden)]
pub mod appended {
    use super::*;
    ops_1_0! { appended newer_than_the_plugin; }
}
