//! Attention with grouped heads, as nearly every decoder has it; what differs between architectures are words on it.

use super::{
    output_gate::OutputGate,
    qk_norm::QkNorm,
    turning::{grown, turned},
};
use crate::{Attend, BlockChoice, Cache, Layer, Linear, Mixer, Norm, Parameter, Rope, SparseBlocks, Tensor, Weights};

/// The shape of an attention block.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    /// Width of the model.
    pub dim: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads, which divide the query heads.
    pub kv_heads: usize,
    /// Lanes of a head.
    pub head_dim: usize,
}

/// `softmax(q · kᵀ · scale) · v · Wo` over grouped heads, with rotary positions. <https://arxiv.org/abs/2305.13245>
#[derive(Debug)]
pub struct SelfAttention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    qk_norm: QkNorm,
    rope: Option<Rope>,
    reversed: bool,
    head_dim: usize,
    scale: f32,
    softcap: Option<f32>,
    clip: Option<f32>,
    growth: Option<(f32, f32)>,
    sinks: Option<Parameter>,
    gate: Option<OutputGate>,
    slopes: Option<Parameter>,
    chunk: Option<usize>,
    blocks: Option<SparseBlocks>,
    /// Keys seen, counting the query's own; for [`Cache::key_value`](crate::Cache::key_value).
    pub window: Option<usize>,
}

impl SelfAttention {
    /// `q_proj`, `k_proj`, `v_proj` with `qkv_bias` or none, `o_proj` with `o_bias` or none; scale `head_dim^-½`, no rope, no window.
    /// Thread: new.
    #[track_caller]
    pub fn new(w: &Weights, h: Heads, qkv_bias: bool, o_bias: bool) -> Self {
        let (q, kv) = (h.heads * h.head_dim, h.kv_heads * h.head_dim);
        let qkv = w.linears(h.dim, qkv_bias, [("q_proj", q), ("k_proj", kv), ("v_proj", kv)]);
        Self::of(qkv, w.linear("o_proj", q, h.dim, o_bias), h.head_dim)
    }

    /// Queries, keys and values stored one below the other in `name.weight` `[(heads + 2 kv_heads) * head_dim, dim]`, with `bias` or
    /// none; `o_proj` has its own. Thread: new.
    #[track_caller]
    pub fn fused(w: &Weights, name: &str, h: Heads, bias: bool, o_proj: Linear) -> Self {
        let (q, kv) = (h.heads * h.head_dim, h.kv_heads * h.head_dim);
        let qkv = [0..q, q..q + kv, q + kv..q + 2 * kv].map(|rows| {
            let bias = bias.then(|| w.source(&format!("{name}.bias")).rows(rows.clone()));
            let outputs = rows.len();
            Linear::of(w.source(&format!("{name}.weight")).rows(rows), bias, h.dim, outputs)
        });
        Self::of(qkv, o_proj, h.head_dim)
    }

    /// Queries, keys and values stored group by group in `name.weight`: the query heads that share a key head, then it, then its value
    /// head; with `bias` or none; `o_proj` has its own. Thread: new.
    #[track_caller]
    pub fn grouped(w: &Weights, name: &str, h: Heads, bias: bool, o_proj: Linear) -> Self {
        let (d, sharing) = (h.head_dim, h.heads / h.kv_heads.max(1));
        let q = sharing * d;
        let qkv = [0..q, q..q + d, q + d..q + 2 * d].map(|lanes| {
            let outputs = h.kv_heads * lanes.len();
            let weight = w.source(&format!("{name}.weight")).reshape(&[h.kv_heads, q + 2 * d, h.dim]);
            let weight = weight.narrow(1, lanes.clone()).reshape(&[outputs, h.dim]);
            let bias = bias.then(|| {
                let bias = w.source(&format!("{name}.bias")).reshape(&[h.kv_heads, q + 2 * d]);
                bias.narrow(1, lanes.clone()).reshape(&[outputs])
            });
            Linear::of(weight, bias, h.dim, outputs)
        });
        Self::of(qkv, o_proj, d)
    }

