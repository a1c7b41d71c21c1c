//! Hunyuan Large: routed experts beside a shared one; layers in groups share the keys and values that their first one projects.
//! <https://arxiv.org/abs/2411.02265>
//!
//! ```text
//! h = x + Attention(RMSNorm(x))            per layer
//! y = h + MoE(RMSNorm(h))
//! logits = RMSNorm(y) · Eᵀ
//!
//! Attention(x) = softmax(q · kᵀ / √d) · v · Wo
//!   q = RMSNorm(rope(x Wq)), k = RMSNorm(rope(u)), each head alone and with this layer's weights
//!   u, v = x Wk, x Wv of the group's first layer          rope with its base times αᵈ⁄⁽ᵈ⁻²⁾
//!
//! MoE(x) = Σ pᵢ SwiGLUᵢ(x) + SwiGLUₛ(x)     over the k largest pᵢ of softmax(x Wgate); with one expert: SwiGLU(x)
//!
//! hunyuan_v1_moe, transformers' name for the later ones: every layer has keys of its own and a shared expert, p is scaled to a sum of 1
//! ```

use plugin_api::{
    config::{Json, Read},
    prelude::*,
};

/// A number for all layers, or one for each.
struct Each(Vec<usize>);

impl Read for Each {
    const WHAT: &'static str = "a whole number or a list of such";
    fn read(json: &Json) -> Option<Self> {
        Vec::read(json).or_else(|| usize::read(json).map(|n| vec![n])).map(Self)
    }
}

impl Each {
    fn of(&self, layer: usize) -> usize {
        self.0.get(layer).or(self.0.last()).copied().unwrap_or(0)
    }
}

config! {
    struct Config {
        model_type: String = "hunyuan".into(),
        vocab_size: usize,
        hidden_size: usize,
        intermediate_size: usize,
        num_hidden_layers: usize,
        num_attention_heads: usize where >= 1,
        num_key_value_heads: usize where >= 1 = num_attention_heads,
        head_dim: usize where >= 3 = hidden_size / num_attention_heads,
        hidden_act: SiluOnly = SiluOnly,
        rms_norm_eps: f32 = 1e-5,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        attention_bias: bool = false,
        use_qk_norm: bool = true,
        use_cla: bool = false,
        cla_share_factor: usize where >= 1 = 2,
        num_experts: usize = 1,
        moe_topk: Each = Each(vec![1]),
        use_mixed_mlp_moe: bool = model_type == "hunyuan_v1_moe",
        num_shared_expert: Each = Each(vec![1]),
        moe_intermediate_size: Each = Each(vec![intermediate_size]),
        tie_word_embeddings: Option<bool> = Some(model_type == "hunyuan"),
    }
}

struct Attention {
    q_proj: Linear,
    /// Keys and values; none where an earlier layer's are used.
    kv_proj: Option<[Linear; 2]>,
    o_proj: Linear,
    norms: Option<[RmsNorm; 2]>,
    rope: Rope,
    head_dim: usize,
}

impl Attention {
    fn new(c: &Config, w: &Weights, layer: usize) -> Self {
        let (dim, d) = (c.hidden_size, c.head_dim);
        let (q, kv) = (c.num_attention_heads * d, c.num_key_value_heads * d);
        let leads = !c.use_cla || layer.is_multiple_of(c.cla_share_factor);
        let (q_proj, kv_proj) = if w.has("qkv_proj.weight") {
            let [q, k, v] = grouped_projections(c, w);
            (q, leads.then_some([k, v]))
        } else {
            let kv = || w.linears(dim, c.attention_bias, [("k_proj", kv), ("v_proj", kv)]);
            (w.linear("q_proj", dim, q, c.attention_bias), leads.then(kv))
        };
        let norm = |name| w.rms_norm(name, d, c.rms_norm_eps);
        let alpha = c.rope_scaling.as_ref().and_then(|s| s.number("alpha")).unwrap_or(1.0);
        let base = c.rope_theta * alpha.powf(d as f32 / (d as f32 - 2.0));
        Self {
            q_proj,
            kv_proj,
            o_proj: w.linear("o_proj", q, dim, c.attention_bias),
            norms: c.use_qk_norm.then(|| [norm("query_layernorm"), norm("key_layernorm")]),
            rope: w.rope(d, base, &None),
            head_dim: d,
        }
    }

