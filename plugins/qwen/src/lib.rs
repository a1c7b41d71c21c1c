//! The first Qwen: LLaMA with fused projections under the names of GPT-2. <https://arxiv.org/abs/2309.16609>
//!
//! ```text
//! h = x + Attention(RMSNorm(x))            per layer
//! y = h + SwiGLU(RMSNorm(h))
//! logits = RMSNorm(y) · Whead
//!
//! Attention(x) = softmax(rope(q) · rope(k)ᵀ / √d) · v · Wo,      [q k v] = x Wc_attn + b
//! SwiGLU(x) = (silu(x W2) * (x W1)) · Wc_proj,      half as wide as intermediate_size says
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize = 151_936,
        hidden_size: usize = 2048,
        intermediate_size: usize = 11_008,
        num_hidden_layers: usize = 24,
        num_attention_heads: usize where >= 1 = 16,
        kv_channels: usize = 128,
        layer_norm_epsilon: f32 = 1e-6,
        rotary_emb_base: f32 = 10_000.0,
        no_bias: bool = true,
        tie_word_embeddings: Option<bool> = Some(false),
    }
}

fn attention(c: &Config, w: &Weights) -> SelfAttention {
    let (heads, head_dim) = (c.num_attention_heads, c.kv_channels);
    let c_proj = w.linear("c_proj", heads * head_dim, c.hidden_size, !c.no_bias);
    SelfAttention::fused(w, "c_attn", Heads { dim: c.hidden_size, heads, kv_heads: heads, head_dim }, true, c_proj)
        .rope(w.rope(head_dim, c.rotary_emb_base, &None))
}

fn block(c: &Config, w: &Weights) -> Block {
    let norms = ["ln_1", "ln_2"].map(|name| w.rms_norm(name, c.hidden_size, c.layer_norm_epsilon));
    let (names, hidden) = (["w2", "w1", "c_proj"], c.intermediate_size / 2);
    let mlp = GatedMlp::named(&w.at("mlp"), names, c.hidden_size, hidden, !c.no_bias, Activation::Silu);
    Block::pre_norm(norms, attention(c, &w.at("attn")), mlp)
}

struct Qwen;

impl Architecture for Qwen {
    const MODEL_TYPES: &'static [&'static str] = &["qwen"];
    type Config = Config;
    type Model = Decoder;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        let (model, vocab, dim) = (w.at("transformer"), c.vocab_size, c.hidden_size);
        let wte = model.embedding("wte", vocab, dim);
        let blocks = model.at("h").each(c.num_hidden_layers, |w, _| Ok(block(&c, w)))?;
        let lm_head = LmHead::new(w, &wte, vocab, dim, c.tie_word_embeddings);
        Ok(Decoder::of(wte, blocks, model.rms_norm("ln_f", dim, c.layer_norm_epsilon), lm_head))
    }
}

export_plugin!(Qwen, examples = ["../../tests/fixtures/tiny/qwen/config.json"]);
