//! Kimi Linear: three layers of Kimi delta attention to one of multi-head latent attention without positions, and routed experts.
//! <https://arxiv.org/abs/2510.26692>
//!
//! ```text
//! h = x + Mixer(RMSNorm(x))                per layer
//! y = h + FFN(RMSNorm(h))
//! logits = RMSNorm(y) · Eᵀ
//!
//! Delta(x):  q, k, v = silu(conv(x Wq, x Wk, x Wv)),   q and k of length 1, q / √d
//!   S = diag(exp(g)) S,  S += k (β (v - kᵀ S))ᵀ,  o = qᵀ S
//!   g = -exp(A_log) softplus(x Wf₁ Wf₂ + dt_bias), one for each key lane,   β = sigmoid(x Wb)
//!   (RMSNorm(o) * sigmoid(x Wg₁ Wg₂)) · Wo
//! Latent(x):  c = RMSNorm(x Wc), u = x Wu;   head h: q = x Wqₕ, k = [c Wkₕ, u], v = c Wvₕ
//!   softmax(q · kᵀ / √d) · v · Wo          computed with q Wkₕᵀ against c, which alone is kept
//! FFN(x) = Σ pᵢ SwiGLUᵢ(x) + SwiGLU(x) over the k best experts; in the first layers SwiGLU(x)
//! ```

use plugin_api::prelude::*;

config! {
    struct LinearAttention {
        // Counted from 1.
        kda_layers: Vec<usize>,
        num_heads: usize where >= 1,
        head_dim: usize where >= 1,
        short_conv_kernel_size: usize where >= 1 = 4,
    }
}

config! {
    struct Config {
        vocab_size: usize,
        hidden_size: usize,
        intermediate_size: usize,
        num_hidden_layers: usize,
        num_attention_heads: usize where >= 1,
        hidden_act: Activation = Activation::Silu,
        rms_norm_eps: f32 = 1e-5,
        linear_attn_config: LinearAttention,
        kv_lora_rank: usize,
        qk_nope_head_dim: usize = 128,
        qk_rope_head_dim: usize = 64,
        v_head_dim: usize = 128,
        num_experts: usize,
        moe_intermediate_size: usize,
        num_experts_per_token: usize where >= 1 = 8,
        num_shared_experts: usize = 1,
        moe_router_activation_func: String = "sigmoid".into(),
        moe_renormalize: bool = true,
        routed_scaling_factor: f32 = 1.0,
        first_k_dense_replace: usize = 1,
        moe_layer_freq: usize where >= 1 = 1,
        num_expert_group: usize = 1,
        topk_group: usize = 1,
        tie_word_embeddings: Option<bool> = None,
    }
}

fn delta(c: &Config, w: &Weights) -> KimiDelta {
    let LinearAttention { num_heads: heads, head_dim, short_conv_kernel_size: kernel, .. } = c.linear_attn_config;
    KimiDelta::new(w, KimiDeltaShape { dim: c.hidden_size, heads, head_dim, kernel, eps: c.rms_norm_eps }, None)
}

/// Multi-head latent attention whose shared lanes do not turn.
fn latent(c: &Config, w: &Weights) -> Mla {
    let shape = MlaShape {
        hidden_size: c.hidden_size,
        num_attention_heads: c.num_attention_heads,
        q_lora_rank: None,
        kv_lora_rank: c.kv_lora_rank,
        qk_nope_head_dim: c.qk_nope_head_dim,
        qk_rope_head_dim: c.qk_rope_head_dim,
        v_head_dim: c.v_head_dim,
        attention_bias: false,
    };
    Mla::new(w, shape, None)
}

fn ffn(c: &Config, w: &Weights, layer: usize) -> Result<Ffn> {
    let dim = c.hidden_size;
    let mlp = |w: Weights, hidden| GatedMlp::new(&w, dim, hidden, false, c.hidden_act);
    if layer < c.first_k_dense_replace || !layer.is_multiple_of(c.moe_layer_freq) {
        return Ok(Ffn::Dense(mlp(w.at("mlp"), c.intermediate_size)));
    }
    let (w, correction) = match w.has("block_sparse_moe.gate.weight") {
        true => (w.at("block_sparse_moe"), "gate.e_score_correction_bias"),
        false => (w.at("mlp"), "e_score_correction_bias"),
    };
    let (gate, top_k) = (w.linear("gate", dim, c.num_experts, false), c.num_experts_per_token);
    let router = match c.moe_router_activation_func.as_str() {
        "sigmoid" => Router::sigmoid(gate, top_k),
        "softmax" => Router::softmax(gate, top_k),
        other => {
            return Err(format!(
                "config.json: moe_router_activation_func is {other:?}, it should be \"sigmoid\" or \"softmax\""
            )
            .into());
        }
    };
    let router = router
        .correction(w.tensor(correction, &[c.num_experts]))
        .groups(c.num_expert_group, c.topk_group, GroupScore::BestTwo)
        .normalized(c.moe_renormalize && top_k > 1, 1e-20)
        .scale(c.routed_scaling_factor);
    let experts = w.experts(ExpertsShape::new(c.num_experts, dim, c.moe_intermediate_size));
    let shared =
        (c.num_shared_experts > 0).then(|| mlp(w.at("shared_experts"), c.moe_intermediate_size * c.num_shared_experts));
    Ok(Ffn::Sparse(Moe::new(router, experts).shared(shared)))
}

struct KimiLinear;

impl Architecture for KimiLinear {
    const MODEL_TYPES: &'static [&'static str] = &["kimi_linear"];
    type Config = Config;
    type Model = Decoder<Block<AnyMixer, Ffn>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        if c.hidden_act != Activation::Silu {
            return Err("config.json: hidden_act of kimi_linear should be silu, the experts know no other".into());
        }
        w.ignore("model.mtp");
        let block = |w: &Weights, i: usize| {
            let attn = w.at("self_attn");
            let mixer: AnyMixer = match c.linear_attn_config.kda_layers.contains(&(i + 1)) {
                true => Box::new(delta(&c, &attn)),
                false => Box::new(latent(&c, &attn)),
            };
            let norms = ["input_layernorm", "post_attention_layernorm"];
            let norms = norms.map(|name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps));
            Ok(Block::pre_norm(norms, mixer, ffn(&c, w, i)?))
        };
        Decoder::new(w, decoder_shape!(c), block)
    }
}

export_plugin!(KimiLinear, examples = ["../../tests/fixtures/tiny/kimi_linear/config.json"]);
