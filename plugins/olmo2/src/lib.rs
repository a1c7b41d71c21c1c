//! OLMo 2 and 3 and EXAONE 4: norms stand after attention and feed-forward, not before. <https://arxiv.org/abs/2501.00656>,
//! <https://arxiv.org/abs/2507.11407>
//!
//! ```text
//! h = x + RMSNorm(Attention(x))            per layer
//! y = h + RMSNorm(SwiGLU(h))
//! logits = RMSNorm(y) · Eᵀ
//!
//! Attention(x) = softmax(q · kᵀ / √d) · (x Wv) · Wo
//!   q = rope(RMSNorm(x Wq)), k = rope(RMSNorm(x Wk))
//!
//! model_type   norm of q and k    layers
//! olmo2        all heads as one   all see all
//! olmo3        all heads as one   three of four see a window; rope is stretched in the fourth alone
//! exaone4      each head alone    three of four see a window; the fourth knows no positions
//! ```

use plugin_api::{
    config::{Json, Read},
    prelude::*,
};

config! {
    struct Config {
        model_type: String = "olmo2".into(),
        vocab_size: usize,
        hidden_size: usize,
        intermediate_size: usize,
        num_hidden_layers: usize,
        num_attention_heads: usize where >= 1,
        num_key_value_heads: usize = num_attention_heads,
        head_dim: usize = hidden_size / num_attention_heads,
        hidden_act: Activation = Activation::Silu,
        rms_norm_eps: f32 = 1e-5,
        rope_theta: f32 = if model_type == "olmo3" { 500_000.0 } else { 10_000.0 },
        rope_local_base_freq: f32 = rope_theta,
        rope_scaling: Option<RopeScaling> = None,
        sliding_window: Option<usize> = None,
        sliding_window_pattern: Pattern = Pattern(vec![true, true, true, false]),
        layer_types: Option<LayerTypes> = None,
        attention_bias: bool = false,
        tie_word_embeddings: Option<bool> = None,
    }
}

/// Which layers see a window, in turns: EXAONE 4 writes LLLG, transformers 4 for three local layers and a global one.
struct Pattern(Vec<bool>);

impl Read for Pattern {
    const WHAT: &'static str = "a number of layers or a text such as LLLG";
    fn read(json: &Json) -> Option<Self> {
        let turns: Vec<bool> = match json.as_str() {
            Some(letters) => letters.chars().map(|letter| letter == 'L').collect(),
            None => (1..=usize::read(json)?.min(1000)).rev().map(|left| left > 1).collect(),
        };
        (!turns.is_empty()).then_some(Self(turns))
    }
}

impl Config {
    fn window(&self, layer: usize) -> Result<Option<usize>> {
        let slides = match &self.layer_types {
            Some(types) => types.slides(layer)?,
            None => {
                self.model_type != "olmo2" && self.sliding_window_pattern.0.iter().cycle().nth(layer) == Some(&true)
            }
        };
        Ok(self.sliding_window.filter(|_| slides))
    }
}

fn attention(c: &Config, w: &Weights, layer: usize) -> Result<SelfAttention> {
    let (dim, heads, kv_heads, head_dim) = (c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim);
    let attention = SelfAttention::new(w, Heads { dim, heads, kv_heads, head_dim }, c.attention_bias, c.attention_bias);
    let norms = |q, k| (w.rms_norm("q_norm", q, c.rms_norm_eps), w.rms_norm("k_norm", k, c.rms_norm_eps));
    let window = c.window(layer)?;
    let rope = |theta, scaling| Some(w.rope(head_dim, theta, scaling));
    let (attention, rope) = match &*c.model_type {
        "exaone4" => {
            let (q_norm, k_norm) = norms(head_dim, head_dim);
            // A model in which no layer slides turns in all of them.
            let turns = c.sliding_window.is_none() || window.is_some();
            let rope = if turns { rope(c.rope_theta, &c.rope_scaling) } else { None };
            (attention.head_norms(q_norm, k_norm), rope)
        }
        _ => {
            let (q_norm, k_norm) = norms(heads * head_dim, kv_heads * head_dim);
            let rope = match window {
                Some(_) => rope(c.rope_local_base_freq, &None),
                None => rope(c.rope_theta, &c.rope_scaling),
            };
            (attention.whole_norms(q_norm, k_norm), rope)
        }
    };
    Ok(attention.rope(rope).window(window))
}

fn block(c: &Config, w: &Weights, layer: usize) -> Result<Block> {
    let norm = |name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps);
    let norms = [norm("post_attention_layernorm"), norm("post_feedforward_layernorm")];
    let mlp = GatedMlp::new(&w.at("mlp"), c.hidden_size, c.intermediate_size, false, c.hidden_act);
    Ok(Block::post_norm(norms, attention(c, &w.at("self_attn"), layer)?, mlp))
}

struct Olmo2;

impl Architecture for Olmo2 {
    const MODEL_TYPES: &'static [&'static str] = &["olmo2", "olmo3", "exaone4"];
    type Config = Config;
    type Model = Decoder;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        Decoder::new(w, decoder_shape!(c), |w, layer| block(&c, w, layer))
    }
}

export_plugin!(Olmo2, examples = ["../../tests/fixtures/tiny/olmo2/config.json"]);
