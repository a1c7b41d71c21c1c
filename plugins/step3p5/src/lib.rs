//! Step 3.5: layers of two shapes, with a gate on each head, and experts whose gates and values are held within limits.
//! <https://huggingface.co/stepfun-ai/Step-3.5-Flash>
//!
//! ```text
//! h = x + Attention(RMSNorm(x))            per layer; checkpoints store the norms' weights less 1
//! y = h + MoE(RMSNorm(h))
//! logits = RMSNorm(y) · Wᵀ
//!
//! Attention(x) = (softmax(q · kᵀ / √d) · (x Wv) * sigmoid(x Wg)) · Wo      one gate a head
//!   q = rope(RMSNorm(x Wq)), k = rope(RMSNorm(x Wk))      each head normalized alone; rope, heads and window by layer
//!
//! MoE(x) = s Σ pᵢ Fᵢ(x) + Fₛ(x)      F(x) = (min(silu(x Wgate), l) * clamp(x Wup, ± l)) · Wdown; in dense layers: F(x)
//!   the k largest sigmoid(x Wr) + b; p their sigmoids, which may be scaled to a sum of 1
//! ```

use plugin_api::{
    config::{Json, Read},
    prelude::*,
};

/// A number for all layers, or one for each.
struct Each(Vec<f32>);

impl Read for Each {
    const WHAT: &'static str = "a number or a list of such";
    fn read(json: &Json) -> Option<Self> {
        match json.as_array() {
            // A limit that is null is none.
            Some(list) => {
                list.iter().map(|n| if n.is_null() { Some(0.0) } else { f32::read(n) }).collect::<Option<_>>().map(Self)
            }
            None => f32::read(json).map(|n| Self(vec![n])),
        }
    }
}

/// The heads of layers with a window.
struct OtherHeads {
    heads: usize,
    kv_heads: usize,
}

impl Read for OtherHeads {
    const WHAT: &'static str = "an object with num_attention_heads and num_attention_groups";
    fn read(json: &Json) -> Option<Self> {
        let number = |key: &str| usize::read(json.get(key)?);
        Some(Self { heads: number("num_attention_heads")?, kv_heads: number("num_attention_groups")? })
    }
}

config! {
    struct Config {
        vocab_size: usize,
        hidden_size: usize,
        intermediate_size: usize,
        num_hidden_layers: usize,
        num_attention_heads: usize where >= 1,
        num_attention_groups: usize,
        head_dim: usize,
        attention_other_setting: Option<OtherHeads> = None,
        use_head_wise_attn_gate: bool = true,
        hidden_act: SiluOnly = SiluOnly,
        rms_norm_eps: f32 = 1e-5,
        rope_theta: Each = Each(vec![10_000.0]),
        rope_scaling: Option<RopeScaling> = None,
        yarn_only_types: Option<Vec<String>> = None,
        partial_rotary_factors: Option<Vec<f32>> = None,
        sliding_window: usize = 512,
        layer_types: Option<LayerTypes> = None,
        moe_layers_enum: Option<String> = None,
        moe_num_experts: usize = 288,
        moe_top_k: usize where >= 1 = 8,
        moe_intermediate_size: usize = 1280,
        share_expert_dim: usize = 1280,
        moe_router_scaling_factor: f32 = 3.0,
        norm_expert_weight: bool = true,
        swiglu_limits: Option<Each> = None,
        swiglu_limits_shared: Option<Each> = None,
        num_nextn_predict_layers: usize = 3,
        tie_word_embeddings: Option<bool> = Some(false),
    }
}

impl Config {
    fn slides(&self, layer: usize) -> Result<bool> {
        self.layer_types.as_ref().map_or(Ok(layer.is_multiple_of(2)), |types| types.slides(layer))
    }

    fn is_sparse(&self, layer: usize) -> bool {
        match self.moe_layers_enum.as_deref().map(str::trim).filter(|list| !list.is_empty()) {
            Some(list) => list.split(',').any(|i| i.trim().parse() == Ok(layer)),
            None => layer > 0,
        }
    }

    fn limit(list: &Option<Each>, layer: usize) -> Option<f32> {
        list.as_ref().and_then(|limits| limits.0.get(layer)).copied().filter(|&limit| limit > 0.0)
    }
}

/// The checkpoint's two forms: as published, and as mlx-lm renames and shifts it.
#[derive(Clone, Copy)]
struct Form {
    published: bool,
}

impl Form {
    fn norm(self, c: &Config, w: &Weights, name: &str, dim: usize) -> RmsNorm {
        let weight = w.source(&format!("{name}.weight"));
        RmsNorm::of(if self.published { weight.plus(1.0) } else { weight }, dim, c.rms_norm_eps)
    }
}

/// SwiGLU, perhaps within limits.
struct LimitedMlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
    limit: Option<f32>,
}

impl LimitedMlp {
    fn new(w: &Weights, dim: usize, hidden: usize, limit: Option<f32>) -> Self {
        let [gate_proj, up_proj] = w.linears(dim, false, [("gate_proj", hidden), ("up_proj", hidden)]);
        Self { gate_proj, up_proj, down_proj: w.linear("down_proj", hidden, dim, false), limit }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let (gate, up) = (self.gate_proj.forward(x), self.up_proj.forward(x));
        self.down_proj.forward(&match self.limit {
            // silu never falls below -0.3.
            Some(limit) => gate.silu().clamp(-1.0, limit) * up.clamp(-limit, limit),
            None => gate.swiglu(&up),
        })
    }
}

