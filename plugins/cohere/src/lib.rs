//! Command R, <https://cohere.com/blog/command-r>, and its successors R7B and A (cohere2), <https://arxiv.org/abs/2504.00698>, also with
//! experts (cohere2_moe), and Compass (cohere_compass), the language model behind North Micro's eyes.
//!
//! ```text
//! n = Norm(x)                              per layer
//! y = x + Attention(n) + SwiGLU(n)         cohere2_moe: + Σ pᵢ SwiGLUᵢ(n) of the chosen, and what a shared one adds
//! logits = s · Norm(y) · Eᵀ
//!
//! Norm(x) = (x - mean(x)) / std(x) * w
//! Attention(x) = softmax(rope(Norm(x Wq)) · rope(Norm(x Wk))ᵀ / √d) · (x Wv) · Wo
//!   Norm in the largest Command R alone, each head with weights of its own
//!   cohere2, cohere2_moe: three of four layers see a window; the fourth sees everything, and no positions
//!   cohere_compass: the config says of both kinds of layers whether and how they turn, in halves
//! ```

use plugin_api::{
    config::{Json, Read},
    prelude::*,
};

config! {
    struct Config {
        model_type: String,
        vocab_size: usize = 256_000,
        hidden_size: usize = 8192,
        intermediate_size: usize = 22_528,
        num_hidden_layers: usize = 40,
        num_attention_heads: usize where >= 1 = 64,
        num_key_value_heads: usize = num_attention_heads,
        head_dim: usize = hidden_size / num_attention_heads,
        hidden_act: Activation = Activation::Silu,
        layer_norm_eps: f32 = 1e-5,
        layer_norm_bias: bool = false,
        attention_bias: bool = false,
        use_qk_norm: bool = false,
        rope_theta: f32 = if model_type == "cohere" { 500_000.0 } else { 10_000.0 },
        rope_scaling: Option<RopeScaling> = None,
        sliding_window: Option<usize> = Some(4096),
        sliding_window_pattern: usize where >= 1 = 4,
        layer_types: Option<LayerTypes> = None,
        rope_parameters: Option<Turning> = None,
        // The first layers of cohere2_moe are dense.
        first_k_dense_replace: usize = 0,
        prefix_dense_intermediate_size: usize = intermediate_size,
        prefix_dense_sliding_window_pattern: usize where >= 1 = 1,
        rms_norm_eps: Option<f32> = None,
        num_experts: usize = 8,
        num_experts_per_tok: usize where >= 1 = 2,
        expert_selection_fn: String = "softmax".to_owned(),
        norm_topk_prob: bool = true,
        num_shared_experts: usize = 0,
        shared_expert_combination_strategy: String = "average".to_owned(),
        logit_scale: f32 = if model_type.starts_with("cohere_compass") { 1.0 } else { 0.0625 },
        tie_word_embeddings: bool = true,
    }
}

/// Compass' `rope_parameters`: a set for each kind of layer, and null for the kind that knows no positions.
struct Turning {
    full: Option<(f32, RopeScaling)>,
    sliding: Option<(f32, RopeScaling)>,
}

impl Read for Turning {
    const WHAT: &'static str = "an object, with rope_theta or with full_attention and sliding_attention";
    fn read(json: &Json) -> Option<Self> {
        let set = |set: &Json| Some((f32::read(set.get("rope_theta")?)?, RopeScaling::read(set)?));
        let of = |kind: &str| match (json.get(kind), json.get("rope_theta")) {
            (Some(Json::Null), _) | (None, None) => Some(None),
            (Some(own), _) => set(own).map(Some),
            (None, Some(_)) => set(json).map(Some),
        };
        Some(Self { full: of("full_attention")?, sliding: of("sliding_attention")? })
    }
}

impl Config {
    fn is_compass(&self) -> bool {
        self.model_type.starts_with("cohere_compass")
    }

    fn compass_rope(&self, w: &Weights, slides: bool) -> Option<Rope> {
        let Some(turning) = &self.rope_parameters else {
            return Some(w.rope(self.head_dim, self.rope_theta, &self.rope_scaling));
        };
        let set = if slides { &turning.sliding } else { &turning.full };
        set.as_ref().map(|(theta, scaling)| w.rope(self.head_dim, *theta, &Some(scaling.clone())))
    }

