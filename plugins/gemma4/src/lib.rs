//! Gemma 4, its language model: windows in most layers, larger heads in those that see everything, experts beside the dense feed-forward
//! layer or inputs for each layer in some sizes. <https://ai.google.dev/gemma/docs/core>
//!
//! ```text
//! x = E[token] · √dim
//! h = x + Norm(Attention(Norm(x)))                          per layer
//! f = GEGLU(Norm(h))
//!   or, with experts: f = Norm(GEGLU(Norm(h))) + Norm(Σ pᵢ GEGLUᵢ(Norm(h)))
//! g = h + Norm(f)
//! y = s · (g + Norm((gelu(g Wgate) * eₗ) Wproj))            eₗ: what this layer is told about the token; in some sizes, else y = s g
//! logits = cap(Norm(y) · Eᵀ)
//!
//! Attention(x) = softmax(rope(Norm(x Wq)) · rope(Norm(x Wk))ᵀ) · unit(x Wv) · Wo
//!   layers that see everything: fewer of their lanes turn, and in some sizes Wv = Wk; the last layers may use keys of earlier ones
//! p = cᵢ softmax(chosen (unit(h) * r / √dim) Wrouter)
//! ```

use plugin_api::{
    config::{Json, Read},
    prelude::*,
};

config! {
    struct Config {
        model_type: String,
        vocab_size: usize = 262_144,
        hidden_size: usize = 2304,
        intermediate_size: usize = 9216,
        num_hidden_layers: usize = 30,
        num_attention_heads: usize = 8,
        num_key_value_heads: usize = 4,
        head_dim: usize = 256,
        // In layers that see everything. Files that transformers 5 wrote say the same layer by layer.
        per_layer_config: Option<Exceptions> = None,
        global_head_dim: usize = 512,
        attention_k_eq_v: bool = false,
        num_global_key_value_heads: usize = num_key_value_heads,
        hidden_activation: Activation = Activation::GeluTanh,
        rms_norm_eps: f32 = 1e-6,
        attention_bias: bool = false,
        sliding_window: usize = if model_type.starts_with("gemma4_unified") { 1024 } else { 512 },
        layer_types: LayerTypes = LayerTypes::every(6, num_hidden_layers),
        num_kv_shared_layers: usize = 0,
        use_double_wide_mlp: bool = false,
        // Those of the two kinds of layers; the host has taken them apart into the keys below.
        rope_parameters: Option<RopeScaling> = None,
        rope_theta: f32 = 1_000_000.0,
        rope_local_base_freq: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = match rope_parameters {
            Some(_) => None,
            None => Some(RopeScaling::of("proportional", &[("partial_rotary_factor", 0.25)])),
        },
        enable_moe_block: bool = false,
        num_experts: usize = 0,
        top_k_experts: usize = 0,
        moe_intermediate_size: usize = 0,
        vocab_size_per_layer_input: usize = 262_144,
        hidden_size_per_layer_input: usize = if model_type.starts_with("gemma4_unified") { 0 } else { 256 },
        final_logit_softcapping: Option<f32> = None,
        tie_word_embeddings: Option<bool> = None,
        use_bidirectional_attention: Option<String> = None,
    }
}

/// `per_layer_config`: what some layers have instead, `{"5": {"head_dim": 512, "num_key_value_heads": 1}, ..}`.
struct Exceptions(Vec<(usize, Option<usize>, Option<usize>)>);

impl Read for Exceptions {
    const WHAT: &'static str = "an object of objects by layer, with head_dim or num_key_value_heads";
    fn read(json: &Json) -> Option<Self> {
        let number = |of: &Json, key: &str| of.get(key).filter(|n| !n.is_null()).map(usize::read);
        let layers = json.as_object()?.iter().map(|(layer, of)| {
            let [head_dim, kv_heads] = ["head_dim", "num_key_value_heads"].map(|key| number(of, key));
            // A key that is there has to be a number.
            let sure = |n: Option<Option<usize>>| n.map_or(Some(None), |n| n.map(Some));
            Some((layer.parse().ok()?, sure(head_dim)?, sure(kv_heads)?))
        });
        layers.collect::<Option<_>>().map(Self)
    }
}

