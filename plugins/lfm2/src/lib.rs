//! LFM2: short gated convolutions in most layers, attention in the others; dense or with routed experts.
//! <https://arxiv.org/abs/2511.23404>
//!
//! ```text
//! h = x + Mixer(RMSNorm(x))                per layer
//! y = h + FFN(RMSNorm(h))
//! logits = RMSNorm(y) · Eᵀ
//!
//! ShortConv(x) = (c * conv(b * u)) · Wo                     b, c, u = split(x Win)
//! Attention(x) = softmax(q · kᵀ / √d) · (x Wv) · Wo
//!   q = rope(RMSNorm(x Wq)), k = rope(RMSNorm(x Wk))        each head normalized alone
//! FFN(x) = SwiGLU(x), or Σ pᵢ SwiGLUᵢ(x) over the k largest pᵢ + biasᵢ of p = sigmoid(x Wr), scaled to a sum of 1
//!
//! LFM3: norms after mixer and FFN too, one gate a head on what attention gives, some layers with a window, two ropes
//! ```

// `conv_L_cache` is spelled as in config.json.
#![allow(non_snake_case)]

use plugin_api::{
    config::{Json, Read},
    prelude::*,
};

/// `rope_parameters`: one set for each kind of layer in LFM3, before that one for all, which is no business of this plugin.
struct Ropes(Option<LayerRopes>);

impl Read for Ropes {
    const WHAT: &'static str = "an object";
    fn read(json: &Json) -> Option<Self> {
        json.is_object().then(|| Self(LayerRopes::read(json)))
    }
}

config! {
    struct Config {
        model_type: String = "lfm2".into(),
        vocab_size: usize,
        hidden_size: usize,
        intermediate_size: usize = 12288,
        block_ff_dim: usize = intermediate_size,
        num_hidden_layers: usize,
        num_attention_heads: usize where >= 1,
        num_key_value_heads: usize = num_attention_heads,
        head_dim: usize = hidden_size / num_attention_heads,
        norm_eps: f32 = 1e-5,
        rope_theta: f32 = 1_000_000.0,
        rope_scaling: Option<RopeScaling> = None,
        conv_bias: bool = false,
        conv_L_cache: usize where >= 1 = if model_type == "lfm3" { 7 } else { 3 },
        // Only LFM3 has these.
        rope_parameters: Ropes = Ropes(None),
        sliding_window: usize = 256,
        attention_bias: bool = false,
        use_attention_gate: bool = model_type == "lfm3",
        use_sandwich_norm: bool = model_type == "lfm3",
        // Which layers attend: a list of them, or a type for each.
        layer_types: Option<Vec<String>> = None,
        full_attn_idxs: Option<Vec<usize>> = None,
        // Only LFM2-MoE has these.
        num_experts: usize = 0,
        num_experts_per_tok: usize = 4,
        num_dense_layers: usize = 2,
        moe_intermediate_size: usize = 1792,
        use_expert_bias: bool = true,
        norm_topk_prob: bool = true,
        routed_scaling_factor: f32 = 1.0,
        // And only LFM2 states its feed-forward width before the usual two thirds.
        block_auto_adjust_ff_dim: bool = num_experts == 0 && model_type != "lfm3",
        block_ffn_dim_multiplier: f32 = 1.0,
        block_multiple_of: usize where >= 1 = 256,
        tie_word_embeddings: Option<bool> = None,
        tie_embedding: Option<bool> = tie_word_embeddings,
    }
}

/// What mixes tokens in a layer.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Conv,
    Full,
    Sliding,
}

impl Config {
    fn kind(&self, layer: usize) -> Result<Kind> {
        if let Some(layers) = &self.full_attn_idxs {
            return Ok(if layers.contains(&layer) { Kind::Full } else { Kind::Conv });
        }
        let Some(types) = &self.layer_types else {
            return Ok(match layer % 4 {
                _ if self.model_type != "lfm3" => Kind::Full,
                2 => Kind::Full,
                0 if layer > 0 => Kind::Sliding,
                _ => Kind::Conv,
            });
        };
        match types.get(layer).map(String::as_str) {
            Some("full_attention") => Ok(Kind::Full),
            Some("sliding_attention") => Ok(Kind::Sliding),
            Some("conv") => Ok(Kind::Conv),
            other => Err(format!("config.json: layer_types has {other:?} for layer {layer}, it should be full_attention, sliding_attention or conv").into()),
        }
    }

    fn rope(&self, w: &Weights, slides: bool) -> Rope {
        match &self.rope_parameters.0 {
            Some(ropes) => ropes.rope(w, self.head_dim, slides),
            None if self.model_type != "lfm3" => w.rope(self.head_dim, self.rope_theta, &self.rope_scaling),
            None if slides => w.rope(self.head_dim, 10_000.0, &None),
            None => {
                let half = RopeScaling::of("proportional", &[("partial_rotary_factor", 0.5)]);
                w.rope(self.head_dim, 1_000_000.0, &Some(half))
            }
        }
    }

