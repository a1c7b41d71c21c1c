//! Muse Spark, its language model: gates of the residual stream that are fixed in the weights, and experts that work at a width of their
//! own, each with a norm behind it. <https://huggingface.co/meta-models/Muse-Spark-Open-816B-A42B>
//!
//! ```text
//! x = unit(E[token])
//! h = gate₁(x, unit(Attention(Norm(x))))            per layer
//! y = gate₂(h, unit((1 + w) * FFN(Norm(h))))
//! logits = c tanh(m RMSNorm(y) · Whead / c)
//!
//! unit divides by the root mean square, Norm multiplies by 1 + w then
//! gate(x, b) = √(σ(-g/T) (1 + σ(g/T))) x + σ(g/T) b
//! Attention(x) = (unit(softmax(f q · kᵀ / √d) · (x Wv)) * sigmoid(x Wgate)) · Wo,      q = unit(x Wq), k = unit(x Wk)
//!   each head normalized alone; in three of four layers q and k are turned too, and see a window
//! FFN(x) = Σ pᵢ unit((1 + w) * SwiGLUᵢ(Norm(x Wpre))) · Wpost      in dense layers SwiGLU(x)
//!   the k largest sigmoid(m x Wr) + b; p their sigmoids, scaled to a sum of s
//! ```

mod feed_forward;

use feed_forward::{FeedForwardLayer, NarrowMoe, ScaledUnit};
use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize = 202_048,
        hidden_size: usize = 8192,
        intermediate_size: usize = 16_384,
        num_hidden_layers: usize = 62,
        num_attention_heads: usize = 128,
        num_key_value_heads: usize = 16,
        head_dim: usize = 64,
        attention_bias: bool = false,
        hidden_act: SiluOnly = SiluOnly,
        rms_norm_eps: f32 = 1e-5,
        post_norm_eps: f32 = 1e-8,
        qk_scale_factor: f32 = 5.473_006_5,
        sliding_window: usize = 2048,
        layer_types: Option<LayerTypes> = None,
        rope_theta: f32 = 500_000.0,
        rope_scaling: Option<RopeScaling> = None,
        // 0 for layers without.
        layer_rope_theta: Option<Vec<f32>> = None,
        residual_gate_temperature: f32 = 0.3,
        output_multiplier: f32 = 0.176_776_7,
        final_logit_softcapping: Option<f32> = Some(20.0),
        mlp_layer_types: Option<Vec<String>> = None,
        num_local_experts: usize = 256,
        num_experts_per_tok: usize where >= 1 = 8,
        moe_hidden_size: usize = 4096,
        moe_intermediate_size: usize = 4096,
        routed_scaling_factor: f32 = 1.0,
        tie_word_embeddings: Option<bool> = Some(false),
    }
}

/// Under the root of the gates' square of what is kept.
const GATE_EPS: f32 = 1e-3;

impl Config {
    /// Every fourth layer, counted from the last, sees all keys and knows no positions.
    fn is_global(&self, layer: usize) -> bool {
        (self.num_hidden_layers - 1 - layer).is_multiple_of(4)
    }

    fn turns(&self, layer: usize) -> bool {
        match &self.layer_rope_theta {
            Some(thetas) => thetas.get(layer).is_some_and(|&theta| theta != 0.0),
            None => !self.is_global(layer),
        }
    }
}

/// A layer's weights: as published, or as mlx-lm works them out beforehand.
struct Layers<'a> {
    c: &'a Config,
    w: &'a Weights,
    worked_out: bool,
}