    fn attention(&self, w: &Weights, layer: usize) -> Result<SelfAttention> {
        let (dim, head_dim, bias) = (self.hidden_size, self.head_dim, self.attention_bias);
        let heads = Heads { dim, heads: self.num_attention_heads, kv_heads: self.num_key_value_heads, head_dim };
        let attention = SelfAttention::new(w, heads, bias, bias);
        if self.is_compass() {
            let slides = self.slides(layer)?;
            return Ok(attention.rope(self.compass_rope(w, slides)).window(self.sliding_window.filter(|_| slides)));
        }
        let rope = w.rope(head_dim, self.rope_theta, &self.rope_scaling).interleaved();
        if self.model_type != "cohere" {
            let turns = self.is_dense(layer) && self.prefix_dense_sliding_window_pattern == 1;
            return Ok(match self.slides(layer)? {
                true => attention.rope(rope).window(self.sliding_window),
                false => attention.rope(turns.then_some(rope)),
            });
        }
        Ok(match self.use_qk_norm {
            true => attention.rope(rope).weighted_norms(
                LayerNorm::plain(head_dim, self.layer_norm_eps),
                w.tensor("q_norm.weight", &[self.num_attention_heads, head_dim]),
                w.tensor("k_norm.weight", &[self.num_key_value_heads, head_dim]),
            ),
            false => attention.rope(rope),
        })
    }

    /// Whether this is one of the dense layers before those with experts.
    fn is_dense(&self, layer: usize) -> bool {
        self.model_type == "cohere2_moe" && layer < self.first_k_dense_replace
    }

    fn slides(&self, layer: usize) -> Result<bool> {
        match &self.layer_types {
            Some(types) => types.slides(layer),
            None if self.is_compass() => Ok(false),
            None if self.is_dense(layer) => Ok(!(layer + 1).is_multiple_of(self.prefix_dense_sliding_window_pattern)),
            None if self.model_type == "cohere2_moe" => {
                Ok(!(layer - self.first_k_dense_replace + 1).is_multiple_of(self.sliding_window_pattern))
            }
            None => Ok(!(layer + 1).is_multiple_of(self.sliding_window_pattern)),
        }
    }

    fn feed(&self, w: &Weights, layer: usize) -> Result<Feed> {
        let (dim, hidden, mlp) = (self.hidden_size, self.intermediate_size, w.at("mlp"));
        let dense = |w: &Weights, hidden| GatedMlp::new(w, dim, hidden, false, self.hidden_act);
        if self.is_dense(layer) {
            return Ok(Feed::Dense(dense(&mlp, self.prefix_dense_intermediate_size)));
        }
        if self.model_type != "cohere2_moe" {
            return Ok(Feed::Dense(dense(&mlp, hidden)));
        }
        let gate = mlp.linear("gate", dim, self.num_experts, false);
        let router = match self.expert_selection_fn.as_str() {
            "softmax" => Router::chosen_softmax(gate, self.num_experts_per_tok),
            "sigmoid" => Router::sigmoid(gate, self.num_experts_per_tok).normalized(self.norm_topk_prob, 0.0),
            other => {
                return Err(
                    format!("config.json: expert_selection_fn is {other}, it should be softmax or sigmoid").into()
                );
            }
        };
        let shared =
            (self.num_shared_experts > 0).then(|| dense(&mlp.at("shared_experts"), hidden * self.num_shared_experts));
        let scale = match (&shared, self.shared_expert_combination_strategy.as_str()) {
            (Some(_), "average") => 0.5,
            _ => 1.0,
        };
        let experts = mlp.experts(ExpertsShape::new(self.num_experts, dim, hidden));
        Ok(Feed::Sparse(Box::new(Moe::new(router, experts).shared(shared)), scale))
    }

    fn norm(&self, w: &Weights, name: &str) -> Norm {
        match self.rms_norm_eps.filter(|_| self.model_type == "cohere2_moe") {
            Some(eps) => w.rms_norm(name, self.hidden_size, eps).into(),
            None => w.layer_norm(name, self.hidden_size, self.layer_norm_eps, self.layer_norm_bias).into(),
        }
    }
}

enum Feed {
    Dense(GatedMlp),
    /// Experts, and what multiplies all that they add.
    Sparse(Box<Moe>, f32),
}

impl FeedForward for Feed {
    fn forward(&self, x: &Tensor) -> Tensor {
        match self {
            Self::Dense(mlp) => mlp.forward(x),
            Self::Sparse(moe, scale) => moe.forward(x) * *scale,
        }
    }
}

struct Cohere;

impl Architecture for Cohere {
    const MODEL_TYPES: &'static [&'static str] =
        &["cohere", "cohere2", "cohere2_moe", "cohere_compass", "cohere_compass_text"];
    type Config = Config;
    type Model = Decoder<Block<SelfAttention, Feed>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        let (model, dim) = (w.at("model"), c.hidden_size);
        let embed_tokens = model.embedding("embed_tokens", c.vocab_size, dim);
        let layers = model.at("layers").each(c.num_hidden_layers, |w, layer| {
            let attention = c.attention(&w.at("self_attn"), layer)?;
            Ok(Block::parallel(c.norm(w, "input_layernorm"), attention, c.feed(w, layer)?))
        })?;
        let lm_head = LmHead::new(w, &embed_tokens, c.vocab_size, dim, Some(c.tie_word_embeddings));
        Ok(Decoder::of(embed_tokens, layers, c.norm(&model, "norm"), lm_head).logit_scale(c.logit_scale))
    }
}

export_plugin!(Cohere, examples = ["../../tests/fixtures/tiny/cohere/config.json"]);
