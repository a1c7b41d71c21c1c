//! GPT-NeoX: Pythia, Dolly and other models of that codebase. <https://arxiv.org/abs/2204.06745>
//!
//! ```text
//! y = x + Attention(LayerNorm₁(x)) + Mlp(LayerNorm₂(x))                per layer
//!   or, one after the other: h = x + Attention(LayerNorm₁(x)), y = h + Mlp(LayerNorm₂(h))
//! logits = LayerNorm(y) · Wout
//!
//! Attention(x) = softmax(rope(q) · rope(k)ᵀ / √d) · v · Wdense        q, k, v: head by head in x Wqkv + b
//! Mlp(x) = gelu(x W₁ + b₁) · W₂ + b₂
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize = 50_432,
        hidden_size: usize = 6144,
        intermediate_size: usize = 24_576,
        num_hidden_layers: usize = 44,
        num_attention_heads: usize where >= 1 = 64,
        hidden_act: Activation = Activation::Gelu,
        layer_norm_eps: f32 = 1e-5,
        use_parallel_residual: bool = true,
        attention_bias: bool = true,
        // The first of each pair is how this codebase calls the second.
        rotary_emb_base: f32 = 10_000.0,
        rope_theta: f32 = rotary_emb_base,
        rotary_pct: f32 = 0.25,
        partial_rotary_factor: f32 = rotary_pct,
        rope_scaling: Option<RopeScaling> = None,
        tie_word_embeddings: bool = false,
    }
}

impl Config {
    fn norm(&self, w: &Weights, name: &str) -> LayerNorm {
        w.layer_norm(name, self.hidden_size, self.layer_norm_eps, true)
    }
}

fn attention(c: &Config, w: &Weights) -> SelfAttention {
    let (dim, heads) = (c.hidden_size, c.num_attention_heads);
    let head_dim = dim / heads;
    // Masks that old exporters stored.
    w.ignore("masked_bias");
    w.ignore("bias");
    let dense = w.linear("dense", dim, dim, c.attention_bias);
    let shape = Heads { dim, heads, kv_heads: heads, head_dim };
    let turned = (head_dim as f32 * c.partial_rotary_factor) as usize;
    SelfAttention::grouped(w, "query_key_value", shape, c.attention_bias, dense).rope(w.rope(
        turned,
        c.rope_theta,
        &c.rope_scaling,
    ))
}

type Layers = Block<SelfAttention, Mlp>;

fn block(c: &Config, w: &Weights) -> Layers {
    let (attention, names) = (attention(c, &w.at("attention")), ["dense_h_to_4h", "dense_4h_to_h"]);
    let mlp = Mlp::new(&w.at("mlp"), names, c.hidden_size, c.intermediate_size, true, c.hidden_act);
    let norms = ["input_layernorm", "post_attention_layernorm"].map(|name| c.norm(w, name));
    match c.use_parallel_residual {
        true => Block::parallel_norms(norms, attention, mlp),
        false => Block::pre_norm(norms, attention, mlp),
    }
}

struct GptNeoX;

impl Architecture for GptNeoX {
    const MODEL_TYPES: &'static [&'static str] = &["gpt_neox"];
    type Config = Config;
    type Model = Decoder<Layers>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        let (model, layers) = match w.has("model.embed_in.weight") {
            true => (w.at("model"), "h"),
            false => (w.at("gpt_neox"), "layers"),
        };
        let embed_in = model.embedding("embed_in", c.vocab_size, c.hidden_size);
        let place = if layers == "h" { &model } else { w };
        let lm_head =
            LmHead::named(place, "embed_out", &embed_in, c.vocab_size, c.hidden_size, Some(c.tie_word_embeddings));
        let layers = model.at(layers).each(c.num_hidden_layers, |w, _| Ok(block(&c, w)))?;
        Ok(Decoder::of(embed_in, layers, c.norm(&model, "final_layer_norm"), lm_head))
    }
}

export_plugin!(GptNeoX, examples = ["../../tests/fixtures/tiny/gpt_neox/config.json"]);
