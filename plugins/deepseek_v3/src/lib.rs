//! DeepSeek V2, V3 and V3.2, and the models of others in their shape: Kimi K2, GLM 4.7 Flash, GLM 5, JoyAI,
//! A.X K1 (a norm after each MoE) and K2 (gates on norms and on what attention gives), Mistral Small 4, and Youtu (all dense).
//! V2: <https://arxiv.org/abs/2405.04434>, V3: <https://arxiv.org/abs/2412.19437>, V3.2: <https://arxiv.org/abs/2512.02556>
//!
//! ```text
//! h = x + MLA(RMSNorm(x))                  per layer
//! y = h + F(RMSNorm(h))                    F: SwiGLU in the first layers, then MoE
//! logits = RMSNorm(y) · E
//!
//! MoE(x) = SwiGLUₛ(x) + a Σ pᵢ SwiGLUᵢ(x)  over the k best experts of the best groups
//!   V3: pᵢ = sᵢ / Σ s over the chosen, s = sigmoid(x Wgate); s + b chooses, groups by the sum of their best two
//!   V2: pᵢ = softmax(x Wgate)ᵢ, groups by their best; Mistral: the same with V3's groups and sum
//!
//! V3.2: attention sees only the keys of the k largest Iₛ = Σⱼ wⱼ relu(qⱼ · kₛ) over an indexer's heads j
//!   q = rope(c Wq), k = rope(LayerNorm(x Wk)), w = x Ww / √(heads d), c the queries' latent
//!   GLM 5: some layers use the selection of the one before
//! A.X K2: V3.2 with RMSNorm(x) * sigmoid(silu(RMSNorm(x) W₁) W₂) before MLA and MoE, and gated queries
//! ```

use plugin_api::prelude::*;
use std::cell::RefCell;

config! {
    struct Config {
        // Of a wrapper the text model's counts.
        text_model_type: Option<String> = None,
        model_type: String,
        kind: String = text_model_type.clone().unwrap_or(model_type.clone()),
        vocab_size: usize,
        hidden_size: usize,
        intermediate_size: usize,
        num_hidden_layers: usize,
        num_attention_heads: usize where >= 1,
        q_lora_rank: Option<usize> = None,
        kv_lora_rank: usize = 512,
        qk_nope_head_dim: usize = 128,
        qk_rope_head_dim: usize where >= 2 = 64,
        v_head_dim: usize where >= 1 = 128,
        attention_bias: bool = false,
        hidden_act: Activation = Activation::Silu,
        rms_norm_eps: f32 = 1e-6,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        rope_interleave: bool = true,
        moe_intermediate_size: usize = intermediate_size,
        // Without experts all layers are dense.
        n_routed_experts: Option<usize> = None,
        n_shared_experts: Option<usize> = None,
        num_experts_per_tok: usize where >= 1 = 8,
        n_group: usize = 1,
        topk_group: usize where >= 1 = n_group.max(1),
        norm_topk_prob: bool = true,
        routed_scaling_factor: f32 = if matches!(kind.as_str(), "deepseek_v2" | "mistral4") { 1.0 } else { 2.5 },
        first_k_dense_replace: usize = if matches!(kind.as_str(), "axk1" | "axk2" | "glm4_moe_lite") { 1 } else { 0 },
        moe_layer_freq: usize where >= 1 = 1,
        mlp_layer_types: Option<Vec<String>> = None,
        // Layers that predict further tokens follow the last one.
        num_nextn_predict_layers: usize = 1,
        index_topk: usize where >= 1 = 2048,
        index_head_dim: usize where >= 2 = 128,
        index_n_heads: usize where >= 1 = if kind == "axk2" { 16 } else { 64 },
        gated_norm_rank: usize = 16,
        indexer_types: Option<Vec<String>> = None,
        index_topk_pattern: Option<String> = None,
        index_topk_freq: usize where >= 1 = 1,
        index_skip_topk_offset: usize = 2,
        tie_word_embeddings: Option<bool> = None,
    }
}

impl Config {
    fn is_sparse(&self, layer: usize) -> bool {
        let by_number = layer >= self.first_k_dense_replace && layer.is_multiple_of(self.moe_layer_freq);
        let by_type = self.mlp_layer_types.as_ref().and_then(|types| types.get(layer));
        self.n_routed_experts.is_some() && by_type.map_or(by_number, |kind| kind == "sparse")
    }

    /// Whether a layer chooses keys itself, in models that choose keys.
    fn indexes(&self, layer: usize) -> bool {
        match (&self.indexer_types, &self.index_topk_pattern) {
            (Some(types), _) => types.get(layer).is_none_or(|kind| kind == "full"),
            (None, Some(pattern)) => pattern.chars().nth(layer).is_none_or(|c| c == 'F'),
            (None, None) => {
                (layer + 1).saturating_sub(self.index_skip_topk_offset).is_multiple_of(self.index_topk_freq)
            }
        }
    }
}

