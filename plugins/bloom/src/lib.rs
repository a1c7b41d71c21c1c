//! BLOOM: positions by linear biases alone, and a norm on the embeddings. <https://arxiv.org/abs/2211.05100>
//!
//! ```text
//! x = LayerNorm(E[token])
//! h = x + Attention(LayerNorm(x))                      per layer
//! y = h + gelu(LayerNorm(h) W₁ + b₁) · W₂ + b₂
//! logits = LayerNorm(y) · Eᵀ
//!
//! Attention(x) = softmax(q · kᵀ / √d - m · distance) · v · Wo + bo      q, k, v: head by head in x Wqkv + b; m by head
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize,
        n_embed: Option<usize> = None,
        hidden_size: usize = n_embed.unwrap_or(64),
        num_hidden_layers: Option<usize> = None,
        n_layer: usize = num_hidden_layers.unwrap_or(2),
        num_attention_heads: Option<usize> = None,
        n_head: usize where >= 1 = num_attention_heads.unwrap_or(8),
        layer_norm_epsilon: f32 = 1e-5,
        apply_residual_connection_post_layernorm: bool = false,
        tie_word_embeddings: Option<bool> = Some(true),
    }
}

struct BloomBlock {
    norms: [LayerNorm; 2],
    attention: SelfAttention,
    mlp: Mlp,
    /// What a branch is added to is its normalized input.
    from_norm: bool,
}

impl BloomBlock {
    fn new(c: &Config, w: &Weights) -> Self {
        let (dim, heads, attn) = (c.hidden_size, c.n_head, w.at("self_attention"));
        let shape = Heads { dim, heads, kv_heads: heads, head_dim: dim / heads };
        let slopes = Parameter::of(Source::numbers(&alibi_slopes(heads, 8.0)), &[heads]);
        let attention =
            SelfAttention::grouped(&attn, "query_key_value", shape, true, attn.linear("dense", dim, dim, true));
        let names = ["dense_h_to_4h", "dense_4h_to_h"];
        Self {
            norms: ["input_layernorm", "post_attention_layernorm"]
                .map(|name| w.layer_norm(name, dim, c.layer_norm_epsilon, true)),
            attention: attention.slopes(slopes),
            mlp: Mlp::new(&w.at("mlp"), names, dim, 4 * dim, true, Activation::GeluTanh),
            from_norm: c.apply_residual_connection_post_layernorm,
        }
    }
}

impl Mixer for BloomBlock {
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let normed = self.norms[0].forward(x);
        let h = self.attention.forward(&normed, layer) + if self.from_norm { &normed } else { x };
        let normed = self.norms[1].forward(&h);
        self.mlp.forward(&normed) + if self.from_norm { &normed } else { &h }
    }

    fn cache(&self) -> Cache {
        self.attention.cache()
    }
}

struct Bloom {
    embed_norm: LayerNorm,
    decoder: Decoder<BloomBlock>,
}

impl Architecture for Bloom {
    const MODEL_TYPES: &'static [&'static str] = &["bloom"];
    type Config = Config;
    type Model = Self;

    fn new(c: Config, w: &Weights) -> Result<Self> {
        // The first checkpoints lack the prefix.
        let model = if w.has("transformer.word_embeddings.weight") { w.at("transformer") } else { w.clone() };
        let (dim, eps) = (c.hidden_size, c.layer_norm_epsilon);
        let embeddings = model.embedding("word_embeddings", c.vocab_size, dim);
        let embed_norm = model.layer_norm("word_embeddings_layernorm", dim, eps, true);
        let layers = model.at("h").each(c.n_layer, |w, _| Ok(BloomBlock::new(&c, w)))?;
        let lm_head = LmHead::new(w, &embeddings, c.vocab_size, dim, c.tie_word_embeddings);
        let decoder = Decoder::of(embeddings, layers, model.layer_norm("ln_f", dim, eps, true), lm_head);
        Ok(Self { embed_norm, decoder })
    }
}

impl Model for Bloom {
    fn caches(&self) -> Vec<Cache> {
        self.decoder.caches()
    }

    fn forward(&self, tokens: &Tensor, step: &mut Step) -> Tensor {
        self.decoder.forward_from(self.embed_norm.forward(&self.decoder.embed(tokens)), step, BloomBlock::forward)
    }

    fn head(&self, hidden: &Tensor) -> Tensor {
        self.decoder.head(hidden)
    }
}

export_plugin!(Bloom);
