//! Muse Glimmer, its language model: attention gated by its input, and layers that know positions only where they see a window.
//! <https://arxiv.org/abs/2505.06708> for the gate.
//!
//! ```text
//! x = Norm(E[token])
//! h = x + Norm₁(Attention(Norm₁(x)))            per layer
//! y = h + Norm₁(SwiGLU(Norm₁(h)))
//! logits = c tanh(m RMSNorm(y) · Whead / c)
//!
//! Norm has no weight, Norm₁ the weight 1 + w
//! Attention(x) = (softmax(f q · kᵀ / √d) · (x Wv) * sigmoid(x Wgate)) · Wo,      q = Norm(x Wq), k = Norm(x Wk)
//!   each head normalized alone; in three of four layers q and k are turned too, and see a window
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize = 202_048,
        hidden_size: usize = 6656,
        intermediate_size: usize = 19_968,
        num_hidden_layers: usize = 52,
        num_attention_heads: usize = 32,
        num_key_value_heads: usize = 2,
        head_dim: usize = 128,
        hidden_activation: Activation = Activation::Silu,
        rms_norm_eps: f32 = 1e-5,
        post_norm_eps: f32 = 1e-8,
        qk_scale_factor: f32 = 3.87,
        sliding_window: usize = 2048,
        layer_types: LayerTypes = LayerTypes::every(4, num_hidden_layers),
        rope_theta: f32 = 500_000.0,
        // 0 for layers without.
        layer_rope_theta: Option<Vec<f32>> = None,
        output_multiplier: f32 = 0.196_116_13,
        final_logit_softcapping: Option<f32> = Some(20.0),
        tie_word_embeddings: Option<bool> = Some(false),
    }
}

impl Config {
    fn turns(&self, layer: usize, slides: bool) -> bool {
        match &self.layer_rope_theta {
            Some(thetas) => thetas.get(layer).is_some_and(|&theta| theta != 0.0),
            None => slides,
        }
    }
}

fn attention(c: &Config, w: &Weights, layer: usize) -> Result<SelfAttention> {
    let (dim, heads, kv_heads) = (c.hidden_size, c.num_attention_heads, c.num_key_value_heads);
    let slides = c.layer_types.slides(layer)?;
    let norm = || RmsNorm::plain(c.head_dim, c.rms_norm_eps);
    Ok(SelfAttention::new(w, Heads { dim, heads, kv_heads, head_dim: c.head_dim }, false, false)
        .head_norms(norm(), norm())
        .rope(c.turns(layer, slides).then(|| w.rope(c.head_dim, c.rope_theta, &None)))
        .scale(c.qk_scale_factor / (c.head_dim as f32).sqrt())
        .window(slides.then_some(c.sliding_window))
        .gate(w.linear("gate_proj", dim, heads * c.head_dim, false)))
}

fn block(c: &Config, w: &Weights, layer: usize) -> Result<Block> {
    let norms = [
        ("input_layernorm", c.rms_norm_eps),
        ("post_attention_layernorm", c.post_norm_eps),
        ("pre_feedforward_layernorm", c.rms_norm_eps),
        ("post_feedforward_layernorm", c.post_norm_eps),
    ];
    let stored = |name: &str| w.source(&format!("{name}.weight"));
    let norms = norms.map(|(name, eps)| RmsNorm::of(stored(name).plus(1.0), c.hidden_size, eps));
    let mlp = GatedMlp::new(&w.at("mlp"), c.hidden_size, c.intermediate_size, false, c.hidden_activation);
    Ok(Block::both_norms(norms, attention(c, &w.at("self_attn"), layer)?, mlp))
}

struct MuseGlimmer {
    embed_norm: RmsNorm,
    decoder: Decoder,
}

impl Architecture for MuseGlimmer {
    const MODEL_TYPES: &'static [&'static str] = &["muse_glimmer"];
    type Config = Config;
    type Model = Self;

    fn new(c: Config, w: &Weights) -> Result<Self> {
        for tower in ["vision_tower.", "vision_adapter.", "vision_projection."] {
            w.ignore(tower);
        }
        let decoder = Decoder::new(w, decoder_shape!(c), |w, layer| block(&c, w, layer))?;
        Ok(Self {
            embed_norm: RmsNorm::plain(c.hidden_size, c.rms_norm_eps),
            decoder: decoder.logit_scale(c.output_multiplier).softcap(c.final_logit_softcapping),
        })
    }
}

impl Model for MuseGlimmer {
    fn caches(&self) -> Vec<Cache> {
        self.decoder.caches()
    }

    fn forward(&self, tokens: &Tensor, step: &mut Step) -> Tensor {
        let x = self.embed_norm.forward(&self.decoder.embed(tokens));
        self.decoder.forward_from(x, step, Block::forward)
    }

    fn head(&self, hidden: &Tensor) -> Tensor {
        self.decoder.head(hidden)
    }
}

export_plugin!(MuseGlimmer, examples = ["../../tests/fixtures/tiny/muse_glimmer/config.json"]);
