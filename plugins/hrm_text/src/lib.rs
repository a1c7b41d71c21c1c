//! HRM-Text: two stacks of layers that take turns, a fast one some times and then a slow one, all of it again. Each turn has keys of its
//! own. <https://arxiv.org/abs/2506.21734>
//!
//! ```text
//! slow = a E[ids], fast = z                z a learned vector
//! H_cycles times:
//!   L_cycles times: fast = L(fast + slow)
//!   slow = H(slow + fast)
//! logits = slow · Wᵀ
//!
//! L and H, each with layers of its own, no norm with weights:
//!   h = x + Attention(RMSNorm(x)),  y = h + SwiGLU(RMSNorm(h)),  at last RMSNorm(y)
//! Attention(x) = (sigmoid(x Wg) * softmax(rope(x Wq) · rope(x Wk)ᵀ / √d) · (x Wv)) · Wo
//! ```
//!
//! Every token sees those before it; the two-sided prefix that `prefix_lm` speaks of is for callers that mark one.

// `H_cycles` and `L_cycles` are spelled as in config.json.
#![allow(non_snake_case)]

use plugin_api::prelude::*;

/// A step of more layers than this is no model.
const MOST_TURNS: usize = 1000;

config! {
    struct Config {
        vocab_size: usize = 151_808,
        hidden_size: usize = 1536,
        intermediate_size: usize = 4096,
        num_hidden_layers: usize = 16,
        num_layers_per_stack: usize = num_hidden_layers,
        num_attention_heads: usize where >= 1 = 12,
        head_dim: usize = 128,
        hidden_act: Activation = Activation::Silu,
        rms_norm_eps: f32 = 1e-6,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        H_cycles: usize where >= 1 = 2,
        L_cycles: usize where >= 1 = 3,
        initializer_range: f32 = 0.02,
        embedding_scale: f32 = 1.0 / initializer_range,
        tie_word_embeddings: Option<bool> = None,
    }
}

fn attention(c: &Config, w: &Weights) -> SelfAttention {
    let (dim, head_dim) = (c.hidden_size, c.head_dim);
    let width = c.num_attention_heads * head_dim;
    // Gate, queries, keys and values, one below the other.
    let gqkv = w.source("gqkv_proj.weight");
    let [gate, q, k, v] =
        [0, 1, 2, 3].map(|part| Linear::of(gqkv.rows(part * width..(part + 1) * width), None, dim, width));
    SelfAttention::of([q, k, v], w.linear("o_proj", width, dim, false), head_dim).gate(gate).rope(w.rope(
        head_dim,
        c.rope_theta,
        &c.rope_scaling,
    ))
}

fn block(c: &Config, w: &Weights) -> Block {
    let (dim, norm) = (c.hidden_size, || RmsNorm::plain(c.hidden_size, c.rms_norm_eps));
    let mlp = GatedMlp::fused(&w.at("mlp"), "gate_up_proj", dim, c.intermediate_size, c.hidden_act);
    Block::pre_norm([norm(), norm()], attention(c, &w.at("attn")), mlp)
}

/// The fast stack is the decoder's own, whose norm serves both.
struct HrmText {
    fast: Decoder,
    slow: Vec<Block>,
    z_l_init: Parameter,
    cycles: [usize; 2],
}

impl HrmText {
    fn turn(&self, stack: &[Block], mut x: Tensor, layers: &mut impl Iterator<Item = Layer>) -> Tensor {
        for (block, mut layer) in stack.iter().zip(layers) {
            x = block.forward(&x, &mut layer);
        }
        self.fast.norm.forward(&x)
    }
}

impl Architecture for HrmText {
    const MODEL_TYPES: &'static [&'static str] = &["hrm_text"];
    type Config = Config;
    type Model = Self;

    fn new(c: Config, w: &Weights) -> Result<Self> {
        let turns = c.H_cycles.saturating_mul(c.L_cycles.saturating_add(1));
        if turns > MOST_TURNS {
            return Err(format!(
                "config.json: H_cycles and L_cycles ask for {turns} turns; at most {MOST_TURNS} make sense"
            )
            .into());
        }
        let (model, dim) = (w.at("model"), c.hidden_size);
        let stack = |name: &str| model.at(name).at("layers").each(c.num_layers_per_stack, |w, _| Ok(block(&c, w)));
        let embed_tokens = model.embedding("embed_tokens", c.vocab_size, dim);
        let lm_head = LmHead::new(w, &embed_tokens, c.vocab_size, dim, c.tie_word_embeddings);
        let norm = RmsNorm::plain(dim, c.rms_norm_eps);
        Ok(Self {
            fast: Decoder::of(embed_tokens, stack("L_module")?, norm, lm_head).embed_scale(c.embedding_scale),
            slow: stack("H_module")?,
            z_l_init: model.tensor("z_L_init", &[dim]),
            cycles: [c.H_cycles, c.L_cycles],
        })
    }
}

impl Model for HrmText {
    fn caches(&self) -> Vec<Cache> {
        let [h_cycles, l_cycles] = self.cycles;
        vec![Cache::key_value(None); h_cycles * (l_cycles * self.fast.layers.len() + self.slow.len())]
    }

    fn forward(&self, tokens: &Tensor, step: &mut Step) -> Tensor {
        let ([h_cycles, l_cycles], mut layers) = (self.cycles, step.layers());
        let (mut slow, mut fast) = (self.fast.embed(tokens), self.z_l_init.tensor());
        for _ in 0..h_cycles {
            for _ in 0..l_cycles {
                fast = self.turn(&self.fast.layers, &slow + &fast, &mut layers);
            }
            slow = self.turn(&self.slow, &slow + &fast, &mut layers);
        }
        slow
    }

    fn head(&self, hidden: &Tensor) -> Tensor {
        self.fast.head(hidden)
    }
}

export_plugin!(HrmText, examples = ["../../tests/fixtures/tiny/hrm_text/config.json"]);
