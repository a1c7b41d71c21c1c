//! Lille: a small LLaMA that keeps its norms inside of attention and feed-forward. <https://huggingface.co/Nikity/lille-130m-instruct>
//!
//! ```text
//! h = x + Attention(RMSNorm(x))            per layer
//! y = h + SwiGLU(RMSNorm(h))
//! logits = RMSNorm(y) · Eᵀ
//!
//! Attention(x) = softmax(rope(q) · rope(k)ᵀ / √d) · v · Wo,      [q k v] = x Wqkv; rope turns neighbouring lanes
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize,
        n_embd: usize,
        n_layer: usize,
        n_head: usize where >= 1,
        n_kv_heads: usize = n_head,
        layer_norm_eps: f32,
        rope_theta: f32,
    }
}

impl Config {
    /// 8/3 of the width, to the nearest multiple of 256, or to the even one of two as near.
    fn hidden(&self) -> usize {
        (((8 * self.n_embd / 3) as f32 / 256.0).round_ties_even() * 256.0) as usize
    }
}

fn attention(c: &Config, w: &Weights) -> SelfAttention {
    let (dim, heads, head_dim) = (c.n_embd, c.n_head, c.n_embd / c.n_head);
    let out_proj = w.linear("out_proj", heads * head_dim, dim, false);
    SelfAttention::fused(w, "qkv_proj", Heads { dim, heads, kv_heads: c.n_kv_heads, head_dim }, false, out_proj)
        .rope(w.rope(head_dim, c.rope_theta, &None).interleaved())
}

fn block(c: &Config, w: &Weights) -> Block {
    let (attn, mlp) = (w.at("attention"), w.at("feed_forward"));
    let norms = [&attn, &mlp].map(|w| w.rms_norm("norm", c.n_embd, c.layer_norm_eps));
    Block::pre_norm(norms, attention(c, &attn), GatedMlp::new(&mlp, c.n_embd, c.hidden(), false, Activation::Silu))
}

struct Lille;

impl Architecture for Lille {
    const MODEL_TYPES: &'static [&'static str] = &["lille-130m"];
    type Config = Config;
    type Model = Decoder;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        let model = w.at("transformer");
        let tok_embeddings = model.embedding("tok_embeddings", c.vocab_size, c.n_embd);
        let layers = model.at("layers").each(c.n_layer, |w, _| Ok(block(&c, w)))?;
        let lm_head = LmHead::new(w, &tok_embeddings, c.vocab_size, c.n_embd, Some(true));
        Ok(Decoder::of(tok_embeddings, layers, model.rms_norm("norm", c.n_embd, c.layer_norm_eps), lm_head))
    }
}

export_plugin!(Lille, examples = ["../../tests/fixtures/tiny/lille-130m/config.json"]);
