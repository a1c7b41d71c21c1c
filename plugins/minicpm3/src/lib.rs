//! MiniCPM3: latent attention in dense blocks whose branches, embeddings and logits are scaled by the model's depth and width.
//! <https://arxiv.org/abs/2404.06395>
//!
//! ```text
//! x = a E[ids]                             a = scale_emb
//! h = x + b MLA(RMSNorm(x))                b = scale_depth / √layers
//! y = h + b SwiGLU(RMSNorm(h))
//! logits = RMSNorm(y) · E · dim_model_base / width
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize,
        hidden_size: usize where >= 1,
        intermediate_size: usize,
        num_hidden_layers: usize where >= 1,
        num_attention_heads: usize where >= 1,
        q_lora_rank: Option<usize> = None,
        kv_lora_rank: usize = 256,
        qk_nope_head_dim: usize = 64,
        qk_rope_head_dim: usize where >= 2 = 32,
        v_head_dim: usize where >= 1 = hidden_size / num_attention_heads,
        attention_bias: bool = false,
        hidden_act: Activation = Activation::Silu,
        rms_norm_eps: f32 = 1e-5,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        scale_emb: f32 = 12.0,
        scale_depth: f32 = 1.4,
        dim_model_base: usize = 256,
        tie_word_embeddings: Option<bool> = None,
    }
}

fn block(c: &Config, w: &Weights) -> Block<Mla> {
    let (attn, norm) = (w.at("self_attn"), |name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps));
    let shape = MlaShape {
        hidden_size: c.hidden_size,
        num_attention_heads: c.num_attention_heads,
        q_lora_rank: c.q_lora_rank,
        kv_lora_rank: c.kv_lora_rank,
        qk_nope_head_dim: c.qk_nope_head_dim,
        qk_rope_head_dim: c.qk_rope_head_dim,
        v_head_dim: c.v_head_dim,
        attention_bias: c.attention_bias,
    };
    let rope = w.rope(c.qk_rope_head_dim, c.rope_theta, &c.rope_scaling);
    let mla = Mla::new(&attn, shape, rope).mscale(&c.rope_scaling);
    let mlp = GatedMlp::new(&w.at("mlp"), c.hidden_size, c.intermediate_size, false, c.hidden_act);
    Block::pre_norm([norm("input_layernorm"), norm("post_attention_layernorm")], mla, mlp)
        .branch_scale(c.scale_depth / (c.num_hidden_layers as f32).sqrt())
}

struct MiniCpm3;

impl Architecture for MiniCpm3 {
    const MODEL_TYPES: &'static [&'static str] = &["minicpm3"];
    type Config = Config;
    type Model = Decoder<Block<Mla>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        let decoder = Decoder::new(w, decoder_shape!(c), |w, _| Ok(block(&c, w)))?;
        Ok(decoder.embed_scale(c.scale_emb).logit_scale(c.dim_model_base as f32 / c.hidden_size as f32))
    }
}

export_plugin!(MiniCpm3, examples = ["../../tests/fixtures/tiny/minicpm3/config.json"]);
