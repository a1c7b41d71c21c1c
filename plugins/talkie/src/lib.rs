//! Talkie: norms without weights, gains in their place, and the embeddings added again after every block.
//! <https://huggingface.co/talkie-lm/talkie-1930-13b-base>
//!
//! ```text
//! e = RMSNorm(E[ids])                      no norm has weights
//! h = x + a Attention(RMSNorm(x))          per layer, x = e at first; a, m and s are learned numbers
//! y = h + m SwiGLU(RMSNorm(h)) + s e
//! logits = g RMSNorm(y) · Wᵀ
//!
//! Attention(x) = softmax(q · kᵀ / √d) · (x Wv) · Wo
//!   q = gₕ RMSNorm(rope(x Wq)), k = RMSNorm(rope(x Wk)); each head h of the queries has a gain
//!   the rope turns the other way round: lane i + d/2 towards lane i
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize = 65_540,
        hidden_size: usize = 5120,
        intermediate_size: usize = 13_696,
        num_hidden_layers: usize = 40,
        num_attention_heads: usize where >= 1 = 40,
        head_dim: usize = 128,
        rms_norm_eps: f32 = f32::EPSILON,
        rope_theta: f32 = 1_000_000.0,
    }
}

struct Attention {
    attn: SelfAttention,
    head_gain: Parameter,
}

impl Attention {
    fn new(c: &Config, w: &Weights) -> Self {
        let (heads, width) = (c.num_attention_heads, c.num_attention_heads * c.head_dim);
        let qkv = w.linears(c.hidden_size, false, ["attn_query", "attn_key", "attn_value"].map(|name| (name, width)));
        let attn_resid = w.linear("attn_resid", width, c.hidden_size, false);
        let gain = w.source("head_gain.head_g").reshape(&[heads, 1]);
        let norm = || RmsNorm::plain(c.head_dim, c.rms_norm_eps);
        Self {
            attn: SelfAttention::of(qkv, attn_resid, c.head_dim)
                .rope(w.rope(c.head_dim, c.rope_theta, &None))
                .reversed()
                .turned_norms(norm(), norm()),
            head_gain: Parameter::of(gain, &[heads, 1]),
        }
    }

    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let [q, k, v] = self.attn.project(x, layer);
        self.attn.output(&self.attn.attend([q * self.head_gain.tensor(), k, v], layer))
    }
}

struct Layers {
    attn: Attention,
    mlp: GatedMlp,
    norm: RmsNorm,
    gains: [Parameter; 3],
}

impl Layers {
    fn new(c: &Config, w: &Weights) -> Self {
        let (dim, names) = (c.hidden_size, ["mlp_gate", "mlp_linear", "mlp_resid"]);
        Self {
            attn: Attention::new(c, &w.at("attn")),
            mlp: GatedMlp::named(&w.at("mlp"), names, dim, c.intermediate_size, false, Activation::Silu),
            norm: RmsNorm::plain(dim, c.rms_norm_eps),
            gains: ["attn_gain.a_g", "mlp_gain.a_g", "embed_skip.a_g"].map(|name| w.tensor(name, &[1])),
        }
    }

    fn forward(&self, embedded: &Tensor, x: &Tensor, layer: &mut Layer) -> Tensor {
        let [attn_gain, mlp_gain, embed_skip] = self.gains.each_ref().map(Parameter::tensor);
        let h = x + self.attn.forward(&self.norm.forward(x), layer) * attn_gain;
        &h + self.mlp.forward(&self.norm.forward(&h)) * mlp_gain + embedded * embed_skip
    }
}

struct Talkie {
    decoder: Decoder<Layers>,
    norm: RmsNorm,
    lm_head_gain: Parameter,
}

impl Architecture for Talkie {
    const MODEL_TYPES: &'static [&'static str] = &["talkie"];
    type Config = Config;
    type Model = Self;

    fn new(c: Config, w: &Weights) -> Result<Self> {
        let (model, dim) = (w.at("model"), c.hidden_size);
        let norm = || RmsNorm::plain(dim, c.rms_norm_eps);
        let embed = model.embedding("embed", c.vocab_size, dim);
        let blocks = model.at("blocks").each(c.num_hidden_layers, |w, _| Ok(Layers::new(&c, w)))?;
        let lm_head = LmHead::Own(Linear::of(w.source("lm_head"), None, dim, c.vocab_size));
        let decoder = Decoder::of(embed, blocks, norm(), lm_head);
        Ok(Self { decoder, norm: norm(), lm_head_gain: w.tensor("lm_head_gain.w_g", &[1]) })
    }
}

impl Model for Talkie {
    fn caches(&self) -> Vec<Cache> {
        self.decoder.layers.iter().map(|_| Cache::key_value(None)).collect()
    }

    fn forward(&self, tokens: &Tensor, step: &mut Step) -> Tensor {
        let embedded = self.norm.forward(&self.decoder.embed(tokens));
        self.decoder.forward_from(embedded.clone(), step, |block, x, layer| block.forward(&embedded, x, layer))
    }

    fn head(&self, hidden: &Tensor) -> Tensor {
        self.decoder.head(hidden) * self.lm_head_gain.tensor()
    }
}

export_plugin!(Talkie, examples = ["../../tests/fixtures/tiny/talkie/config.json"]);
