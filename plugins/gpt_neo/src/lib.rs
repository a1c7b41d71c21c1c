//! GPT-Neo: GPT-2 with windows in every second layer and unscaled scores. <https://doi.org/10.5281/zenodo.5297715>
//!
//! ```text
//! x = E[token] + P[position]
//! h = x + Attention(LayerNorm(x))          per layer
//! y = h + gelu(LayerNorm(h) Wfc) · Wproj
//! logits = LayerNorm(y) · Eᵀ
//!
//! Attention(x) = softmax((x Wq) · (x Wk)ᵀ) · (x Wv) · Wo
//! ```

use plugin_api::{
    config::{Json, Read},
    prelude::*,
};

config! {
    struct Config {
        vocab_size: usize = 50_257,
        hidden_size: usize = 2048,
        intermediate_size: usize = 4 * hidden_size,
        num_layers: usize = 24,
        num_heads: usize where >= 1 = 16,
        max_position_embeddings: usize = 2048,
        attention_types: AttentionTypes = AttentionTypes([false, true].repeat(12)),
        window_size: usize = 256,
        activation_function: Activation = Activation::GeluTanh,
        layer_norm_epsilon: f32 = 1e-5,
        tie_word_embeddings: bool = true,
    }
}

/// Which layers see a window only, as `[[["global", "local"], 12]]`: these kinds in turn, so often.
struct AttentionTypes(Vec<bool>);

impl Read for AttentionTypes {
    const WHAT: &'static str = "a list of pairs of a list of global and local and a number";
    fn read(json: &Json) -> Option<Self> {
        let mut local = Vec::new();
        for pair in json.as_array()? {
            let [kinds, times] = pair.as_array()?.as_slice() else { return None };
            let is_local = |kind: &Json| match kind.as_str()? {
                "local" => Some(true),
                "global" => Some(false),
                _ => None,
            };
            let kinds = kinds.as_array()?.iter().map(is_local).collect::<Option<Vec<_>>>()?;
            // No model has more layers; a broken number would take all memory.
            let times = usize::read(times).filter(|&times| times <= 10_000)?;
            local.extend(kinds.repeat(times));
        }
        Some(Self(local))
    }
}

type Layers = Block<SelfAttention, Mlp>;

impl Config {
    fn norm(&self, w: &Weights, name: &str) -> LayerNorm {
        w.layer_norm(name, self.hidden_size, self.layer_norm_epsilon, true)
    }

    fn block(&self, w: &Weights, layer: usize) -> Result<Layers> {
        let (dim, hidden, attention) = (self.hidden_size, self.intermediate_size, w.at("attn.attention"));
        let none = || format!("config.json: attention_types has no entry for layer {layer}");
        let local = *self.attention_types.0.get(layer).ok_or_else(none)?;
        // Masks that old exporters stored.
        attention.ignore("bias");
        attention.ignore("masked_bias");
        let qkv = attention.linears(dim, false, [("q_proj", dim), ("k_proj", dim), ("v_proj", dim)]);
        let attention = SelfAttention::of(qkv, attention.linear("out_proj", dim, dim, true), dim / self.num_heads)
            .scale(1.0)
            .window(local.then_some(self.window_size));
        let mlp = Mlp::new(&w.at("mlp"), ["c_fc", "c_proj"], dim, hidden, true, self.activation_function);
        Ok(Block::pre_norm(["ln_1", "ln_2"].map(|name| self.norm(w, name)), attention, mlp))
    }
}

struct GptNeo {
    decoder: Decoder<Layers>,
    wpe: Embedding,
}

impl Architecture for GptNeo {
    const MODEL_TYPES: &'static [&'static str] = &["gpt_neo"];
    type Config = Config;
    type Model = Self;

    fn new(c: Config, w: &Weights) -> Result<Self> {
        let model = w.at("transformer");
        let wte = model.embedding("wte", c.vocab_size, c.hidden_size);
        let layers = model.at("h").each(c.num_layers, |w, layer| c.block(w, layer))?;
        let lm_head = LmHead::new(w, &wte, c.vocab_size, c.hidden_size, Some(c.tie_word_embeddings));
        let decoder = Decoder::of(wte, layers, c.norm(&model, "ln_f"), lm_head);
        Ok(Self { decoder, wpe: model.embedding("wpe", c.max_position_embeddings, c.hidden_size) })
    }
}

impl Model for GptNeo {
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

export_plugin!(GptNeo, examples = ["../../tests/fixtures/tiny/gpt_neo/config.json"]);
