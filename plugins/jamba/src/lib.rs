//! Jamba: Mamba's mixers, attention in every few layers, and experts in every other one. <https://arxiv.org/abs/2403.19887>
//!
//! ```text
//! h = x + Mixer(RMSNorm(x))                per layer
//! y = h + FFN(RMSNorm(h))
//! logits = RMSNorm(y) · Eᵀ
//!
//! Mixer: attention without positions where layer mod attn_layer_period = attn_layer_offset, elsewhere Mamba with RMSNorms on Δ, B, C
//! FFN: Σ pᵢ SwiGLUᵢ(x) over the k largest pᵢ of softmax(x Wrouter) where layer mod expert_layer_period = expert_layer_offset,
//!      elsewhere SwiGLU(x)
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize = 65_536,
        hidden_size: usize = 4096,
        intermediate_size: usize = 14_336,
        num_hidden_layers: usize = 32,
        num_attention_heads: usize where >= 1 = 32,
        num_key_value_heads: usize = num_attention_heads,
        hidden_act: Activation = Activation::Silu,
        rms_norm_eps: f32 = 1e-6,
        num_experts: usize = 16,
        num_experts_per_tok: usize where >= 1 = 2,
        expert_layer_period: usize where >= 1 = 2,
        expert_layer_offset: usize = 1,
        attn_layer_period: usize where >= 1 = 8,
        attn_layer_offset: usize = 4,
        mamba_d_state: usize where >= 1 = 16,
        mamba_d_conv: usize where >= 1 = 4,
        mamba_expand: usize = 2,
        mamba_dt_rank: OrAuto = OrAuto::AUTO,
        mamba_conv_bias: bool = true,
        mamba_proj_bias: bool = false,
        tie_word_embeddings: Option<bool> = None,
    }
}

fn mixer(c: &Config, w: &Weights, layer: usize) -> AnyMixer {
    let (dim, heads) = (c.hidden_size, c.num_attention_heads);
    if layer % c.attn_layer_period == c.attn_layer_offset {
        let shape = Heads { dim, heads, kv_heads: c.num_key_value_heads, head_dim: dim / heads };
        return Box::new(SelfAttention::new(&w.at("self_attn"), shape, false, false));
    }
    let w = w.at("mamba");
    let shape = MambaShape {
        dim,
        inner: c.mamba_expand * dim,
        state: c.mamba_d_state,
        kernel: c.mamba_d_conv,
        dt_rank: c.mamba_dt_rank.or(dim.div_ceil(16)),
        bias: c.mamba_proj_bias,
        conv_bias: c.mamba_conv_bias,
        act: c.hidden_act,
    };
    let norms = [("dt_layernorm", shape.dt_rank), ("b_layernorm", shape.state), ("c_layernorm", shape.state)];
    Box::new(Mamba::new(&w, shape).norms(norms.map(|(name, lanes)| w.rms_norm(name, lanes, c.rms_norm_eps))))
}

fn ffn(c: &Config, w: &Weights, layer: usize) -> Ffn {
    let (dim, hidden) = (c.hidden_size, c.intermediate_size);
    if c.num_experts < 2 || layer % c.expert_layer_period != c.expert_layer_offset {
        return Ffn::Dense(GatedMlp::new(w, dim, hidden, false, c.hidden_act));
    }
    let router = Router::softmax(w.linear("router", dim, c.num_experts, false), c.num_experts_per_tok);
    Ffn::Sparse(Moe::new(router, w.experts(ExpertsShape::new(c.num_experts, dim, hidden))))
}

struct Jamba;

impl Architecture for Jamba {
    const MODEL_TYPES: &'static [&'static str] = &["jamba"];
    type Config = Config;
    type Model = Decoder<Block<AnyMixer, Ffn>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        let (model, dim) = (w.at("model"), c.hidden_size);
        let embed_tokens = model.embedding("embed_tokens", c.vocab_size, dim);
        let lm_head = LmHead::new(w, &embed_tokens, c.vocab_size, dim, c.tie_word_embeddings);
        let layers = model.at("layers").each(c.num_hidden_layers, |w, layer| {
            let norms = ["input_layernorm", "pre_ff_layernorm"].map(|name| w.rms_norm(name, dim, c.rms_norm_eps));
            Ok(Block::pre_norm(norms, mixer(&c, w, layer), ffn(&c, &w.at("feed_forward"), layer)))
        })?;
        let norm = model.rms_norm("final_layernorm", dim, c.rms_norm_eps);
        Ok(Decoder::of(embed_tokens, layers, norm, lm_head))
    }
}

export_plugin!(Jamba, examples = ["../../tests/fixtures/tiny/jamba/config.json"]);
