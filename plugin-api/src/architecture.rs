//! What a plugin implements, and the running step as it sees it.

use crate::{
    Rope, Tensor, Weights,
    abi::{At, AttendSpec, CACHE_KEY_VALUE, CacheSpec, Handle, SpecRef},
    config::FromConfig,
    tensor::Call,
};

/// Why a model could not be built, in one sentence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error(pub String);

impl<T: Into<String>> From<T> for Error {
    fn from(text: T) -> Self {
        Error(text.into())
    }
}

/// What building returns. Running returns tensors: their errors stick.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A model architecture: the equations of a paper over layers that the host owns.
///
/// `Send`, since a model may be built on one thread and run on another; a [`Tensor`] is not, so none can be kept between steps.
///
/// Replay contract: `forward` and `head` are pure functions of their arguments' shapes. They read no values, no clock and no files, and
/// for equal token counts they issue equal ops, so that the host may record a step once and replay it.
pub trait Architecture: Sized + Send + 'static {
    /// The `model_type`s of config.json that this architecture serves; the first one names the library file.
    const MODEL_TYPES: &'static [&'static str];
    /// The keys it reads, declared with [`config!`](crate::config!).
    type Config: FromConfig;

    /// Names the weights. Runs against the checkpoint's header alone; missing tensors are the host's to report. Thread: any.
    fn new(config: Self::Config, weights: &Weights) -> Result<Self>;

    /// What each layer must remember, in the order in which [`Step::layers`] hands them out.
    fn caches(&self) -> Vec<Cache>;

    /// The new tokens of all sequences of the step, one after the other, ids `[tokens]` -> hidden `[tokens, dim]`.
    fn forward(&self, tokens: &Tensor, step: &mut Step) -> Tensor;

    /// Hidden `[rows, dim]` -> logits `[rows, vocab]`, for those rows whose logits somebody wants.
    fn head(&self, hidden: &Tensor) -> Tensor;
}

/// What a layer remembers between steps. The host stores, trims, shares, quantizes and saves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cache {
    /// Keys and values; with a window, only the last `window` of them ever matter.
    KeyValue {
        /// Keys seen, counting the query's own.
        window: Option<usize>,
    },
}

impl Cache {
    pub(crate) fn spec(self) -> CacheSpec {
        let Cache::KeyValue { window } = self;
        CacheSpec { kind: CACHE_KEY_VALUE, flags: 0, window: window.unwrap_or(0) as u64, dims: [0; 6] }
    }
}

/// How [`Layer::attend`] scores keys. Only `scale` has no default.
#[derive(Default)]
pub struct Attend<'a> {
    /// Multiplies q·k; usually `head_dim` to the power of -1/2.
    pub scale: f32,
    /// Keys seen, counting the query's own; `None` for all.
    pub window: Option<usize>,
    /// `softcap * tanh(score / softcap)`
    pub softcap: Option<f32>,
    /// One logit per query head that joins the softmax and is dropped. <https://arxiv.org/abs/2309.17453>
    pub sinks: Option<&'a Tensor>,
}

/// One call of the model. Positions, masks and caches are the host's.
pub struct Step {
    pub(crate) caches: u32,
}

impl Step {
    /// The layers' caches, in the order that [`Architecture::caches`] declared.
    pub fn layers(&mut self) -> impl Iterator<Item = Layer> + use<> {
        (0..self.caches).map(|cache| Layer { cache })
    }
}

/// One layer of the running step: the ops that know where each token stands in its sequence.
pub struct Layer {
    cache: u32,
}

impl Layer {
    /// Turns x `[tokens, heads, head_dim]` by each token's position.
    #[track_caller]
    pub fn rotate(&mut self, rope: &Rope, x: Tensor) -> Tensor {
        let call = Call::current();
        Tensor::own(call.ops.rotate()(call.ctx, rope.slot, x.handle(), rope.flags, At::caller()))
    }

    /// Softmax attention of q `[tokens, heads, d]` over all keys so far; k `[tokens, kv_heads, d]` and v `[tokens, kv_heads, e]` join the
    /// cache first. Grouped heads share keys. Gives `[tokens, heads, e]`.
    #[track_caller]
    pub fn attend(&mut self, q: Tensor, k: Tensor, v: Tensor, how: &Attend) -> Tensor {
        let call = Call::current();
        let spec = AttendSpec {
            flags: 0,
            scale: how.scale,
            softcap: how.softcap.unwrap_or(0.0),
            reserved: 0,
            window: how.window.unwrap_or(0) as u64,
            sinks: how.sinks.map_or(Handle::NONE, Tensor::handle),
        };
        Tensor::own(call.ops.attend()(
            call.ctx,
            self.cache,
            q.handle(),
            k.handle(),
            v.handle(),
            SpecRef::new(&spec),
            At::caller(),
        ))
    }
}
