//! Command R, <https://cohere.com/blog/command-r>, and its successors R7B and A (cohere2), <https://arxiv.org/abs/2504.00698>.
//!
//! ```text
//! n = Norm(x)                              per layer
//! y = x + Attention(n) + SwiGLU(n)
//! logits = s · Norm(y) · Eᵀ
//!
//! Norm(x) = (x - mean(x)) / std(x) * w
//! Attention(x) = softmax(rope(Norm(x Wq)) · rope(Norm(x Wk))ᵀ / √d) · (x Wv) · Wo
//!   Norm in the largest Command R alone, each head with weights of its own
//!   cohere2: three of four layers see a window; the fourth sees everything, and no positions
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        model_type: String,
        vocab_size: usize = 256_000,
        hidden_size: usize = 8192,
        intermediate_size: usize = 22_528,
        num_hidden_layers: usize = 40,
        num_attention_heads: usize where >= 1 = 64,
        num_key_value_heads: usize = num_attention_heads,
        head_dim: usize = hidden_size / num_attention_heads,
        hidden_act: Activation = Activation::Silu,
        layer_norm_eps: f32 = 1e-5,
        layer_norm_bias: bool = false,
        attention_bias: bool = false,
        use_qk_norm: bool = false,
        rope_theta: f32 = if model_type == "cohere" { 500_000.0 } else { 10_000.0 },
        rope_scaling: Option<RopeScaling> = None,
        sliding_window: Option<usize> = Some(4096),
        sliding_window_pattern: usize where >= 1 = 4,
        layer_types: LayerTypes = LayerTypes::every(sliding_window_pattern, num_hidden_layers),
        logit_scale: f32 = 0.0625,
        tie_word_embeddings: bool = true,
    }
}

impl Config {
    fn attention(&self, w: &Weights, layer: usize) -> Result<SelfAttention> {
        let (dim, head_dim, bias) = (self.hidden_size, self.head_dim, self.attention_bias);
        let heads = Heads { dim, heads: self.num_attention_heads, kv_heads: self.num_key_value_heads, head_dim };
        let attention = SelfAttention::new(w, heads, bias, bias);
        let rope = w.rope(head_dim, self.rope_theta, &self.rope_scaling).interleaved();
        if self.model_type == "cohere2" {
            return Ok(match self.layer_types.slides(layer)? {
                true => attention.rope(rope).window(self.sliding_window),
                false => attention,
            });
        }
        Ok(match self.use_qk_norm {
            true => attention.rope(rope).weighted_norms(
                LayerNorm::plain(head_dim, self.layer_norm_eps),
                w.tensor("q_norm.weight", &[self.num_attention_heads, head_dim]),
                w.tensor("k_norm.weight", &[self.num_key_value_heads, head_dim]),
            ),
            false => attention.rope(rope),
        })
    }

    fn norm(&self, w: &Weights, name: &str) -> LayerNorm {
        w.layer_norm(name, self.hidden_size, self.layer_norm_eps, self.layer_norm_bias)
    }
}

struct Cohere(Decoder);

impl Architecture for Cohere {
    const MODEL_TYPES: &'static [&'static str] = &["cohere", "cohere2"];
    type Config = Config;

    fn new(c: Config, w: &Weights) -> Result<Self> {
        let (model, dim) = (w.at("model"), c.hidden_size);
        let embed_tokens = model.embedding("embed_tokens", c.vocab_size, dim);
        let layers = model.at("layers").each(c.num_hidden_layers, |w, layer| {
            let mlp = GatedMlp::new(&w.at("mlp"), dim, c.intermediate_size, false, c.hidden_act);
            Ok(Block::parallel(c.norm(w, "input_layernorm"), c.attention(&w.at("self_attn"), layer)?, mlp))
        })?;
        let lm_head = LmHead::new(w, &embed_tokens, c.vocab_size, dim, Some(c.tie_word_embeddings));
        Ok(Self(Decoder::of(embed_tokens, layers, c.norm(&model, "norm"), lm_head).logit_scale(c.logit_scale)))
    }

    fn caches(&self) -> Vec<Cache> {
        self.0.caches()
    }

    fn forward(&self, tokens: &Tensor, step: &mut Step) -> Tensor {
        self.0.run(tokens, step)
    }

    fn head(&self, hidden: &Tensor) -> Tensor {
        self.0.head(hidden)
    }
}

export_plugin!(Cohere);
