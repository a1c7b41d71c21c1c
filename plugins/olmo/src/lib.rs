//! OLMo: norms without weights, and projections held within bounds. <https://arxiv.org/abs/2402.00838>
//!
//! ```text
//! h = x + Attention(LayerNorm(x))            per layer
//! y = h + SwiGLU(LayerNorm(h))
//! logits = LayerNorm(y) · Eᵀ
//!
//! Attention(x) = softmax(rope(q) · rope(k)ᵀ / √d) · v · Wo,      [q k v] = clip(x [Wq Wk Wv])
//! LayerNorm(x) = (x - mean) / std
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
        hidden_act: Activation = Activation::Silu,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        clip_qkv: Option<f32> = None,
        attention_bias: bool = false,
        tie_word_embeddings: Option<bool> = None,
    }
}

fn norm(c: &Config) -> LayerNorm {
    LayerNorm::plain(c.hidden_size, 1e-5)
}

fn attention(c: &Config, w: &Weights) -> SelfAttention {
    let (dim, heads, kv_heads) = (c.hidden_size, c.num_attention_heads, c.num_key_value_heads);
    let head_dim = dim / heads;
    SelfAttention::new(w, Heads { dim, heads, kv_heads, head_dim }, c.attention_bias, c.attention_bias)
        .rope(w.rope(head_dim, c.rope_theta, &c.rope_scaling))
        .clip(c.clip_qkv)
}

fn block(c: &Config, w: &Weights) -> Block {
    let mlp = GatedMlp::new(&w.at("mlp"), c.hidden_size, c.intermediate_size, false, c.hidden_act);
    Block::pre_norm([norm(c), norm(c)], attention(c, &w.at("self_attn")), mlp)
}

struct Olmo;

impl Architecture for Olmo {
    const MODEL_TYPES: &'static [&'static str] = &["olmo"];
    type Config = Config;
    type Model = Decoder;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        let (model, vocab, dim) = (w.at("model"), c.vocab_size, c.hidden_size);
        let embed_tokens = model.embedding("embed_tokens", vocab, dim);
        let layers = model.at("layers").each(c.num_hidden_layers, |w, _| Ok(block(&c, w)))?;
        let lm_head = LmHead::new(w, &embed_tokens, vocab, dim, c.tie_word_embeddings);
        Ok(Decoder::of(embed_tokens, layers, norm(&c), lm_head))
    }
}

export_plugin!(Olmo, examples = ["../../tests/fixtures/tiny/olmo/config.json"]);
