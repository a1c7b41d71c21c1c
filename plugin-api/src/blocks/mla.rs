//! Multi-head latent attention: what all heads know of a token is one short vector, the latent, and that alone is cached.
//! <https://arxiv.org/abs/2405.04434>
//!
//! The paper's per-head keys and values are products of the latent. Here they are never made: `(Wk c) · q = c · (Wkᵀ q)`, so each query is
//! taken into the latent space, attends there with the latents as keys and as values, and only the result is taken out again.

use super::turning::grown;
use crate::{
    Attend, Cache, Layer, Linear, Mixer, MultiLinear, Norm, RmsNorm, Rope, RopeScaling, Source, Tensor, Weights,
};

/// The shape of latent attention, by the names of config.json.
#[derive(Debug, Clone, Copy)]
pub struct MlaShape {
    /// Width of the model.
    pub hidden_size: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Width of the queries' latent; without one they come from x.
    pub q_lora_rank: Option<usize>,
    /// Width of the keys' and values' latent.
    pub kv_lora_rank: usize,
    /// Lanes of a head that do not turn.
    pub qk_nope_head_dim: usize,
    /// Lanes of a head that turn; their keys are the same for all heads.
    pub qk_rope_head_dim: usize,
    /// Lanes of a head's value.
    pub v_head_dim: usize,
    /// Whether the projections from and to the model's width, except queries without a latent, have biases.
    pub attention_bias: bool,
}

/// Where queries come from.
#[derive(Debug)]
enum Queries {
    Direct(Linear),
    Latent { q_a_proj: Linear, q_a_layernorm: Norm, q_b_proj: Linear },
    Gated { q_a_proj: Linear, q_a_layernorm: Norm, q_b_proj: Linear },
}

/// ```text
/// c = RMSNorm(x Wa), r = rope(x Wr)         cached: [c, r]
/// qₙ, qᵣ = x Wq or RMSNorm(x Wqa) Wqb       per head; qᵣ turned
/// o = softmax([qₙ Wk, qᵣ] · [c, r]ᵀ s) · c  per head, in the latent space
/// y = [o Wvᵀ ..] Wo
/// gated: [qₙ, qᵣ, g] = [RMSNorm(x Wqa), x Wqa] Wqg per head, y = [o Wvᵀ * sigmoid(g) ..] Wo
/// ```
#[derive(Debug)]
pub struct Mla {
    queries: Queries,
    kv_a_proj_with_mqa: Linear,
    kv_a_layernorm: RmsNorm,
    embed_q: MultiLinear,
    unembed_out: MultiLinear,
    o_proj: Linear,
    rope: Option<Rope>,
    gate: Option<(Linear, usize)>,
    shape: MlaShape,
    scale: f32,
    growth: Option<(f32, f32)>,
}

/// Under the root of the latents' norms, whatever config.json says of the other norms.
const EPS: f32 = 1e-6;

impl Mla {
    /// The names of DeepSeek's checkpoints, without a rope no positions; per-head matrices as `kv_b_proj` `[heads * (nope + v), rank]` (all keys and values of a head
    /// below each other) or as MLX splits it, `embed_q` `[heads, rank, nope]` and `unembed_out` `[heads, v, rank]`. Thread: new.
    #[track_caller]
    pub fn new(w: &Weights, s: MlaShape, rope: impl Into<Option<Rope>>) -> Self {
        Self::named(w, "o_proj", s, rope)
    }

    /// The same with another name for the output's projection. Thread: new.
    #[track_caller]
    pub fn named(w: &Weights, o_proj: &str, s: MlaShape, rope: impl Into<Option<Rope>>) -> Self {
        let (dim, heads, rank) = (s.hidden_size, s.num_attention_heads, s.kv_lora_rank);
        let (nope, value) = (s.qk_nope_head_dim, s.v_head_dim);
        let q = heads * (nope + s.qk_rope_head_dim);
        let queries = match s.q_lora_rank {
            None => Queries::Direct(w.linear("q_proj", dim, q, false)),
            // The two have one name, but never one shape.
            Some(q_rank) if w.has_shape("q_b_proj.weight", &[q + heads * value, 2 * q_rank]) => Queries::Gated {
                q_a_proj: w.linear("q_a_proj", dim, q_rank, s.attention_bias),
                q_a_layernorm: w.rms_norm("q_a_layernorm", q_rank, EPS).into(),
                q_b_proj: w.linear("q_b_proj", 2 * q_rank, q + heads * value, false),
            },
            Some(q_rank) => Queries::Latent {
                q_a_proj: w.linear("q_a_proj", dim, q_rank, s.attention_bias),
                q_a_layernorm: w.rms_norm("q_a_layernorm", q_rank, EPS).into(),
                q_b_proj: w.linear("q_b_proj", q_rank, q, false),
            },
        };
        let (embed_q, unembed_out) = if w.has("embed_q.weight") {
            (w.multi_linear("embed_q", heads, nope, rank), w.multi_linear("unembed_out", heads, rank, value))
        } else {
            let kv = w.source("kv_b_proj.weight").reshape(&[heads, nope + value, rank]);
            let of = |source: Source, inputs, outputs| MultiLinear::of(source, None, heads, inputs, outputs);
            (of(kv.narrow(1, 0..nope).transpose(), nope, rank), of(kv.narrow(1, nope..nope + value), rank, value))
        };
        Self {
            queries,
            kv_a_proj_with_mqa: w.linear("kv_a_proj_with_mqa", dim, rank + s.qk_rope_head_dim, s.attention_bias),
            kv_a_layernorm: w.rms_norm("kv_a_layernorm", rank, EPS),
            embed_q,
            unembed_out,
            o_proj: w.linear(o_proj, heads * value, dim, s.attention_bias),
            rope: rope.into(),
            gate: None,
            shape: s,
            scale: ((nope + s.qk_rope_head_dim) as f32).powf(-0.5),
            growth: None,
        }
    }