/// Chooses the keys that attention sees.
struct Indexer {
    wq_b: Linear,
    wk: Linear,
    k_norm: LayerNorm,
    weights_proj: Linear,
    rope: Rope,
    head_dim: usize,
    scale: f32,
    top_k: usize,
    /// Lanes of the queries' latent.
    rank: usize,
}

impl Indexer {
    fn new(c: &Config, w: &Weights) -> Self {
        let (heads, head_dim) = (c.index_n_heads, c.index_head_dim);
        let rope = w.rope(c.qk_rope_head_dim, c.rope_theta, &c.rope_scaling);
        Self {
            wq_b: w.linear("wq_b", c.q_lora_rank.unwrap_or(c.hidden_size), heads * head_dim, false),
            wk: w.linear("wk", c.hidden_size, head_dim, false),
            k_norm: w.layer_norm("k_norm", head_dim, 1e-6, true),
            weights_proj: w.linear("weights_proj", c.hidden_size, heads, false),
            rope: if c.kind == "glm_moe_dsa" { rope.interleaved() } else { rope },
            head_dim,
            scale: ((heads * head_dim) as f32).powf(-0.5),
            top_k: c.index_topk,
            rank: c.q_lora_rank.unwrap_or(c.hidden_size),
        }
    }

    fn choose(&self, x: &Tensor, latent: &Tensor, layer: &mut Layer) -> Tensor {
        let q = layer.rotate(&self.rope, self.wq_b.forward(latent).split_heads(self.head_dim));
        let k = layer.rotate(&self.rope, self.k_norm.forward(&self.wk.forward(x)).split_heads(self.head_dim));
        layer.index(q, k, self.weights_proj.forward(x) * self.scale, self.top_k)
    }
}

fn mla(c: &Config, w: &Weights) -> Mla {
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
    let number = |key| c.rope_scaling.as_ref().and_then(|s| s.number(key));
    Mla::new(w, shape, if c.rope_interleave { rope.interleaved() } else { rope })
        .mscale(&c.rope_scaling)
        .growing_queries(number("llama_4_scaling_beta").zip(number("original_max_position_embeddings")))
}

fn ffn(c: &Config, w: &Weights, layer: usize) -> Ffn {
    let (dim, hidden) = (c.hidden_size, c.moe_intermediate_size);
    let mlp = |w: &Weights, hidden| GatedMlp::new(w, dim, hidden, false, c.hidden_act);
    let Some(experts) = c.n_routed_experts.filter(|_| c.is_sparse(layer)) else {
        return Ffn::Dense(mlp(w, c.intermediate_size));
    };
    let gate = w.linear("gate", dim, experts, false);
    let (k, groups, kept) = (c.num_experts_per_tok, c.n_group, c.topk_group);
    // A.X K1's checkpoints have none, so it is optional there.
    let corrected = c.kind != "axk1" || w.has("gate.e_score_correction_bias");
    let correction = || corrected.then(|| w.at("gate").tensor("e_score_correction_bias", &[experts]));
    let router = match c.kind.as_str() {
        "deepseek_v2" => Router::softmax(gate, k).groups(groups, kept, GroupScore::Best),
        "mistral4" => {
            Router::softmax(gate, k).groups(groups, kept, GroupScore::BestTwo).normalized(c.norm_topk_prob, 1e-20)
        }
        _ => Router::sigmoid(gate, k)
            .correction(correction())
            .groups(groups, kept, GroupScore::BestTwo)
            .normalized(c.norm_topk_prob, 1e-20),
    };
    let router = if c.kind == "axk2" { router.zeroed_groups() } else { router };
    let shared = c.n_shared_experts.filter(|&n| n > 0).map(|n| mlp(&w.at("shared_experts"), n * hidden));
    let experts = w.experts(ExpertsShape::new(experts, dim, hidden));
    Ffn::Sparse(Moe::new(router.scale(c.routed_scaling_factor), experts).shared(shared))
}

/// RMSNorm, in A.X K2 with a gate.
struct MaybeGated {
    norm: RmsNorm,
    /// W₁ and W₂.
    gate: Option<[Linear; 2]>,
}

