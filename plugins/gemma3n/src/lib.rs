//! Gemma 3n: a Gemma that runs on phones. <https://ai.google.dev/gemma/docs/gemma-3n>
//!
//! ```text
//! x₀ = E[token] · √dim,  xⱼ = x₀ Wⱼ scaled to the size of x₀          K streams, of which the layers compute one (AltUp)
//! eₗ = (Norm(x₀ Wmodel / √dim) + Eper_layer[token] · √p)ₗ / √2         per layer and token
//!
//! p = x + C(x_a) x                         per layer: streams predicted from each other
//! n = Norm(p_a)
//! h = (p_a + Norm(Attention(n)) + n + Norm(n Wleft Wright)) / √2        the last two: Laurel
//! y = h + Norm(GEGLU(Norm(h)))
//! cⱼ = pⱼ + (1 + d(y)ⱼ) (y - p_a)          all streams corrected by what the one has found
//! xⱼ = cⱼ + Norm((gelu(s c_a Wgate) * eₗ) Wproj)       for j > 0
//!
//! logits = cap(Norm(mean(x₀, x₁W'₁, ..)) · Eᵀ)
//!
//! C, d: tanh(Norm(x) / dim · Wrouter), then a linear layer             AltUp: <https://arxiv.org/abs/2301.13310>
//! Attention(x) = softmax(rope(Norm(x Wq)) · rope(Norm(x Wk))ᵀ) · unit(x Wv) · Wo       Laurel: <https://arxiv.org/abs/2411.07501>
//! GEGLU(x) = (gelu(sparse(x Wgate)) * (x Wup)) · Wdown,  sparse(g) = relu(g - mean(g) - z std(g)) in the first layers
//! ```
//!
//! The last layers have no keys and values: they look at those of the last layer before them of their own kind.

mod altup;
mod block;

use altup::Streams;
use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize = 262_400,
        hidden_size: usize = 2048,
        intermediate_size: PerLayer<usize> = PerLayer::All(16_384),
        num_hidden_layers: usize = 35,
        num_attention_heads: usize = 8,
        num_key_value_heads: usize = 2,
        head_dim: usize = 256,
        hidden_activation: Activation = Activation::GeluTanh,
        rms_norm_eps: f32 = 1e-6,
        attention_bias: bool = false,
        sliding_window: usize = 512,
        layer_types: LayerTypes = LayerTypes::every(5, num_hidden_layers),
        rope_theta: f32 = 1_000_000.0,
        rope_local_base_freq: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        final_logit_softcapping: Option<f32> = Some(30.0),
        vocab_size_per_layer_input: usize = 262_144,
        hidden_size_per_layer_input: usize = 256,
        altup_active_idx: usize = 0,
        altup_correct_scale: bool = true,
        altup_num_inputs: usize where >= 1 = 4,
        num_kv_shared_layers: usize = 15,
        laurel_rank: usize = 64,
        activation_sparsity_pattern: Option<PerLayer<f32>> = None,
        tie_word_embeddings: Option<bool> = None,
    }
}

impl Config {
    /// The share of gates that a layer turns off.
    fn sparsity(&self, layer: usize) -> Result<f32> {
        match &self.activation_sparsity_pattern {
            Some(pattern) => pattern.at(layer, "activation_sparsity_pattern"),
            None => Ok(if self.num_hidden_layers > 10 && layer < 10 { 0.95 } else { 0.0 }),
        }
    }

    /// The layer whose keys and values this one looks at, where it has none.
    fn keys_of(&self, layer: usize) -> Result<Option<usize>> {
        let end = self.num_hidden_layers.saturating_sub(self.num_kv_shared_layers);
        if layer < end { Ok(None) } else { self.layer_types.last_like(layer, end).map(Some) }
    }

    fn norm(&self, w: &Weights, name: &str) -> RmsNorm {
        w.rms_norm(name, self.hidden_size, self.rms_norm_eps)
    }
}

struct Gemma3n {
    decoder: Decoder<block::Block>,
    streams: Streams,
    per_layer_inputs: PerLayerInputs,
}

impl Architecture for Gemma3n {
    const MODEL_TYPES: &'static [&'static str] = &["gemma3n", "gemma3n_text"];
    type Config = Config;
    type Model = Self;

    fn new(c: Config, w: &Weights) -> Result<Self> {
        if c.altup_active_idx >= c.altup_num_inputs {
            let (index, streams) = (c.altup_active_idx, c.altup_num_inputs);
            return Err(format!("config.json: altup_active_idx is {index}, there are {streams} streams").into());
        }
        let model = w.at("model");
        Ok(Self {
            decoder: Decoder::new(w, decoder_shape!(c), |w, layer| block::Block::new(&c, w, layer))?
                .embed_scale((c.hidden_size as f32).sqrt())
                .softcap(c.final_logit_softcapping),
            streams: Streams::new(&c, &model)?,
            per_layer_inputs: PerLayerInputs::new(
                &model,
                PerLayerShape {
                    vocab: c.vocab_size_per_layer_input,
                    layers: c.num_hidden_layers,
                    dim: c.hidden_size,
                    width: c.hidden_size_per_layer_input,
                    eps: c.rms_norm_eps,
                },
            ),
        })
    }
}

impl Model for Gemma3n {
    fn caches(&self) -> Vec<Cache> {
        self.decoder.layers.iter().map(block::Block::cache).collect()
    }

    fn forward(&self, tokens: &Tensor, step: &mut Step) -> Tensor {
        let embedded = self.decoder.embed(tokens);
        let inputs = self.per_layer_inputs.forward(tokens, &embedded, step);
        let mut x = self.streams.part(embedded);
        for ((block, input), mut layer) in self.decoder.layers.iter().zip(&inputs).zip(step.layers()) {
            x = block.forward(&x, input, &mut layer);
        }
        self.decoder.norm.forward(&self.streams.join(&x))
    }

    fn head(&self, hidden: &Tensor) -> Tensor {
        self.decoder.head(hidden)
    }
}

export_plugin!(Gemma3n, examples = ["../../tests/fixtures/tiny/gemma3n/config.json"]);
