//! Gemma, <https://arxiv.org/abs/2403.08295>, Gemma 2, <https://arxiv.org/abs/2408.00118>, and VaultGemma,
//! <https://arxiv.org/abs/2510.15001>, which is Gemma 2 without the second norm of each half.
//!
//! ```text
//! x = E[token] · √dim
//! h = x + Post(Attention(Norm(x)))         per layer; Post is a Norm in Gemma 2, nothing in the others
//! y = h + Post(GEGLU(Norm(h)))
//! logits = cap(Norm(y) · Eᵀ)
//!
//! Norm(x) = x / rms(x) * (1 + w)
//! Attention(x) = softmax(cap(rope(x Wq) · rope(x Wk)ᵀ / √s)) · (x Wv) · Wo
//! GEGLU(x) = (gelu(x Wgate) * (x Wup)) · Wdown
//! cap(z) = c · tanh(z / c)                 Gemma 2 and VaultGemma, where every second layer sees a window
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        model_type: String,
        vocab_size: usize = 256_000,
        hidden_size: usize,
        intermediate_size: usize,
        num_hidden_layers: usize,
        num_attention_heads: usize,
        num_key_value_heads: usize = num_attention_heads,
        head_dim: usize where >= 1 = 256,
        // Files of the first Gemma say gelu, and mean its tanh form.
        hidden_activation: Activation = Activation::GeluTanh,
        rms_norm_eps: f32 = 1e-6,
        attention_bias: bool = false,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        query_pre_attn_scalar: f32 = head_dim as f32,
        sliding_window: Option<usize> = Some(4096),
        layer_types: LayerTypes = LayerTypes::every(2, num_hidden_layers),
        attn_logit_softcapping: Option<f32> = Some(50.0),
        final_logit_softcapping: Option<f32> = Some(30.0),
        tie_word_embeddings: Option<bool> = None,
        use_bidirectional_attention: bool = false,
    }
}

impl Config {
    /// What came with Gemma 2: windows, caps and a scale of its own.
    fn is_second(&self) -> bool {
        self.model_type != "gemma"
    }

    fn attention(&self, w: &Weights, layer: usize) -> Result<SelfAttention> {
        let (dim, head_dim) = (self.hidden_size, self.head_dim);
        let heads = Heads { dim, heads: self.num_attention_heads, kv_heads: self.num_key_value_heads, head_dim };
        let attention = SelfAttention::new(w, heads, self.attention_bias, self.attention_bias).rope(w.rope(
            head_dim,
            self.rope_theta,
            &self.rope_scaling,
        ));
        if !self.is_second() {
            return Ok(attention);
        }
        let window = if self.layer_types.slides(layer)? { self.sliding_window } else { None };
        let scale = self.query_pre_attn_scalar.powf(-0.5);
        Ok(attention.window(window).scale(scale).softcap(self.attn_logit_softcapping))
    }

    fn act(&self) -> Activation {
        if self.is_second() { self.hidden_activation } else { Activation::GeluTanh }
    }
}

/// Checkpoints store w of `1 + w`.
fn norm(c: &Config, w: &Weights, name: &str) -> RmsNorm {
    RmsNorm::of(w.source(&format!("{name}.weight")).plus(1.0), c.hidden_size, c.rms_norm_eps)
}

impl Config {
    fn block(&self, w: &Weights, layer: usize) -> Result<Block> {
        let attention = self.attention(&w.at("self_attn"), layer)?;
        let mlp = GatedMlp::new(&w.at("mlp"), self.hidden_size, self.intermediate_size, false, self.act());
        let norm = |name| norm(self, w, name);
        let [input, attended, fed] = ["input_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"];
        Ok(match self.model_type.as_str() {
            "gemma2" => {
                Block::both_norms([input, attended, "pre_feedforward_layernorm", fed].map(norm), attention, mlp)
            }
            "vaultgemma" => Block::pre_norm([input, "pre_feedforward_layernorm"].map(norm), attention, mlp),
            _ => Block::pre_norm([input, attended].map(norm), attention, mlp),
        })
    }
}

struct Gemma;

impl Architecture for Gemma {
    const MODEL_TYPES: &'static [&'static str] = &["gemma", "gemma2", "vaultgemma"];
    type Config = Config;
    type Model = Decoder;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        if c.use_bidirectional_attention {
            return Err("config.json: use_bidirectional_attention makes an encoder, which generates no text".into());
        }
        let model = w.at("model");
        let embed_tokens = model.embedding("embed_tokens", c.vocab_size, c.hidden_size);
        let layers = model.at("layers").each(c.num_hidden_layers, |w, layer| c.block(w, layer))?;
        let lm_head = LmHead::new(w, &embed_tokens, c.vocab_size, c.hidden_size, c.tie_word_embeddings);
        let decoder = Decoder::of(embed_tokens, layers, norm(&c, &model, "norm"), lm_head)
            .embed_scale((c.hidden_size as f32).sqrt())
            .softcap(c.final_logit_softcapping.filter(|_| c.is_second()));
        Ok(decoder)
    }
}

export_plugin!(Gemma, examples = ["../../tests/fixtures/tiny/gemma/config.json"]);
