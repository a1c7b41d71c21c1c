//! Falcon: few key heads, attention and feed-forward side by side, and RW, whose layers are plain ones with linear biases in place of
//! turned queries and keys. <https://arxiv.org/abs/2311.16867>, <https://arxiv.org/abs/2306.01116>
//!
//! ```text
//! y = x + Attention(LayerNorm₁(x)) + gelu(LayerNorm₂(x) W₁) · W₂       per layer; in 7B both norms are one
//!   in RW: h = x + Attention(LayerNorm₁(x)), y = h + gelu(LayerNorm₂(h) W₁) · W₂
//! logits = LayerNorm(y) · Eᵀ
//!
//! Attention(x) = softmax(rope(q) · rope(k)ᵀ / √d) · v · Wdense         q, k, v: group by group in x Wqkv
//!   in RW: softmax((q · kᵀ - m · distance) / √d) · v · Wdense          m by head
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize = 65_024,
        hidden_size: usize = 4544,
        num_hidden_layers: usize = 32,
        num_attention_heads: usize where >= 1 = 71,
        num_kv_heads: usize where >= 1 = num_attention_heads,
        ffn_hidden_size: usize = 4 * hidden_size,
        activation: Activation = Activation::Gelu,
        layer_norm_epsilon: f32 = 1e-5,
        bias: bool = false,
        new_decoder_architecture: bool = false,
        multi_query: bool = true,
        parallel_attn: bool = true,
        num_ln_in_parallel_attn: usize = if new_decoder_architecture { 2 } else { 1 },
        alibi: bool = false,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        tie_word_embeddings: Option<bool> = None,
    }
}

type Layers = Block<SelfAttention, Mlp>;

impl Config {
    fn norm(&self, w: &Weights, name: &str) -> LayerNorm {
        w.layer_norm(name, self.hidden_size, self.layer_norm_epsilon, true)
    }

    fn attention(&self, w: &Weights) -> SelfAttention {
        let (dim, heads) = (self.hidden_size, self.num_attention_heads);
        let kv_heads = match (self.new_decoder_architecture, self.multi_query) {
            (true, _) => self.num_kv_heads,
            (false, true) => 1,
            (false, false) => heads,
        };
        let shape = Heads { dim, heads, kv_heads, head_dim: dim / heads };
        let dense = w.linear("dense", dim, dim, self.bias);
        let attention = SelfAttention::grouped(w, "query_key_value", shape, self.bias, dense);
        if !self.alibi {
            return attention.rope(w.rope(shape.head_dim, self.rope_theta, &self.rope_scaling));
        }
        // The biases are scaled like q·k, which they are added to.
        let scale = (shape.head_dim as f32).powf(-0.5);
        let slopes: Vec<f32> = alibi_slopes(heads, 8.0).into_iter().map(|slope| slope * scale).collect();
        attention.slopes(Parameter::of(Source::numbers(&slopes), &[heads]))
    }

    fn block(&self, w: &Weights) -> Layers {
        let (attention, names) = (self.attention(&w.at("self_attention")), ["dense_h_to_4h", "dense_4h_to_h"]);
        let mlp = Mlp::new(&w.at("mlp"), names, self.hidden_size, self.ffn_hidden_size, self.bias, self.activation);
        let norm = |name| self.norm(w, name);
        match (self.parallel_attn, self.num_ln_in_parallel_attn) {
            (false, _) => Block::pre_norm(["input_layernorm", "post_attention_layernorm"].map(norm), attention, mlp),
            (true, 2) => Block::parallel_norms(["ln_attn", "ln_mlp"].map(norm), attention, mlp),
            (true, _) => Block::parallel(norm("input_layernorm"), attention, mlp),
        }
    }
}

struct Falcon;

impl Architecture for Falcon {
    const MODEL_TYPES: &'static [&'static str] = &["falcon"];
    type Config = Config;
    type Model = Decoder<Layers>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        if !c.num_attention_heads.is_multiple_of(c.num_kv_heads) {
            let (heads, groups) = (c.num_attention_heads, c.num_kv_heads);
            return Err(format!("config.json: {heads} heads do not split into num_kv_heads {groups} groups").into());
        }
        let model = w.at("transformer");
        let word_embeddings = model.embedding("word_embeddings", c.vocab_size, c.hidden_size);
        let layers = model.at("h").each(c.num_hidden_layers, |w, _| Ok(c.block(w)))?;
        let lm_head = LmHead::new(w, &word_embeddings, c.vocab_size, c.hidden_size, c.tie_word_embeddings);
        Ok(Decoder::of(word_embeddings, layers, c.norm(&model, "ln_f"), lm_head))
    }
}

export_plugin!(Falcon, examples = ["../../tests/fixtures/tiny/falcon/config.json"]);
