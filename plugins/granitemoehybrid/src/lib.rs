//! Granite 4: Mamba 2's mixers and some attention, each followed by experts beside a shared one.
//! <https://huggingface.co/ibm-granite/granite-4.0-tiny-preview>
//!
//! ```text
//! h = x + r Mixer(RMSNorm(x))              per layer; r is residual_multiplier
//! y = h + r FFN(RMSNorm(h))
//! logits = RMSNorm(y) · Eᵀ / logits_scaling, the embeddings times embedding_multiplier
//!
//! Mixer: by layer_types, Mamba 2 or attention with the scale attention_multiplier, without positions unless
//!        position_embedding_type is rope
//! FFN(x) = SwiGLU_shared(x) + Σ pᵢ SwiGLUᵢ(x) over the k largest of x Wrouter, p their softmax; without experts the first alone
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize = 32_000,
        hidden_size: usize = 4096,
        intermediate_size: usize = 11_008,
        shared_intermediate_size: usize = 1024,
        num_hidden_layers: usize = 32,
        layer_types: Option<Vec<String>> = None,
        num_attention_heads: usize where >= 1 = 32,
        num_key_value_heads: usize = num_attention_heads,
        hidden_act: Activation = Activation::Silu,
        rms_norm_eps: f32 = 1e-6,
        attention_bias: bool = false,
        embedding_multiplier: f32 = 1.0,
        logits_scaling: f32 = 1.0,
        residual_multiplier: f32 = 1.0,
        attention_multiplier: f32 = 1.0,
        num_local_experts: usize = 8,
        num_experts_per_tok: usize = 2,
        position_embedding_type: Option<String> = None,
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

impl Config {
    fn attends(&self, layer: usize) -> Result<bool> {
        let Some(types) = &self.layer_types else { return Ok(false) };
        match types.get(layer).map(String::as_str) {
            Some("attention" | "full_attention") => Ok(true),
            Some("mamba" | "linear_attention") => Ok(false),
            kind => {
                Err(format!("config.json: layer_types says {kind:?} of layer {layer}, it should be mamba or attention")
                    .into())
            }
        }
    }
}

fn attention(c: &Config, w: &Weights) -> SelfAttention {
    let head_dim = c.hidden_size / c.num_attention_heads;
    let shape = Heads { dim: c.hidden_size, heads: c.num_attention_heads, kv_heads: c.num_key_value_heads, head_dim };
    let turns = c.position_embedding_type.as_deref() == Some("rope");
    SelfAttention::new(w, shape, c.attention_bias, c.attention_bias)
        .scale(c.attention_multiplier)
        .rope(turns.then(|| w.rope(head_dim, c.rope_theta, &c.rope_scaling)))
}

fn mamba(c: &Config, w: &Weights) -> Mamba2 {
    let shape = Mamba2Shape {
        dim: c.hidden_size,
        heads: c.mamba_n_heads,
        head_dim: c.mamba_d_head.or(c.mamba_expand * c.hidden_size / c.mamba_n_heads),
        groups: c.mamba_n_groups,
        state: c.mamba_d_state,
        kernel: c.mamba_d_conv,
        bias: c.mamba_proj_bias,
        out_bias: c.mamba_proj_bias,
        conv_bias: c.mamba_conv_bias,
        act: c.hidden_act,
        time_step_limit: c.time_step_limit,
    };
    Mamba2::new(w, shape, GatedNorm::new(w, "norm", shape.inner(), c.mamba_n_groups, c.rms_norm_eps))
}

/// mlx-lm splits the dense model's fused projection, and names it as others do.
fn shared(c: &Config, w: &Weights) -> GatedMlp {
    let (dim, hidden) = (c.hidden_size, c.shared_intermediate_size);
    if w.has("mlp.up_proj.weight") {
        return GatedMlp::new(&w.at("mlp"), dim, hidden, false, c.hidden_act);
    }
    let (w, input) = (w.at("shared_mlp"), w.source("shared_mlp.input_linear.weight"));
    let [gate, up] = [0..hidden, hidden..2 * hidden].map(|rows| Linear::of(input.rows(rows), None, dim, hidden));
    GatedMlp::of(gate, up, w.linear("output_linear", hidden, dim, false), c.hidden_act)
}

fn ffn(c: &Config, w: &Weights) -> Ffn {
    if c.num_local_experts == 0 {
        return Ffn::Dense(shared(c, w));
    }
    let moe = w.at("block_sparse_moe");
    let router = moe.linear("router.layer", c.hidden_size, c.num_local_experts, false);
    let experts = moe.experts(ExpertsShape::new(c.num_local_experts, c.hidden_size, c.intermediate_size));
    Ffn::Sparse(Moe::new(Router::chosen_softmax(router, c.num_experts_per_tok), experts).shared(shared(c, w)))
}

struct GraniteMoeHybrid;

impl Architecture for GraniteMoeHybrid {
    const MODEL_TYPES: &'static [&'static str] = &["granitemoehybrid"];
    type Config = Config;
    type Model = Decoder<Block<AnyMixer, Ffn>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        let decoder = Decoder::new(w, decoder_shape!(c), |w, layer| {
            let norm = |name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps);
            let mixer: AnyMixer = match c.attends(layer)? {
                true => Box::new(attention(&c, &w.at("self_attn"))),
                false => Box::new(mamba(&c, &w.at("mamba"))),
            };
            let norms = [norm("input_layernorm"), norm("post_attention_layernorm")];
            Ok(Block::pre_norm(norms, mixer, ffn(&c, w)).branch_scale(c.residual_multiplier))
        })?;
        Ok(decoder.embed_scale(c.embedding_multiplier).logit_scale(1.0 / c.logits_scaling))
    }
}

export_plugin!(GraniteMoeHybrid, examples = ["../../tests/fixtures/tiny/granitemoehybrid/config.json"]);
