//! Qwen3 with routed experts in place of most or all feed-forward layers. <https://arxiv.org/abs/2505.09388>
//!
//! ```text
//! h = x + Attention(RMSNorm(x))            per layer
//! y = h + MoE(RMSNorm(h))
//! logits = RMSNorm(y) · Eᵀ
//!
//! Attention(x) = softmax(q · kᵀ / √d) · (x Wv) · Wo
//!   q = rope(RMSNorm(x Wq)), k = rope(RMSNorm(x Wk))      each head normalized alone
//!
//! MoE(x) = Σ pᵢ SwiGLUᵢ(x)     over the k largest pᵢ of softmax(x Wgate), which may be scaled to a sum of 1
//!          in dense layers: SwiGLU(x)
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
        hidden_act: Activation = Activation::Silu,
        rms_norm_eps: f32 = 1e-6,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        // All layers slide, or none.
        use_sliding_window: bool = false,
        sliding_window: Option<usize> = Some(4096),
        moe_intermediate_size: usize,
        // transformers 5 writes the first name, everyone before it the second.
        num_local_experts: Option<usize> = None,
        num_experts: usize = num_local_experts.unwrap_or(128),
        num_experts_per_tok: usize where >= 1 = 8,
        norm_topk_prob: bool = false,
        decoder_sparse_step: usize where >= 1 = 1,
        mlp_only_layers: Vec<usize> = vec![],
        attention_bias: bool = false,
        tie_word_embeddings: Option<bool> = None,
    }
}

impl Config {
    fn is_sparse(&self, layer: usize) -> bool {
        self.num_experts > 0
            && (layer + 1).is_multiple_of(self.decoder_sparse_step)
            && !self.mlp_only_layers.contains(&layer)
    }
}

struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    q_norm: RmsNorm,
    k_norm: RmsNorm,
    rope: Rope,
    head_dim: usize,
    window: Option<usize>,
}

impl Attention {
    fn new(c: &Config, w: &Weights) -> Self {
        let (q_dim, kv_dim) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
        let projections = [("q_proj", q_dim), ("k_proj", kv_dim), ("v_proj", kv_dim)];
        let [q_proj, k_proj, v_proj] = w.linears(c.hidden_size, c.attention_bias, projections);
        Self {
            q_proj,
            k_proj,
            v_proj,
            o_proj: w.linear("o_proj", q_dim, c.hidden_size, c.attention_bias),
            q_norm: w.rms_norm("q_norm", c.head_dim, c.rms_norm_eps),
            k_norm: w.rms_norm("k_norm", c.head_dim, c.rms_norm_eps),
            rope: w.rope(c.head_dim, c.rope_theta, &c.rope_scaling),
            head_dim: c.head_dim,
            window: c.sliding_window.filter(|_| c.use_sliding_window),
        }
    }

    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let q = self.q_proj.forward(x).split_heads(self.head_dim);
        let k = self.k_proj.forward(x).split_heads(self.head_dim);
        let v = self.v_proj.forward(x).split_heads(self.head_dim);

        let q = layer.rotate(&self.rope, self.q_norm.forward(&q));
        let k = layer.rotate(&self.rope, self.k_norm.forward(&k));
        let scale = (self.head_dim as f32).powf(-0.5);
        let y = layer.attend(q, k, v, &Attend { scale, window: self.window, ..Default::default() });
        self.o_proj.forward(&y.merge_heads())
    }
}

/// Each token goes to the experts that the router finds most probable.
struct Sparse {
    gate: Linear,
    experts: Experts,
    num_experts_per_tok: usize,
    norm_topk_prob: bool,
}

impl Sparse {
    fn new(c: &Config, w: &Weights) -> Self {
        Self {
            gate: w.linear("gate", c.hidden_size, c.num_experts, false),
            experts: w.experts(ExpertsShape::new(c.num_experts, c.hidden_size, c.moe_intermediate_size)),
            num_experts_per_tok: c.num_experts_per_tok,
            norm_topk_prob: c.norm_topk_prob,
        }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let (p, chosen) = self.gate.forward(x).softmax().topk(self.num_experts_per_tok);
        let p = if self.norm_topk_prob { &p / p.sum() } else { p };
        self.experts.forward(x, &chosen, &p)
    }
}

enum Mlp {
    Dense(GatedMlp),
    Sparse(Sparse),
}

impl Mlp {
    fn new(c: &Config, w: &Weights, layer: usize) -> Self {
        if c.is_sparse(layer) {
            return Self::Sparse(Sparse::new(c, w));
        }
        Self::Dense(GatedMlp::new(w, c.hidden_size, c.intermediate_size, false, c.hidden_act))
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        match self {
            Self::Dense(mlp) => mlp.forward(x),
            Self::Sparse(moe) => moe.forward(x),
        }
    }
}

struct Block {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    mlp: Mlp,
}

impl Block {
    fn new(c: &Config, w: &Weights, layer: usize) -> Self {
        let norm = |name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps);
        Self {
            input_layernorm: norm("input_layernorm"),
            self_attn: Attention::new(c, &w.at("self_attn")),
            post_attention_layernorm: norm("post_attention_layernorm"),
            mlp: Mlp::new(c, &w.at("mlp"), layer),
        }
    }

    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let h = x + self.self_attn.forward(&self.input_layernorm.forward(x), layer);
        &h + self.mlp.forward(&self.post_attention_layernorm.forward(&h))
    }
}

struct Qwen3Moe {
    embed_tokens: Embedding,
    layers: Vec<Block>,
    norm: RmsNorm,
    lm_head: LmHead,
}

impl Architecture for Qwen3Moe {
    const MODEL_TYPES: &'static [&'static str] = &["qwen3_moe"];
    type Config = Config;

    fn new(c: Config, w: &Weights) -> Result<Self> {
        if c.hidden_act != Activation::Silu {
            return Err("config.json: hidden_act of qwen3_moe should be silu, the experts know no other".into());
        }
        let model = w.at("model");
        let embed_tokens = model.embedding("embed_tokens", c.vocab_size, c.hidden_size);
        Ok(Self {
            layers: model.at("layers").each(c.num_hidden_layers, |w, i| Ok(Block::new(&c, w, i)))?,
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

export_plugin!(Qwen3Moe);
