//! Ring and Ling "linear", 2.0 to 3.0: linear attention in most layers, softmax attention at the end of each group of layers, and routed
//! experts. In 2.5 softmax attention is latent, in 3.0 linear attention is Kimi's. <https://arxiv.org/abs/2510.19338>
//!
//! ```text
//! h = x + Mixer(RMSNorm(x))                per layer
//! y = h + FFN(RMSNorm(h))
//! logits = RMSNorm(y) · Eᵀ
//!
//! q, k, v = split(x Wqkv),  q = rope(RMSNorm(q)), k = rope(RMSNorm(k))        each head normalized alone
//! Attention(x) = softmax(q · kᵀ / √d) · v · Wo
//! Linear(x) = (GroupRMSNorm(o) * sigmoid(x Wg)) · Wo,   S = exp(-sₕ f) S + k vᵀ,  o = qᵀ S / √d
//!   sₕ = 2^(-8 h / heads), h from 1;   f falls from 1 in the first layers to 0 in the last
//! Latent attention and Kimi's are words: see `Mla`, here perhaps with a gate for each head, and `KimiDelta`
//! FFN(x) = Σ pᵢ SwiGLUᵢ(x) + SwiGLU(x) over the k best experts of the best groups; in the first layers SwiGLU(x)
//! ```

use plugin_api::prelude::*;

/// Later models have another name for their type, and further defaults.
const HYBRID: &str = "bailing_hybrid";

config! {
    struct Config {
        model_type: String,
        vocab_size: usize,
        hidden_size: usize,
        intermediate_size: usize,
        num_hidden_layers: usize where >= 1,
        num_attention_heads: usize where >= 1,
        num_key_value_heads: usize = num_attention_heads,
        head_dim: usize = hidden_size / num_attention_heads,
        rms_norm_eps: f32 = 1e-6,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        rope_traditional: bool = false,
        partial_rotary_factor: f32 = if model_type == HYBRID { 0.5 } else { 1.0 },
        use_bias: bool = false,
        use_qkv_bias: bool = false,
        use_qk_norm: bool = model_type == HYBRID,
        layer_group_size: usize where >= 1,
        group_norm_size: usize where >= 1 = 1,
        first_k_dense_replace: usize = 0,
        num_experts: usize,
        num_experts_per_tok: usize where >= 1,
        moe_intermediate_size: usize,
        num_shared_experts: usize = 0,
        moe_shared_expert_intermediate_size: usize = moe_intermediate_size,
        moe_router_enable_shared_expert: bool = true,
        moe_router_enable_expert_bias: bool = model_type == HYBRID,
        score_function: String = if model_type == HYBRID { "sigmoid" } else { "softmax" }.into(),
        norm_topk_prob: bool = model_type == HYBRID,
        routed_scaling_factor: f32 = 1.0,
        n_group: usize = 1,
        topk_group: usize = 4,
        // Of latent attention.
        q_lora_rank: Option<usize> = None,
        kv_lora_rank: usize = 512,
        qk_nope_head_dim: usize = 128,
        qk_rope_head_dim: usize = 64,
        v_head_dim: usize = 128,
        rope_interleave: bool = true,
        // Of Kimi's linear attention.
        short_conv_kernel_size: usize where >= 1 = 4,
        kda_safe_gate: bool = true,
        kda_lower_bound: f32 = -5.0,
        num_nextn_predict_layers: usize = 1,
        norm_head: bool = false,
        tie_word_embeddings: bool = false,
    }
}

impl Config {
    /// The last layer of each whole group attends by softmax, and so do the layers after the last whole group.
    fn is_global(&self, layer: usize) -> bool {
        let grouped = self.num_hidden_layers / self.layer_group_size * self.layer_group_size;
        (layer + 1).is_multiple_of(self.layer_group_size) || layer >= grouped
    }

    fn rope(&self, w: &Weights, head_dim: usize) -> Rope {
        let turned = (head_dim as f32 * self.partial_rotary_factor) as usize;
        let rope = w.rope(turned, self.rope_theta, &self.rope_scaling);
        if self.rope_traditional { rope.interleaved() } else { rope }
    }

