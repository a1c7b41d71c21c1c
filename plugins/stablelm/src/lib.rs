//! StableLM 2 and 3B-4E1T: LLaMA's blocks under LayerNorms, a quarter of each head turned. <https://arxiv.org/abs/2402.17834>
//!
//! ```text
//! h = x + Attention(LayerNorm(x))          per layer
//! y = h + SwiGLU(LayerNorm(h))
//!   or, in parallel: y = x + Attention(n) + SwiGLU(n), n = LayerNorm(x)
//! logits = LayerNorm(y) · Wlm
//!
//! Attention(x) = softmax(rope(Norm(x Wq)) · rope(Norm(x Wk))ᵀ / √d) · (x Wv) · Wo
//!   Norm in the 12B model alone: a LayerNorm without bias, each head with weights of its own
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize = 50_304,
        hidden_size: usize = 2560,
        intermediate_size: usize = 6912,
        num_hidden_layers: usize = 32,
        num_attention_heads: usize where >= 1 = 32,
        num_key_value_heads: usize = 32,
        hidden_act: Activation = Activation::Silu,
        layer_norm_eps: f32 = 1e-5,
        use_qkv_bias: bool = false,
        qk_layernorm: bool = false,
        use_parallel_residual: bool = false,
        partial_rotary_factor: f32 = 0.25,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        tie_word_embeddings: bool = false,
    }
}

impl Config {
    fn attention(&self, w: &Weights) -> SelfAttention {
        let (dim, head_dim) = (self.hidden_size, self.hidden_size / self.num_attention_heads);
        let heads = Heads { dim, heads: self.num_attention_heads, kv_heads: self.num_key_value_heads, head_dim };
        let turned = (head_dim as f32 * self.partial_rotary_factor) as usize;
        let attention = SelfAttention::new(w, heads, self.use_qkv_bias, false).rope(w.rope(
            turned,
            self.rope_theta,
            &self.rope_scaling,
        ));
        if !self.qk_layernorm {
            return attention;
        }
        // Files have one norm a head.
        let weights = |name: &str, heads: usize| {
            let norms: Vec<Source> = (0..heads).map(|h| w.source(&format!("{name}.norms.{h}.weight"))).collect();
            Parameter::of(Source::stack(&norms), &[heads, head_dim])
        };
        attention.weighted_norms(
            LayerNorm::plain(head_dim, self.layer_norm_eps),
            weights("q_layernorm", heads.heads),
            weights("k_layernorm", heads.kv_heads),
        )
    }
}

struct StableLm;

impl Architecture for StableLm {
    const MODEL_TYPES: &'static [&'static str] = &["stablelm"];
    type Config = Config;
    type Model = Decoder;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        let (model, dim) = (w.at("model"), c.hidden_size);
        let embed_tokens = model.embedding("embed_tokens", c.vocab_size, dim);
        let norm = |w: &Weights, name| w.layer_norm(name, dim, c.layer_norm_eps, true);
        let layers = model.at("layers").each(c.num_hidden_layers, |w, _| {
            let (attention, first) = (c.attention(&w.at("self_attn")), norm(w, "input_layernorm"));
            let mlp = GatedMlp::new(&w.at("mlp"), dim, c.intermediate_size, false, c.hidden_act);
            Ok(match c.use_parallel_residual {
                true => Block::parallel(first, attention, mlp),
                false => Block::pre_norm([first, norm(w, "post_attention_layernorm")], attention, mlp),
            })
        })?;
        let lm_head = LmHead::new(w, &embed_tokens, c.vocab_size, dim, Some(c.tie_word_embeddings));
        Ok(Decoder::of(embed_tokens, layers, norm(&model, "norm"), lm_head))
    }
}

export_plugin!(StableLm, examples = ["../../tests/fixtures/tiny/stablelm/config.json"]);
