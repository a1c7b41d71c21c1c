//! Attention as in Gemma 3n and Gemma 4: heads of queries, keys and values normalized, and in the last layers no keys at all, but those
//! of an earlier layer. <https://arxiv.org/abs/2405.05254>

use crate::{Attend, Cache, Heads, Layer, Linear, Mixer, RmsNorm, Rope, Tensor, Weights};

/// `softmax(rope(Norm(x Wq)) · rope(Norm(x Wk))ᵀ) · unit(x Wv) · Wo`, where unit divides each head by its root mean square.
#[derive(Debug)]
pub struct SharingAttention {
    q_proj: Linear,
    q_norm: RmsNorm,
    keys: Keys,
    o_proj: Linear,
    rope: Rope,
    head_dim: usize,
    window: Option<usize>,
}

#[derive(Debug)]
enum Keys {
    Own {
        k_proj: Linear,
        /// None where values are the keys before norm and rope.
        v_proj: Option<Linear>,
        k_norm: RmsNorm,
        v_norm: RmsNorm,
    },
    /// Those of this layer.
    Of(usize),
}

impl SharingAttention {
    /// `q_proj`, `k_proj`, `v_proj` and `o_proj`, all with `bias` or none, `q_norm` and `k_norm` of `head_dim` lanes. With a `lender`,
    /// keys and values are those of that layer (from 0), and this one's own projections are not read; with `k_eq_v` there is no `v_proj`,
    /// values are what `k_proj` gives. Thread: new.
    #[track_caller]
    pub fn new(
        w: &Weights,
        h: Heads,
        (bias, k_eq_v): (bool, bool),
        eps: f32,
        rope: Rope,
        lender: Option<usize>,
    ) -> Self {
        let (q, kv) = (h.heads * h.head_dim, h.kv_heads * h.head_dim);
        let keys = match lender {
            Some(layer) => {
                // Files may carry projections that were never trained.
                for unused in ["k_proj.", "v_proj.", "k_norm."] {
                    w.ignore(unused);
                }
                Keys::Of(layer)
            }
            None => Keys::Own {
                k_proj: w.linear("k_proj", h.dim, kv, bias),
                v_proj: (!k_eq_v).then(|| w.linear("v_proj", h.dim, kv, bias)),
                k_norm: w.rms_norm("k_norm", h.head_dim, eps),
                v_norm: RmsNorm::plain(h.head_dim, eps),
            },
        };
        let q_proj = w.linear("q_proj", h.dim, q, bias);
        let (q_norm, o_proj) = (w.rms_norm("q_norm", h.head_dim, eps), w.linear("o_proj", q, h.dim, bias));
        Self { q_proj, q_norm, keys, o_proj, rope, head_dim: h.head_dim, window: None }
    }

    /// Keys seen, counting the query's own.
    pub fn window(self, window: Option<usize>) -> Self {
        Self { window, ..self }
    }
}

impl Mixer for SharingAttention {
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let how = Attend { scale: 1.0, window: self.window, ..Default::default() };
        let heads = |proj: &Linear| proj.forward(x).split_heads(self.head_dim);
        let q = layer.rotate(&self.rope, self.q_norm.forward(&heads(&self.q_proj)));
        let y = match &self.keys {
            Keys::Of(lender) => layer.attend_to(*lender, q, &how),
            Keys::Own { k_proj, v_proj, k_norm, v_norm } => {
                let k = heads(k_proj);
                let v = v_norm.forward(&v_proj.as_ref().map_or_else(|| k.clone(), heads));
                let k = layer.rotate(&self.rope, k_norm.forward(&k));
                layer.attend(q, k, v, &how)
            }
        };
        self.o_proj.forward(&y.merge_heads())
    }

    fn cache(&self) -> Cache {
        match self.keys {
            Keys::Own { .. } => Cache::key_value(self.window),
            Keys::Of(_) => Cache::none(),
        }
    }
}