    /// Queries, keys and values from one matrix, and all of the block but what joins them.
    fn attention(&self, w: &Weights, kv_heads: usize, head_dim: usize) -> SelfAttention {
        let heads = self.num_attention_heads;
        let shape = Heads { dim: self.hidden_size, heads, kv_heads, head_dim };
        let dense = w.linear("dense", heads * head_dim, self.hidden_size, self.use_bias);
        let attention = SelfAttention::fused(w, "query_key_value", shape, self.use_qkv_bias, dense);
        let attention = attention.rope(self.rope(w, head_dim));
        if !self.use_qk_norm {
            return attention;
        }
        let norm = |name| w.rms_norm(name, head_dim, self.rms_norm_eps);
        attention.head_norms(norm("query_layernorm"), norm("key_layernorm"))
    }

    /// How fast each head of a layer forgets.
    fn log_decays(&self, layer: usize) -> Vec<f32> {
        // Of a number that is no power of two: those of the power below it, then every other one of the power above.
        let power_of_2 = |n: usize| (1..=n).map(move |h| (-8.0 * h as f64 / n as f64).exp2());
        let heads = self.num_attention_heads;
        let below = (heads + 1).next_power_of_two() / 2;
        let slopes = power_of_2(below).chain(power_of_2(2 * below).step_by(2)).take(heads);
        let layer = if self.model_type == HYBRID { layer } else { layer.saturating_sub(1) };
        let depth = layer as f64 / (self.num_hidden_layers - 1).max(1) as f64;
        slopes.map(|slope| (-slope * (1.0 - depth + 1e-5)) as f32).collect()
    }
}

struct LinearAttention {
    attention: SelfAttention,
    log_decays: Parameter,
    g_proj: Linear,
    g_norm: RmsNorm,
    g_norm_weight: Parameter,
    groups: usize,
    heads: usize,
    head_dim: usize,
}

impl LinearAttention {
    fn new(c: &Config, w: &Weights, layer: usize) -> Self {
        let (heads, groups) = (c.num_attention_heads, c.group_norm_size);
        let head_dim = if c.model_type == HYBRID { c.head_dim } else { c.hidden_size / heads };
        Self {
            attention: c.attention(w, heads, head_dim),
            log_decays: Parameter::of(Source::numbers(&c.log_decays(layer)), &[heads]),
            g_proj: w.linear("g_proj", c.hidden_size, heads * head_dim, false),
            g_norm: RmsNorm::plain(heads * head_dim / groups, c.rms_norm_eps),
            g_norm_weight: w.tensor("g_norm.weight", &[heads * head_dim]),
            groups,
            heads,
            head_dim,
        }
    }
}

impl Mixer for LinearAttention {
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let [q, k, v] = self.attention.project(x, layer);
        let q = q * (self.head_dim as f32).powf(-0.5);
        let o = layer.linear_attention(&q, &k, &v, &self.log_decays.tensor()).merge_heads();
        let o = self.g_norm.forward(&o.unflatten(self.groups)).flatten() * self.g_norm_weight.tensor();
        self.attention.output(&(o * self.g_proj.forward(x).sigmoid()))
    }

    fn cache(&self) -> Cache {
        Cache::state(&[self.heads, self.head_dim, self.head_dim])
    }
}

fn latent(c: &Config, w: &Weights) -> Mla {
    let shape = MlaShape {
        hidden_size: c.hidden_size,
        num_attention_heads: c.num_attention_heads,
        q_lora_rank: c.q_lora_rank,
        kv_lora_rank: c.kv_lora_rank,
        qk_nope_head_dim: c.qk_nope_head_dim,
        qk_rope_head_dim: c.qk_rope_head_dim,
        v_head_dim: c.v_head_dim,
        attention_bias: c.use_qkv_bias,
    };
    let rope = w.rope(c.qk_rope_head_dim, c.rope_theta, &c.rope_scaling);
    let rope = if c.rope_interleave { rope.interleaved() } else { rope };
    let mla = Mla::named(w, "dense", shape, rope).mscale(&c.rope_scaling);
    match w.has("g_proj.weight") {
        true => mla.head_gate(w.linear("g_proj", c.hidden_size, c.num_attention_heads, false)),
        false => mla,
    }
}

fn kimi_delta(c: &Config, w: &Weights) -> KimiDelta {
    let (heads, head_dim, kernel) = (c.num_attention_heads, c.head_dim, c.short_conv_kernel_size);
    let shape = KimiDeltaShape { dim: c.hidden_size, heads, head_dim, kernel, eps: c.rms_norm_eps };
    KimiDelta::new(w, shape, c.kda_safe_gate.then_some(c.kda_lower_bound))
}

