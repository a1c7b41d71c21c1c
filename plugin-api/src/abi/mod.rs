//! What crosses between host and plugin, and nothing else: plain values, borrowed slices, and handles that only the host can read.
//! The only place, with the host's `plugin` folder, where abi_stable is seen; leaving it would change these files alone.

pub mod c;
pub mod checking;
pub mod extension;
pub mod later;
pub mod note;
pub mod ops;
pub mod own_op;
pub mod root;
pub mod spec;

pub use spec::{AttendSpec, BlockChoiceSpec, ExpertsSpec, SpecRef};

use abi_stable::{
    StableAbi,
    std_types::{RSlice, RSliceMut, RStr},
};
use std::{
    borrow::Cow,
    fmt::{self, Display, Formatter},
};

/// The ABI's major number: another one means that neither side can talk to the other.
pub const MAJOR: u32 = 1;
/// The ABI's minor number: grows when an op or a named extension is added; an older plugin never notices.
pub const MINOR: u32 = 0;

/// The exported symbol of a plugin; it carries the major number.
pub const SYMBOL: &[u8] = b"dylm_plugin_1\0";

/// The host's own state for one call; the plugin hands it back unread.
#[repr(transparent)]
#[derive(StableAbi, Clone, Copy)]
pub struct Ctx(pub *const ());

/// A tensor of the running step: an index with a generation, checked by the host at every use. 0 is no tensor.
#[repr(transparent)]
#[derive(StableAbi, Clone, Copy, PartialEq, Eq, Debug)]
pub struct Handle(pub u64);

impl Handle {
    /// No tensor.
    pub const NONE: Handle = Handle(0);
}

/// Something with weights that the host built for this model: a linear layer, a norm, a rope table. Valid as long as the model.
#[repr(transparent)]
#[derive(StableAbi, Clone, Copy, PartialEq, Eq, Debug)]
pub struct Slot(pub u32);

/// A stored tensor, by name, with the transforms still to be applied. Valid while the model is being built. 0 is none.
#[repr(transparent)]
#[derive(StableAbi, Clone, Copy, PartialEq, Eq, Debug)]
pub struct SourceId(pub u32);

impl SourceId {
    /// No tensor: a linear layer without bias, a norm without weight.
    pub const NONE: SourceId = SourceId(0);
}

/// Two tensors, from an op that makes two.
#[repr(C)]
#[derive(StableAbi, Clone, Copy)]
pub struct Pair {
    /// For `topk`: the values.
    pub first: Handle,
    /// For `topk`: their indices.
    pub second: Handle,
}

/// One token's step of a recurrence, which `scan` calls back: on its thread, while it runs, and ops may be called meanwhile.
#[repr(C)]
#[derive(StableAbi, Clone, Copy)]
pub struct ScanStep {
    /// The plugin's own.
    pub data: *mut (),
    /// The states before a token `[1, ..]` and its rows of the inputs `[1, ..]`, all of which the plugin owns from then on, -> 1 and in
    /// `out` the states after it and a row of the result, which the host owns from then on; or 0 if there are none.
    pub run:
        extern "C" fn(*mut (), states: RSlice<'_, Handle>, now: RSlice<'_, Handle>, out: RSliceMut<'_, Handle>) -> u8,
}

/// Where in the plugin's source an op was called, for error texts.
#[repr(C)]
#[derive(StableAbi, Clone, Copy)]
pub struct At {
    /// The file, as the plugin's compiler saw it.
    pub file: RStr<'static>,
    /// The line, from 1.
    pub line: u32,
}

impl At {
    /// The caller of a `#[track_caller]` function.
    #[track_caller]
    #[inline]
    pub fn caller() -> Self {
        let here = std::panic::Location::caller();
        At { file: RStr::from_str(here.file()), line: here.line() }
    }
}

/// `file:line`. A plugin in C may have been compiled in a folder whose name is not UTF-8, or say nothing.
impl Display for At {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let file = if self.file.as_ptr().is_null() {
            Cow::default()
        } else {
            String::from_utf8_lossy(self.file.as_rslice().as_slice())
        };
        write!(f, "{file}:{}", self.line)
    }
}