impl Layers<'_> {
    /// The factors of a norm, stored as 1 less.
    fn gain(&self, name: &str) -> Source {
        let gain = self.w.source(name);
        if self.worked_out { gain } else { gain.plus(1.0) }
    }

    fn norm(&self, name: &str, dim: usize) -> RmsNorm {
        RmsNorm::of(self.gain(&format!("{name}.weight")), dim, self.c.rms_norm_eps)
    }

    fn gate(&self, published: &str, worked_out: &str) -> Gate {
        let numbers = |name: &str| self.w.tensor(name, &[self.c.hidden_size]);
        match self.worked_out {
            true => Gate::WorkedOut(["alpha", "beta"].map(|part| numbers(&format!("{worked_out}_{part}")))),
            false => Gate::Published(numbers(&format!("{published}.gate")), self.c.residual_gate_temperature),
        }
    }

    fn attention(&self, layer: usize) -> Result<Attention> {
        let (c, w) = (self.c, self.w.at("self_attn"));
        let (dim, heads, kv_heads, head_dim) =
            (c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim);
        let rope = c.turns(layer).then(|| w.rope(head_dim, c.rope_theta, &c.rope_scaling));
        let (attention, gate, rope) = match w.has("qkvg_proj.weight") {
            true => {
                let (q, kv) = (heads * head_dim, kv_heads * head_dim);
                let stored = w.source("qkvg_proj.weight");
                let [q_proj, k_proj, v_proj, gate] = [(0, q), (q, kv), (q + kv, kv), (q + 2 * kv, q)]
                    .map(|(start, rows)| Linear::of(stored.rows(start..start + rows), None, dim, rows));
                let o_proj = w.linear("o_proj", q, dim, false);
                // Rows of q and k are stored in the order of that rope.
                let rope = rope.map(Rope::interleaved);
                (SelfAttention::of([q_proj, k_proj, v_proj], o_proj, head_dim), gate, rope)
            }
            false => {
                let shape = Heads { dim, heads, kv_heads, head_dim };
                let gate = w.linear("gate_proj", dim, heads * head_dim, false);
                (SelfAttention::new(&w, shape, c.attention_bias, c.attention_bias), gate, rope)
            }
        };
        let slides = c.layer_types.as_ref().map_or(Ok(!c.is_global(layer)), |types| types.slides(layer))?;
        let unit = || RmsNorm::plain(head_dim, c.rms_norm_eps);
        let attention = attention
            .head_norms(unit(), unit())
            .rope(rope)
            .scale(c.qk_scale_factor / (head_dim as f32).sqrt())
            .window(slides.then_some(c.sliding_window));
        Ok(Attention { attention, gate, norm: unit(), head_dim })
    }

    fn ffn(&self, layer: usize) -> FeedForwardLayer {
        let (c, w) = (self.c, self.w.at("mlp"));
        let (dim, count, narrow) = (c.hidden_size, c.num_local_experts, c.moe_hidden_size);
        if c.mlp_layer_types.as_ref().and_then(|types| types.get(layer)).is_some_and(|kind| kind == "dense") {
            return FeedForwardLayer::Dense(GatedMlp::new(&w, dim, c.intermediate_size, false, Activation::Silu));
        }
        let router = Router::sigmoid(w.linear("gate", dim, count, false), c.num_experts_per_tok)
            .logit_scale(c.output_multiplier)
            .correction(w.tensor("gate.e_score_correction_bias", &[count]))
            .normalized(true, 1e-15)
            .scale(c.routed_scaling_factor);
        FeedForwardLayer::Sparse(NarrowMoe {
            router,
            pre_expert_proj: w.linear("pre_expert_proj", dim, narrow, false),
            pre_expert_norm: self.norm("mlp.pre_expert_norm", narrow),
            experts: w.experts(ExpertsShape::new(count, narrow, c.moe_intermediate_size)),
            post_expert_norm: ScaledUnit {
                gain: Parameter::of(self.gain("mlp.experts.post_expert_norm.weight"), &[narrow]),
                unit: RmsNorm::plain(narrow, c.post_norm_eps),
            },
            post_expert_proj: w.linear("post_expert_proj", narrow, dim, false),
            top_k: c.num_experts_per_tok,
        })
    }
}

/// What joins a branch and the stream, lane by lane.
enum Gate {
    /// g, and the temperature T.
    Published(Parameter, f32),
    /// What the stream is multiplied by, and the branch.
    WorkedOut([Parameter; 2]),
}

