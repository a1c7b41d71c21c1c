//! OLMo Hybrid: three layers of the gated delta rule to one of attention, each kind with its norms in another place.
//! <https://arxiv.org/abs/2412.06464>
//!
//! ```text
//! h = x + Delta(RMSNorm(x)),       y = h + SwiGLU(RMSNorm(h))           most layers
//! h = x + RMSNorm(Attention(x)),   y = h + RMSNorm(SwiGLU(h))           the others
//! logits = RMSNorm(y) · Eᵀ
//!
//! Delta(x):  q, k, v = silu(conv(x Wq, x Wk, x Wv)),   q and k of length 1, q / √d
//!   S = exp(g) S,  S += k (β (v - kᵀ S))ᵀ,  o = qᵀ S
//!   g = -exp(A_log) softplus(x Wa + dt_bias),  β = 2 sigmoid(x Wb), or without the 2
//!   (RMSNorm(o) * silu(x Wg)) · Wo
//! Attention(x) = softmax(q · kᵀ / √d) · (x Wv) · Wo,   q = RMSNorm(x Wq), k = RMSNorm(x Wk), perhaps turned
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize,
        hidden_size: usize,
        intermediate_size: usize,
        num_hidden_layers: usize,
        num_attention_heads: usize where >= 1,
        num_key_value_heads: usize = num_attention_heads,
        head_dim: usize = hidden_size / num_attention_heads,
        hidden_act: Activation = Activation::Silu,
        rms_norm_eps: f32 = 1e-6,
        // Without it no positions.
        rope_theta: Option<f32> = None,
        rope_scaling: Option<RopeScaling> = None,
        attention_bias: bool = false,
        layer_types: Option<Vec<String>> = None,
        linear_num_key_heads: usize where >= 1 = num_attention_heads,
        linear_num_value_heads: usize where >= 1 = num_attention_heads,
        linear_key_head_dim: usize where >= 1 = 3 * hidden_size / 4 / linear_num_key_heads,
        linear_value_head_dim: usize where >= 1 = 2 * linear_key_head_dim,
        linear_conv_kernel_dim: usize where >= 1 = 4,
        linear_allow_neg_eigval: bool = true,
        tie_word_embeddings: Option<bool> = None,
    }
}

impl Config {
    fn attends(&self, layer: usize) -> Result<bool> {
        let Some(types) = &self.layer_types else {
            let only_last = self.num_hidden_layers < 4 && layer + 1 == self.num_hidden_layers;
            return Ok(layer % 4 == 3 || only_last);
        };
        match types.get(layer).map(String::as_str) {
            Some("full_attention") => Ok(true),
            Some("linear_attention") => Ok(false),
            other => Err(format!("config.json: layer_types has {other:?} for layer {layer}, it should be full_attention or linear_attention").into()),
        }
    }
}

struct Delta {
    qkv: [Linear; 3],
    rule: DeltaRule,
    a_proj: Linear,
    b_proj: Linear,
    g_proj: Linear,
    a_log: Parameter,
    dt_bias: Parameter,
    o_norm: RmsNorm,
    o_proj: Linear,
    most: f32,
}

impl Delta {
    fn new(c: &Config, w: &Weights) -> Self {
        let s = DeltaShape {
            k_heads: c.linear_num_key_heads,
            d: c.linear_key_head_dim,
            heads: c.linear_num_value_heads,
            e: c.linear_value_head_dim,
            kernel: c.linear_conv_kernel_dim,
        };
        let (dim, keys, values) = (c.hidden_size, s.key_dim(), s.value_dim());
        Self {
            qkv: w.linears(dim, false, [("q_proj", keys), ("k_proj", keys), ("v_proj", values)]),
            rule: DeltaRule::apart(w, ["q_conv1d", "k_conv1d", "v_conv1d"], s),
            a_proj: w.linear("a_proj", dim, s.heads, false),
            b_proj: w.linear("b_proj", dim, s.heads, false),
            g_proj: w.linear("g_proj", dim, values, false),
            a_log: w.tensor("A_log", &[s.heads]),
            dt_bias: w.tensor("dt_bias", &[s.heads]),
            // Not of rms_norm_eps.
            o_norm: w.rms_norm("o_norm", s.e, 1e-5),
            o_proj: w.linear("o_proj", values, dim, false),
            most: if c.linear_allow_neg_eigval { 2.0 } else { 1.0 },
        }
    }
}

impl Mixer for Delta {
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let [q, k, v] = self.qkv.each_ref().map(|proj| proj.forward(x));
        let g = -(self.a_log.tensor().exp() * (self.a_proj.forward(x) + self.dt_bias.tensor()).softplus());
        let beta = self.b_proj.forward(x).sigmoid() * self.most;
        let o = self.o_norm.forward(&self.rule.forward(&Tensor::concat(&[&q, &k, &v]), &g, &beta, layer));
        self.o_proj.forward(&self.g_proj.forward(x).swiglu(&o.merge_heads()))
    }

    fn cache(&self) -> Cache {
        self.rule.cache()
    }
}

fn attention(c: &Config, w: &Weights) -> SelfAttention {
    let (heads, kv_heads, head_dim) = (c.num_attention_heads, c.num_key_value_heads, c.head_dim);
    let shape = Heads { dim: c.hidden_size, heads, kv_heads, head_dim };
    let norm = |name, heads| w.rms_norm(name, heads * head_dim, c.rms_norm_eps);
    SelfAttention::new(w, shape, c.attention_bias, c.attention_bias)
        .whole_norms(norm("q_norm", heads), norm("k_norm", kv_heads))
        .rope(c.rope_theta.map(|theta| w.rope(head_dim, theta, &c.rope_scaling)))
}

struct OlmoHybrid;

impl Architecture for OlmoHybrid {
    const MODEL_TYPES: &'static [&'static str] = &["olmo_hybrid"];
    type Config = Config;
    type Model = Decoder<Block<AnyMixer, GatedMlp>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        let block = |w: &Weights, i: usize| {
            let norm = |name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps);
            let mlp = GatedMlp::new(&w.at("mlp"), c.hidden_size, c.intermediate_size, false, c.hidden_act);
            Ok(if c.attends(i)? {
                let norms = ["post_attention_layernorm", "post_feedforward_layernorm"].map(norm);
                Block::post_norm(norms, Box::new(attention(&c, &w.at("self_attn"))) as AnyMixer, mlp)
            } else {
                let names = match w.has("attention_layer_norm.weight") {
                    true => ["attention_layer_norm", "feedforward_layer_norm"],
                    false => ["input_layernorm", "post_attention_layernorm"],
                };
                Block::pre_norm(names.map(norm), Box::new(Delta::new(&c, &w.at("linear_attn"))) as AnyMixer, mlp)
            })
        };
        Decoder::new(w, decoder_shape!(c), block)
    }
}

export_plugin!(OlmoHybrid, examples = ["../../tests/fixtures/tiny/olmo_hybrid/config.json"]);
