//! A decoder's block: what mixes tokens, then what treats each token alone, both added to the residual stream. Architectures differ in
//! where they put the norms and whether the second sees what the first did, and the traits leave open what mixes and what feeds.

use crate::{Cache, Ffn, GatedMlp, Layer, Mlp, Moe, Norm, SelfAttention, Tensor};

/// What lets tokens see each other: attention, a recurrence, or a whole block around one.
pub trait Mixer {
    /// `[tokens, dim]` -> `[tokens, dim]`. Thread: step.
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor;
    /// What it remembers.
    fn cache(&self) -> Cache;
}

/// Mixers of several kinds, where layers differ.
impl<M: Mixer + ?Sized> Mixer for Box<M> {
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        (**self).forward(x, layer)
    }

    fn cache(&self) -> Cache {
        (**self).cache()
    }
}

/// What treats each token alone.
pub trait FeedForward {
    /// `[tokens, dim]` -> `[tokens, dim]`. Thread: step.
    fn forward(&self, x: &Tensor) -> Tensor;
}

macro_rules! feed_forward {
    ($($name:ident)*) => {$(
        impl FeedForward for $name {
            fn forward(&self, x: &Tensor) -> Tensor {
                self.forward(x)
            }
        }
    )*};
}

feed_forward!(GatedMlp Mlp Moe Ffn);

/// What the feed-forward layer sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    /// What the mixer made of x.
    InTurn,
    /// x, by a norm of its own.
    Parallel,
    /// x as the mixer sees it.
    OneNorm,
}

/// `h = x + mixer(x)`, `y = h + ffn(h)`, with norms before or after the two, or both at once.
#[derive(Debug)]
pub struct Block<M = SelfAttention, F = GatedMlp> {
    /// What lets tokens see each other.
    pub mixer: M,
    /// What treats each token alone.
    pub ffn: F,
    before: Option<[Norm; 2]>,
    after: Option<[Norm; 2]>,
    branch_scale: f32,
    order: Order,
}

impl<M: Mixer, F: FeedForward> Block<M, F> {
    /// `h = x + mixer(norm(x))`, `y = h + ffn(norm(h))`. <https://arxiv.org/abs/2002.04745>
    pub fn pre_norm(norms: [impl Into<Norm>; 2], mixer: M, ffn: F) -> Self {
        let before = Some(norms.map(Into::into));
        Self { mixer, ffn, before, after: None, branch_scale: 1.0, order: Order::InTurn }
    }

    /// `h = x + norm(mixer(x))`, `y = h + norm(ffn(h))`. <https://arxiv.org/abs/2501.00656>
    pub fn post_norm(norms: [impl Into<Norm>; 2], mixer: M, ffn: F) -> Self {
        let after = Some(norms.map(Into::into));
        Self { mixer, ffn, before: None, after, branch_scale: 1.0, order: Order::InTurn }
    }

    /// `h = x + norm(mixer(norm(x)))`, `y = h + norm(ffn(norm(h)))`, the norms in the order of their use. <https://arxiv.org/abs/2408.00118>
    pub fn both_norms(norms: [impl Into<Norm>; 4], mixer: M, ffn: F) -> Self {
        let [before_mixer, after_mixer, before_ffn, after_ffn] = norms.map(Into::into);
        let (before, after) = (Some([before_mixer, before_ffn]), Some([after_mixer, after_ffn]));
        Self { mixer, ffn, before, after, branch_scale: 1.0, order: Order::InTurn }
    }

    /// `y = x + mixer(n) + ffn(n)` with `n = norm(x)`. <https://arxiv.org/abs/2204.02311>
    pub fn parallel(norm: impl Into<Norm>, mixer: M, ffn: F) -> Self {
        let norm = norm.into();
        let same = Norm(norm.0);
        Self { order: Order::OneNorm, ..Self::pre_norm([norm, same], mixer, ffn) }
    }

    /// `y = x + mixer(norm(x)) + ffn(norm(x))`, each with a norm of its own. <https://arxiv.org/abs/2204.06745>
    pub fn parallel_norms(norms: [impl Into<Norm>; 2], mixer: M, ffn: F) -> Self {
        Self { order: Order::Parallel, ..Self::pre_norm(norms, mixer, ffn) }
    }

    /// Multiplies what either of the two adds to the stream.
    pub fn branch_scale(self, branch_scale: f32) -> Self {
        Self { branch_scale, ..self }
    }

    #[track_caller]
    fn normed(&self, which: usize, x: &Tensor) -> Tensor {
        self.before.as_ref().map_or_else(|| x.clone(), |norms| norms[which].forward(x))
    }

    /// What one of the two adds to the stream.
    #[track_caller]
    fn branch(&self, which: usize, y: Tensor) -> Tensor {
        let y = match &self.after {
            Some(norms) => norms[which].forward(&y),
            None => y,
        };
        if self.branch_scale == 1.0 { y } else { y * self.branch_scale }
    }
}

/// A whole block mixes tokens too: what a decoder is made of is a list of these.
impl<M: Mixer, F: FeedForward> Mixer for Block<M, F> {
    #[track_caller]
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let seen = self.normed(0, x);
        let h = x + self.branch(0, self.mixer.forward(&seen, layer));
        let seen = match self.order {
            Order::InTurn => self.normed(1, &h),
            Order::Parallel => self.normed(1, x),
            Order::OneNorm => seen,
        };
        h + self.branch(1, self.ffn.forward(&seen))
    }

    fn cache(&self) -> Cache {
        self.mixer.cache()
    }
}