    /// The block of projections that the author found.
    pub fn of([q_proj, k_proj, v_proj]: [Linear; 3], o_proj: Linear, head_dim: usize) -> Self {
        Self {
            q_proj,
            k_proj,
            v_proj,
            o_proj,
            qk_norm: QkNorm::None,
            rope: None,
            reversed: false,
            head_dim,
            scale: (head_dim as f32).powf(-0.5),
            softcap: None,
            clip: None,
            growth: None,
            sinks: None,
            gate: None,
            slopes: None,
            chunk: None,
            blocks: None,
            window: None,
        }
    }

    /// Turns queries and keys by their positions; `None` leaves this layer without.
    pub fn rope(self, rope: impl Into<Option<Rope>>) -> Self {
        Self { rope: rope.into(), ..self }
    }

    /// The rope turns all lanes, and the other way: by minus the angle.
    pub fn reversed(self) -> Self {
        Self { reversed: true, ..self }
    }

    /// Normalizes each head of queries and keys alone, before the rope: norms of `head_dim` lanes.
    pub fn head_norms(self, q_norm: impl Into<Norm>, k_norm: impl Into<Norm>) -> Self {
        Self { qk_norm: QkNorm::Heads(q_norm.into(), k_norm.into()), ..self }
    }

    /// Normalizes all heads of queries and of keys as one, before the rope: norms of `heads * head_dim` lanes.
    pub fn whole_norms(self, q_norm: impl Into<Norm>, k_norm: impl Into<Norm>) -> Self {
        Self { qk_norm: QkNorm::Whole(q_norm.into(), k_norm.into()), ..self }
    }

    /// Normalizes each head of queries and keys alone, after the rope: norms of `head_dim` lanes.
    pub fn turned_norms(self, q_norm: impl Into<Norm>, k_norm: impl Into<Norm>) -> Self {
        Self { qk_norm: QkNorm::Turned(q_norm.into(), k_norm.into()), ..self }
    }

    /// Normalizes each head alone, before the rope, by a norm without weights, and multiplies it with weights of its own:
    /// `[heads, head_dim]` for queries and `[kv_heads, head_dim]` for keys.
    pub fn weighted_norms(self, norm: impl Into<Norm>, q_weight: Parameter, k_weight: Parameter) -> Self {
        Self { qk_norm: QkNorm::Weighted(norm.into(), q_weight, k_weight), ..self }
    }

    /// Holds what the three projections, normalized as a whole or not, give within ± `clip`.
    pub fn clip(self, clip: Option<f32>) -> Self {
        Self { clip, ..self }
    }

    /// Multiplies queries by `1 + beta · ln(1 + ⌊position / span⌋)`, with `(beta, span)`: sharper attention in long texts.
    pub fn growing_queries(self, growth: Option<(f32, f32)>) -> Self {
        Self { growth, ..self }
    }

    /// One logit per query head that joins the softmax and is dropped: `[heads]`.
    pub fn sinks(self, sinks: impl Into<Option<Parameter>>) -> Self {
        Self { sinks: sinks.into(), ..self }
    }

    /// ALiBi: `[heads]`, by how much a score falls for each position between query and key; [`alibi_slopes`](super::alibi_slopes) has
    /// the paper's. <https://arxiv.org/abs/2108.12409>
    pub fn slopes(self, slopes: impl Into<Option<Parameter>>) -> Self {
        Self { slopes: slopes.into(), ..self }
    }

    /// Multiplies what attention gives by `sigmoid(x W)`, before the output projection; W `[heads * head_dim, dim]`.
    /// <https://arxiv.org/abs/2505.06708>
    pub fn gate(self, gate: Linear) -> Self {
        Self { gate: Some(OutputGate::Lanes(gate)), ..self }
    }

    /// The same with one factor a head; W `[heads, dim]`.
    pub fn head_gate(self, gate: Linear) -> Self {
        Self { gate: Some(OutputGate::Heads(gate)), ..self }
    }

