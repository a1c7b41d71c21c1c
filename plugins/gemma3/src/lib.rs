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

fn attention(c: &Config, w: &Weights, layer: usize) -> Result<SelfAttention> {
    let (dim, heads, kv_heads) = (c.hidden_size, c.num_attention_heads, c.num_key_value_heads);
    let shape = Heads { dim, heads, kv_heads, head_dim: c.head_dim };
    let head_norm = |name| norm(w, name, c.head_dim, c.rms_norm_eps);
    let local = c.slides(layer)?;
    let rope = match local {
        true => w.rope(c.head_dim, c.rope_local_base_freq, &None),
        false => w.rope(c.head_dim, c.rope_theta, &c.rope_scaling),
    };
    Ok(SelfAttention::new(w, shape, c.attention_bias, c.attention_bias)
        .head_norms(head_norm("q_norm"), head_norm("k_norm"))
        .rope(rope)
        .scale(c.query_pre_attn_scalar.powf(-0.5))
        .window(local.then_some(c.sliding_window)))
}

fn block(c: &Config, w: &Weights, layer: usize) -> Result<Block> {
    let norms =
        ["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"];
    let mlp = GatedMlp::new(&w.at("mlp"), c.hidden_size, c.intermediate_size, false, c.hidden_activation);
    let norms = norms.map(|name| norm(w, name, c.hidden_size, c.rms_norm_eps));
    Ok(Block::both_norms(norms, attention(c, &w.at("self_attn"), layer)?, mlp))
}

struct Gemma3;

impl Architecture for Gemma3 {
    const MODEL_TYPES: &'static [&'static str] = &["gemma3", "gemma3_text"];
    type Config = Config;
    type Model = Decoder;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        if c.use_bidirectional_attention {
            return Err(
                "config.json: use_bidirectional_attention makes an embedding model, which generates no text".into()
            );
        }
        let (model, vocab, dim) = (w.at("model"), c.vocab_size, c.hidden_size);
        let embed_tokens = model.embedding("embed_tokens", vocab, dim);
        let layers = model.at("layers").each(c.num_hidden_layers, |w, i| block(&c, w, i))?;
        let lm_head = LmHead::new(w, &embed_tokens, vocab, dim, c.tie_word_embeddings);
        let decoder = Decoder::of(embed_tokens, layers, norm(&model, "norm", dim, c.rms_norm_eps), lm_head);
        Ok(decoder.embed_scale((dim as f32).sqrt()).softcap(c.final_logit_softcapping))
    }
}

export_plugin!(Gemma3, examples = ["../../tests/fixtures/tiny/gemma3/config.json"]);
