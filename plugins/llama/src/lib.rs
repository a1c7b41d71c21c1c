//! LLaMA and the many that are LLaMA but for a line. <https://arxiv.org/abs/2302.13971>
//!
//! ```text
//! h = x + Attention(RMSNorm(x))            per layer
//! y = h + SwiGLU(RMSNorm(h))
//! logits = RMSNorm(y) · Eᵀ
//!
//! Attention(x) = softmax(rope(x Wq) · rope(x Wk)ᵀ / √d) · (x Wv) · Wo
//! SwiGLU(x) = (silu(x Wgate) * (x Wup)) · Wdown
//!
//! model_type                 what differs
//! llama, iquestcoder, xverse nothing; attention_bias and mlp_bias add biases, layer_types windows
//! mistral, ministral         a window, in all layers or in those of layer_types
//! ministral3                 q · (1 + β ln(1 + ⌊position / span⌋)), the numbers in rope_parameters
//! mistral3, pixtral, llava   one of these three, or llama, beside a vision tower: text_config says which
//! cwm                        three of four layers see a window
//! smollm3                    every fourth layer knows no positions
//! seed_oss                   biases on q, k and v, another key for the one on Wo
//! internlm3                  qkv_bias and bias are its keys for the biases
//! ernie4_5, helium           rope turns neighbouring lanes; use_bias is ernie4_5's key
//! telechat3                  a YaRN of its own name
//! arcee                      relu(x Wup)² · Wdown, no gate
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        model_type: String = "llama".into(),
        text_model_type: String = model_type.clone(),
        vocab_size: usize = unsaid(text_model_type != model_type, "vocab_size", 32_000)?,
        hidden_size: usize = unsaid(text_model_type != model_type, "hidden_size", 4096)?,
        intermediate_size: usize = {
            let of_class = if text_model_type == "llama" { 11_008 } else { 14_336 };
            unsaid(text_model_type != model_type, "intermediate_size", of_class)?
        },
        num_hidden_layers: usize = unsaid(text_model_type != model_type, "num_hidden_layers", 32)?,
        num_attention_heads: usize where >= 1 = unsaid(text_model_type != model_type, "num_attention_heads", 32)?,
        num_key_value_heads: usize = match &*text_model_type {
            "mistral" | "ministral3" if text_model_type != model_type => 8,
            _ => num_attention_heads,
        },
        head_dim: usize = match &*text_model_type {
            "cwm" | "ernie4_5" | "helium" | "internlm3" | "iquestcoder" | "ministral3" | "seed_oss" => 128,
            _ => hidden_size / num_attention_heads,
        },
        hidden_act: Activation = Activation::Silu,
        rms_norm_eps: f32 = unsaid(text_model_type != model_type, "rms_norm_eps", 1e-6)?,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        rope_traditional: bool = matches!(&*text_model_type, "helium" | "ernie4_5"),
        no_rope_layer_interval: usize where >= 1 = 4,
        no_rope_layers: Option<Vec<usize>> = None,
        use_sliding_window: bool = false,
        sliding_window: Option<usize> = None,
        layer_types: Option<LayerTypes> = None,
        use_bias: bool = false,
        qkv_bias: bool = false,
        bias: bool = false,
        attention_bias: bool = match &*text_model_type {
            "ernie4_5" => use_bias,
            "internlm3" => qkv_bias,
            kind => kind == "seed_oss",
        },
        attention_out_bias: bool = attention_bias && text_model_type != "seed_oss",
        mlp_bias: bool = match &*text_model_type {
            "ernie4_5" => use_bias,
            kind => kind == "internlm3" && bias,
        },
        tie_word_embeddings: Option<bool> = None,
    }
}

/// A text_config leaves out what equals the default of its class in transformers; a config of its own says everything.
fn unsaid<T>(in_text_config: bool, key: &str, default: T) -> Result<T> {
    in_text_config.then_some(default).ok_or_else(|| format!("config.json: {key} is missing").into())
}

impl Config {
    fn turns(&self, layer: usize) -> bool {
        match &self.no_rope_layers {
            _ if self.text_model_type != "smollm3" => true,
            Some(list) => list.get(layer) != Some(&0),
            None => !(layer + 1).is_multiple_of(self.no_rope_layer_interval),
        }
    }

    fn window(&self, layer: usize) -> Result<Option<usize>> {
        let slides = match (&*self.text_model_type, &self.layer_types) {
            ("smollm3", _) if !self.use_sliding_window => false,
            (_, Some(types)) => types.slides(layer)?,
            ("smollm3", None) => !self.turns(layer),
            ("cwm", None) => !layer.is_multiple_of(4),
            (kind, None) => kind.contains("mistral") || kind == "ministral",
        };
        Ok(self.sliding_window.filter(|_| slides))
    }

    /// ministral3's β and span.
    fn growth(&self) -> Option<(f32, f32)> {
        let scaling = self.rope_scaling.as_ref().filter(|_| self.text_model_type == "ministral3")?;
        scaling.number("llama_4_scaling_beta").zip(scaling.number("original_max_position_embeddings"))
    }
}

fn attention(c: &Config, w: &Weights, layer: usize) -> Result<SelfAttention> {
    let (dim, heads, kv_heads) = (c.hidden_size, c.num_attention_heads, c.num_key_value_heads);
    let shape = Heads { dim, heads, kv_heads, head_dim: c.head_dim };
    let rope = c.turns(layer).then(|| {
        let rope = w.rope(c.head_dim, c.rope_theta, &c.rope_scaling);
        if c.rope_traditional { rope.interleaved() } else { rope }
    });
    let attention = SelfAttention::new(w, shape, c.attention_bias, c.attention_out_bias);
    Ok(attention.rope(rope).window(c.window(layer)?).growing_queries(c.growth()))
}

fn block(c: &Config, w: &Weights, layer: usize) -> Result<Block<SelfAttention, Ffn>> {
    let norm = |name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps);
    let (mlp, dim, hidden) = (w.at("mlp"), c.hidden_size, c.intermediate_size);
    let ffn = match &*c.text_model_type {
        "arcee" => Ffn::Plain(Mlp::new(&mlp, ["up_proj", "down_proj"], dim, hidden, c.mlp_bias, c.hidden_act)),
        _ => Ffn::Dense(GatedMlp::new(&mlp, dim, hidden, c.mlp_bias, c.hidden_act)),
    };
    let norms = [norm("input_layernorm"), norm("post_attention_layernorm")];
    Ok(Block::pre_norm(norms, attention(c, &w.at("self_attn"), layer)?, ffn))
}

struct Llama;

impl Architecture for Llama {
    const MODEL_TYPES: &'static [&'static str] = &[
        "llama",
        "iquestcoder",
        "mistral",
        "ministral",
        "ministral3",
        "mistral3",
        "pixtral",
        "llava",
        "cwm",
        "smollm3",
        "seed_oss",
        "internlm3",
        "ernie4_5",
        "helium",
        "telechat3",
        "xverse",
        "arcee",
    ];
    type Config = Config;
    type Model = Decoder<Block<SelfAttention, Ffn>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        Decoder::new(w, decoder_shape!(c), |w, layer| block(&c, w, layer))
    }
}

export_plugin!(Llama, examples = ["../../tests/fixtures/tiny/llama/config.json"]);
