//! Gemma 3, its language model: most layers see a window, every sixth sees all. <https://arxiv.org/abs/2503.19786>
//!
//! ```text
//! x = E[token] · √dim
//! h = x + Norm(Attention(Norm(x)))         per layer, a norm on either side
//! y = h + Norm(GEGLU(Norm(h)))
//! logits = Norm(y) · Eᵀ
//!
//! Norm(x) = x / rms(x) * (1 + w)
//! Attention(x) = softmax(q · kᵀ / √s) · (x Wv) · Wo
//!   q = rope(Norm(x Wq)), k = rope(Norm(x Wk))      each head normalized alone; local and global layers turn by other angles
//! GEGLU(x) = (gelu(x Wgate) * (x Wup)) · Wdown
//! ```

use plugin_api::prelude::*;

config! {
    /// The config inside of a multimodal gemma3 leaves out what equals these defaults, which are transformers'.
    struct Config {
        vocab_size: usize = 262_208,
        hidden_size: usize = 2304,
        intermediate_size: usize = 9216,
        num_hidden_layers: usize = 26,
        num_attention_heads: usize = 8,
        num_key_value_heads: usize = 4,
        head_dim: usize = 256,
        hidden_activation: Activation = Activation::GeluTanh,
        rms_norm_eps: f32 = 1e-6,
        query_pre_attn_scalar: f32 = 256.0,
        attention_bias: bool = false,
        sliding_window: usize = 4096,
        sliding_window_pattern: usize where >= 1 = 6,
        layer_types: Option<LayerTypes> = None,
        rope_theta: f32 = 1_000_000.0,
        rope_local_base_freq: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        final_logit_softcapping: Option<f32> = None,
        tie_word_embeddings: Option<bool> = None,
        use_bidirectional_attention: bool = false,
    }
}

impl Config {
    fn slides(&self, layer: usize) -> Result<bool> {
        match &self.layer_types {
            Some(types) => types.slides(layer),
            None => Ok(!(layer + 1).is_multiple_of(self.sliding_window_pattern)),
        }
    }
}

/// Checkpoints store w of `1 + w`.
fn norm(w: &Weights, name: &str, dim: usize, eps: f32) -> RmsNorm {
    RmsNorm::of(w.source(&format!("{name}.weight")).plus(1.0), dim, eps)
}

struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    q_norm: RmsNorm,
    k_norm: RmsNorm,
    rope: Rope,
    scale: f32,
    head_dim: usize,
    window: Option<usize>,
}

impl Attention {
    fn new(c: &Config, w: &Weights, layer: usize) -> Result<Self> {
        let (q_dim, kv_dim) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
        let projections = [("q_proj", q_dim), ("k_proj", kv_dim), ("v_proj", kv_dim)];
        let [q_proj, k_proj, v_proj] = w.linears(c.hidden_size, c.attention_bias, projections);
        let local = c.slides(layer)?;
        Ok(Self {
            q_proj,
            k_proj,
            v_proj,
            o_proj: w.linear("o_proj", q_dim, c.hidden_size, c.attention_bias),
            q_norm: norm(w, "q_norm", c.head_dim, c.rms_norm_eps),
            k_norm: norm(w, "k_norm", c.head_dim, c.rms_norm_eps),
            rope: match local {
                true => w.rope(c.head_dim, c.rope_local_base_freq, &None),
                false => w.rope(c.head_dim, c.rope_theta, &c.rope_scaling),
            },
            scale: c.query_pre_attn_scalar.powf(-0.5),
            head_dim: c.head_dim,
            window: local.then_some(c.sliding_window),
        })
    }

    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let q = self.q_proj.forward(x).split_heads(self.head_dim);
        let k = self.k_proj.forward(x).split_heads(self.head_dim);
        let v = self.v_proj.forward(x).split_heads(self.head_dim);

        let q = layer.rotate(&self.rope, self.q_norm.forward(&q));
        let k = layer.rotate(&self.rope, self.k_norm.forward(&k));
        let y = layer.attend(q, k, v, &Attend { scale: self.scale, window: self.window, ..Default::default() });
        self.o_proj.forward(&y.merge_heads())
    }
}

struct Block {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    pre_feedforward_layernorm: RmsNorm,
    mlp: GatedMlp,
    post_feedforward_layernorm: RmsNorm,
}

impl Block {
    fn new(c: &Config, w: &Weights, layer: usize) -> Result<Self> {
        let norm = |name| norm(w, name, c.hidden_size, c.rms_norm_eps);
        Ok(Self {
            input_layernorm: norm("input_layernorm"),
            self_attn: Attention::new(c, &w.at("self_attn"), layer)?,
            post_attention_layernorm: norm("post_attention_layernorm"),
            pre_feedforward_layernorm: norm("pre_feedforward_layernorm"),
            mlp: GatedMlp::new(&w.at("mlp"), c.hidden_size, c.intermediate_size, false, c.hidden_activation),
            post_feedforward_layernorm: norm("post_feedforward_layernorm"),
        })
    }

    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let attended = self.self_attn.forward(&self.input_layernorm.forward(x), layer);
        let h = x + self.post_attention_layernorm.forward(&attended);
        let fed = self.mlp.forward(&self.pre_feedforward_layernorm.forward(&h));
        &h + self.post_feedforward_layernorm.forward(&fed)
    }
}

struct Gemma3 {
    embed_tokens: Embedding,
    layers: Vec<Block>,
    norm: RmsNorm,
    lm_head: LmHead,
    embed_scale: f32,
    softcap: Option<f32>,
}

impl Architecture for Gemma3 {
    const MODEL_TYPES: &'static [&'static str] = &["gemma3", "gemma3_text"];
    type Config = Config;

    fn new(c: Config, w: &Weights) -> Result<Self> {
        if c.use_bidirectional_attention {
            return Err(
                "config.json: use_bidirectional_attention makes an embedding model, which generates no text".into()
            );
        }
        let model = w.at("model");
        let embed_tokens = model.embedding("embed_tokens", c.vocab_size, c.hidden_size);
        Ok(Self {
            layers: model.at("layers").each(c.num_hidden_layers, |w, i| Block::new(&c, w, i))?,
            norm: norm(&model, "norm", c.hidden_size, c.rms_norm_eps),
            lm_head: LmHead::new(w, &embed_tokens, c.vocab_size, c.hidden_size, c.tie_word_embeddings),
            embed_tokens,
            embed_scale: (c.hidden_size as f32).sqrt(),
            softcap: c.final_logit_softcapping,
        })
    }

    fn caches(&self) -> Vec<Cache> {
        self.layers.iter().map(|block| Cache::key_value(block.self_attn.window)).collect()
    }

    fn forward(&self, tokens: &Tensor, step: &mut Step) -> Tensor {
        let embedded = self.embed_tokens.forward(tokens) * self.embed_scale;
        let h = step.through(&self.layers, embedded, Block::forward);
        self.norm.forward(&h)
    }

    fn head(&self, hidden: &Tensor) -> Tensor {
        let logits = self.lm_head.forward(hidden);
        match self.softcap {
            Some(cap) => (logits / cap).tanh() * cap,
            None => logits,
        }
    }
}

export_plugin!(Gemma3);