    /// The projected keys and values of the layer that leads are handed on.
    fn forward(&self, x: &Tensor, layer: &mut Layer, led: &mut Option<[Tensor; 2]>) -> Tensor {
        if let Some(kv_proj) = &self.kv_proj {
            *led = Some(kv_proj.each_ref().map(|proj| proj.forward(x).split_heads(self.head_dim)));
        }
        let Some([k, v]) = led.clone() else { return Tensor::failed("the first layer has no keys and values") };
        let q = layer.rotate(&self.rope, self.q_proj.forward(x).split_heads(self.head_dim));
        let k = layer.rotate(&self.rope, k);
        let (q, k) = match &self.norms {
            Some([query, key]) => (query.forward(&q), key.forward(&k)),
            None => (q, k),
        };
        let scale = (self.head_dim as f32).powf(-0.5);
        self.o_proj.forward(&layer.attend(q, k, v, &Attend { scale, ..Default::default() }).merge_heads())
    }
}

/// `qkv_proj`, where each key head lies behind its query heads and before its value head.
fn grouped_projections(c: &Config, w: &Weights) -> [Linear; 3] {
    let (dim, d, groups) = (c.hidden_size, c.head_dim, c.num_key_value_heads);
    let queries = c.num_attention_heads / groups * d;
    let grouped = w.source("qkv_proj.weight").reshape(&[groups, queries + 2 * d, dim]);
    [0..queries, queries..queries + d, queries + d..queries + 2 * d].map(|rows| {
        let outputs = groups * rows.len();
        Linear::of(grouped.narrow(1, rows).reshape(&[outputs, dim]), None, dim, outputs)
    })
}

fn mlp(c: &Config, w: &Weights, layer: usize) -> Ffn {
    let (dim, hidden) = (c.hidden_size, c.intermediate_size);
    if c.num_experts == 1 {
        if w.has("gate_and_up_proj.weight") {
            let both = w.source("gate_and_up_proj.weight");
            let [up, gate] = [0..hidden, hidden..2 * hidden].map(|rows| Linear::of(both.rows(rows), None, dim, hidden));
            return Ffn::Dense(GatedMlp::of(gate, up, w.linear("down_proj", hidden, dim, false), Activation::Silu));
        }
        return Ffn::Dense(GatedMlp::new(w, dim, hidden, false, Activation::Silu));
    }
    let router = Router::softmax(w.at("gate").linear("wg", dim, c.num_experts, false), c.moe_topk.of(layer))
        .normalized(c.model_type == "hunyuan_v1_moe", 0.0);
    let experts = w.experts(ExpertsShape::new(c.num_experts, dim, c.moe_intermediate_size.of(layer)));
    let shared = |hidden| GatedMlp::new(&w.at("shared_mlp"), dim, hidden, false, Activation::Silu);
    let shared = c.use_mixed_mlp_moe.then(|| shared(hidden * c.num_shared_expert.of(layer)));
    Ffn::Sparse(Moe::new(router, experts).shared(shared))
}

struct HunyuanBlock {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    mlp: Ffn,
}

impl HunyuanBlock {
    fn new(c: &Config, w: &Weights, layer: usize) -> Self {
        let norm = |name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps);
        Self {
            input_layernorm: norm("input_layernorm"),
            self_attn: Attention::new(c, &w.at("self_attn"), layer),
            post_attention_layernorm: norm("post_attention_layernorm"),
            mlp: mlp(c, &w.at("mlp"), layer),
        }
    }

    fn forward(&self, x: &Tensor, layer: &mut Layer, led: &mut Option<[Tensor; 2]>) -> Tensor {
        let h = x + self.self_attn.forward(&self.input_layernorm.forward(x), layer, led);
        &h + self.mlp.forward(&self.post_attention_layernorm.forward(&h))
    }
}

struct Hunyuan(Decoder<HunyuanBlock>);

impl Architecture for Hunyuan {
    const MODEL_TYPES: &'static [&'static str] = &["hunyuan", "hunyuan_v1_moe"];
    type Config = Config;
    type Model = Self;

    fn new(c: Config, w: &Weights) -> Result<Self> {
        Ok(Self(Decoder::new(w, decoder_shape!(c), |w, layer| Ok(HunyuanBlock::new(&c, w, layer)))?))
    }
}

impl Model for Hunyuan {
    fn caches(&self) -> Vec<Cache> {
        vec![Cache::key_value(None); self.0.layers.len()]
    }

    fn forward(&self, tokens: &Tensor, step: &mut Step) -> Tensor {
        let led = std::cell::RefCell::new(None);
        self.0.forward(tokens, step, |block, x, layer| block.forward(x, layer, &mut led.borrow_mut()))
    }

    fn head(&self, hidden: &Tensor) -> Tensor {
        self.0.head(hidden)
    }
}

export_plugin!(Hunyuan, examples = ["../../tests/fixtures/tiny/hunyuan/config.json"]);