    /// Multiplies scores by what YaRN's `mscale_all_dim` asks for, where `rope_scaling` has it. <https://arxiv.org/abs/2309.00071>
    pub fn mscale(self, scaling: &Option<RopeScaling>) -> Self {
        let number = |key| scaling.as_ref().and_then(|s| s.number(key));
        let (factor, all) = (number("factor").unwrap_or(1.0), number("mscale_all_dim").unwrap_or(0.0));
        let mscale = if factor > 1.0 { 0.1 * all * factor.ln() + 1.0 } else { 1.0 };
        Self { scale: self.scale * mscale * mscale, ..self }
    }

    /// Multiplies what each head has attended to by `sigmoid(x W)`, W `[heads, dim]`.
    pub fn head_gate(self, gate: Linear) -> Self {
        Self { gate: Some((gate, 1)), ..self }
    }

    /// Multiplies each lane of what heads have attended to by its own `sigmoid(x W)`, W `[heads * v_head_dim, dim]`.
    pub fn lane_gate(self, gate: Linear) -> Self {
        let lanes = self.shape.v_head_dim;
        Self { gate: Some((gate, lanes)), ..self }
    }

    /// Multiplies queries by `1 + beta · ln(1 + ⌊position / span⌋)`, with `(beta, span)`: sharper attention in long texts.
    pub fn growing_queries(self, growth: Option<(f32, f32)>) -> Self {
        Self { growth, ..self }
    }

    /// Multiplies all queries by the first number and the latents of keys and values, not the turned keys, by the second. Thread: new.
    #[track_caller]
    pub fn latent_scales(self, w: &Weights, queries: f32, latents: f32) -> Self {
        let norm = w.source("kv_a_layernorm.weight").times(latents);
        let kv_a_layernorm = RmsNorm::of(norm, self.shape.kv_lora_rank, EPS);
        Self { scale: self.scale * queries, kv_a_layernorm, ..self }
    }

    /// What queries are made of: their latent `[tokens, q_lora_rank]`, or x. Where they are gated, the latent before its norm follows it.
    /// Thread: step.
    #[track_caller]
    pub fn query_latent(&self, x: &Tensor) -> Tensor {
        match &self.queries {
            Queries::Direct(_) => x.clone(),
            Queries::Latent { q_a_proj, q_a_layernorm, .. } => q_a_layernorm.forward(&q_a_proj.forward(x)),
            Queries::Gated { q_a_proj, q_a_layernorm, .. } => {
                let latent = q_a_proj.forward(x);
                Tensor::concat(&[&q_a_layernorm.forward(&latent), &latent])
            }
        }
    }

    /// x `[tokens, dim]` and its [`query_latent`](Self::query_latent) -> `[tokens, dim]`, over the selected keys only, if any are.
    /// Thread: step.
    #[track_caller]
    pub fn attend(&self, x: &Tensor, latent: &Tensor, selection: Option<&Tensor>, layer: &mut Layer) -> Tensor {
        let (rank, nope, turned) = (self.shape.kv_lora_rank, self.shape.qk_nope_head_dim, self.shape.qk_rope_head_dim);
        let q = match &self.queries {
            Queries::Direct(q_proj) => q_proj.forward(latent),
            Queries::Latent { q_b_proj, .. } => q_b_proj.forward(latent),
            Queries::Gated { q_b_proj, .. } => q_b_proj.forward(latent),
        };
        let (q, gate) = match &self.queries {
            Queries::Gated { .. } => {
                let both = q.split_heads(nope + turned + self.shape.v_head_dim);
                (both.narrow(0, nope + turned), Some(both.narrow(nope + turned, self.shape.v_head_dim)))
            }
            _ => (q.split_heads(nope + turned), None),
        };
        let kv = self.kv_a_proj_with_mqa.forward(x);
        let c = self.kv_a_layernorm.forward(&kv.narrow(0, rank)).split_heads(rank);
        let mut turn = |x: Tensor| match &self.rope {
            Some(rope) => layer.rotate(rope, x),
            None => x,
        };
        let (q_rope, k_rope) = (turn(q.narrow(nope, turned)), turn(kv.narrow(rank, turned).split_heads(turned)));
        let q = Tensor::concat(&[&self.embed_q.forward(&q.narrow(0, nope)), &q_rope]);
        let q = grown(q, self.growth, layer);
        let how = Attend { scale: self.scale, selection, ..Default::default() };
        let attended = layer.attend_latent(q, Tensor::concat(&[&c, &k_rope]), rank, &how);
        let by_head = self.unembed_out.forward(&attended);
        let by_head = match &self.gate {
            Some((gate, lanes)) => by_head * gate.forward(x).sigmoid().split_heads(*lanes),
            None => by_head,
        };
        let by_head = match gate {
            Some(gate) => by_head * gate.sigmoid(),
            None => by_head,
        };
        self.o_proj.forward(&by_head.merge_heads())
    }
}

impl Mixer for Mla {
    #[track_caller]
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        self.attend(x, &self.query_latent(x), None, layer)
    }

    fn cache(&self) -> Cache {
        Cache::key_value(None)
    }
}
