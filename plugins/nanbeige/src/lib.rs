//! Nanbeige: LLaMA whose layers run several times, each time over keys of their own. <https://arxiv.org/abs/2502.05171>
//!
//! ```text
//! h = x + Attention(RMSNorm(x))            per layer, and all layers num_loops times
//! y = h + SwiGLU(RMSNorm(h))
//! x = RMSNorm(y)                           after every loop, or after the last one only
//! logits = x · Wᵀ
//!
//! Attention(x) = softmax(rope(x Wq) · rope(x Wk)ᵀ / √d) · (x Wv) · Wo
//! ```

use plugin_api::prelude::*;

/// A step of more layers than this is no model.
const MOST_LOOPS: usize = 100;

config! {
    struct Config {
        vocab_size: usize,
        hidden_size: usize,
        intermediate_size: usize,
        num_hidden_layers: usize,
        num_attention_heads: usize where >= 1,
        num_key_value_heads: usize = num_attention_heads,
        head_dim: usize = hidden_size / num_attention_heads,
        rms_norm_eps: f32,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        attention_bias: bool = false,
        mlp_bias: bool = false,
        loop_loss_weights: Vec<f32> = vec![],
        num_loops: usize where >= 1 = 1,
        skip_loop_final_norm: bool = false,
        enable_double_loop_split: bool = false,
        loop_share_kv: bool = false,
        enable_depth_attention: bool = false,
        tie_word_embeddings: bool = false,
    }
}

impl Config {
    /// Training with a loss after each loop leaves a weight for every loop but one.
    fn loops(&self) -> Result<usize> {
        let loops = if self.loop_loss_weights.is_empty() { self.num_loops } else { self.loop_loss_weights.len() + 1 };
        match loops <= MOST_LOOPS {
            true => Ok(loops),
            false => Err(format!("config.json: num_loops is {loops}, at most {MOST_LOOPS} make sense").into()),
        }
    }

    fn check(&self) -> Result<()> {
        let unknown = [
            ("enable_double_loop_split", self.enable_double_loop_split),
            ("loop_share_kv", self.loop_share_kv),
            ("enable_depth_attention", self.enable_depth_attention),
        ];
        match unknown.into_iter().find(|&(_, is_set)| is_set) {
            Some((key, _)) => Err(format!("config.json: {key} is true, which this plugin does not know").into()),
            None => Ok(()),
        }
    }
}

fn block(c: &Config, w: &Weights) -> Block {
    let (dim, heads, kv_heads, head_dim) = (c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim);
    let norms = ["input_layernorm", "post_attention_layernorm"].map(|name| w.rms_norm(name, dim, c.rms_norm_eps));
    let shape = Heads { dim, heads, kv_heads, head_dim };
    let attention = SelfAttention::new(&w.at("self_attn"), shape, c.attention_bias, c.attention_bias).rope(w.rope(
        head_dim,
        c.rope_theta,
        &c.rope_scaling,
    ));
    Block::pre_norm(
        norms,
        attention,
        GatedMlp::new(&w.at("mlp"), dim, c.intermediate_size, c.mlp_bias, Activation::Silu),
    )
}

struct Nanbeige {
    decoder: Decoder,
    loops: usize,
    skip_loop_final_norm: bool,
}

impl Architecture for Nanbeige {
    const MODEL_TYPES: &'static [&'static str] = &["nanbeige"];
    type Config = Config;
    type Model = Self;

    fn new(c: Config, w: &Weights) -> Result<Self> {
        c.check()?;
        let shape = DecoderShape {
            vocab_size: c.vocab_size,
            hidden_size: c.hidden_size,
            num_hidden_layers: c.num_hidden_layers,
            rms_norm_eps: c.rms_norm_eps,
            tie_word_embeddings: Some(c.tie_word_embeddings),
        };
        let decoder = Decoder::new(w, shape, |w, _| Ok(block(&c, w)))?;
        Ok(Self { decoder, loops: c.loops()?, skip_loop_final_norm: c.skip_loop_final_norm })
    }
}

impl Model for Nanbeige {
    fn caches(&self) -> Vec<Cache> {
        (0..self.loops).flat_map(|_| self.decoder.caches()).collect()
    }

    fn forward(&self, tokens: &Tensor, step: &mut Step) -> Tensor {
        let mut layers = step.layers();
        let mut x = self.decoder.embed(tokens);
        for turn in 1..=self.loops {
            for (block, mut layer) in self.decoder.layers.iter().zip(layers.by_ref()) {
                x = block.forward(&x, &mut layer);
            }
            if turn == self.loops || !self.skip_loop_final_norm {
                x = self.decoder.norm.forward(&x);
            }
        }
        x
    }

    fn head(&self, hidden: &Tensor) -> Tensor {
        self.decoder.head(hidden)
    }
}

export_plugin!(Nanbeige, examples = ["../../tests/fixtures/tiny/nanbeige/config.json"]);