impl Config {
    /// Lanes of a head, and key heads.
    fn heads(&self, layer: usize) -> Result<(usize, usize)> {
        let (usual, slides) = ((self.head_dim, self.num_key_value_heads), self.slides(layer)?);
        if let Some(Exceptions(layers)) = &self.per_layer_config {
            let other = layers.iter().find(|(i, ..)| *i == layer);
            return Ok(other.map_or(usual, |(_, d, kv)| (d.unwrap_or(usual.0), kv.unwrap_or(usual.1))));
        }
        Ok(match (slides, self.attention_k_eq_v) {
            (true, _) => usual,
            (false, true) => (self.global_head_dim, self.num_global_key_value_heads),
            (false, false) => (self.global_head_dim, self.num_key_value_heads),
        })
    }

    fn norm(&self, w: &Weights, name: &str) -> RmsNorm {
        w.rms_norm(name, self.hidden_size, self.rms_norm_eps)
    }

    /// The last layer always sees everything.
    fn slides(&self, layer: usize) -> Result<bool> {
        Ok(layer + 1 < self.num_hidden_layers && self.layer_types.slides(layer)?)
    }

    /// The layer whose keys and values this one looks at, where it has none.
    fn keys_of(&self, layer: usize) -> Result<Option<usize>> {
        let end = self.num_hidden_layers.saturating_sub(self.num_kv_shared_layers);
        if layer < end { Ok(None) } else { self.layer_types.last_like(layer, end).map(Some) }
    }

    fn attention(&self, w: &Weights, layer: usize) -> Result<SharingAttention> {
        let (dim, heads, slides) = (self.hidden_size, self.num_attention_heads, self.slides(layer)?);
        let (head_dim, kv_heads) = self.heads(layer)?;
        let rope = match slides {
            true => w.rope(head_dim, self.rope_local_base_freq, &None),
            false => w.rope(head_dim, self.rope_theta, &self.rope_scaling),
        };
        let k_eq_v = self.attention_k_eq_v && !slides;
        let (flags, shape) = ((self.attention_bias, k_eq_v), Heads { dim, heads, kv_heads, head_dim });
        let attention = SharingAttention::new(w, shape, flags, self.rms_norm_eps, rope, self.keys_of(layer)?);
        Ok(attention.window(slides.then_some(self.sliding_window)))
    }

    fn mlp(&self, w: &Weights, layer: usize) -> Result<GatedMlp> {
        let wide = self.use_double_wide_mlp && self.keys_of(layer)?.is_some();
        let hidden = self.intermediate_size * if wide { 2 } else { 1 };
        Ok(GatedMlp::new(w, self.hidden_size, hidden, false, self.hidden_activation))
    }
}

/// Experts, and the norms that take them and the dense layer apart.
struct Routed {
    norm: RmsNorm,
    router: Router,
    per_expert_scale: Parameter,
    experts: Experts,
    before: RmsNorm,
    after: RmsNorm,
    after_dense: RmsNorm,
}

impl Routed {
    fn new(c: &Config, w: &Weights) -> Self {
        let (dim, count, router) = (c.hidden_size, c.num_experts, w.at("router"));
        let scale = router.source("scale").times((dim as f32).powf(-0.5));
        Self {
            norm: RmsNorm::of(scale, dim, c.rms_norm_eps),
            router: Router::chosen_softmax(router.linear("proj", dim, count, false), c.top_k_experts),
            per_expert_scale: router.tensor("per_expert_scale", &[count]),
            experts: w.experts(ExpertsShape::new(count, dim, c.moe_intermediate_size).kind(ExpertKind::Geglu)),
            before: c.norm(w, "pre_feedforward_layernorm_2"),
            after: c.norm(w, "post_feedforward_layernorm_2"),
            after_dense: c.norm(w, "post_feedforward_layernorm_1"),
        }
    }

    fn forward(&self, h: &Tensor, dense: &Tensor) -> Tensor {
        let normed = self.norm.forward(h);
        let (chosen, weights) = self.router.forward(&normed);
        // The same scales for every token, to choose from.
        let scales = (normed.narrow(0, 1) * 0.0 + self.per_expert_scale.tensor()).gather(&chosen);
        let routed = self.experts.forward(&self.before.forward(h), &chosen, &(weights * scales));
        self.after_dense.forward(dense) + self.after.forward(&routed)
    }
}