impl MaybeGated {
    fn new(c: &Config, w: &Weights, name: &str, gated: bool) -> Self {
        let (dim, rank, at) = (c.hidden_size, c.gated_norm_rank, w.at(name));
        if !gated {
            return Self { norm: w.rms_norm(name, dim, c.rms_norm_eps), gate: None };
        }
        let gate = [at.linear("W_down", dim, rank, false), at.linear("W_up", rank, dim, false)];
        Self { norm: at.rms_norm("norm", dim, c.rms_norm_eps), gate: Some(gate) }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let y = self.norm.forward(x);
        match &self.gate {
            Some([down, up]) => &y * up.forward(&down.forward(&y).silu()).sigmoid(),
            None => y,
        }
    }
}

struct Block {
    input_layernorm: MaybeGated,
    self_attn: Mla,
    /// Whether this layer sees selected keys only, and what chooses them; without, the layer before did.
    selects: bool,
    indexer: Option<Indexer>,
    post_attention_layernorm: MaybeGated,
    mlp: Ffn,
    /// After a routed layer, in A.X K1.
    post_mlp_layernorm: Option<RmsNorm>,
}

impl Block {
    fn new(c: &Config, w: &Weights, layer: usize) -> Self {
        let gated = c.kind == "axk2";
        let normed = c.kind == "axk1" && c.is_sparse(layer);
        if !normed {
            w.ignore("post_mlp_layernorm.");
        }
        let (attn, selects) = (w.at("self_attn"), matches!(c.kind.as_str(), "axk2" | "deepseek_v32" | "glm_moe_dsa"));
        Self {
            input_layernorm: MaybeGated::new(c, w, "input_layernorm", gated),
            self_attn: mla(c, &attn),
            selects,
            indexer: (selects && c.indexes(layer)).then(|| Indexer::new(c, &attn.at("indexer"))),
            post_attention_layernorm: MaybeGated::new(c, w, "post_attention_layernorm", gated && c.is_sparse(layer)),
            mlp: ffn(c, &w.at("mlp"), layer),
            post_mlp_layernorm: normed.then(|| w.rms_norm("post_mlp_layernorm", c.hidden_size, c.rms_norm_eps)),
        }
    }

    /// The indexer's keys come first, then the latents.
    fn cache(&self) -> Cache {
        let indexed = if self.indexer.is_some() { Cache::key_value(None) } else { Cache::none() };
        indexed.and(self.self_attn.cache())
    }

    fn forward(&self, x: &Tensor, selection: &RefCell<Option<Tensor>>, layer: &mut Layer) -> Tensor {
        let normed = self.input_layernorm.forward(x);
        let latent = self.self_attn.query_latent(&normed);
        if let Some(indexer) = &self.indexer {
            *selection.borrow_mut() = Some(indexer.choose(&normed, &latent.narrow(0, indexer.rank), layer));
        }
        let selection = selection.borrow();
        let h = x + self.self_attn.attend(&normed, &latent, selection.as_ref().filter(|_| self.selects), layer);
        let y = self.mlp.forward(&self.post_attention_layernorm.forward(&h));
        h + self.post_mlp_layernorm.iter().fold(y, |y, norm| norm.forward(&y))
    }
}

struct DeepseekV3(Decoder<Block>);

impl Architecture for DeepseekV3 {
    const MODEL_TYPES: &'static [&'static str] = &[
        "deepseek_v3",
        "deepseek_v2",
        "deepseek_v32",
        "axk1",
        "axk2",
        "glm4_moe_lite",
        "glm_moe_dsa",
        "joyai_llm_flash",
        "kimi_k2",
        "kimi_k25",
        "kimi_vl",
        "mistral4",
        "mistral3.mistral4",
        "youtu",
        "youtu_llm",
    ];
    type Config = Config;
    type Model = Self;

    fn new(c: Config, w: &Weights) -> Result<Self> {
        if c.hidden_act != Activation::Silu {
            return Err(format!("config.json: hidden_act of {} should be silu", c.kind).into());
        }
        let layers = w.at("model.layers");
        for further in 0..c.num_nextn_predict_layers.min(8) {
            layers.ignore(&format!("{}.", c.num_hidden_layers + further));
        }
        Ok(Self(Decoder::new(w, decoder_shape!(c), |w, layer| Ok(Block::new(&c, w, layer)))?))
    }
}

impl Model for DeepseekV3 {
    fn caches(&self) -> Vec<Cache> {
        self.0.layers.iter().map(Block::cache).collect()
    }

    fn forward(&self, tokens: &Tensor, step: &mut Step) -> Tensor {
        let selection = RefCell::new(None);
        self.0.forward(tokens, step, |block, x, layer| block.forward(x, &selection, layer))
    }

    fn head(&self, hidden: &Tensor) -> Tensor {
        self.0.head(hidden)
    }
}

export_plugin!(DeepseekV3, examples = ["../../tests/fixtures/tiny/deepseek_v3/config.json"]);
