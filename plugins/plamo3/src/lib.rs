//! PLaMo 3: norms before and after, whose weights are stored as differences from a start that shrinks what a branch adds.
//! <https://huggingface.co/pfnet/plamo-3-nict-8b-base>
//!
//! ```text
//! h = x + Norm(Attention(Norm(x)))            per layer
//! y = h + Norm(SwiGLU(Norm(h)))
//! logits = Norm(y) · Eᵀ
//!
//! Norm(x) = x / rms(x) * (start + w),      start = 1; after attention 1/5, after SwiGLU 1/5^1.5
//! Attention(x) = softmax(q · kᵀ / √d) · v · Wo,      [q k v] = x Wqkv
//!   q = rope(Norm(q)), k = rope(Norm(k))      each head alone; most layers see a window and turn by other angles
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize = 32_000,
        hidden_size: usize = 4096,
        intermediate_size: usize = 13_312,
        num_hidden_layers: usize = 32,
        num_attention_heads: usize = 32,
        num_key_value_heads: usize = 4,
        head_dim: usize = 128,
        rms_norm_eps: f32 = 1e-6,
        window_size: usize = 2048,
        sliding_window: usize = window_size,
        sliding_window_pattern: usize where >= 1 = 8,
        rope_theta: f32 = 1_000_000.0,
        rope_local_theta: f32 = 10_000.0,
        tie_word_embeddings: Option<bool> = Some(true),
    }
}

fn norm(w: &Weights, name: &str, start: f32, dim: usize, eps: f32) -> RmsNorm {
    RmsNorm::of(w.source(&format!("{name}.weight")).plus(start), dim, eps)
}

fn attention(c: &Config, w: &Weights, layer: usize) -> SelfAttention {
    let (dim, heads, kv_heads) = (c.hidden_size, c.num_attention_heads, c.num_key_value_heads);
    let head_norm = |name| norm(w, name, 1.0, c.head_dim, c.rms_norm_eps);
    let local = !(layer + 1).is_multiple_of(c.sliding_window_pattern);
    let o_proj = w.linear("o_proj", heads * c.head_dim, dim, false);
    SelfAttention::fused(w, "qkv_proj", Heads { dim, heads, kv_heads, head_dim: c.head_dim }, false, o_proj)
        .head_norms(head_norm("q_norm"), head_norm("k_norm"))
        .rope(w.rope(c.head_dim, if local { c.rope_local_theta } else { c.rope_theta }, &None))
        // The window does not count the query's own key.
        .window(local.then_some(c.sliding_window + 1))
}

fn block(c: &Config, w: &Weights, layer: usize) -> Block {
    let norms = [
        ("pre_mixer_norm", 1.0),
        ("post_mixer_norm", 0.2),
        ("pre_mlp_norm", 1.0),
        ("post_mlp_norm", 5.0_f32.powf(-1.5)),
    ];
    let norms = norms.map(|(name, start)| norm(w, name, start, c.hidden_size, c.rms_norm_eps));
    let (mlp, act) = (w.at("mlp"), Activation::Silu);
    let mlp = GatedMlp::fused(&mlp, "gate_up_proj", c.hidden_size, c.intermediate_size, act);
    Block::both_norms(norms, attention(c, &w.at("mixer"), layer), mlp)
}

struct Plamo3;

impl Architecture for Plamo3 {
    const MODEL_TYPES: &'static [&'static str] = &["plamo3"];
    type Config = Config;
    type Model = Decoder;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        let (model, vocab, dim) = (w.at("model"), c.vocab_size, c.hidden_size);
        let embed_tokens = model.embedding("embed_tokens", vocab, dim);
        let layers = model.at("layers.layers").each(c.num_hidden_layers, |w, i| Ok(block(&c, w, i)))?;
        let lm_head = LmHead::new(w, &embed_tokens, vocab, dim, c.tie_word_embeddings);
        Ok(Decoder::of(embed_tokens, layers, norm(&model, "norm", 1.0, dim, c.rms_norm_eps), lm_head))
    }
}

export_plugin!(Plamo3, examples = ["../../tests/fixtures/tiny/plamo3/config.json"]);
