//! StarCoder 2: grouped heads under LayerNorms, biases everywhere. <https://arxiv.org/abs/2402.19173>
//!
//! ```text
//! h = x + Attention(LayerNorm(x))          per layer
//! y = h + gelu(LayerNorm(h) Wfc) · Wproj
//! logits = LayerNorm(y) · Eᵀ
//!
//! Attention(x) = softmax(rope(x Wq) · rope(x Wk)ᵀ / √d) · (x Wv) · Wo
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize = 49_152,
        hidden_size: usize = 3072,
        intermediate_size: usize = 12_288,
        num_hidden_layers: usize = 30,
        num_attention_heads: usize where >= 1 = 24,
        num_key_value_heads: usize = 2,
        head_dim: usize = hidden_size / num_attention_heads,
        hidden_act: Activation = Activation::GeluTanh,
        norm_epsilon: f32 = 1e-5,
        use_bias: bool = true,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        sliding_window: Option<usize> = None,
        tie_word_embeddings: Option<bool> = None,
    }
}

type Layers = Block<SelfAttention, Mlp>;

impl Config {
    fn norm(&self, w: &Weights, name: &str) -> LayerNorm {
        w.layer_norm(name, self.hidden_size, self.norm_epsilon, true)
    }

    fn block(&self, w: &Weights) -> Layers {
        let (dim, head_dim, bias) = (self.hidden_size, self.head_dim, self.use_bias);
        let heads = Heads { dim, heads: self.num_attention_heads, kv_heads: self.num_key_value_heads, head_dim };
        let attention = SelfAttention::new(&w.at("self_attn"), heads, bias, bias)
            .rope(w.rope(head_dim, self.rope_theta, &self.rope_scaling))
            .window(self.sliding_window);
        let mlp = Mlp::new(&w.at("mlp"), ["c_fc", "c_proj"], dim, self.intermediate_size, bias, self.hidden_act);
        Block::pre_norm(["input_layernorm", "post_attention_layernorm"].map(|name| self.norm(w, name)), attention, mlp)
    }
}

struct Starcoder2;

impl Architecture for Starcoder2 {
    const MODEL_TYPES: &'static [&'static str] = &["starcoder2"];
    type Config = Config;
    type Model = Decoder<Layers>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        let model = w.at("model");
        let embed_tokens = model.embedding("embed_tokens", c.vocab_size, c.hidden_size);
        let layers = model.at("layers").each(c.num_hidden_layers, |w, _| Ok(c.block(w)))?;
        let lm_head = LmHead::new(w, &embed_tokens, c.vocab_size, c.hidden_size, c.tie_word_embeddings);
        Ok(Decoder::of(embed_tokens, layers, c.norm(&model, "norm"), lm_head))
    }
}

export_plugin!(Starcoder2, examples = ["../../tests/fixtures/tiny/starcoder2/config.json"]);
