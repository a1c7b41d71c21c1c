//! Bamba: Mamba 2's mixers and some attention, each followed by a feed-forward layer. <https://huggingface.co/blog/bamba>
//!
//! ```text
//! h = x + Mixer(RMSNorm(x))                per layer
//! y = h + SwiGLU(RMSNorm(h))
//! logits = RMSNorm(y) · Eᵀ
//!
//! Mixer: attention in the layers of attn_layer_indices, half of each head's lanes turned by position; Mamba 2 elsewhere
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize = 128_000,
        hidden_size: usize = 4096,
        intermediate_size: usize = 14_336,
        num_hidden_layers: usize = 32,
        attn_layer_indices: Vec<usize> = vec![],
        num_attention_heads: usize where >= 1 = 32,
        num_key_value_heads: usize = num_attention_heads,
        hidden_act: Activation = Activation::Silu,
        rms_norm_eps: f32 = 1e-5,
        attention_bias: bool = false,
        mlp_bias: bool = false,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        mamba_n_heads: usize where >= 1 = 128,
        mamba_n_groups: usize where >= 1 = 1,
        mamba_d_state: usize where >= 1 = 256,
        mamba_expand: usize = 2,
        mamba_d_head: OrAuto = OrAuto::AUTO,
        mamba_d_conv: usize where >= 1 = 4,
        mamba_conv_bias: bool = true,
        mamba_proj_bias: bool = false,
        time_step_limit: TimeStepLimit = TimeStepLimit::NONE,
        tie_word_embeddings: Option<bool> = None,
    }
}

fn mixer(c: &Config, w: &Weights, layer: usize) -> AnyMixer {
    let (dim, heads) = (c.hidden_size, c.num_attention_heads);
    if c.attn_layer_indices.contains(&layer) {
        let shape = Heads { dim, heads, kv_heads: c.num_key_value_heads, head_dim: dim / heads };
        let attention = SelfAttention::new(&w.at("self_attn"), shape, c.attention_bias, c.attention_bias);
        return Box::new(attention.rope(w.rope(shape.head_dim / 2, c.rope_theta, &c.rope_scaling)));
    }
    let w = w.at("mamba");
    let shape = Mamba2Shape {
        dim,
        heads: c.mamba_n_heads,
        head_dim: c.mamba_d_head.or(c.mamba_expand * dim / c.mamba_n_heads),
        groups: c.mamba_n_groups,
        state: c.mamba_d_state,
        kernel: c.mamba_d_conv,
        bias: c.mamba_proj_bias,
        out_bias: c.mamba_proj_bias,
        conv_bias: c.mamba_conv_bias,
        act: c.hidden_act,
        time_step_limit: c.time_step_limit,
    };
    Box::new(Mamba2::new(&w, shape, GatedNorm::new(&w, "norm", shape.inner(), c.mamba_n_groups, c.rms_norm_eps)))
}

struct Bamba;

impl Architecture for Bamba {
    const MODEL_TYPES: &'static [&'static str] = &["bamba"];
    type Config = Config;
    type Model = Decoder<Block<AnyMixer>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        let (model, dim) = (w.at("model"), c.hidden_size);
        let embed_tokens = model.embedding("embed_tokens", c.vocab_size, dim);
        let lm_head = LmHead::new(w, &embed_tokens, c.vocab_size, dim, c.tie_word_embeddings);
        let layers = model.at("layers").each(c.num_hidden_layers, |w, layer| {
            let norms = ["input_layernorm", "pre_ff_layernorm"].map(|name| w.rms_norm(name, dim, c.rms_norm_eps));
            let ffn = GatedMlp::new(&w.at("feed_forward"), dim, c.intermediate_size, c.mlp_bias, c.hidden_act);
            Ok(Block::pre_norm(norms, mixer(&c, w, layer), ffn))
        })?;
        let norm = model.rms_norm("final_layernorm", dim, c.rms_norm_eps);
        Ok(Decoder::of(embed_tokens, layers, norm, lm_head))
    }
}

export_plugin!(Bamba, examples = ["../../tests/fixtures/tiny/bamba/config.json"]);
