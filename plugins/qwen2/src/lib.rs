//! Qwen2 to Qwen3, dense, alone or as the language model beside a vision tower. <https://arxiv.org/abs/2407.10671>,
//! <https://arxiv.org/abs/2505.09388>
//!
//! ```text
//! h = x + Attention(RMSNorm(x))            per layer
//! y = h + SwiGLU(RMSNorm(h))
//! logits = RMSNorm(y) · Eᵀ
//!
//! Attention(x) = softmax(q · kᵀ / √d) · v · Wo
//!   Qwen2: q = rope(x Wq + bq), k = rope(x Wk + bk), v = x Wv + bv
//!   Qwen3: q = rope(RMSNorm(x Wq)), k = rope(RMSNorm(x Wk)), v = x Wv      each head normalized alone
//!
//! model_type                 what differs
//! qwen2, mimo                mimo's checkpoints have layers that guess further tokens, for training
//! qwen2_vl, qwen2_5_vl       Qwen2 whose rope has axes for images, which turn as one in text
//! qwen3, qwen3_vl            norms in place of the biases, as above
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        model_type: String = "qwen2".into(),
        vocab_size: usize,
        hidden_size: usize,
        intermediate_size: usize,
        num_hidden_layers: usize,
        num_attention_heads: usize where >= 1,
        num_key_value_heads: usize = num_attention_heads,
        head_dim: usize = if model_type.starts_with("qwen3") { 128 } else { hidden_size / num_attention_heads },
        hidden_act: Activation = Activation::Silu,
        rms_norm_eps: f32 = 1e-6,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        use_sliding_window: bool = false,
        sliding_window: Option<usize> = Some(4096),
        max_window_layers: usize = 28,
        layer_types: Option<LayerTypes> = None,
        // Qwen3's key; Qwen2 has its biases without saying so.
        attention_bias: bool = false,
        tie_word_embeddings: Option<bool> = None,
    }
}

impl Config {
    /// The later layers slide, if any do.
    fn window(&self, layer: usize) -> Result<Option<usize>> {
        let slides = match &self.layer_types {
            Some(types) => types.slides(layer)?,
            None => layer >= self.max_window_layers,
        };
        Ok(self.sliding_window.filter(|_| self.use_sliding_window && slides))
    }
}

fn attention(c: &Config, w: &Weights, layer: usize) -> Result<SelfAttention> {
    let (dim, heads, kv_heads) = (c.hidden_size, c.num_attention_heads, c.num_key_value_heads);
    let shape = Heads { dim, heads, kv_heads, head_dim: c.head_dim };
    let attention = if c.model_type.starts_with("qwen3") {
        let norm = |name| w.rms_norm(name, c.head_dim, c.rms_norm_eps);
        SelfAttention::new(w, shape, c.attention_bias, c.attention_bias).head_norms(norm("q_norm"), norm("k_norm"))
    } else {
        SelfAttention::new(w, shape, true, false)
    };
    Ok(attention.rope(w.rope(c.head_dim, c.rope_theta, &c.rope_scaling)).window(c.window(layer)?))
}

fn block(c: &Config, w: &Weights, layer: usize) -> Result<Block> {
    let norm = |name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps);
    let norms = [norm("input_layernorm"), norm("post_attention_layernorm")];
    let mlp = GatedMlp::new(&w.at("mlp"), c.hidden_size, c.intermediate_size, false, c.hidden_act);
    Ok(Block::pre_norm(norms, attention(c, &w.at("self_attn"), layer)?, mlp))
}

struct Qwen;

impl Architecture for Qwen {
    const MODEL_TYPES: &'static [&'static str] = &["qwen2", "qwen2_vl", "qwen2_5_vl", "mimo", "qwen3", "qwen3_vl"];
    type Config = Config;
    type Model = Decoder;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        w.ignore("visual.");
        w.ignore("model.mtp_layers.");
        Decoder::new(w, decoder_shape!(c), |w, layer| block(&c, w, layer))
    }
}

export_plugin!(Qwen, examples = ["../../tests/fixtures/tiny/qwen2/config.json"]);
