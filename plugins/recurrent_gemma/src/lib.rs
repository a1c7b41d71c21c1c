//! RecurrentGemma: Griffin's blocks, two of a gated linear recurrence to one of local attention. <https://arxiv.org/abs/2402.19427>
//!
//! ```text
//! h = x + Mixer(norm(x))                   per layer, x = E √dim at first
//! y = h + GEGLU(norm(h))                   norm(x) = x / rms(x) * (1 + w)
//! logits = c tanh(norm(y) · Eᵀ / c)
//!
//! Recurrent(x) = (lru(conv(x Wx + bx)) * gelu(x Wy + by)) · Wo + bo
//!   lru(u):  a = exp(-8 softplus(λ) σ(u Wa + ba)),  h = a h + √(1 - a²) σ(u Wi + bi) u        matrices by head
//! Attention(x) = softmax(q · kᵀ / √d) · (x Wv) · Wo + bo,    q = rope(x Wq), k = rope(x Wk), over a window
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
        lru_width: usize = hidden_size,
        conv1d_width: usize where >= 1 = 4,
        attention_window_size: usize = 2048,
        // The two sizes of the model have different names for it.
        _block_types: Option<Vec<String>> = None,
        block_types: Option<Vec<String>> = _block_types.clone(),
        hidden_activation: Activation = Activation::GeluTanh,
        rms_norm_eps: f32 = 1e-6,
        rope_theta: f32 = 10_000.0,
        partial_rotary_factor: f32 = 0.5,
        attention_bias: bool = false,
        embeddings_scale_by_sqrt_dim: bool = true,
        logits_soft_cap: f32 = 30.0,
        tie_word_embeddings: Option<bool> = None,
    }
}

impl Config {
    fn attends(&self, layer: usize) -> Result<bool> {
        let Some(types) = self.block_types.as_ref().filter(|types| !types.is_empty()) else {
            return Ok(layer % 3 == 2);
        };
        match types[layer % types.len()].as_str() {
            "attention" => Ok(true),
            "recurrent" => Ok(false),
            other => Err(format!("config.json: block_types has {other:?}, it should be recurrent or attention").into()),
        }
    }
}

/// The norm of this model: its weights are what is to be added to 1.
fn norm(c: &Config, w: &Weights, name: &str) -> RmsNorm {
    RmsNorm::of(w.source(&format!("{name}.weight")).plus(1.0), c.hidden_size, c.rms_norm_eps)
}

/// The real-gated linear recurrent unit with its two gates, each a matrix a head.
struct RgLru {
    input_gate: MultiLinear,
    recurrent_gate: MultiLinear,
    recurrent_param: Parameter,
    head_dim: usize,
}

impl RgLru {
    fn new(c: &Config, w: &Weights) -> Self {
        let head_dim = c.lru_width / c.num_attention_heads;
        // Stored [heads, inputs, outputs].
        let gate = |name: &str| {
            let weight = w.source(&format!("{name}_weight")).transpose();
            let bias = w.source(&format!("{name}_bias"));
            MultiLinear::of(weight, Some(bias), c.num_attention_heads, head_dim, head_dim)
        };
        let recurrent_param = w.tensor("recurrent_param", &[c.lru_width]);
        Self { input_gate: gate("input_gate"), recurrent_gate: gate("recurrent_gate"), recurrent_param, head_dim }
    }

    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let heads = x.split_heads(self.head_dim);
        let gate = |gate: &MultiLinear| gate.forward(&heads).merge_heads().sigmoid();
        let log_a = gate(&self.recurrent_gate) * (self.recurrent_param.tensor().softplus() * -8.0);
        layer.rg_lru(&(x * gate(&self.input_gate)), &log_a)
    }
}

struct Recurrent {
    linear_x: Linear,
    linear_y: Linear,
    conv_1d: Conv1d,
    rg_lru: RgLru,
    linear_out: Linear,
    act: Activation,
    lru_width: usize,
}

impl Recurrent {
    fn new(c: &Config, w: &Weights) -> Self {
        let named = [("linear_x", c.lru_width), ("linear_y", c.lru_width)];
        let [linear_x, linear_y] = w.linears(c.hidden_size, true, named);
        Self {
            linear_x,
            linear_y,
            conv_1d: w.conv1d("conv_1d", c.lru_width, c.conv1d_width, true),
            rg_lru: RgLru::new(c, &w.at("rg_lru")),
            linear_out: w.linear("linear_out", c.lru_width, c.hidden_size, true),
            act: c.hidden_activation,
            lru_width: c.lru_width,
        }
    }
}

impl Mixer for Recurrent {
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let gate = self.act.forward(&self.linear_y.forward(x));
        let u = layer.conv1d(&self.conv_1d, &self.linear_x.forward(x));
        self.linear_out.forward(&(self.rg_lru.forward(&u, layer) * gate))
    }

    fn cache(&self) -> Cache {
        self.conv_1d.cache().and(Cache::state(&[self.lru_width]))
    }
}

fn attention(c: &Config, w: &Weights) -> SelfAttention {
    let heads = Heads {
        dim: c.hidden_size,
        heads: c.num_attention_heads,
        kv_heads: c.num_key_value_heads,
        head_dim: c.head_dim,
    };
    let turned = (c.head_dim as f32 * c.partial_rotary_factor) as usize;
    SelfAttention::new(w, heads, c.attention_bias, true)
        .rope(w.rope(turned, c.rope_theta, &None))
        .window(Some(c.attention_window_size))
}

struct RecurrentGemma;

impl Architecture for RecurrentGemma {
    const MODEL_TYPES: &'static [&'static str] = &["recurrent_gemma"];
    type Config = Config;
    type Model = Decoder<Block<AnyMixer, GatedMlp>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        let (model, dim) = (w.at("model"), c.hidden_size);
        let layers = model.at("layers").each(c.num_hidden_layers, |w, i| {
            let mixer: AnyMixer = match c.attends(i)? {
                true => Box::new(attention(&c, &w.at("temporal_block"))),
                false => Box::new(Recurrent::new(&c, &w.at("temporal_block"))),
            };
            let norms = ["temporal_pre_norm", "channel_pre_norm"].map(|name| norm(&c, w, name));
            let mlp = GatedMlp::new(&w.at("mlp_block"), dim, c.intermediate_size / 2, true, c.hidden_activation);
            Ok(Block::pre_norm(norms, mixer, mlp))
        })?;
        let embed_tokens = model.embedding("embed_tokens", c.vocab_size, dim);
        let lm_head = LmHead::new(w, &embed_tokens, c.vocab_size, dim, c.tie_word_embeddings);
        let embed_scale = if c.embeddings_scale_by_sqrt_dim { (dim as f32).sqrt() } else { 1.0 };
        let decoder = Decoder::of(embed_tokens, layers, norm(&c, &model, "final_norm"), lm_head)
            .embed_scale(embed_scale)
            .softcap(Some(c.logits_soft_cap).filter(|&cap| cap > 0.0));
        Ok(decoder)
    }
}

export_plugin!(RecurrentGemma, examples = ["../../tests/fixtures/tiny/recurrent_gemma/config.json"]);
