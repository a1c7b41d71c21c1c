//! InternLM 2: LLaMA that stores queries, keys and values group by group in one matrix. <https://arxiv.org/abs/2403.17297>
//!
//! ```text
//! h = x + Attention(RMSNorm(x))            per layer
//! y = h + SwiGLU(RMSNorm(h))
//! logits = RMSNorm(y) · Eᵀ
//!
//! Attention(x) = softmax(rope(q) · rope(k)ᵀ / √d) · v · Wo,      x Wqkv = [q q .. k v] of the first kv head, then of the second, ..
//! SwiGLU(x) = (silu(x W1) * (x W3)) · W2
//! ```

use plugin_api::prelude::*;
use std::ops::Range;

config! {
    struct Config {
        vocab_size: usize,
        hidden_size: usize,
        intermediate_size: usize,
        num_hidden_layers: usize,
        num_attention_heads: usize where >= 1,
        num_key_value_heads: usize where >= 1 = num_attention_heads,
        head_dim: usize = hidden_size / num_attention_heads,
        hidden_act: Activation = Activation::Silu,
        rms_norm_eps: f32 = 1e-6,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        bias: bool = true,
        tie_word_embeddings: Option<bool> = None,
    }
}

fn attention(c: &Config, w: &Weights) -> SelfAttention {
    let (kv_heads, q_heads) = (c.num_key_value_heads, c.num_attention_heads / c.num_key_value_heads);
    // Some heads of each group.
    let rows = |name: &str, heads: &Range<usize>| {
        let first_row = |kv_head: usize, head: usize| (kv_head * (q_heads + 2) + head) * c.head_dim;
        let of_group = |g| w.source(name).rows(first_row(g, heads.start)..first_row(g, heads.end));
        Source::join(&(0..kv_heads).map(of_group).collect::<Vec<_>>(), 0)
    };
    let qkv = [0..q_heads, q_heads..q_heads + 1, q_heads + 1..q_heads + 2].map(|heads| {
        let bias = c.bias.then(|| rows("wqkv.bias", &heads));
        Linear::of(rows("wqkv.weight", &heads), bias, c.hidden_size, kv_heads * heads.len() * c.head_dim)
    });
    let wo = w.linear("wo", c.num_attention_heads * c.head_dim, c.hidden_size, c.bias);
    SelfAttention::of(qkv, wo, c.head_dim).rope(w.rope(c.head_dim, c.rope_theta, &c.rope_scaling))
}

fn block(c: &Config, w: &Weights) -> Block {
    let norms = ["attention_norm", "ffn_norm"].map(|name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps));
    let (names, dim, hidden) = (["w1", "w3", "w2"], c.hidden_size, c.intermediate_size);
    let mlp = GatedMlp::named(&w.at("feed_forward"), names, dim, hidden, false, c.hidden_act);
    Block::pre_norm(norms, attention(c, &w.at("attention")), mlp)
}

struct InternLm2;

impl Architecture for InternLm2 {
    const MODEL_TYPES: &'static [&'static str] = &["internlm2"];
    type Config = Config;
    type Model = Decoder;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        let (model, vocab, dim) = (w.at("model"), c.vocab_size, c.hidden_size);
        let tok_embeddings = model.embedding("tok_embeddings", vocab, dim);
        let layers = model.at("layers").each(c.num_hidden_layers, |w, _| Ok(block(&c, w)))?;
        let output = LmHead::named(w, "output", &tok_embeddings, vocab, dim, c.tie_word_embeddings);
        Ok(Decoder::of(tok_embeddings, layers, model.rms_norm("norm", dim, c.rms_norm_eps), output))
    }
}

export_plugin!(InternLm2, examples = ["../../tests/fixtures/tiny/internlm2/config.json"]);
