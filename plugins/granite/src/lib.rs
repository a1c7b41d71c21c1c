//! LLaMA with constants that keep the size of activations the same at every width: Granite, MiniCPM, HyperCLOVA X.
//! <https://arxiv.org/abs/2203.03466>, <https://arxiv.org/abs/2404.06395>
//!
//! ```text
//! x = a · E[token]
//! h = x + r · Attention(RMSNorm(x))            per layer
//! y = h + r · SwiGLU(RMSNorm(h))
//! logits = l · RMSNorm(y) · Eᵀ
//!
//! Attention(x) = softmax(s · rope(x Wq) · rope(x Wk)ᵀ) · (x Wv) · Wo
//!
//! model_type     a                      r                        s                      l
//! granite        embedding_multiplier   residual_multiplier      attention_multiplier   1 / logits_scaling
//! hyperclovax    the same, with logits_scaling itself for l, and perhaps norms after attention and SwiGLU too
//! minicpm        scale_emb              scale_depth / √layers    1 / √d                 dim_model_base / hidden_size
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        model_type: String = "granite".into(),
        vocab_size: usize,
        hidden_size: usize where >= 1,
        intermediate_size: usize,
        num_hidden_layers: usize where >= 1,
        num_attention_heads: usize where >= 1,
        num_key_value_heads: usize = num_attention_heads,
        head_dim: usize = hidden_size / num_attention_heads,
        hidden_act: Activation = Activation::Silu,
        rms_norm_eps: f32 = 1e-6,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        scale_emb: f32 = 1.0,
        scale_depth: f32 = (num_hidden_layers as f32).sqrt(),
        dim_model_base: usize = hidden_size,
        embedding_multiplier: f32 = scale_emb,
        residual_multiplier: f32 = scale_depth / (num_hidden_layers as f32).sqrt(),
        attention_multiplier: f32 = if model_type == "granite" { 1.0 } else { (head_dim as f32).powf(-0.5) },
        logits_scaling: f32 = 1.0,
        use_post_norm: bool = model_type == "hyperclovax",
        attention_bias: bool = false,
        mlp_bias: bool = false,
        tie_word_embeddings: Option<bool> = None,
    }
}

impl Config {
    fn logit_scale(&self) -> f32 {
        match &*self.model_type {
            "minicpm" => self.dim_model_base as f32 / self.hidden_size as f32,
            "hyperclovax" => self.logits_scaling,
            _ => 1.0 / self.logits_scaling,
        }
    }
}

fn attention(c: &Config, w: &Weights) -> SelfAttention {
    let (dim, heads, kv_heads) = (c.hidden_size, c.num_attention_heads, c.num_key_value_heads);
    let shape = Heads { dim, heads, kv_heads, head_dim: c.head_dim };
    SelfAttention::new(w, shape, c.attention_bias, c.attention_bias)
        .rope(w.rope(c.head_dim, c.rope_theta, &c.rope_scaling))
        .scale(c.attention_multiplier)
}

fn block(c: &Config, w: &Weights) -> Block {
    let norm = |name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps);
    let attention = attention(c, &w.at("self_attn"));
    let mlp = GatedMlp::new(&w.at("mlp"), c.hidden_size, c.intermediate_size, c.mlp_bias, c.hidden_act);
    let block = if c.use_post_norm {
        let names = ["input_layernorm", "post_norm1", "post_attention_layernorm", "post_norm2"];
        Block::both_norms(names.map(norm), attention, mlp)
    } else {
        Block::pre_norm(["input_layernorm", "post_attention_layernorm"].map(norm), attention, mlp)
    };
    block.branch_scale(c.residual_multiplier)
}

struct Granite;

impl Architecture for Granite {
    const MODEL_TYPES: &'static [&'static str] = &["granite", "minicpm", "hyperclovax"];
    type Config = Config;
    type Model = Decoder;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        let decoder = Decoder::new(w, decoder_shape!(c), |w, _| Ok(block(&c, w)))?;
        Ok(decoder.embed_scale(c.embedding_multiplier).logit_scale(c.logit_scale()))
    }
}

export_plugin!(Granite, examples = ["../../tests/fixtures/tiny/granite/config.json"]);
