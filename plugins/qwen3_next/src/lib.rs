//! Qwen3-Next and Qwen3.5: three layers of the gated delta rule to one of gated attention, dense or with routed experts.
//! <https://arxiv.org/abs/2412.06464>, <https://arxiv.org/abs/2505.06708>
//!
//! ```text
//! h = x + Mixer(RMSNorm(x))                per layer
//! y = h + FFN(RMSNorm(h))
//! logits = RMSNorm(y) · Eᵀ
//!
//! GatedDelta(x):  q, k, v = split(silu(conv(x Wqkv)))
//!   S = exp(g) S,  S += k (β (v - kᵀ S))ᵀ,  o = qᵀ S         q and k of length 1, q / √d
//!   g = -exp(A_log) softplus(x Wa + dt_bias),  β = sigmoid(x Wb)
//!   (RMSNorm(o) * silu(x Wz)) · Wo
//! Attention(x) = (softmax(q · kᵀ / √d) · (x Wv) * sigmoid(x Wgate)) · Wo
//!   q = rope(RMSNorm(x Wq)), k = rope(RMSNorm(x Wk))
//! FFN(x) = SwiGLU(x), or Σ pᵢ SwiGLUᵢ(x) + sigmoid(x w) SwiGLU(x) over the k largest of p = softmax(x Wr)
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize,
        hidden_size: usize,
        intermediate_size: usize = 0,
        num_hidden_layers: usize,
        num_attention_heads: usize where >= 1,
        num_key_value_heads: usize = num_attention_heads,
        head_dim: usize = 256,
        hidden_act: Activation = Activation::Silu,
        rms_norm_eps: f32 = 1e-6,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        partial_rotary_factor: f32 = 0.25,
        attention_bias: bool = false,
        layer_types: Option<Vec<String>> = None,
        full_attention_interval: usize where >= 1 = 4,
        linear_conv_kernel_dim: usize where >= 1 = 4,
        linear_key_head_dim: usize where >= 1 = 128,
        linear_value_head_dim: usize where >= 1 = 128,
        linear_num_key_heads: usize where >= 1 = 16,
        linear_num_value_heads: usize where >= 1 = 32,
        // Qwen3.5 without experts has none of these.
        num_experts: usize = 0,
        num_experts_per_tok: usize = 8,
        moe_intermediate_size: usize = 512,
        shared_expert_intermediate_size: usize = 512,
        norm_topk_prob: bool = true,
        decoder_sparse_step: usize where >= 1 = 1,
        mlp_only_layers: Vec<usize> = vec![],
        tie_word_embeddings: Option<bool> = None,
    }
}

impl Config {
    fn is_full(&self, layer: usize) -> Result<bool> {
        let Some(types) = &self.layer_types else {
            return Ok((layer + 1).is_multiple_of(self.full_attention_interval));
        };
        match types.get(layer).map(String::as_str) {
            Some("full_attention") => Ok(true),
            Some("linear_attention") => Ok(false),
            other => Err(format!("config.json: layer_types has {other:?} for layer {layer}, it should be full_attention or linear_attention").into()),
        }
    }

    fn is_sparse(&self, layer: usize) -> bool {
        let due = (layer + 1).is_multiple_of(self.decoder_sparse_step);
        self.num_experts > 0 && due && !self.mlp_only_layers.contains(&layer)
    }

    fn delta_shape(&self) -> DeltaShape {
        DeltaShape {
            k_heads: self.linear_num_key_heads,
            d: self.linear_key_head_dim,
            heads: self.linear_num_value_heads,
            e: self.linear_value_head_dim,
            kernel: self.linear_conv_kernel_dim,
        }
    }

    /// Hugging Face's norms multiply by 1 + w, converted ones store that sum; the conversion shows in the shape of the convolutions.
    fn is_converted(&self, w: &Weights) -> bool {
        let conv = [self.delta_shape().channels(), self.linear_conv_kernel_dim, 1];
        let name = |layer| format!("model.layers.{layer}.linear_attn.conv1d.weight");
        (0..self.num_hidden_layers.min(100)).any(|layer| w.has_shape(&name(layer), &conv))
    }
}

