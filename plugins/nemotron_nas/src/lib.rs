//! Llama-Nemotron and DeciLM: LLaMA after a search that left out, narrowed or replaced parts of each layer. <https://arxiv.org/abs/2411.19146>
//!
//! ```text
//! h = x + A(RMSNorm(x))                    per layer; A: Attention with its own number of key heads, a linear layer, or nothing
//! y = h + F(RMSNorm(h))                    F: SwiGLU of its own width, a linear layer, or nothing
//! logits = RMSNorm(y) · Wlm
//!
//! Attention(x) = softmax(rope(x Wq) · rope(x Wk)ᵀ / √d) · (x Wv) · Wo
//! ```

use plugin_api::{
    config::{Json, Read},
    prelude::*,
};

/// Widths are multiples of this.
const WIDTH_STEP: usize = 256;

config! {
    struct Config {
        vocab_size: usize,
        hidden_size: usize,
        num_hidden_layers: usize,
        num_attention_heads: usize where >= 1,
        block_configs: Vec<Plan>,
        hidden_act: Activation = Activation::Silu,
        rms_norm_eps: f32 = 1e-5,
        attention_bias: bool = false,
        mlp_bias: bool = false,
        rope_theta: f32 = 500_000.0,
        rope_scaling: Option<RopeScaling> = None,
        tie_word_embeddings: bool = false,
    }
}

/// What the search left of one half of a layer.
#[derive(Clone, Copy)]
enum Half<T> {
    Nothing,
    Linear,
    Kept(T),
}

/// One entry of `block_configs`: query heads a key head, and the width as config.json has it.
#[derive(Clone, Copy)]
struct Plan {
    attention: Half<usize>,
    ffn: Half<f64>,
}

impl Read for Plan {
    const WHAT: &'static str = "a list of objects, each with attention.n_heads_in_group and ffn.ffn_mult, or no_op";
    fn read(json: &Json) -> Option<Self> {
        fn half<T: Read>(json: &Json, size: &str) -> Option<Half<T>> {
            let is = |key: &str| json.get(key).and_then(Json::as_bool).unwrap_or(false);
            match (is("no_op"), is("replace_with_linear")) {
                (true, _) => Some(Half::Nothing),
                (false, true) => Some(Half::Linear),
                (false, false) => T::read(json.get(size)?).map(Half::Kept),
            }
        }
        Some(Plan {
            attention: half(json.get("attention")?, "n_heads_in_group")?,
            ffn: half(json.get("ffn")?, "ffn_mult")?,
        })
    }
}

enum Attention {
    Kept(SelfAttention),
    Linear(Linear),
}

enum Feed {
    Kept(GatedMlp),
    Linear(Linear),
}

struct Layers {
    attention: Option<(RmsNorm, Attention)>,
    ffn: Option<(RmsNorm, Feed)>,
}

impl Layers {
    fn new(c: &Config, w: &Weights, layer: usize) -> Result<Self> {
        let (dim, heads) = (c.hidden_size, c.num_attention_heads);
        let plan = c
            .block_configs
            .get(layer)
            .ok_or_else(|| format!("config.json: block_configs has no entry for layer {layer}"))?;
        let norm = |name| w.rms_norm(name, dim, c.rms_norm_eps);
        // Hub checkpoints call the replacement by the first name, MLX's by the second.
        let linear = |w: Weights, name: &str, bias| {
            let name = if w.has(&format!("{name}.weight")) { name } else { "linear" };
            w.linear(name, dim, dim, bias)
        };
        let attention = match plan.attention {
            Half::Nothing => None,
            Half::Linear => Some(Attention::Linear(linear(w.at("self_attn"), "linear_attn", c.attention_bias))),
            Half::Kept(group) if group == 0 || !heads.is_multiple_of(group) => {
                return Err(format!(
                    "config.json: {heads} heads do not split into n_heads_in_group {group} in layer {layer}"
                )
                .into());
            }
            Half::Kept(group) => {
                let heads = Heads { dim, heads, kv_heads: heads / group, head_dim: dim / heads };
                let attention = SelfAttention::new(&w.at("self_attn"), heads, c.attention_bias, c.attention_bias);
                Some(Attention::Kept(attention.rope(w.rope(heads.head_dim, c.rope_theta, &c.rope_scaling))))
            }
        };
        let ffn = match plan.ffn {
            Half::Nothing => None,
            Half::Linear => Some(Feed::Linear(linear(w.at("mlp"), "linear_mlp", c.mlp_bias))),
            Half::Kept(mult) => {
                // By way of u32, which leaves room for the rounding.
                let hidden = ((2.0 * mult * dim as f64 / 3.0) as u32 as usize).next_multiple_of(WIDTH_STEP);
                Some(Feed::Kept(GatedMlp::new(&w.at("mlp"), dim, hidden, c.mlp_bias, c.hidden_act)))
            }
        };
        Ok(Self {
            attention: attention.map(|attention| (norm("input_layernorm"), attention)),
            ffn: ffn.map(|ffn| (norm("post_attention_layernorm"), ffn)),
        })
    }

    fn cache(&self) -> Cache {
        match &self.attention {
            Some((_, Attention::Kept(attention))) => attention.cache(),
            _ => Cache::none(),
        }
    }

    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let h = match &self.attention {
            None => x.clone(),
            Some((norm, Attention::Kept(attention))) => x + attention.forward(&norm.forward(x), layer),
            Some((norm, Attention::Linear(linear))) => x + linear.forward(&norm.forward(x)),
        };
        match &self.ffn {
            None => h,
            Some((norm, Feed::Kept(mlp))) => &h + mlp.forward(&norm.forward(&h)),
            Some((norm, Feed::Linear(linear))) => &h + linear.forward(&norm.forward(&h)),
        }
    }
}

struct NemotronNas(Decoder<Layers>);

impl Architecture for NemotronNas {
    const MODEL_TYPES: &'static [&'static str] = &["nemotron-nas"];
    type Config = Config;
    type Model = Self;

    fn new(c: Config, w: &Weights) -> Result<Self> {
        let shape = DecoderShape {
            vocab_size: c.vocab_size,
            hidden_size: c.hidden_size,
            num_hidden_layers: c.num_hidden_layers,
            rms_norm_eps: c.rms_norm_eps,
            tie_word_embeddings: Some(c.tie_word_embeddings),
        };
        Ok(Self(Decoder::new(w, shape, |w, layer| Layers::new(&c, w, layer))?))
    }
}

impl Model for NemotronNas {
    fn caches(&self) -> Vec<Cache> {
        self.0.layers.iter().map(Layers::cache).collect()
    }

    fn forward(&self, tokens: &Tensor, step: &mut Step) -> Tensor {
        self.0.forward(tokens, step, Layers::forward)
    }

    fn head(&self, hidden: &Tensor) -> Tensor {
        self.0.head(hidden)
    }
}

export_plugin!(NemotronNas, examples = ["../../tests/fixtures/tiny/nemotron-nas/config.json"]);
