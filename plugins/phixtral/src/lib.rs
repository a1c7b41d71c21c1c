//! Phixtral: Phi-2 models merged into routed experts, attention and experts side by side. <https://huggingface.co/mlabonne/phixtral-4x2_8>
//!
//! ```text
//! y = x + Attention(LayerNorm(x)) + MoE(LayerNorm(x))      per layer, one norm for both
//! logits = LayerNorm(y) · Wᵀ + b
//!
//! Attention(x) = softmax(rope(q) · rope(k)ᵀ / √d) · v · Wo + bo      q, k, v = x Wqkv + b; some lanes of a head turn
//! MoE(x) = Σ pᵢ (gelu(x W1ᵢ + b1ᵢ) W2ᵢ + b2ᵢ)     over the k largest logits of x Wgate, p their softmax
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        // The first names are those of the checkpoints, the second mlx-lm's.
        vocab_size: usize = 51_200,
        num_vocab: usize = vocab_size,
        n_embd: usize = 2560,
        model_dim: usize = n_embd,
        n_head: usize = 32,
        num_heads: usize where >= 1 = n_head,
        n_layer: usize = 32,
        num_layers: usize = n_layer,
        rotary_dim: usize = 32,
        layer_norm_epsilon: f32 = 1e-5,
        num_local_experts: usize = 4,
        num_experts_per_tok: usize where >= 1 = 2,
    }
}

struct ParallelBlock {
    ln: LayerNorm,
    mixer: SelfAttention,
    moe: Moe,
}

impl ParallelBlock {
    fn new(c: &Config, w: &Weights) -> Self {
        let (dim, heads) = (c.model_dim, c.num_heads);
        let (mixer, moe) = (w.at("mixer"), w.at("moe"));
        let shape = Heads { dim, heads, kv_heads: heads, head_dim: dim / heads };
        let attention = SelfAttention::fused(&mixer, "Wqkv", shape, true, mixer.linear("out_proj", dim, dim, true))
            .rope(mixer.rope(c.rotary_dim, 10_000.0, &None));
        let gate = moe.linear("gate", dim, c.num_local_experts, false);
        let experts = ExpertsShape::new(c.num_local_experts, dim, 4 * dim).kind(ExpertKind::GeluTanh);
        let experts = moe.experts(ExpertsShape { bias: true, ..experts });
        Self {
            ln: w.layer_norm("ln", dim, c.layer_norm_epsilon, true),
            mixer: attention,
            moe: Moe::new(Router::chosen_softmax(gate, c.num_experts_per_tok), experts),
        }
    }

    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let normed = self.ln.forward(x);
        x + self.mixer.forward(&normed, layer) + self.moe.forward(&normed)
    }
}

struct Phixtral(Decoder<ParallelBlock>);

impl Architecture for Phixtral {
    const MODEL_TYPES: &'static [&'static str] = &["phixtral", "phi-msft"];
    type Config = Config;
    type Model = Self;

    fn new(c: Config, w: &Weights) -> Result<Self> {
        let (transformer, head) = (w.at("transformer"), w.at("lm_head"));
        let wte = transformer.at("embd").embedding("wte", c.num_vocab, c.model_dim);
        let layers = transformer.at("h").each(c.num_layers, |w, _| Ok(ParallelBlock::new(&c, w)))?;
        let norm = head.layer_norm("ln", c.model_dim, c.layer_norm_epsilon, true);
        let linear = head.linear("linear", c.model_dim, c.num_vocab, true);
        Ok(Self(Decoder::of(wte, layers, norm, LmHead::Own(linear))))
    }
}

impl Model for Phixtral {
    fn caches(&self) -> Vec<Cache> {
        self.0.layers.iter().map(|block| block.mixer.cache()).collect()
    }

    fn forward(&self, tokens: &Tensor, step: &mut Step) -> Tensor {
        self.0.forward(tokens, step, ParallelBlock::forward)
    }

    fn head(&self, hidden: &Tensor) -> Tensor {
        self.0.head(hidden)
    }
}

export_plugin!(Phixtral, examples = ["../../tests/fixtures/tiny/phi-msft/config.json"]);
