//! MiMo V2 Flash: five layers with a window and sinks for each that sees all keys, values narrower than keys.
//! <https://huggingface.co/XiaomiMiMo/MiMo-V2-Flash>
//!
//! ```text
//! h = x + Attention(RMSNorm(x))            per layer
//! y = h + MoE(RMSNorm(h))
//! logits = RMSNorm(y) · Wᵀ
//!
//! Attention(x) = softmax(q · kᵀ / √d) · (s x Wv) · Wo      q = rope(x Wq), k = rope(x Wk), a third of the lanes turned
//!   with a window: more key heads, another rope, and one logit a head that joins the softmax and is dropped
//!
//! MoE(x) = t Σ pᵢ SwiGLUᵢ(x)     dense in the first layer: SwiGLU(x)
//!   the k largest sigmoid(x Wgate) + b within the best groups; p their sigmoids, scaled to a sum of 1
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize = 152_576,
        hidden_size: usize = 4096,
        intermediate_size: usize = 16_384,
        num_hidden_layers: usize = 48,
        num_attention_heads: usize where >= 1 = 64,
        swa_num_attention_heads: usize where >= 1 = num_attention_heads,
        num_key_value_heads: usize = 4,
        swa_num_key_value_heads: usize = 2 * num_key_value_heads,
        head_dim: usize = 192,
        swa_head_dim: usize = head_dim,
        v_head_dim: usize = 128,
        swa_v_head_dim: usize = v_head_dim,
        layernorm_epsilon: f32 = 1e-5,
        hidden_act: SiluOnly = SiluOnly,
        rms_norm_eps: f32 = layernorm_epsilon,
        rope_theta: f32 = 5e6,
        swa_rope_theta: f32 = 10_000.0,
        partial_rotary_factor: f32 = 0.334,
        rope_parameters: Option<LayerRopes> = None,
        attention_bias: bool = false,
        attention_value_scale: Option<f32> = Some(0.707),
        add_swa_attention_sink_bias: bool = true,
        add_full_attention_sink_bias: bool = false,
        // The second one counts the keys before the query's own.
        sliding_window: usize = 129,
        sliding_window_size: usize = sliding_window.saturating_sub(1),
        layer_types: Option<LayerTypes> = None,
        hybrid_layer_pattern: Option<Vec<usize>> = None,
        mlp_layer_types: Option<Vec<String>> = None,
        moe_layer_freq: Option<Vec<usize>> = None,
        moe_intermediate_size: usize = 2048,
        n_routed_experts: usize = 256,
        n_shared_experts: usize = 0,
        num_experts_per_tok: usize where >= 1 = 8,
        n_group: usize = 1,
        topk_group: usize = 1,
        norm_topk_prob: bool = true,
        routed_scaling_factor: f32 = 1.0,
        tie_word_embeddings: Option<bool> = None,
    }
}

impl Config {
    fn slides(&self, layer: usize) -> Result<bool> {
        match (&self.layer_types, &self.hybrid_layer_pattern) {
            (Some(types), _) => types.slides(layer),
            (None, Some(pattern)) => Ok(pattern.get(layer) == Some(&1)),
            (None, None) => Ok(layer > 0 && !(layer + 1).is_multiple_of(6)),
        }
    }

    fn is_sparse(&self, layer: usize) -> bool {
        match (&self.mlp_layer_types, &self.moe_layer_freq) {
            (Some(types), _) => types.get(layer).is_some_and(|kind| kind == "sparse"),
            (None, Some(sparse)) => sparse.get(layer) == Some(&1),
            (None, None) => layer > 0,
        }
    }
}

struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    sinks: Option<Parameter>,
    rope: Rope,
    head_dim: usize,
    v_head_dim: usize,
    v_scale: f32,
    window: Option<usize>,
}