impl Gate {
    fn forward(&self, x: &Tensor, branch: &Tensor) -> Tensor {
        let [alpha, beta] = match self {
            Self::WorkedOut(factors) => factors.each_ref().map(Parameter::tensor),
            Self::Published(gate, temperature) => {
                let g = gate.tensor() / *temperature;
                let beta = g.sigmoid();
                [((-g).sigmoid() * (&beta + 1.0)).clamp(GATE_EPS, f32::MAX).sqrt(), beta]
            }
        };
        x * alpha + branch * beta
    }
}

struct Attention {
    attention: SelfAttention,
    gate: Linear,
    norm: RmsNorm,
    head_dim: usize,
}

impl Attention {
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let y = self.attention.attend(self.attention.project(x, layer), layer);
        let y = self.norm.forward(&y.split_heads(self.head_dim)).merge_heads();
        self.attention.output(&(y * self.gate.forward(x).sigmoid()))
    }
}

struct SparkBlock {
    input_layernorm: RmsNorm,
    attention: Attention,
    post_attention_layernorm: RmsNorm,
    attention_gate: Gate,
    pre_feedforward_layernorm: RmsNorm,
    ffn: FeedForwardLayer,
    post_feedforward_layernorm: ScaledUnit,
    ffn_gate: Gate,
}

impl SparkBlock {
    fn new(c: &Config, w: &Weights, layer: usize) -> Result<Self> {
        let layers = Layers { c, w, worked_out: w.has("add_attn_alpha") };
        let (dim, unit) = (c.hidden_size, || RmsNorm::plain(c.hidden_size, c.post_norm_eps));
        Ok(Self {
            input_layernorm: layers.norm("input_layernorm", dim),
            attention: layers.attention(layer)?,
            post_attention_layernorm: unit(),
            attention_gate: layers.gate("post_attention_residual_gate", "add_attn"),
            pre_feedforward_layernorm: layers.norm("pre_feedforward_layernorm", dim),
            ffn: layers.ffn(layer),
            post_feedforward_layernorm: ScaledUnit {
                gain: Parameter::of(layers.gain("post_feedforward_layernorm.weight"), &[dim]),
                unit: unit(),
            },
            ffn_gate: layers.gate("post_feedforward_residual_gate", "add_ffn"),
        })
    }
}

impl Mixer for SparkBlock {
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let attended = self.attention.forward(&self.input_layernorm.forward(x), layer);
        let h = self.attention_gate.forward(x, &self.post_attention_layernorm.forward(&attended));
        let seen = self.pre_feedforward_layernorm.forward(&h);
        self.ffn_gate.forward(&h, &self.post_feedforward_layernorm.forward(&self.ffn.forward(&seen)))
    }

    fn cache(&self) -> Cache {
        self.attention.attention.cache()
    }
}

struct MuseSpark {
    embed_norm: RmsNorm,
    decoder: Decoder<SparkBlock>,
}

impl Architecture for MuseSpark {
    const MODEL_TYPES: &'static [&'static str] = &["muse_spark"];
    type Config = Config;
    type Model = Self;

    fn new(c: Config, w: &Weights) -> Result<Self> {
        let decoder = Decoder::new(w, decoder_shape!(c), |w, layer| SparkBlock::new(&c, w, layer))?;
        Ok(Self {
            embed_norm: RmsNorm::plain(c.hidden_size, c.rms_norm_eps),
            decoder: decoder.logit_scale(c.output_multiplier).softcap(c.final_logit_softcapping),
        })
    }
}

impl Model for MuseSpark {
    fn caches(&self) -> Vec<Cache> {
        self.decoder.caches()
    }

    fn forward(&self, tokens: &Tensor, step: &mut Step) -> Tensor {
        let x = self.embed_norm.forward(&self.decoder.embed(tokens));
        self.decoder.forward_from(x, step, SparkBlock::forward)
    }

    fn head(&self, hidden: &Tensor) -> Tensor {
        self.decoder.head(hidden)
    }
}

export_plugin!(MuseSpark);
