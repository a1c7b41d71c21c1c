//! Baichuan M1: keys and values mixed with those of the token before, windows in some layers. <https://arxiv.org/abs/2502.12671>
//!
//! ```text
//! h = x + Attention(RMSNorm(x))            per layer
//! y = h + SwiGLU(RMSNorm(h))
//! logits = RMSNorm(y) · (Wlm, each row of length 1)
//!
//! Attention(x) = softmax(rope(q) · rope(conv k)ᵀ / √d) · (conv v) · Wo,  q, k, v parts of x Wpack
//!   conv(u)ₜ = a uₜ₋₁ + b uₜ, with a and b of each key head
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize,
        hidden_size: usize,
        intermediate_size: usize,
        num_hidden_layers: usize,
        num_attention_heads: usize where >= 1,
        num_key_value_heads: usize where >= 1,
        // In layers with a window; more heads there are smaller ones.
        num_swa_attention_heads: usize where >= 1 = num_attention_heads,
        num_swa_key_value_heads: usize where >= 1 = num_key_value_heads,
        sliding_window: usize,
        sliding_window_layers: Vec<usize>,
        conv_window: usize = 2,
        rms_norm_eps: f32 = 1e-6,
        rope_theta: f32 = 100_000.0,
        rope_scaling: Option<RopeScaling> = None,
        tie_word_embeddings: bool = false,
    }
}

struct Attention {
    qkv: [Linear; 3],
    o_proj: Linear,
    /// `[kv_heads, 2]`: the token before, the token itself.
    conv_k: Parameter,
    conv_v: Parameter,
    rope: Rope,
    head_dim: usize,
    kv_heads: usize,
    window: Option<usize>,
}

impl Attention {
    fn new(c: &Config, w: &Weights, layer: usize) -> Self {
        let slides = c.sliding_window_layers.contains(&layer);
        let (heads, kv_heads) = match slides {
            true => (c.num_swa_attention_heads, c.num_swa_key_value_heads),
            false => (c.num_attention_heads, c.num_key_value_heads),
        };
        let (dim, head_dim) = (c.hidden_size, c.hidden_size / heads);
        let (kv, packed) = (kv_heads * head_dim, w.source("W_pack.weight"));
        let rows = [0..dim, dim..dim + kv, dim + kv..dim + 2 * kv];
        let conv = |name: &str| Parameter::of(w.source(name).reshape(&[kv_heads, 2]), &[kv_heads, 2]);
        Self {
            qkv: rows.map(|rows| Linear::of(packed.rows(rows.clone()), None, dim, rows.len())),
            o_proj: w.linear("o_proj", dim, dim, false),
            conv_k: conv("conv_k"),
            conv_v: conv("conv_v"),
            rope: w.rope(head_dim, c.rope_theta, &c.rope_scaling),
            head_dim,
            kv_heads,
            window: slides.then_some(c.sliding_window),
        }
    }
}

impl Mixer for Attention {
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let [q, k, v] = self.qkv.each_ref().map(|proj| proj.forward(x));
        let before = layer.shift(&Tensor::concat(&[&k, &v]));
        let kv = self.kv_heads * self.head_dim;
        let conv = |weights: &Parameter, at: usize, now: Tensor| {
            let (weights, heads) = (weights.tensor(), |x: Tensor| x.split_heads(self.head_dim));
            heads(before.narrow(at, kv)) * weights.narrow(0, 1) + heads(now) * weights.narrow(1, 1)
        };
        let k = layer.rotate(&self.rope, conv(&self.conv_k, 0, k));
        let q = layer.rotate(&self.rope, q.split_heads(self.head_dim));
        let scale = (self.head_dim as f32).powf(-0.5);
        let how = Attend { scale, window: self.window, ..Default::default() };
        self.o_proj.forward(&layer.attend(q, k, conv(&self.conv_v, kv, v), &how).merge_heads())
    }

    fn cache(&self) -> Cache {
        Cache::key_value(self.window).and(Cache::state(&[1, 2 * self.kv_heads * self.head_dim]))
    }
}

struct BaichuanM1;

impl Architecture for BaichuanM1 {
    const MODEL_TYPES: &'static [&'static str] = &["baichuan_m1"];
    type Config = Config;
    type Model = Decoder<Block<Attention>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        if c.conv_window != 2 {
            return Err(format!("config.json: conv_window is {}, Baichuan M1 mixes 2 tokens", c.conv_window).into());
        }
        let (model, dim) = (w.at("model"), c.hidden_size);
        let embed_tokens = model.embedding("embed_tokens", c.vocab_size, dim);
        let norm = |w: &Weights, name| w.rms_norm(name, dim, c.rms_norm_eps);
        let layers = model.at("layers").each(c.num_hidden_layers, |w, layer| {
            let mlp = GatedMlp::new(&w.at("mlp"), dim, c.intermediate_size, false, Activation::Silu);
            let norms = ["input_layernorm", "post_attention_layernorm"].map(|name| norm(w, name));
            Ok(Block::pre_norm(norms, Attention::new(&c, &w.at("self_attn"), layer), mlp))
        })?;
        // Packed heads were scaled before they were packed.
        let lm_head = match c.tie_word_embeddings || w.has("lm_head.scales") {
            true => LmHead::new(w, &embed_tokens, c.vocab_size, dim, Some(c.tie_word_embeddings)),
            false => LmHead::Own(Linear::of(w.source("lm_head.weight").unit_rows(1e-12), None, dim, c.vocab_size)),
        };
        Ok(Decoder::of(embed_tokens, layers, norm(&model, "norm"), lm_head))
    }
}

export_plugin!(BaichuanM1, examples = ["../../tests/fixtures/tiny/baichuan_m1/config.json"]);
