//! What a plugin implements: an architecture, which names its config and its weights once, and the model that this gives, which runs.

use crate::{Cache, Step, Tensor, Weights, abi::extension::Offer, config::FromConfig};

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
pub trait Architecture: 'static {
    /// The `model_type`s of config.json that this architecture serves; the first one names the library file. Text models inside of a
    /// wrapper that also wraps others go by both names, `mistral3.mistral4`.
    const MODEL_TYPES: &'static [&'static str];
    /// The keys it reads, declared with [`config!`](crate::config!).
    type Config: FromConfig;
    /// What it builds: mostly a [`Decoder`](crate::Decoder), which runs its blocks by itself; or `Self`, and the author says how.
    type Model: Model;

    /// Names the weights. Runs against the checkpoint's header alone; missing tensors are the host's to report. Thread: any.
    fn new(config: Self::Config, weights: &Weights) -> Result<Self::Model>;

    /// What it offers to hosts that ask by name, before there is a model: see [`abi::extension`](crate::abi::extension). Thread: any.
    fn extension(_id: &str) -> Option<Offer<'static>> {
        None
    }
}

/// A model that runs.
///
/// `Send`, since a model may be built on one thread and run on another; a [`Tensor`] is not, so none can be kept between steps.
///
/// Replay contract: `forward` and `head` are pure functions of their arguments' shapes. They read no values, no clock and no files, and
/// for equal token counts they issue equal ops, so that the host may record a step once and replay it.
pub trait Model: Send + 'static {
    /// What each layer must remember, in the order in which [`Step::layers`] hands the layers out. Thread: any, one call at a time.
    fn caches(&self) -> Vec<Cache>;

    /// The new tokens of all sequences of the step, one after the other, ids `[tokens]` -> hidden `[tokens, dim]`. Thread: any, one call at a time.
    fn forward(&self, tokens: &Tensor, step: &mut Step) -> Tensor;

    /// Hidden `[rows, dim]` -> logits `[rows, vocab]`, for those rows whose logits somebody wants. Thread: any, one call at a time.
    fn head(&self, hidden: &Tensor) -> Tensor;

    /// What this model offers to hosts that ask by name: see [`abi::extension`](crate::abi::extension). Thread: any, one call at a time.
    fn extension(&self, _id: &str) -> Option<Offer<'_>> {
        None
    }
}