    fn hidden(&self) -> usize {
        if !self.block_auto_adjust_ff_dim {
            return self.block_ff_dim;
        }
        // By way of u32, which leaves room for the rounding.
        let hidden = (self.block_ffn_dim_multiplier * (2 * self.block_ff_dim / 3) as f32) as u32 as usize;
        hidden.next_multiple_of(self.block_multiple_of)
    }
}

struct ShortConv {
    in_proj: Linear,
    conv: Conv1d,
    out_proj: Linear,
    dim: usize,
}

impl ShortConv {
    fn new(c: &Config, w: &Weights) -> Self {
        let dim = c.hidden_size;
        Self {
            in_proj: w.linear("in_proj", dim, 3 * dim, c.conv_bias),
            conv: w.conv1d("conv", dim, c.conv_L_cache, c.conv_bias),
            out_proj: w.linear("out_proj", dim, dim, c.conv_bias),
            dim,
        }
    }
}

impl Mixer for ShortConv {
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let bcu = self.in_proj.forward(x);
        let [b, c, u] = [0, 1, 2].map(|part| bcu.narrow(part * self.dim, self.dim));
        self.out_proj.forward(&(c * layer.conv1d(&self.conv, &(b * u))))
    }

    fn cache(&self) -> Cache {
        self.conv.cache()
    }
}

fn attention(c: &Config, w: &Weights, slides: bool) -> SelfAttention {
    let (head_dim, bias) = (c.head_dim, c.attention_bias);
    let (q, kv) = (c.num_attention_heads * head_dim, c.num_key_value_heads * head_dim);
    let qkv = w.linears(c.hidden_size, bias, [("q_proj", q), ("k_proj", kv), ("v_proj", kv)]);
    let [q_norm, k_norm, output] = match &*c.model_type {
        "lfm3" => ["q_norm", "k_norm", "o_proj"],
        _ => ["q_layernorm", "k_layernorm", "out_proj"],
    };
    let norm = |name| w.rms_norm(name, head_dim, c.norm_eps);
    let attention = SelfAttention::of(qkv, w.linear(output, q, c.hidden_size, bias), head_dim)
        .head_norms(norm(q_norm), norm(k_norm))
        .rope(c.rope(w, slides))
        .window(slides.then_some(c.sliding_window));
    if !c.use_attention_gate {
        return attention;
    }
    let gate = if w.has("gate_proj.weight") { "gate_proj" } else { "g_proj" };
    attention.head_gate(w.linear(gate, c.hidden_size, c.num_attention_heads, false))
}

fn block(c: &Config, w: &Weights, layer: usize) -> Result<Block<AnyMixer, Ffn>> {
    let mixer: AnyMixer = match c.kind(layer)? {
        Kind::Conv => Box::new(ShortConv::new(c, &w.at("conv"))),
        kind => Box::new(attention(c, &w.at("self_attn"), kind == Kind::Sliding)),
    };
    let norm = |name| w.rms_norm(name, c.hidden_size, c.norm_eps);
    let ffn = ffn(c, &w.at("feed_forward"), layer);
    Ok(match c.use_sandwich_norm {
        true => {
            let names = ["operator_norm", "post_operator_norm", "ffn_norm", "post_ffn_norm"];
            Block::both_norms(names.map(norm), mixer, ffn)
        }
        false => Block::pre_norm(["operator_norm", "ffn_norm"].map(norm), mixer, ffn),
    })
}

fn ffn(c: &Config, w: &Weights, layer: usize) -> Ffn {
    let dim = c.hidden_size;
    if c.num_experts == 0 || layer < c.num_dense_layers {
        let names = match w.has("w1.weight") {
            true => ["w1", "w3", "w2"],
            false => ["gate_proj", "up_proj", "down_proj"],
        };
        return Ffn::Dense(GatedMlp::named(w, names, dim, c.hidden(), false, Activation::Silu));
    }
    let bias = c.use_expert_bias.then(|| w.tensor("expert_bias", &[c.num_experts]));
    let router = Router::sigmoid(w.linear("gate", dim, c.num_experts, false), c.num_experts_per_tok)
        .correction(bias)
        .normalized(c.norm_topk_prob, 1e-6)
        .scale(c.routed_scaling_factor);
    Ffn::Sparse(Moe::new(router, w.experts(ExpertsShape::new(c.num_experts, dim, c.moe_intermediate_size))))
}

struct Lfm2;

impl Architecture for Lfm2 {
    const MODEL_TYPES: &'static [&'static str] = &["lfm2", "lfm2_moe", "lfm2_vl", "lfm2-vl", "lfm3"];
    type Config = Config;
    type Model = Decoder<Block<AnyMixer, Ffn>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        let model = w.at("model");
        let layers = model.at("layers").each(c.num_hidden_layers, |w, layer| block(&c, w, layer))?;
        let embed_tokens = model.embedding("embed_tokens", c.vocab_size, c.hidden_size);
        let lm_head = LmHead::new(w, &embed_tokens, c.vocab_size, c.hidden_size, c.tie_embedding);
        let norm = model.rms_norm("embedding_norm", c.hidden_size, c.norm_eps);
        Ok(Decoder::of(embed_tokens, layers, norm, lm_head))
    }
}

export_plugin!(Lfm2, examples = ["../../tests/fixtures/tiny/lfm2/config.json"]);
