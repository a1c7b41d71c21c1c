//! XGLM: positions by sines, which no file stores. <https://arxiv.org/abs/2112.10668>
//!
//! ```text
//! x = √dim E[token] + S[position + 2]           S = (sin, cos)(position · 10⁻⁴ⁱ) over half of the lanes each
//! h = x + Attention(LayerNorm(x))               per layer
//! y = h + gelu(LayerNorm(h) W₁ + b₁) · W₂ + b₂
//! logits = LayerNorm(y) · Eᵀ
//!
//! Attention(x) = softmax(q · kᵀ / √d) · v · Wout
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize = 256_008,
        max_position_embeddings: usize = 2048,
        d_model: usize where >= 4 = 1024,
        ffn_dim: usize = 4096,
        num_layers: usize = 24,
        attention_heads: usize where >= 1 = 16,
        activation_function: Activation = Activation::Gelu,
        scale_embedding: bool = true,
        tie_word_embeddings: Option<bool> = Some(true),
    }
}

/// Position 0 stands in this row: fairseq's first rows were for the start and for padding.
const OFFSET: usize = 2;
/// Tables beyond these are a broken config's.
const MOST_POSITIONS: usize = 1 << 16;
const MOST_NUMBERS: usize = 1 << 26;
const EPS: f32 = 1e-5;

type Layers = Block<SelfAttention, Mlp>;

impl Config {
    /// Sines and cosines `[positions, dim]`.
    fn sinusoids(&self) -> Vec<f32> {
        let half = self.d_model / 2;
        let rate = 10_000f32.ln() / (half as f32 - 1.0);
        let frequencies: Vec<f32> = (0..half).map(|i| (i as f32 * -rate).exp()).collect();
        let row = |position: usize| {
            let angles = frequencies.iter().map(|f| position as f32 * f);
            let rest = std::iter::repeat_n(0.0, self.d_model % 2);
            angles.clone().map(f32::sin).chain(angles.map(f32::cos)).chain(rest).collect::<Vec<_>>()
        };
        (OFFSET..self.max_position_embeddings + OFFSET).flat_map(row).collect()
    }

    fn norm(&self, w: &Weights, name: &str) -> LayerNorm {
        w.layer_norm(name, self.d_model, EPS, true)
    }

    fn block(&self, w: &Weights) -> Layers {
        let (dim, heads, attn) = (self.d_model, self.attention_heads, w.at("self_attn"));
        let qkv = attn.linears(dim, true, ["q_proj", "k_proj", "v_proj"].map(|name| (name, dim)));
        let attention = SelfAttention::of(qkv, attn.linear("out_proj", dim, dim, true), dim / heads);
        let mlp = Mlp::new(w, ["fc1", "fc2"], dim, self.ffn_dim, true, self.activation_function);
        Block::pre_norm(["self_attn_layer_norm", "final_layer_norm"].map(|name| self.norm(w, name)), attention, mlp)
    }
}

struct Xglm {
    positions: Embedding,
    decoder: Decoder<Layers>,
}

impl Architecture for Xglm {
    const MODEL_TYPES: &'static [&'static str] = &["xglm"];
    type Config = Config;
    type Model = Self;

    fn new(c: Config, w: &Weights) -> Result<Self> {
        let (model, dim, positions) = (w.at("model"), c.d_model, c.max_position_embeddings);
        if positions > MOST_POSITIONS {
            return Err(format!(
                "config.json: max_position_embeddings is {positions}, at most {MOST_POSITIONS} make sense"
            )
            .into());
        }
        if positions.saturating_mul(dim) > MOST_NUMBERS {
            return Err(format!("config.json: d_model is {dim}, too wide for a table of {positions} positions").into());
        }
        // Old exporters stored the sines.
        model.ignore("embed_positions.");
        let embed_tokens = model.embedding("embed_tokens", c.vocab_size, dim);
        let layers = model.at("layers").each(c.num_layers, |w, _| Ok(c.block(w)))?;
        let lm_head = LmHead::new(w, &embed_tokens, c.vocab_size, dim, c.tie_word_embeddings);
        let scale = if c.scale_embedding { (dim as f32).sqrt() } else { 1.0 };
        let decoder = Decoder::of(embed_tokens, layers, c.norm(&model, "layer_norm"), lm_head).embed_scale(scale);
        let table = Source::numbers(&c.sinusoids()).reshape(&[positions, dim]);
        Ok(Self { positions: Embedding::of(table, positions, dim), decoder })
    }
}

impl Model for Xglm {
    fn caches(&self) -> Vec<Cache> {
        self.decoder.caches()
    }

    fn forward(&self, tokens: &Tensor, step: &mut Step) -> Tensor {
        let x = self.decoder.embed(tokens) + self.positions.forward(&step.positions());
        self.decoder.forward_from(x, step, Block::forward)
    }

    fn head(&self, hidden: &Tensor) -> Tensor {
        self.decoder.head(hidden)
    }
}

export_plugin!(Xglm, examples = ["../../tests/fixtures/tiny/xglm/config.json"]);