enum Mlp {
    Dense(LimitedMlp),
    Sparse { router: Router, experts: Experts, shared: LimitedMlp },
}

impl Mlp {
    fn new(c: &Config, w: &Weights, layer: usize, form: Form) -> Self {
        let (dim, mlp) = (c.hidden_size, w.at("mlp"));
        let shared_limit = Config::limit(&c.swiglu_limits_shared, layer);
        if !c.is_sparse(layer) {
            return Self::Dense(LimitedMlp::new(&mlp, dim, c.intermediate_size, shared_limit));
        }
        let shape = ExpertsShape::new(c.moe_num_experts, dim, c.moe_intermediate_size);
        let shape = match Config::limit(&c.swiglu_limits, layer) {
            Some(limit) => shape.kind(ExpertKind::LimitedSwiglu { limit }),
            None => shape,
        };
        let moe = w.at("moe");
        let (at, gate, shared) = match form.published {
            true => (&moe, moe.linear("gate", dim, c.moe_num_experts, false), w.at("share_expert")),
            false => {
                (&mlp.at("gate"), mlp.at("gate").linear("gate", dim, c.moe_num_experts, false), mlp.at("share_expert"))
            }
        };
        let router = Router::sigmoid(gate, c.moe_top_k)
            .correction(at.tensor("router_bias", &[c.moe_num_experts]))
            .normalized(c.norm_expert_weight, 1e-20)
            .scale(c.moe_router_scaling_factor);
        let experts = match form.published {
            true => {
                let [gate, up, down] =
                    ["gate_proj", "up_proj", "down_proj"].map(|n| moe.source(&format!("{n}.weight")));
                Experts::of(shape, Some(gate), up, down, [None; 3])
            }
            false => mlp.experts(shape),
        };
        Self::Sparse { router, experts, shared: LimitedMlp::new(&shared, dim, c.share_expert_dim, shared_limit) }
    }
}

impl FeedForward for Mlp {
    fn forward(&self, x: &Tensor) -> Tensor {
        match self {
            Self::Dense(mlp) => mlp.forward(x),
            Self::Sparse { router, experts, shared } => {
                let (chosen, weights) = router.forward(x);
                experts.forward(x, &chosen, &weights) + shared.forward(x)
            }
        }
    }
}

fn attention(c: &Config, w: &Weights, layer: usize, form: Form) -> Result<SelfAttention> {
    let slides = c.slides(layer)?;
    let (heads, kv_heads) = match &c.attention_other_setting {
        Some(other) if slides => (other.heads, other.kv_heads),
        _ => (c.num_attention_heads, c.num_attention_groups),
    };
    let (dim, head_dim) = (c.hidden_size, c.head_dim);
    let share = c.partial_rotary_factors.as_ref().and_then(|shares| shares.get(layer)).copied().unwrap_or(1.0);
    let theta = c.rope_theta.0.get(layer).or(c.rope_theta.0.first()).copied().unwrap_or(10_000.0);
    let kind = if slides { "sliding_attention" } else { "full_attention" };
    let is_stretched =
        c.yarn_only_types.as_ref().is_none_or(|kinds| kinds.is_empty() || kinds.iter().any(|k| k == kind));
    let scaling = c.rope_scaling.clone().filter(|_| is_stretched);
    let norm = |name| form.norm(c, w, name, head_dim);
    let attention = SelfAttention::new(w, Heads { dim, heads, kv_heads, head_dim }, false, false)
        .head_norms(norm("q_norm"), norm("k_norm"))
        .rope(w.rope((head_dim as f32 * share) as usize, theta, &scaling))
        .window(slides.then_some(c.sliding_window));
    Ok(match c.use_head_wise_attn_gate {
        true => attention.head_gate(w.linear("g_proj", dim, heads, false)),
        false => attention,
    })
}

fn block(c: &Config, w: &Weights, layer: usize, form: Form) -> Result<Block<SelfAttention, Mlp>> {
    let norms = ["input_layernorm", "post_attention_layernorm"].map(|name| form.norm(c, w, name, c.hidden_size));
    Ok(Block::pre_norm(norms, attention(c, &w.at("self_attn"), layer, form)?, Mlp::new(c, w, layer, form)))
}

struct Step3p5;

impl Architecture for Step3p5 {
    const MODEL_TYPES: &'static [&'static str] = &["step3p5"];
    type Config = Config;
    type Model = Decoder<Block<SelfAttention, Mlp>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        let (model, dim) = (w.at("model"), c.hidden_size);
        let layers = model.at("layers");
        let is_moe = |layer: usize| layers.at(&layer.to_string()).has("moe.gate.weight");
        let form = Form { published: (0..c.num_hidden_layers).any(is_moe) };
        let embed_tokens = model.embedding("embed_tokens", c.vocab_size, dim);
        let blocks = layers.each(c.num_hidden_layers, |w, layer| block(&c, w, layer, form))?;
        let norm = form.norm(&c, &model, "norm", dim);
        let lm_head = LmHead::new(w, &embed_tokens, c.vocab_size, dim, c.tie_word_embeddings);
        for layer in 0..c.num_nextn_predict_layers {
            w.ignore(&format!("model.layers.{}.", c.num_hidden_layers + layer));
        }
        Ok(Decoder::of(embed_tokens, blocks, norm, lm_head))
    }
}

export_plugin!(Step3p5, examples = ["../../tests/fixtures/tiny/step3p5/config.json"]);