    /// Which blocks of keys are seen.
    pub fn blocks(self, blocks: Option<SparseBlocks>) -> Self {
        Self { blocks, ..self }
    }

    /// Keys seen from the last multiple of this on.
    pub fn chunk(self, chunk: Option<usize>) -> Self {
        Self { chunk, ..self }
    }

    /// Keys seen, counting the query's own.
    pub fn window(self, window: Option<usize>) -> Self {
        Self { window, ..self }
    }

    /// Multiplies q·k, in place of `head_dim^-½`.
    pub fn scale(self, scale: f32) -> Self {
        Self { scale, ..self }
    }

    /// `softcap * tanh(score / softcap)`
    pub fn softcap(self, softcap: Option<f32>) -> Self {
        Self { softcap, ..self }
    }

    /// Queries, keys and values `[tokens, heads, head_dim]`, normalized and turned. Thread: step.
    #[track_caller]
    pub fn project(&self, x: &Tensor, layer: &mut Layer) -> [Tensor; 3] {
        let [q, k, v] = [&self.q_proj, &self.k_proj, &self.v_proj].map(|proj| proj.forward(x));
        let (q, k) = self.qk_norm.of_whole(q, k);
        let [q, k, v] = match self.clip {
            Some(most) => [q, k, v].map(|x| x.clamp(-most, most)),
            None => [q, k, v],
        };
        let [q, k, v] = [q, k, v].map(|x| x.split_heads(self.head_dim));
        let (q, k) = self.qk_norm.of_heads(q, k);
        let turn = |x, layer: &mut Layer| turned(x, self.rope.as_ref(), self.reversed.then_some(self.head_dim), layer);
        let (q, k) = (turn(q, layer), turn(k, layer));
        let (q, k) = self.qk_norm.of_turned(q, k);
        [grown(q, self.growth, layer), k, v]
    }

    /// Attention over all keys so far, heads joined: `[tokens, heads * head_dim]`, for what stands between it and `o_proj`. Thread: step.
    #[track_caller]
    pub fn attend(&self, qkv: [Tensor; 3], layer: &mut Layer) -> Tensor {
        self.attend_how(qkv, layer, Attend::default())
    }

    /// The same over some blocks of keys alone, those that [`Layer::index_blocks`] chose by `choice`. Thread: step.
    #[track_caller]
    pub fn attend_chosen(&self, qkv: [Tensor; 3], chosen: &Tensor, choice: BlockChoice, layer: &mut Layer) -> Tensor {
        let selection_block = Some(choice.size);
        self.attend_how(qkv, layer, Attend { selection: Some(chosen), selection_block, ..Default::default() })
    }

    #[track_caller]
    fn attend_how(&self, [q, k, v]: [Tensor; 3], layer: &mut Layer, how: Attend) -> Tensor {
        let [sinks, slopes] = [&self.sinks, &self.slopes].map(|numbers| numbers.as_ref().map(Parameter::tensor));
        let (sinks, slopes, scale) = (sinks.as_ref(), slopes.as_ref(), self.scale);
        let (window, chunk, softcap, blocks) = (self.window, self.chunk, self.softcap, self.blocks);
        layer.attend(q, k, v, &Attend { scale, window, chunk, softcap, sinks, slopes, blocks, ..how }).merge_heads()
    }

    /// The output projection. Thread: step.
    #[track_caller]
    pub fn output(&self, attended: &Tensor) -> Tensor {
        self.o_proj.forward(attended)
    }

    /// `[tokens, dim]` -> `[tokens, dim]`. Thread: step.
    #[track_caller]
    pub fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let attended = self.attend(self.project(x, layer), layer);
        self.output(&match &self.gate {
            Some(gate) => gate.forward(x, attended, self.head_dim),
            None => attended,
        })
    }
}

impl Mixer for SelfAttention {
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        self.forward(x, layer)
    }

    fn cache(&self) -> Cache {
        self.chunk.map_or_else(|| Cache::key_value(self.window), Cache::chunked)
    }
}