/// Which of the four mixers a layer has, its tensors and its number tell.
fn mixer(c: &Config, w: &Weights, layer: usize) -> AnyMixer {
    if w.has("kv_a_proj_with_mqa.weight") {
        Box::new(latent(c, w))
    } else if w.has("q_conv1d.weight") {
        Box::new(kimi_delta(c, w))
    } else if c.is_global(layer) {
        Box::new(c.attention(w, c.num_key_value_heads, c.head_dim))
    } else {
        Box::new(LinearAttention::new(c, w, layer))
    }
}

fn ffn(c: &Config, w: &Weights, layer: usize) -> Result<Ffn> {
    let dim = c.hidden_size;
    let mlp = |w: Weights, hidden| GatedMlp::new(&w, dim, hidden, c.use_bias, Activation::Silu);
    if layer < c.first_k_dense_replace {
        return Ok(Ffn::Dense(mlp(w.clone(), c.intermediate_size)));
    }
    // Converted checkpoints have the router one level deeper.
    let gate = if w.has("gate.gate_proj.weight") { "gate.gate_proj" } else { "gate" };
    let gate = w.linear(gate, dim, c.num_experts, false);
    let router = match c.score_function.as_str() {
        "softmax" => Router::softmax(gate, c.num_experts_per_tok),
        "sigmoid" => Router::sigmoid(gate, c.num_experts_per_tok),
        other => {
            return Err(
                format!("config.json: score_function is {other:?}, it should be \"softmax\" or \"sigmoid\"").into()
            );
        }
    };
    let bias = c.moe_router_enable_expert_bias.then(|| w.tensor("gate.expert_bias", &[c.num_experts]));
    let router = router
        .correction(bias)
        .groups(c.n_group, c.topk_group, GroupScore::BestTwo)
        .normalized(c.norm_topk_prob && c.num_experts_per_tok > 1, 1e-20)
        .scale(c.routed_scaling_factor);
    let experts =
        w.experts(ExpertsShape { bias: c.use_bias, ..ExpertsShape::new(c.num_experts, dim, c.moe_intermediate_size) });
    let has_shared = c.num_shared_experts > 0 && c.moe_router_enable_shared_expert;
    let shared_dim = c.moe_shared_expert_intermediate_size * c.num_shared_experts;
    let shared = has_shared.then(|| mlp(w.at("shared_experts"), shared_dim));
    Ok(Ffn::Sparse(Moe::new(router, experts).shared(shared)))
}

fn lm_head(c: &Config, w: &Weights, embedding: &Embedding) -> LmHead {
    if !c.norm_head || c.tie_word_embeddings {
        return LmHead::new(w, embedding, c.vocab_size, c.hidden_size, Some(c.tie_word_embeddings));
    }
    // Columns of length 1.
    let weight = w.source("lm_head.weight").transpose().unit_rows(1e-7).transpose();
    LmHead::Own(Linear::of(weight, None, c.hidden_size, c.vocab_size))
}

struct BailingMoeLinear;

impl Architecture for BailingMoeLinear {
    const MODEL_TYPES: &'static [&'static str] = &["bailing_moe_linear", "bailing_hybrid"];
    type Config = Config;
    type Model = Decoder<Block<AnyMixer, Ffn>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        let model = w.at("model");
        // Layers after the last predict further tokens.
        (0..c.num_nextn_predict_layers.min(8))
            .for_each(|i| model.ignore(&format!("layers.{}.", c.num_hidden_layers + i)));
        let layers = model.at("layers").each(c.num_hidden_layers, |w, i| {
            let mixer = mixer(&c, &w.at("attention"), i);
            let norms = ["input_layernorm", "post_attention_layernorm"];
            let norms = norms.map(|name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps));
            Ok(Block::pre_norm(norms, mixer, ffn(&c, &w.at("mlp"), i)?))
        })?;
        let word_embeddings = model.embedding("word_embeddings", c.vocab_size, c.hidden_size);
        let lm_head = lm_head(&c, w, &word_embeddings);
        let norm = model.rms_norm("norm", c.hidden_size, c.rms_norm_eps);
        Ok(Decoder::of(word_embeddings, layers, norm, lm_head))
    }
}

export_plugin!(BailingMoeLinear, examples = ["../../tests/fixtures/tiny/bailing_moe_linear/config.json"]);
