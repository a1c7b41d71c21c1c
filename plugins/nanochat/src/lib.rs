//! nanochat: a GPT with the parts of a modern one, and no norm with weights. <https://github.com/karpathy/nanochat>
//!
//! ```text
//! x = RMSNorm(E[token])
//! h = x + Attention(RMSNorm(x))            per layer
//! y = h + relu(RMSNorm(h) Wfc)² · Wproj
//! logits = c tanh(RMSNorm(y) · Whead / c)
//!
//! Attention(x) = softmax(q · kᵀ / √d) · (x Wv) · Wo
//!   q = RMSNorm(rope(x Wq)), k = RMSNorm(rope(x Wk)),      rope turns by -angle
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
        rms_norm_eps: f32 = 1e-6,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        hidden_act: Activation = Activation::Relu2,
        final_logit_softcapping: Option<f32> = Some(15.0),
        tie_word_embeddings: Option<bool> = None,
    }
}

/// Names in transformers' checkpoints, and in those of nanochat itself and of MLX.
struct Names {
    model: &'static str,
    embed: &'static str,
    layers: &'static str,
    attn: &'static str,
    qkvo: [&'static str; 4],
    mlp: [&'static str; 2],
}

const OF_TRANSFORMERS: Names = Names {
    model: "model",
    embed: "embed_tokens",
    layers: "layers",
    attn: "self_attn",
    qkvo: ["q_proj", "k_proj", "v_proj", "o_proj"],
    mlp: ["fc1", "fc2"],
};

const OF_NANOCHAT: Names = Names {
    model: "transformer",
    embed: "wte",
    layers: "h",
    attn: "attn",
    qkvo: ["c_q", "c_k", "c_v", "c_proj"],
    mlp: ["c_fc", "c_proj"],
};

fn attention(c: &Config, w: &Weights, [q, k, v, o]: [&str; 4]) -> SelfAttention {
    let (q_dim, kv_dim) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
    let qkv = w.linears(c.hidden_size, false, [(q, q_dim), (k, kv_dim), (v, kv_dim)]);
    let norm = || RmsNorm::plain(c.head_dim, c.rms_norm_eps);
    SelfAttention::of(qkv, w.linear(o, q_dim, c.hidden_size, false), c.head_dim)
        .rope(w.rope(c.head_dim, c.rope_theta, &c.rope_scaling))
        .reversed()
        .turned_norms(norm(), norm())
}

struct NanoChat(Decoder<Block<SelfAttention, Mlp>>);

impl Architecture for NanoChat {
    const MODEL_TYPES: &'static [&'static str] = &["nanochat"];
    type Config = Config;
    type Model = Self;

    fn new(c: Config, w: &Weights) -> Result<Self> {
        let n = if w.has("transformer.wte.weight") { OF_NANOCHAT } else { OF_TRANSFORMERS };
        let (model, vocab, dim) = (w.at(n.model), c.vocab_size, c.hidden_size);
        let norm = || RmsNorm::plain(dim, c.rms_norm_eps);
        let embed_tokens = model.embedding(n.embed, vocab, dim);
        let layers = model.at(n.layers).each(c.num_hidden_layers, |w, _| {
            let mlp = Mlp::new(&w.at("mlp"), n.mlp, dim, c.intermediate_size, false, c.hidden_act);
            Ok(Block::pre_norm([norm(), norm()], attention(&c, &w.at(n.attn), n.qkvo), mlp))
        })?;
        let lm_head = LmHead::new(w, &embed_tokens, vocab, dim, c.tie_word_embeddings);
        Ok(Self(Decoder::of(embed_tokens, layers, norm(), lm_head).softcap(c.final_logit_softcapping)))
    }
}

impl Model for NanoChat {
    fn caches(&self) -> Vec<Cache> {
        self.0.caches()
    }

    fn forward(&self, tokens: &Tensor, step: &mut Step) -> Tensor {
        // The norm has no weight: the last one serves before the first block too.
        let x = self.0.norm.forward(&self.0.embed(tokens));
        self.0.forward_from(x, step, Block::forward)
    }

    fn head(&self, hidden: &Tensor) -> Tensor {
        self.0.head(hidden)
    }
}

export_plugin!(NanoChat, examples = ["../../tests/fixtures/tiny/nanochat/config.json"]);