impl Attention {
    fn new(c: &Config, w: &Weights, slides: bool) -> Self {
        let (heads, kv_heads, d, e) = match slides {
            true => (c.swa_num_attention_heads, c.swa_num_key_value_heads, c.swa_head_dim, c.swa_v_head_dim),
            false => (c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.v_head_dim),
        };
        let projections = [("q_proj", heads * d), ("k_proj", kv_heads * d), ("v_proj", kv_heads * e)];
        let [q_proj, k_proj, v_proj] = w.linears(c.hidden_size, c.attention_bias, projections);
        let theta = if slides { c.swa_rope_theta } else { c.rope_theta };
        let has_sinks = if slides { c.add_swa_attention_sink_bias } else { c.add_full_attention_sink_bias };
        Self {
            q_proj,
            k_proj,
            v_proj,
            o_proj: w.linear("o_proj", heads * e, c.hidden_size, false),
            sinks: has_sinks.then(|| w.tensor("attention_sink_bias", &[heads])),
            rope: match &c.rope_parameters {
                Some(ropes) => ropes.rope(w, d, slides),
                None => w.rope((d as f32 * c.partial_rotary_factor) as usize, theta, &None),
            },
            head_dim: d,
            v_head_dim: e,
            v_scale: c.attention_value_scale.unwrap_or(1.0),
            window: slides.then_some(c.sliding_window_size + 1),
        }
    }
}

impl Mixer for Attention {
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let q = layer.rotate(&self.rope, self.q_proj.forward(x).split_heads(self.head_dim));
        let k = layer.rotate(&self.rope, self.k_proj.forward(x).split_heads(self.head_dim));
        let v = self.v_proj.forward(x).split_heads(self.v_head_dim) * self.v_scale;
        let (scale, sinks) = ((self.head_dim as f32).powf(-0.5), self.sinks.as_ref().map(Parameter::tensor));
        let how = Attend { scale, window: self.window, sinks: sinks.as_ref(), ..Default::default() };
        self.o_proj.forward(&layer.attend(q, k, v, &how).merge_heads())
    }

    fn cache(&self) -> Cache {
        Cache::key_value(self.window)
    }
}

fn mlp(c: &Config, w: &Weights, layer: usize) -> Ffn {
    let (dim, experts, hidden) = (c.hidden_size, c.n_routed_experts, c.moe_intermediate_size);
    let dense = |w: &Weights, hidden| GatedMlp::new(w, dim, hidden, false, Activation::Silu);
    if !c.is_sparse(layer) {
        return Ffn::Dense(dense(w, c.intermediate_size));
    }
    let router = Router::sigmoid(w.linear("gate", dim, experts, false), c.num_experts_per_tok)
        .correction(w.tensor("gate.e_score_correction_bias", &[experts]))
        .groups(c.n_group, c.topk_group, GroupScore::BestTwo)
        .normalized(c.norm_topk_prob, 1e-20)
        .scale(c.routed_scaling_factor);
    let shared = (c.n_shared_experts > 0).then(|| dense(&w.at("shared_experts"), hidden * c.n_shared_experts));
    Ffn::Sparse(Moe::new(router, w.experts(ExpertsShape::new(experts, dim, hidden))).shared(shared))
}

fn block(c: &Config, w: &Weights, layer: usize) -> Result<Block<Attention, Ffn>> {
    let norm = |name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps);
    let norms = [norm("input_layernorm"), norm("post_attention_layernorm")];
    Ok(Block::pre_norm(norms, Attention::new(c, &w.at("self_attn"), c.slides(layer)?), mlp(c, &w.at("mlp"), layer)))
}

struct MiMoV2Flash;

impl Architecture for MiMoV2Flash {
    const MODEL_TYPES: &'static [&'static str] = &["mimo_v2_flash"];
    type Config = Config;
    type Model = Decoder<Block<Attention, Ffn>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        // Layers that predict further tokens.
        w.ignore("model.mtp");
        Decoder::new(w, decoder_shape!(c), |w, layer| block(&c, w, layer))
    }
}

export_plugin!(MiMoV2Flash, examples = ["../../tests/fixtures/tiny/mimo_v2_flash/config.json"]);
