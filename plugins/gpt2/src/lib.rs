//! GPT-2, <https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf>, and GPT-BigCode
//! (StarCoder, SantaCoder), which gives all query heads one key head. <https://arxiv.org/abs/2305.06161>
//!
//! ```text
//! x = E[token] + P[position]
//! h = x + Attention(LayerNorm(x))          per layer
//! y = h + gelu(LayerNorm(h) Wfc) · Wproj
//! logits = LayerNorm(y) · Eᵀ
//!
//! Attention(x) = softmax(q · kᵀ / √d) · v · Wproj,  q, k, v parts of x Wattn
//! ```
//!
//! GPT-2's files hold W for x · W, not for x · Wᵀ as all others; those that mlx-lm wrote have them turned, and say `model.`.

use plugin_api::prelude::*;

config! {
    struct Config {
        model_type: String,
        vocab_size: usize = 50_257,
        n_positions: usize = 1024,
        n_embd: usize = 768,
        n_layer: usize = 12,
        n_head: usize where >= 1 = 12,
        n_inner: usize = 4 * n_embd,
        activation_function: Activation = Activation::GeluTanh,
        layer_norm_epsilon: f32 = 1e-5,
        scale_attn_weights: bool = true,
        scale_attn_by_inverse_layer_idx: bool = false,
        multi_query: bool = true,
        tie_word_embeddings: bool = true,
    }
}

impl Config {
    fn norm(&self, w: &Weights, name: &str) -> LayerNorm {
        w.layer_norm(name, self.n_embd, self.layer_norm_epsilon, true)
    }

    fn scale(&self, layer: usize) -> f32 {
        let heads = if self.scale_attn_weights { ((self.n_embd / self.n_head) as f32).powf(-0.5) } else { 1.0 };
        if self.scale_attn_by_inverse_layer_idx { heads / (layer + 1) as f32 } else { heads }
    }
}

/// How q, k and v lie in `c_attn`.
enum Fused {
    /// All of q, all of k, all of v: this many lanes each.
    Blocks([usize; 3]),
    /// Head by head.
    Heads,
}

struct Attention {
    c_attn: Linear,
    c_proj: Linear,
    fused: Fused,
    scale: f32,
    head_dim: usize,
}

impl Mixer for Attention {
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let (qkv, d) = (self.c_attn.forward(x), self.head_dim);
        let [q, k, v] = match self.fused {
            Fused::Blocks([q, k, v]) => {
                [(0, q), (q, k), (q + k, v)].map(|(start, len)| qkv.narrow(start, len).split_heads(d))
            }
            Fused::Heads => [0, d, 2 * d].map(|start| qkv.split_heads(3 * d).narrow(start, d)),
        };
        let y = layer.attend(q, k, v, &Attend { scale: self.scale, ..Default::default() });
        self.c_proj.forward(&y.merge_heads())
    }

    fn cache(&self) -> Cache {
        Cache::key_value(None)
    }
}

/// `gelu(x Wfc) · Wproj`
struct Feed {
    c_fc: Linear,
    c_proj: Linear,
    act: Activation,
}

impl FeedForward for Feed {
    fn forward(&self, x: &Tensor) -> Tensor {
        self.c_proj.forward(&self.act.forward(&self.c_fc.forward(x)))
    }
}

type Layers = Block<Attention, Feed>;

fn block(c: &Config, w: &Weights, layer: usize, transposed: bool) -> Layers {
    let (dim, head_dim) = (c.n_embd, c.n_embd / c.n_head);
    let linear = |name: &str, inputs, outputs| {
        let (weight, bias) = (w.source(&format!("{name}.weight")), w.source(&format!("{name}.bias")));
        Linear::of(if transposed { weight.transpose() } else { weight }, Some(bias), inputs, outputs)
    };
    // Masks that old exporters stored.
    w.ignore("attn.bias");
    w.ignore("attn.masked_bias");
    let (kv, fused) = match (c.model_type == "gpt_bigcode", c.multi_query) {
        (true, true) => (head_dim, Fused::Blocks([dim, head_dim, head_dim])),
        (true, false) => (dim, Fused::Heads),
        (false, _) => (dim, Fused::Blocks([dim; 3])),
    };
    let attention = Attention {
        c_attn: linear("attn.c_attn", dim, dim + 2 * kv),
        c_proj: linear("attn.c_proj", dim, dim),
        fused,
        scale: c.scale(layer),
        head_dim,
    };
    let feed = Feed {
        c_fc: linear("mlp.c_fc", dim, c.n_inner),
        c_proj: linear("mlp.c_proj", c.n_inner, dim),
        act: c.activation_function,
    };
    Block::pre_norm(["ln_1", "ln_2"].map(|name| c.norm(w, name)), attention, feed)
}

struct Gpt2 {
    decoder: Decoder<Layers>,
    wpe: Embedding,
}

impl Architecture for Gpt2 {
    const MODEL_TYPES: &'static [&'static str] = &["gpt2", "gpt_bigcode"];
    type Config = Config;
    type Model = Self;

    fn new(c: Config, w: &Weights) -> Result<Self> {
        let prefix = ["model", "transformer"].into_iter().find(|p| w.at(p).has("wte.weight"));
        let transposed = c.model_type == "gpt2" && prefix != Some("model");
        let model = prefix.map_or_else(|| w.clone(), |prefix| w.at(prefix));
        let wte = model.embedding("wte", c.vocab_size, c.n_embd);
        let layers = model.at("h").each(c.n_layer, |w, layer| Ok(block(&c, w, layer, transposed)))?;
        let lm_head = LmHead::new(w, &wte, c.vocab_size, c.n_embd, Some(c.tie_word_embeddings));
        let decoder = Decoder::of(wte, layers, c.norm(&model, "ln_f"), lm_head);
        Ok(Self { decoder, wpe: model.embedding("wpe", c.n_positions, c.n_embd) })
    }
}

impl Model for Gpt2 {
    fn caches(&self) -> Vec<Cache> {
        self.decoder.caches()
    }

    fn forward(&self, tokens: &Tensor, step: &mut Step) -> Tensor {
        let embedded = self.decoder.embed(tokens) + self.wpe.forward(&step.positions());
        self.decoder.forward_from(embedded, step, Block::forward)
    }

    fn head(&self, hidden: &Tensor) -> Tensor {
        self.decoder.head(hidden)
    }
}

export_plugin!(Gpt2, examples = ["../../tests/fixtures/tiny/gpt2/config.json"]);
