//! EXAONE 3: LLaMA under the names of GPT-2. <https://arxiv.org/abs/2408.03541>
//!
//! ```text
//! h = x + Attention(RMSNorm(x))            per layer
//! y = h + SwiGLU(RMSNorm(h))
//! logits = RMSNorm(y) · Eᵀ
//!
//! Attention(x) = softmax(rope(x Wq) · rope(x Wk)ᵀ / √d) · (x Wv) · Wo
//! SwiGLU(x) = (silu(x Wc_fc_0) * (x Wc_fc_1)) · Wc_proj
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize,
        hidden_size: usize,
        intermediate_size: usize,
        num_layers: usize,
        num_attention_heads: usize where >= 1,
        num_key_value_heads: usize = num_attention_heads,
        head_dim: usize = hidden_size / num_attention_heads,
        activation_function: Activation = Activation::Silu,
        layer_norm_epsilon: f32 = 1e-5,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        attention_bias: bool = false,
        mlp_bias: bool = false,
        tie_word_embeddings: Option<bool> = None,
    }
}

fn attention(c: &Config, w: &Weights) -> SelfAttention {
    let (q, kv) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
    let qkv = w.linears(c.hidden_size, c.attention_bias, [("q_proj", q), ("k_proj", kv), ("v_proj", kv)]);
    let out_proj = w.linear("out_proj", q, c.hidden_size, c.attention_bias);
    SelfAttention::of(qkv, out_proj, c.head_dim).rope(w.rope(c.head_dim, c.rope_theta, &c.rope_scaling))
}

fn block(c: &Config, w: &Weights) -> Block {
    let norms = ["ln_1", "ln_2"].map(|name| w.rms_norm(name, c.hidden_size, c.layer_norm_epsilon));
    let (names, act) = (["c_fc_0", "c_fc_1", "c_proj"], c.activation_function);
    let mlp = GatedMlp::named(&w.at("mlp"), names, c.hidden_size, c.intermediate_size, c.mlp_bias, act);
    Block::pre_norm(norms, attention(c, &w.at("attn.attention")), mlp)
}

struct Exaone;

impl Architecture for Exaone {
    const MODEL_TYPES: &'static [&'static str] = &["exaone"];
    type Config = Config;
    type Model = Decoder;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        let (model, vocab, dim) = (w.at("transformer"), c.vocab_size, c.hidden_size);
        let wte = model.embedding("wte", vocab, dim);
        let blocks = model.at("h").each(c.num_layers, |w, _| Ok(block(&c, w)))?;
        let lm_head = LmHead::new(w, &wte, vocab, dim, c.tie_word_embeddings);
        Ok(Decoder::of(wte, blocks, model.rms_norm("ln_f", dim, c.layer_norm_epsilon), lm_head))
    }
}

export_plugin!(Exaone, examples = ["../../tests/fixtures/tiny/exaone/config.json"]);
