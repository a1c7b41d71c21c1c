//! The op tables: everything a plugin can ask of the host, one line an op. Append-only: the order below is the ABI.
//! (abi_stable counts a table's fields in 64 bits, so there is more than one.) What ends with `last` is ABI 1.0, which every host has;
//! later ops are appended in `ops_today`, and a plugin's file says which of those it calls: see `abi::later`.
//!
//! The table belongs to the host, so a newer host's table is longer than the one an old plugin knows. abi_stable would call that an
//! error (it expects the *library* to be the newer side), so the table is hidden from the host's check and the plugin checks it
//! instead, in `export_plugin!`: one of the two tables must be the beginning of the other.
//!
//! Threads: a building op may be called while `create` runs, a running op while `forward` or `head` runs, on that thread only.

use super::{
    At, Ctx, Handle, Pair, ScanStep, Slot, SourceId, SpecRef,
    later::{Absent, stamp},
};
use crate::tensor::Call;
use abi_stable::{
    StableAbi,
    std_types::{RSlice, RStr},
};

/// Where the ops of a table may be called.
macro_rules! thread {
    (build) => {
        "Thread: new."
    };
    (layers) => {
        "Thread: step."
    };
    (tensors) => {
        "Thread: step."
    };
}

/// Declares the tables: a struct of function pointers each, the root that holds them, and the list of all names for notes and `dylm check`.
macro_rules! op_tables {
    ($($table:ident = $(#[$tdoc:meta])* $struct:ident $ref:ident {
        $($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)?;)*
        last fn $lname:ident($($larg:ident: $lty:ty),*) $(-> $lret:ty)?;
        $($(#[$adoc:meta])* later fn $aname:ident($($aarg:ident: $aty:ty),*) $(-> $aret:ty)?;)*
    })*) => {
        $(
            $(#[$tdoc])*
            #[repr(C)]
            #[derive(StableAbi)]
            #[sabi(kind(Prefix(prefix_ref = $ref)))]
            #[allow(missing_docs)]
            pub struct $struct {
                $($(#[$doc])* #[doc = thread!($table)] pub $name: extern "C" fn(Ctx, $($ty,)* At) $(-> $ret)?,)*
                #[sabi(last_prefix_field)]
                #[doc = thread!($table)]
                pub $lname: extern "C" fn(Ctx, $($lty,)* At) $(-> $lret)?,
                $($(#[$adoc])* #[doc = thread!($table)] pub $aname: extern "C" fn(Ctx, $($aty,)* At) $(-> $aret)?,)*
            }
        )*

        /// Every op of the host, in tables that grow at their ends; a new table would follow the last one.
        #[repr(C)]
        #[derive(StableAbi)]
        #[sabi(kind(Prefix(prefix_ref = OpsRef)))]
        #[allow(missing_docs)]
        pub struct Ops {
            pub build: BuildOpsRef,
            pub layers: LayerOpsRef,
            #[sabi(last_prefix_field)]
            pub tensors: TensorOpsRef,
        }

        /// An op by its name, whichever table it stands in.
        #[allow(missing_docs)]
        #[allow(clippy::should_implement_trait)] // these give the op's function; what `neg` computes is the host's
        impl OpsRef {
            $(
                $(#[inline] pub fn $name(self) -> extern "C" fn(Ctx, $($ty,)* At) $(-> $ret)? { self.$table().$name() })*
                #[inline] pub fn $lname(self) -> extern "C" fn(Ctx, $($lty,)* At) $(-> $lret)? { self.$table().$lname() }
                $(pub fn $aname(self) -> extern "C" fn(Ctx, $($aty,)* At) $(-> $aret)? {
                    extern "C" fn missing(_: Ctx, $(_: $aty,)* at: At) $(-> $aret)? { Absent::absent(stringify!($aname), at) }
                    stamp!(needs $aname);
                    self.$table().$aname().unwrap_or(missing)
                })*
            )*

            /// Where each op's function lies, in ABI order; null for one that this table lacks.
            #[doc(hidden)]
            pub fn addresses(self) -> Vec<(&'static str, *const ())> {
                vec![$(
                    $((stringify!($name), self.$table().$name() as *const ()),)*
                    (stringify!($lname), self.$table().$lname() as *const ()),
                    $((stringify!($aname), self.$table().$aname().map_or(std::ptr::null(), |op| op as *const ())),)*
                )*]
            }

            /// Whether the table has an op of this name.
            pub fn offers(self, name: &str) -> bool {
                match name {
                    $($(stringify!($aname) => self.$table().$aname().is_some(),)*)*
                    _ => NAMES.contains(&name),
                }
            }
        }

        /// Whether the host has an op that was appended after ABI 1.0: `if have::newer() { x.newer() } else { .. }`. Asking, anywhere in a
        /// plugin, tells hosts that the plugin can do without that op. Thread: call.
        pub mod have {
            #[allow(unused_imports)] // in tables without later ops
            use super::{Call, stamp};
            $($($(#[$adoc])* pub fn $aname() -> bool {
                stamp!(asks $aname);
                Call::running().is_some_and(|call| call.ops.offers(stringify!($aname)))
            })*)*
        }

        /// The ops' names, in ABI order, table by table.
        pub const NAMES: &[&str] = &[$($(stringify!($name),)* stringify!($lname), $(stringify!($aname),)*)*];

        /// What the parameters of each op are called, between the context, which comes first, and the place, which comes last.
        #[doc(hidden)]
        pub const PARAMETERS: &[(&str, &[&str])] = &[$(
            $((stringify!($name), &[$(stringify!($arg)),*]),)*
            (stringify!($lname), &[$(stringify!($larg)),*]),
            $((stringify!($aname), &[$(stringify!($aarg)),*]),)*
        )*];
    };
}

/// The tables of ABI 1.0, with what is appended to each, handed to a macro that makes something of them.
macro_rules! ops_1_0 {
    ($into:ident build { $($build:tt)* } layers { $($layers:tt)* } tensors { $($tensors:tt)* }) => { $into! {
        build = /// What a plugin asks for while it describes a model: during `create`.
        BuildOps BuildOpsRef {
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
            /// Sources joined along an axis that they have.
            fn join(sources: RSlice<'_, SourceId>, axis: u64) -> SourceId;
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
            /// The same from sources that the plugin found itself: gate, up, down, then their biases; `SourceId::NONE` for what there is
            /// not; `spec` is an `ExpertsSpec`.
            fn experts_from(sources: RSlice<'_, SourceId>, spec: SpecRef<'_>) -> Slot;
            /// One linear layer a head: weight `[heads, outputs, inputs]`, bias `[heads, outputs]`.
            fn multi_linear_layer(weight: SourceId, bias: SourceId, heads: u64, inputs: u64, outputs: u64) -> Slot;
            /// A causal convolution of each channel alone: weight of `channels * kernel` numbers, channel by channel; bias `[channels]`.
            fn conv1d_layer(weight: SourceId, bias: SourceId, channels: u64, kernel: u64) -> Slot;
            /// A tensor used as it is.
            fn parameter_layer(source: SourceId, dims: RSlice<'_, u64>) -> Slot;
            /// Rotary angles for the first `dims` lanes of a head; `scaling` is config.json's `rope_scaling` as JSON, or empty.
            fn rope_layer(dims: u64, base: f64, scaling: RStr<'_>) -> Slot;
            /// Whether the checkpoint has a tensor of this full name and these dims (1) or not (0).
            fn has_shape(name: RStr<'_>, dims: RSlice<'_, u64>) -> u8;
            // Numbers `[len]` that no checkpoint stores, since a formula gives them.
            last fn numbers(values: RSlice<'_, f32>) -> SourceId;
            $($build)*
        }
        layers = /// What stands on weights or on the sequence: during `forward` and `head`.
        LayerOps LayerOpsRef {
            // ---- layers with weights ----
            /// ids `[tokens]` -> `[tokens, dim]`; a table of whole numbers gives ids.
            fn embed(slot: Slot, tokens: Handle) -> Handle;
            /// `[tokens, dim]` -> `[tokens, vocab]`: an embedding used as the output head.
            fn unembed(slot: Slot, x: Handle) -> Handle;
            /// `[.., inputs]` -> `[.., outputs]`
            fn linear(slot: Slot, x: Handle) -> Handle;
            /// Normalizes the last axis, in f32.
            fn norm(slot: Slot, x: Handle) -> Handle;
            /// x `[tokens, dim]`, chosen experts and their weights `[tokens, k]` -> `[tokens, dim]`, the weighted sum.
            fn experts(slot: Slot, x: Handle, chosen: Handle, weights: Handle) -> Handle;
            /// x `[tokens, heads, inputs]` -> `[tokens, heads, outputs]`, each head by its own matrix.
            fn multi_linear(slot: Slot, x: Handle) -> Handle;
            /// The tensor itself.
            fn parameter(slot: Slot) -> Handle;

            // ---- ops that know the sequence ----
            /// x `[tokens, heads, head_dim]` turned by each token's position; `flags` are any of `ROTATE_*`.
            fn rotate(slot: Slot, x: Handle, flags: u32) -> Handle;
            /// Where each token stands in its sequence, from 0: ids `[tokens]`.
            fn positions() -> Handle;
            /// Ids `[tokens]` of the n-grams that end at each token, `Σ id(t - i) * base^i mod modulus` over i < n; 0 stands before the start.
            fn ngrams(tokens: Handle, n: u64, base: u64, modulus: u64) -> Handle;
            /// q `[tokens, heads, d]`, k `[tokens, kv_heads, d]`, v `[tokens, kv_heads, e]` -> `[tokens, heads, e]`; k and v join the cache, once a
            /// step; without k and v it looks at what the step has put there before; `spec` is an `AttendSpec`.
            fn attend(cache: u32, q: Handle, k: Handle, v: Handle, spec: SpecRef<'_>) -> Handle;

            /// Which keys are worth attending to (an indexer's choice): q `[tokens, heads, d]`, k `[tokens, 1, d]`, which joins the cache, weights
            /// `[tokens, heads]`; the score of a key is `Σ weight * relu(q·k)` over the heads. Gives the positions `[tokens, count]` of the best, in
            /// any order, and `u32::MAX` where there are fewer, for `AttendSpec::selection`.
            fn index(cache: u32, q: Handle, k: Handle, weights: Handle, count: u64) -> Handle;
            /// x `[tokens, channels]` -> the same, each channel folded with its kernel over the last tokens; state `[kernel - 1, channels]`.
            fn conv1d(slot: Slot, cache: u32, x: Handle) -> Handle;
            /// x `[tokens, dim]` -> each token's predecessor, 0 before the first; state `[1, dim]`.
            fn shift(cache: u32, x: Handle) -> Handle;
            /// Mamba 2: x `[tokens, heads, d]`, dt `[tokens, heads]`, a `[heads]`, b and c `[tokens, groups, n]` -> `[tokens, heads, d]`;
            /// `h = exp(dt a) h + dt x bᵀ`, `y = h c`; state `[heads, d, n]`.
            fn ssd(cache: u32, x: Handle, dt: Handle, a: Handle, b: Handle, c: Handle) -> Handle;
            /// Mamba 1: x and dt `[tokens, d]`, a `[d, n]`, b and c `[tokens, n]` -> `[tokens, d]`; `h = exp(dt a) h + dt x bᵀ`, `y = h c`; state
            /// `[d, n]`.
            fn selective_scan(cache: u32, x: Handle, dt: Handle, a: Handle, b: Handle, c: Handle) -> Handle;
            /// q and k `[tokens, k_heads, d]`, v `[tokens, heads, e]`, beta `[tokens, heads]`, g `[tokens, heads]` or `[tokens, heads, d]` ->
            /// `[tokens, heads, e]`; `S = exp(g) S`, then `S += k (beta (v - kᵀ S))ᵀ`, `y = qᵀ S`; state `[heads, d, e]`.
            fn gated_delta(cache: u32, q: Handle, k: Handle, v: Handle, g: Handle, beta: Handle) -> Handle;
            /// q and k `[tokens, k_heads, d]`, v `[tokens, heads, e]`, g `[heads]`, `[tokens, heads]` or `[tokens, heads, d]` ->
            /// `[tokens, heads, e]`; `S = exp(g) S + k vᵀ`, `y = qᵀ S`; state `[heads, d, e]`.
            fn linear_attention(cache: u32, q: Handle, k: Handle, v: Handle, g: Handle) -> Handle;
            /// RWKV 7, all `[tokens, heads, d]`: `S = S diag(exp(w)) + (S a) bᵀ + v kᵀ`, `y = S r`; state `[heads, d, d]`.
            fn wkv7(cache: u32, r: Handle, w: Handle, k: Handle, v: Handle, a: Handle, b: Handle) -> Handle;
            /// The real-gated linear recurrent unit, x and log_a `[tokens, dim]`: `h = a h + √(1 - a²) x`, and `h = x` at a sequence's first token;
            /// state `[dim]`.
            fn rg_lru(cache: u32, x: Handle, log_a: Handle) -> Handle;
            /// A recurrence by the plugin's own step, over these states and inputs `[tokens, ..]` -> `[tokens, ..]`; in f32.
            fn scan(caches: RSlice<'_, u32>, inputs: RSlice<'_, Handle>, step: ScanStep) -> Handle;
            /// Which blocks of keys are worth attending to, each head apart: q `[tokens, heads, d]`, k `[tokens, 1, d]`, which joins the cache; the
            /// score of a block is its best key's q·k. Gives the numbers `[tokens, heads, count]` of the best blocks, in any order, and `u32::MAX`
            /// where there are fewer, for `AttendSpec::selection`; `spec` is a `BlockChoiceSpec`.
            fn index_blocks(cache: u32, q: Handle, k: Handle, spec: SpecRef<'_>) -> Handle;
            // Windows of `rate` tokens become one entry each: x and gate `[tokens, n * d]`, bias `[rate, n * d]` -> `[tokens, d]`, where a window
            // ends `Σ softmax(gate + bias) x` for each lane, elsewhere 0; the last d lanes of a token count for its own window, the d before
            // them for the next one, and so on; state `[n, 3, d]`.
            last fn pool(cache: u32, x: Handle, gate: Handle, bias: Handle) -> Handle;
            $($layers)*
        }
        tensors = /// What needs only its arguments: during `forward` and `head`.
        TensorOps TensorOpsRef {
            // ---- handles ----
            /// One more owner of a tensor.
            fn retain(x: Handle) -> Handle;
            /// One owner fewer; outside of the step, on any thread, nothing at all.
            fn release(x: Handle);
            /// A failed tensor that says so.
            fn fail(message: RStr<'_>) -> Handle;

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
            fn floor(x: Handle) -> Handle;
            /// Halves go to the even neighbour.
            fn round(x: Handle) -> Handle;
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
            /// 1 for the k largest (equal values: lower index first), 0 for the rest.
            fn top_mask(x: Handle, k: u64) -> Handle;
            /// x `[.., n]`, indices `[.., k]` -> `[.., k]`
            fn gather(x: Handle, indices: Handle) -> Handle;

            // ---- over the last two axes ----
            // Matrices `[.., n, n]` made nearly doubly stochastic, in f32: columns by their sums plus `eps`, then `rounds - 1` times rows and
            // columns. <https://projecteuclid.org/euclid.pjm/1102992505>
            last fn sinkhorn(x: Handle, rounds: u64, eps: f64) -> Handle;
            $($tensors)*
        }
    } };
}

/// Today's tables, ABI 1.0 and what came later: a later op stands in front of the dots of its table, `later fn newer(x: Handle) -> Handle;`.
macro_rules! ops_today {
    ($into:ident) => { ops_today! { $into build {} layers {} tensors {} } };
    ($into:ident build { $($build:tt)* } layers { $($layers:tt)* } tensors { $($tensors:tt)* }) => { ops_1_0! { $into
        build { $($build)* }
        layers { $($layers)* }
        tensors { $($tensors)* }
    } };
}

ops_today! { op_tables }
pub(super) use {ops_1_0, ops_today};

/// The tables of ABI 1.0 alone: what the tests of "a new plugin on an old host" hand to a plugin.
#[doc(hidden)]
pub mod oldest {
    use super::*;
    ops_1_0! { op_tables build {} layers {} tensors {} }
}

/// The tables as a later host might have them: what the tests of "an old plugin never notices" hand to a plugin.
#[doc(hidden)]
pub mod newer {
    use super::*;
    ops_today! { op_tables
        build {
            /// `has`, once more.
            later fn later_has(name: RStr<'_>) -> u8;
        }
        layers {}
        tensors {
            /// `neg`, once more.
            later fn later_neg(x: Handle) -> Handle;
        }
    }
}
