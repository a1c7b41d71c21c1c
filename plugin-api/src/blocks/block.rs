//! A decoder's block: what mixes tokens, then what treats each token alone, both added to the residual stream. Architectures differ in
//! where they put the norms, and the traits leave open what mixes and what feeds.

use crate::{Cache, Ffn, GatedMlp, Layer, Mlp, Moe, Norm, SelfAttention, Tensor};

/// What lets tokens see each other: attention, or a recurrence.
pub trait Mixer {
    /// `[tokens, dim]` -> `[tokens, dim]`
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
    /// `[tokens, dim]` -> `[tokens, dim]`
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

/// `h = x + mixer(x)`, `y = h + ffn(h)`, with norms before or after the two.
#[derive(Debug)]
pub struct Block<M = SelfAttention, F = GatedMlp> {
    /// What lets tokens see each other.
    pub mixer: M,
    /// What treats each token alone.
    pub ffn: F,
    before: Option<[Norm; 2]>,
    after: Option<[Norm; 2]>,
    branch_scale: f32,
}

impl<M: Mixer, F: FeedForward> Block<M, F> {
    /// `h = x + mixer(norm(x))`, `y = h + ffn(norm(h))`. <https://arxiv.org/abs/2002.04745>
    pub fn pre_norm(norms: [impl Into<Norm>; 2], mixer: M, ffn: F) -> Self {
        Self { mixer, ffn, before: Some(norms.map(Into::into)), after: None, branch_scale: 1.0 }
    }

    /// `h = x + norm(mixer(x))`, `y = h + norm(ffn(h))`. <https://arxiv.org/abs/2501.00656>
    pub fn post_norm(norms: [impl Into<Norm>; 2], mixer: M, ffn: F) -> Self {
        Self { mixer, ffn, before: None, after: Some(norms.map(Into::into)), branch_scale: 1.0 }
    }

    /// `h = x + norm(mixer(norm(x)))`, `y = h + norm(ffn(norm(h)))`, the norms in the order of their use. <https://arxiv.org/abs/2408.00118>
    pub fn both_norms(norms: [impl Into<Norm>; 4], mixer: M, ffn: F) -> Self {
        let [before_mixer, after_mixer, before_ffn, after_ffn] = norms.map(Into::into);
        let (before, after) = (Some([before_mixer, before_ffn]), Some([after_mixer, after_ffn]));
        Self { mixer, ffn, before, after, branch_scale: 1.0 }
    }

    /// Multiplies what either of the two adds to the stream.
    pub fn branch_scale(self, branch_scale: f32) -> Self {
        Self { branch_scale, ..self }
    }

    /// `[tokens, dim]` -> `[tokens, dim]`
    #[track_caller]
    pub fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let h = self.add(0, x, |x| self.mixer.forward(x, layer));
        self.add(1, &h, |h| self.ffn.forward(h))
    }

    #[track_caller]
    fn add(&self, which: usize, x: &Tensor, branch: impl FnOnce(&Tensor) -> Tensor) -> Tensor {
        let y = match &self.before {
            Some(norms) => branch(&norms[which].forward(x)),
            None => branch(x),
        };
        let y = match &self.after {
            Some(norms) => norms[which].forward(&y),
            None => y,
        };
        x + if self.branch_scale == 1.0 { y } else { y * self.branch_scale }
    }
}