/// The projections of a gated delta layer: Qwen3-Next's are two matrices, sorted by key head, Qwen3.5's four.
enum Projections {
    Sorted { in_proj_qkvz: Linear, in_proj_ba: Linear, shape: DeltaShape },
    Apart([Linear; 4]),
}

impl Projections {
    fn new(dim: usize, s: DeltaShape, w: &Weights) -> Self {
        if w.has("in_proj_qkvz.weight") {
            return Self::Sorted {
                in_proj_qkvz: w.linear("in_proj_qkvz", dim, s.channels() + s.value_dim(), false),
                in_proj_ba: w.linear("in_proj_ba", dim, 2 * s.heads, false),
                shape: s,
            };
        }
        let (qkv, z) = (("in_proj_qkv", s.channels()), ("in_proj_z", s.value_dim()));
        Self::Apart(w.linears(dim, false, [qkv, z, ("in_proj_b", s.heads), ("in_proj_a", s.heads)]))
    }

    /// x `[tokens, dim]` -> qkv `[tokens, channels]`, z `[tokens, value_dim]`, b and a `[tokens, heads]`.
    fn forward(&self, x: &Tensor) -> [Tensor; 4] {
        match self {
            Self::Apart(projections) => projections.each_ref().map(|proj| proj.forward(x)),
            Self::Sorted { in_proj_qkvz, in_proj_ba, shape: DeltaShape { k_heads, d, heads, e, .. } } => {
                let (shared, e) = (heads / k_heads, heads / k_heads * e);
                let qkvz = in_proj_qkvz.forward(x).unflatten(*k_heads);
                let ba = in_proj_ba.forward(x).unflatten(*k_heads);
                let part = |start, len| qkvz.narrow(start, len).flatten();
                let qkv = Tensor::concat(&[&part(0, *d), &part(*d, *d), &part(2 * d, e)]);
                [qkv, part(2 * d + e, e), ba.narrow(0, shared).flatten(), ba.narrow(shared, shared).flatten()]
            }
        }
    }
}

struct GatedDelta {
    projections: Projections,
    rule: DeltaRule,
    a_log: Parameter,
    dt_bias: Parameter,
    norm: RmsNorm,
    out_proj: Linear,
}

impl GatedDelta {
    fn new(c: &Config, w: &Weights) -> Self {
        let (s, dim) = (c.delta_shape(), c.hidden_size);
        Self {
            projections: Projections::new(dim, s, w),
            rule: DeltaRule::new(w, "conv1d", s),
            a_log: w.tensor("A_log", &[s.heads]),
            dt_bias: w.tensor("dt_bias", &[s.heads]),
            norm: w.rms_norm("norm", s.e, c.rms_norm_eps),
            out_proj: w.linear("out_proj", s.value_dim(), dim, false),
        }
    }
}

impl Mixer for GatedDelta {
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let [qkv, z, b, a] = self.projections.forward(x);
        let g = -(self.a_log.tensor().exp() * (a + self.dt_bias.tensor()).softplus());
        let o = self.norm.forward(&self.rule.forward(&qkv, &g, &b.sigmoid(), layer));
        self.out_proj.forward(&z.swiglu(&o.merge_heads()))
    }

    fn cache(&self) -> Cache {
        self.rule.cache()
    }
}

/// Attention whose query projection also gives a gate for each lane of the output, head by head.
struct GatedAttention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    q_norm: RmsNorm,
    k_norm: RmsNorm,
    rope: Rope,
    head_dim: usize,
}