struct Layers {
    input_layernorm: RmsNorm,
    self_attn: SharingAttention,
    post_attention_layernorm: RmsNorm,
    pre_feedforward_layernorm: RmsNorm,
    mlp: GatedMlp,
    routed: Option<Routed>,
    post_feedforward_layernorm: RmsNorm,
    input_gate: Option<PerLayerGate>,
    layer_scalar: Parameter,
}

impl Layers {
    fn new(c: &Config, w: &Weights, layer: usize) -> Result<Self> {
        let (width, eps) = (c.hidden_size_per_layer_input, c.rms_norm_eps);
        Ok(Self {
            input_layernorm: c.norm(w, "input_layernorm"),
            self_attn: c.attention(&w.at("self_attn"), layer)?,
            post_attention_layernorm: c.norm(w, "post_attention_layernorm"),
            pre_feedforward_layernorm: c.norm(w, "pre_feedforward_layernorm"),
            mlp: c.mlp(&w.at("mlp"), layer)?,
            routed: c.enable_moe_block.then(|| Routed::new(c, w)),
            post_feedforward_layernorm: c.norm(w, "post_feedforward_layernorm"),
            input_gate: (width > 0).then(|| PerLayerGate::new(w, c.hidden_size, width, eps, c.hidden_activation)),
            layer_scalar: w.tensor("layer_scalar", &[1]),
        })
    }

    fn forward(&self, x: &Tensor, input: Option<&Tensor>, layer: &mut Layer) -> Tensor {
        let attended = self.self_attn.forward(&self.input_layernorm.forward(x), layer);
        let h = x + self.post_attention_layernorm.forward(&attended);
        let dense = self.mlp.forward(&self.pre_feedforward_layernorm.forward(&h));
        let fed = self.routed.as_ref().map_or_else(|| dense.clone(), |routed| routed.forward(&h, &dense));
        let g = h + self.post_feedforward_layernorm.forward(&fed);
        let y = match (&self.input_gate, input) {
            (Some(gate), Some(input)) => &g + gate.forward(&g, input),
            _ => g,
        };
        y * self.layer_scalar.tensor()
    }
}

struct Gemma4 {
    decoder: Decoder<Layers>,
    per_layer_inputs: Option<PerLayerInputs>,
}

impl Architecture for Gemma4 {
    const MODEL_TYPES: &'static [&'static str] = &["gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"];
    type Config = Config;
    type Model = Self;

    fn new(c: Config, w: &Weights) -> Result<Self> {
        if c.use_bidirectional_attention.as_deref() == Some("all") {
            return Err("config.json: use_bidirectional_attention makes an encoder, which generates no text".into());
        }
        let inputs = PerLayerShape {
            vocab: c.vocab_size_per_layer_input,
            layers: c.num_hidden_layers,
            dim: c.hidden_size,
            width: c.hidden_size_per_layer_input,
            eps: c.rms_norm_eps,
        };
        Ok(Self {
            decoder: Decoder::new(w, decoder_shape!(c), |w, layer| Layers::new(&c, w, layer))?
                .embed_scale((c.hidden_size as f32).sqrt())
                .softcap(c.final_logit_softcapping),
            per_layer_inputs: (inputs.width > 0).then(|| PerLayerInputs::new(&w.at("model"), inputs)),
        })
    }
}

impl Model for Gemma4 {
    fn caches(&self) -> Vec<Cache> {
        self.decoder.layers.iter().map(|block| block.self_attn.cache()).collect()
    }

    fn forward(&self, tokens: &Tensor, step: &mut Step) -> Tensor {
        let mut x = self.decoder.embed(tokens);
        let inputs = self.per_layer_inputs.as_ref().map(|inputs| inputs.forward(tokens, &x, step));
        for (i, (block, mut layer)) in self.decoder.layers.iter().zip(step.layers()).enumerate() {
            x = block.forward(&x, inputs.as_ref().map(|inputs| &inputs[i]), &mut layer);
        }
        self.decoder.norm.forward(&x)
    }

    fn head(&self, hidden: &Tensor) -> Tensor {
        self.decoder.head(hidden)
    }
}

export_plugin!(Gemma4, examples = ["../../tests/fixtures/tiny/gemma4/config.json"]);