/// `down(silu(gate x) * up x)`
pub const EXPERTS_SWIGLU: u32 = 0;
/// `down(gelu_tanh(gate x) * up x)`
pub const EXPERTS_GEGLU: u32 = 1;
/// `down(g sigmoid(alpha g) * (u + 1))`, g = gate x up to `limit`, u = up x within ± `limit`
pub const EXPERTS_CLAMPED_SWIGLU: u32 = 2;
/// `down(min(silu(gate x), limit) * clamp(up x, ± limit))`
pub const EXPERTS_LIMITED_SWIGLU: u32 = 3;
/// `down(relu(up x)²)`, no gate
pub const EXPERTS_RELU2: u32 = 4;
/// `down(gelu_tanh(up x))`, no gate
pub const EXPERTS_GELU_TANH: u32 = 5;
/// `down(silu(up x))`, no gate
pub const EXPERTS_SILU: u32 = 6;

/// `down(alpha tanh(g / alpha) sigmoid(g) * limit tanh(u / limit))`, g = gate x, u = up x; with `limit` 0, u as it is
pub const EXPERTS_SITU: u32 = 7;

/// `down(silu(g) * u)`, g = gate x up to `limit`, u = up x within ± `limit`
pub const EXPERTS_BOUNDED_SWIGLU: u32 = 8;

/// Every projection has a bias.
pub const EXPERTS_WITH_BIAS: u32 = 1;
/// The router's weight multiplies an expert's input, not its output.
pub const EXPERTS_WITH_SCALED_INPUT: u32 = 2;
/// Where gate and up are stored as one tensor, their rows take turns.
pub const EXPERTS_IN_TURNS: u32 = 4;

/// Normalize by the root mean square.
pub const NORM_RMS: u32 = 0;
/// Normalize by mean and variance.
pub const NORM_LAYER: u32 = 1;

/// Rows `ints[0]..ints[1]` of the first axis.
pub const TRANSFORM_ROWS: u32 = 0;
/// Adds `factor` to every element.
pub const TRANSFORM_PLUS: u32 = 1;
/// Multiplies every element by `factor`.
pub const TRANSFORM_SCALE: u32 = 2;
/// Exchanges the last two axes.
pub const TRANSFORM_TRANSPOSE: u32 = 3;
/// The same elements in the shape `ints`.
pub const TRANSFORM_RESHAPE: u32 = 4;
/// Entries `ints[1]..ints[2]` of axis `ints[0]`.
pub const TRANSFORM_NARROW: u32 = 5;
/// Entries `ints[1]`, `ints[1] + ints[2]`, `ints[1] + 2 ints[2]` .. of axis `ints[0]`.
pub const TRANSFORM_EVERY: u32 = 6;
/// Each row (last axis) divided by its Euclidean length, which counts as `factor` at least.
pub const TRANSFORM_UNIT_ROWS: u32 = 7;

/// What one layer must remember between steps. Frozen: models hand these over as a list, whose stride both sides must agree on. A later
/// kind of memory gets a number and finds room in `dims`.
#[repr(C)]
#[derive(StableAbi, Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheSpec {
    /// One of the `CACHE_*` constants.
    pub kind: u32,
    /// `CACHE_IN_CHUNKS`, or 0.
    pub flags: u32,
    /// Keys that ever matter, counting the query's own; 0 for all.
    pub window: u64,
    /// The shape of a state, up to the first 0; of pooled keys their rate, then 0; 0 elsewhere.
    pub dims: [u64; 6],
}

/// Keys and values.
pub const CACHE_KEY_VALUE: u32 = 0;
/// Numbers of a fixed shape, 0 at first, that every step replaces: what a recurrence or a convolution carries on.
pub const CACHE_STATE: u32 = 1;
/// Keys and values of which each stands for `dims[0]` tokens: of the rows that an op brings, only those of tokens that end such a window
/// stay, at that token's position.
pub const CACHE_POOLED: u32 = 2;

/// `window` is a chunk: keys before the last multiple of it never matter.
pub const CACHE_IN_CHUNKS: u32 = 1;

/// `rotate`: neighbouring lanes pair up.
pub const ROTATE_NEIGHBOURS: u32 = 1;
/// `rotate`: the last lanes of a head turn, not the first.
pub const ROTATE_LAST: u32 = 2;
/// `rotate`: the other way round.
pub const ROTATE_BACK: u32 = 4;
/// `rotate`: above this many bits stands the length of a block; each token turns as the first of its block. 0 for no blocks.
pub const ROTATE_BLOCK_SHIFT: u32 = 8;