impl GatedAttention {
    fn new(c: &Config, w: &Weights, norm: impl Fn(&Weights, &str, usize) -> RmsNorm) -> Self {
        let (q, kv) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
        let named = [("q_proj", 2 * q), ("k_proj", kv), ("v_proj", kv)];
        let [q_proj, k_proj, v_proj] = w.linears(c.hidden_size, c.attention_bias, named);
        let turned = (c.head_dim as f32 * c.partial_rotary_factor) as usize;
        Self {
            q_proj,
            k_proj,
            v_proj,
            o_proj: w.linear("o_proj", q, c.hidden_size, c.attention_bias),
            q_norm: norm(w, "q_norm", c.head_dim),
            k_norm: norm(w, "k_norm", c.head_dim),
            rope: w.rope(turned, c.rope_theta, &c.rope_scaling),
            head_dim: c.head_dim,
        }
    }
}

impl Mixer for GatedAttention {
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let d = self.head_dim;
        let q_and_gate = self.q_proj.forward(x).split_heads(2 * d);
        let k = self.k_proj.forward(x).split_heads(d);
        let v = self.v_proj.forward(x).split_heads(d);

        let q = layer.rotate(&self.rope, self.q_norm.forward(&q_and_gate.narrow(0, d)));
        let k = layer.rotate(&self.rope, self.k_norm.forward(&k));
        let y = layer.attend(q, k, v, &Attend { scale: (d as f32).powf(-0.5), ..Default::default() });
        self.o_proj.forward(&(y * q_and_gate.narrow(d, d).sigmoid()).merge_heads())
    }

    fn cache(&self) -> Cache {
        Cache::key_value(None)
    }
}

fn ffn(c: &Config, w: &Weights, layer: usize) -> Ffn {
    let mlp = |w: Weights, hidden| GatedMlp::new(&w, c.hidden_size, hidden, false, c.hidden_act);
    if !c.is_sparse(layer) {
        return Ffn::Dense(mlp(w.clone(), c.intermediate_size));
    }
    let gate = w.linear("gate", c.hidden_size, c.num_experts, false);
    let experts = w.experts(ExpertsShape::new(c.num_experts, c.hidden_size, c.moe_intermediate_size));
    let shared = mlp(w.at("shared_expert"), c.shared_expert_intermediate_size);
    let router = Router::softmax(gate, c.num_experts_per_tok).normalized(c.norm_topk_prob, 0.0);
    let shared_gate = w.linear("shared_expert_gate", c.hidden_size, 1, false);
    Ffn::Sparse(Moe::new(router, experts).shared(shared).shared_gate(shared_gate))
}

struct Qwen3Next;

impl Architecture for Qwen3Next {
    const MODEL_TYPES: &'static [&'static str] =
        &["qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text"];
    type Config = Config;
    type Model = Decoder<Block<AnyMixer, Ffn>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        if c.num_experts > 0 && c.hidden_act != Activation::Silu {
            return Err("config.json: hidden_act should be silu, the experts know no other".into());
        }
        w.ignore("mtp.");
        let offset = if c.is_converted(w) { 0.0 } else { 1.0 };
        let norm = |w: &Weights, name: &str, dim| {
            RmsNorm::of(w.source(&format!("{name}.weight")).plus(offset), dim, c.rms_norm_eps)
        };
        let model = w.at("model");
        let layers = model.at("layers").each(c.num_hidden_layers, |w, i| {
            let mixer: AnyMixer = match c.is_full(i)? {
                true => Box::new(GatedAttention::new(&c, &w.at("self_attn"), norm)),
                false => Box::new(GatedDelta::new(&c, &w.at("linear_attn"))),
            };
            let norms = ["input_layernorm", "post_attention_layernorm"].map(|name| norm(w, name, c.hidden_size));
            Ok(Block::pre_norm(norms, mixer, ffn(&c, &w.at("mlp"), i)))
        })?;
        let embed_tokens = model.embedding("embed_tokens", c.vocab_size, c.hidden_size);
        let lm_head = LmHead::new(w, &embed_tokens, c.vocab_size, c.hidden_size, c.tie_word_embeddings);
        Ok(Decoder::of(embed_tokens, layers, norm(&model, "norm", c.hidden_size), lm_head))
    }
}

export_plugin!(Qwen3Next, examples = ["../../tests/fixtures/tiny/qwen3_next/config.json"]);
