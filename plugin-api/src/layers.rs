//! The layers that an architecture is made of. Each is a slot in the host; whether its weights are dense, packed in 4 bits, carry a
//! LoRA or lie on a GPU is the host's business, and no layer here can tell.

use crate::{
    Cache,
    abi::{self, At, Slot},
    tensor::{Call, Tensor},
};

macro_rules! layers {
    ($($(#[$doc:meta])* $name:ident { $($(#[$mdoc:meta])* fn $method:ident = $op:ident;)* })*) => {$(
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $name(pub(crate) Slot);
        impl $name {
            $($(#[$mdoc])* #[doc = "Thread: step."] #[track_caller] pub fn $method(&self, x: &Tensor) -> Tensor {
                let call = Call::current();
                Tensor::own(call.ops.$op()(call.ctx, self.0, x.handle(), At::caller()))
            })*
        }
    )*};
}

layers! {
    /// `y = x · Wᵀ + b`, W `[outputs, inputs]`.
    Linear {
        /// `[.., inputs]` -> `[.., outputs]`
        fn forward = linear;
    }
    /// A table of vectors, one per token id; or of ids, where the checkpoint has whole numbers.
    Embedding {
        /// ids `[tokens]` -> `[tokens, dim]`
        fn forward = embed;
        /// `[tokens, dim]` -> logits `[tokens, vocab]`: the table as output head, for tied embeddings.
        fn as_linear = unembed;
    }
    /// `x / rms(x) * w` over the last axis, in f32. <https://arxiv.org/abs/1910.07467>
    RmsNorm {
        /// The same shape.
        fn forward = norm;
    }
    /// `(x - mean) / std * w + b` over the last axis, in f32. <https://arxiv.org/abs/1607.06450>
    LayerNorm {
        /// The same shape.
        fn forward = norm;
    }
    /// Either of the two, where a block is built for both.
    Norm {
        /// The same shape.
        fn forward = norm;
    }
    /// One linear layer a head, as in multi-head latent attention: W `[heads, outputs, inputs]`.
    MultiLinear {
        /// `[tokens, heads, inputs]` -> `[tokens, heads, outputs]`
        fn forward = multi_linear;
    }
}

impl From<RmsNorm> for Norm {
    fn from(norm: RmsNorm) -> Self {
        Norm(norm.0)
    }
}

impl From<LayerNorm> for Norm {
    fn from(norm: LayerNorm) -> Self {
        Norm(norm.0)
    }
}

/// A causal convolution of each channel alone, over the last `kernel` tokens. [`Layer::conv1d`](crate::Layer::conv1d) runs it.
#[derive(Debug)]
pub struct Conv1d {
    pub(crate) slot: Slot,
    pub(crate) channels: usize,
    pub(crate) kernel: usize,
}

impl Conv1d {
    /// What it remembers: the inputs of the last `kernel - 1` tokens.
    pub fn cache(&self) -> Cache {
        Cache::state(&[self.kernel.saturating_sub(1), self.channels])
    }
}

/// A tensor of the checkpoint that the architecture uses as it is.
#[derive(Debug)]
pub struct Parameter(pub(crate) Slot);

impl Parameter {
    /// The tensor, for this step. Thread: step.
    #[track_caller]
    pub fn tensor(&self) -> Tensor {
        let call = Call::current();
        Tensor::own(call.ops.parameter()(call.ctx, self.0, At::caller()))
    }
}

/// Rotary position angles. <https://arxiv.org/abs/2104.09864>
#[derive(Debug, Clone, Copy)]
pub struct Rope {
    pub(crate) slot: Slot,
    pub(crate) flags: u32,
}

impl Rope {
    /// Neighbouring lanes (2i, 2i + 1) turn together, as in the paper; without it lane i turns with lane i + dims / 2.
    pub fn interleaved(mut self) -> Self {
        self.flags |= abi::ROTATE_NEIGHBOURS;
        self
    }

    /// The last lanes of a head turn; without it the first.
    pub fn at_the_end(mut self) -> Self {
        self.flags |= abi::ROTATE_LAST;
        self
    }

    /// Turns back what the same rope has turned: the values that attention took from keys.
    pub fn back(mut self) -> Self {
        self.flags ^= abi::ROTATE_BACK;
        self
    }

    /// Every token turns as the first of its block of `size` tokens (at most 2^24 - 1; 0 for no blocks): what stands for a block has one
    /// position.
    pub fn in_blocks(mut self, size: usize) -> Self {
        let size = (size as u32).min(u32::MAX >> abi::ROTATE_BLOCK_SHIFT);
        self.flags = self.flags & ((1 << abi::ROTATE_BLOCK_SHIFT) - 1) | size << abi::ROTATE_BLOCK_SHIFT;
        self
    }
}
