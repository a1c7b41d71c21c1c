//! MPT: positions by linear biases, and no biases anywhere else. <https://huggingface.co/mosaicml/mpt-7b>
//!
//! ```text
//! h = x + Attention(LayerNorm(x))                      per layer; LayerNorm has weights alone
//! y = h + gelu(LayerNorm(h) W₁) · W₂
//! logits = LayerNorm(y) · Eᵀ
//!
//! Attention(x) = softmax(q · kᵀ / √d - m · distance) · v · Wo      q, k, v: in x Wqkv, which may be clipped; m by head
//! ```

use plugin_api::prelude::*;

config! {
    struct AttentionConfig {
        attn_type: String = "multihead_attention".into(),
        clip_qkv: Option<f32> = None,
        softmax_scale: Option<f32> = None,
        prefix_lm: bool = false,
        qk_ln: bool = false,
        alibi: bool = true,
        alibi_bias_max: f32 = 8.0,
    }
}

config! {
    struct Config {
        vocab_size: usize = 50_368,
        d_model: usize = 2048,
        n_heads: usize where >= 1 = 16,
        n_layers: usize = 24,
        layer_norm_epsilon: f32 = 1e-5,
        no_bias: bool = true,
        attn_config: Option<AttentionConfig> = None,
        tie_word_embeddings: Option<bool> = Some(true),
    }
}

type Layers = Block<SelfAttention, Mlp>;

impl Config {
    /// What of MPT's code no published model has used, and transformers has not taken over.
    fn unknown(&self) -> Option<&str> {
        let Some(attn) = &self.attn_config else { return (!self.no_bias).then_some("no_bias is false") };
        let cases = [
            (!self.no_bias, "no_bias is false"),
            (attn.attn_type != "multihead_attention", "attn_config.attn_type is not multihead_attention"),
            (attn.prefix_lm, "attn_config.prefix_lm is true"),
            (attn.qk_ln, "attn_config.qk_ln is true"),
            (!attn.alibi, "attn_config.alibi is false"),
        ];
        cases.into_iter().find(|(is, _)| *is).map(|(_, what)| what)
    }

    fn norm(&self, w: &Weights, name: &str) -> LayerNorm {
        w.layer_norm(name, self.d_model, self.layer_norm_epsilon, false)
    }

    fn attention(&self, w: &Weights) -> SelfAttention {
        let (dim, heads, attn) = (self.d_model, self.n_heads, self.attn_config.as_ref());
        let head_dim = dim / heads;
        let slopes = alibi_slopes(heads, attn.map_or(8.0, |attn| attn.alibi_bias_max));
        let shape = Heads { dim, heads, kv_heads: heads, head_dim };
        SelfAttention::fused(w, "Wqkv", shape, false, w.linear("out_proj", dim, dim, false))
            .slopes(Parameter::of(Source::numbers(&slopes), &[heads]))
            .clip(attn.and_then(|attn| attn.clip_qkv))
            .scale(attn.and_then(|attn| attn.softmax_scale).unwrap_or((head_dim as f32).powf(-0.5)))
    }

    fn block(&self, w: &Weights) -> Layers {
        let (dim, names) = (self.d_model, ["up_proj", "down_proj"]);
        let mlp = Mlp::new(&w.at("ffn"), names, dim, 4 * dim, false, Activation::Gelu);
        Block::pre_norm(["norm_1", "norm_2"].map(|name| self.norm(w, name)), self.attention(&w.at("attn")), mlp)
    }
}

struct Mpt;

impl Architecture for Mpt {
    const MODEL_TYPES: &'static [&'static str] = &["mpt"];
    type Config = Config;
    type Model = Decoder<Layers>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        if let Some(what) = c.unknown() {
            return Err(format!("config.json: {what}; of MPT's models only those without are known").into());
        }
        let model = w.at("transformer");
        let embeddings = model.embedding("wte", c.vocab_size, c.d_model);
        let layers = model.at("blocks").each(c.n_layers, |w, _| Ok(c.block(w)))?;
        let lm_head = LmHead::new(w, &embeddings, c.vocab_size, c.d_model, c.tie_word_embeddings);
        Ok(Decoder::of(embeddings, layers, c.norm(&model, "norm_f"), lm_head))
    }
}

export_plugin!(Mpt);
