//! LLaMA and its family: Llama 1 to 3, Mistral, and whatever else calls itself llama. <https://arxiv.org/abs/2302.13971>
//!
//! ```text
//! h = x + Attention(RMSNorm(x))            per layer
//! y = h + SwiGLU(RMSNorm(h))
//! logits = RMSNorm(y) · Eᵀ
//!
//! Attention(x) = softmax(rope(x Wq) · rope(x Wk)ᵀ / √d) · (x Wv) · Wo
//! SwiGLU(x) = (silu(x Wgate) * (x Wup)) · Wdown
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize,
        hidden_size: usize,
        intermediate_size: usize,
        num_hidden_layers: usize,
        num_attention_heads: usize where >= 1,
        num_key_value_heads: usize = num_attention_heads,
        head_dim: usize = hidden_size / num_attention_heads,
        rms_norm_eps: f32,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        rope_traditional: bool = false,
        // Mistral states one window for all layers, MLX's llama a type for each.
        sliding_window: Option<usize> = None,
        layer_types: Option<LayerTypes> = None,
        model_type: String = "llama".into(),
        hidden_act: Activation = Activation::Silu,
        attention_bias: bool = false,
        mlp_bias: bool = false,
        tie_word_embeddings: Option<bool> = None,
    }
}

impl Config {
    fn window(&self, layer: usize) -> Result<Option<usize>> {
        let slides = match &self.layer_types {
            Some(types) => types.slides(layer)?,
            None => self.model_type == "mistral",
        };
        Ok(self.sliding_window.filter(|_| slides))
    }
}

struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    rope: Rope,
    head_dim: usize,
    window: Option<usize>,
}

impl Attention {
    fn new(c: &Config, w: &Weights, layer: usize) -> Result<Self> {
        let (q_dim, kv_dim) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
        let projections = [("q_proj", q_dim), ("k_proj", kv_dim), ("v_proj", kv_dim)];
        let [q_proj, k_proj, v_proj] = w.linears(c.hidden_size, c.attention_bias, projections);
        let rope = w.rope(c.head_dim, c.rope_theta, &c.rope_scaling);
        Ok(Self {
            q_proj,
            k_proj,
            v_proj,
            o_proj: w.linear("o_proj", q_dim, c.hidden_size, c.attention_bias),
            rope: if c.rope_traditional { rope.interleaved() } else { rope },
            head_dim: c.head_dim,
            window: c.window(layer)?,
        })
    }

    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let q = self.q_proj.forward(x).split_heads(self.head_dim);
        let k = self.k_proj.forward(x).split_heads(self.head_dim);
        let v = self.v_proj.forward(x).split_heads(self.head_dim);

        let (q, k) = (layer.rotate(&self.rope, q), layer.rotate(&self.rope, k));
        let scale = (self.head_dim as f32).powf(-0.5);
        let y = layer.attend(q, k, v, &Attend { scale, window: self.window, ..Default::default() });
        self.o_proj.forward(&y.merge_heads())
    }
}

struct Block {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    mlp: GatedMlp,
}

impl Block {
    fn new(c: &Config, w: &Weights, layer: usize) -> Result<Self> {
        let norm = |name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps);
        Ok(Self {
            input_layernorm: norm("input_layernorm"),
            self_attn: Attention::new(c, &w.at("self_attn"), layer)?,
            post_attention_layernorm: norm("post_attention_layernorm"),
            mlp: GatedMlp::new(&w.at("mlp"), c.hidden_size, c.intermediate_size, c.mlp_bias, c.hidden_act),
        })
    }

    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let h = x + self.self_attn.forward(&self.input_layernorm.forward(x), layer);
        &h + self.mlp.forward(&self.post_attention_layernorm.forward(&h))
    }
}

struct Llama {
    embed_tokens: Embedding,
    layers: Vec<Block>,
    norm: RmsNorm,
    lm_head: LmHead,
}

impl Architecture for Llama {
    const MODEL_TYPES: &'static [&'static str] = &["llama", "mistral"];
    type Config = Config;

    fn new(c: Config, w: &Weights) -> Result<Self> {
        let model = w.at("model");
        let embed_tokens = model.embedding("embed_tokens", c.vocab_size, c.hidden_size);
        Ok(Self {
            layers: model.at("layers").each(c.num_hidden_layers, |w, i| Block::new(&c, w, i))?,
            norm: model.rms_norm("norm", c.hidden_size, c.rms_norm_eps),
            lm_head: LmHead::new(w, &embed_tokens, c.vocab_size, c.hidden_size, c.tie_word_embeddings),
            embed_tokens,
        })
    }

    fn caches(&self) -> Vec<Cache> {
        self.layers.iter().map(|block| Cache::key_value(block.self_attn.window)).collect()
    }

    fn forward(&self, tokens: &Tensor, step: &mut Step) -> Tensor {
        let h = step.through(&self.layers, self.embed_tokens.forward(tokens), Block::forward);
        self.norm.forward(&h)
    }

    fn head(&self, hidden: &Tensor) -> Tensor {
        self.lm_head.forward(hidden)
    }
}

export_plugin!(Llama);
