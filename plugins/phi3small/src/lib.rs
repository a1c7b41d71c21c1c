//! Phi 3 small: block-sparse attention in every other layer, muP's multipliers. <https://arxiv.org/abs/2404.14219>
//!
//! ```text
//! x = m · E[token]
//! h = x + Attention(LayerNorm(x))          per layer
//! y = h + GEGELU(LayerNorm(h))
//! logits = LayerNorm(y) · Eᵀ / m'
//!
//! Attention(x) = softmax(rope(q) · rope(k)ᵀ · s) · v · Wdense       q, k, v: group by group in x Wqkv + b
//! GEGELU(x) = (a σ(1.702 a) * (b + 1)) · Wdown,  a = min(x Wup, l), b = clamp(x Wup, ± l) of even and odd lanes
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize,
        hidden_size: usize,
        ff_intermediate_size: usize,
        num_hidden_layers: usize,
        num_attention_heads: usize where >= 1,
        num_key_value_heads: usize where >= 1,
        layer_norm_epsilon: f32 = 1e-5,
        gegelu_limit: f32 = 20.0,
        dense_attention_every_n_layers: usize = 2,
        blocksparse_block_size: usize = 64,
        blocksparse_num_local_blocks: usize = 16,
        blocksparse_vert_stride: usize = 8,
        mup_use_scaling: bool = true,
        mup_attn_multiplier: f32 = 1.0,
        mup_embedding_multiplier: f32 = 10.0,
        mup_width_multiplier: f32 = 8.0,
        rope_embedding_base: f32 = 1_000_000.0,
        rope_position_scale: f32 = 1.0,
    }
}

impl Config {
    fn norm(&self, w: &Weights, name: &str) -> LayerNorm {
        w.layer_norm(name, self.hidden_size, self.layer_norm_epsilon, true)
    }
}

fn attention(c: &Config, w: &Weights, layer: usize) -> SelfAttention {
    let (dim, heads, kv_heads) = (c.hidden_size, c.num_attention_heads, c.num_key_value_heads);
    let shape = Heads { dim, heads, kv_heads, head_dim: dim / heads };
    let every = c.dense_attention_every_n_layers;
    let is_dense = every > 0 && (layer + 1).is_multiple_of(every);
    let (size, local) = (c.blocksparse_block_size, c.blocksparse_num_local_blocks);
    let blocks = SparseBlocks { size, local, stride: c.blocksparse_vert_stride };
    let stretch = RopeScaling::of("linear", &[("factor", 1.0 / c.rope_position_scale)]);
    let stretch = (c.rope_position_scale != 1.0).then_some(stretch);
    SelfAttention::grouped(w, "query_key_value", shape, true, w.linear("dense", dim, dim, true))
        .rope(w.rope(shape.head_dim, c.rope_embedding_base, &stretch))
        .scale(match c.mup_use_scaling {
            true => c.mup_attn_multiplier / shape.head_dim as f32,
            false => (shape.head_dim as f32).powf(-0.5),
        })
        .blocks((!is_dense).then_some(blocks))
}

struct Gegelu {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
    limit: f32,
}

impl Gegelu {
    fn new(c: &Config, w: &Weights) -> Self {
        let (dim, hidden) = (c.hidden_size, c.ff_intermediate_size);
        let [gate_proj, up_proj] = [0, 1].map(|turn| {
            let [weight, bias] = ["up_proj.weight", "up_proj.bias"].map(|name| w.source(name).every(0, turn, 2));
            Linear::of(weight, Some(bias), dim, hidden)
        });
        Self { gate_proj, up_proj, down_proj: w.linear("down_proj", hidden, dim, true), limit: c.gegelu_limit }
    }
}

impl FeedForward for Gegelu {
    fn forward(&self, x: &Tensor) -> Tensor {
        let a = self.gate_proj.forward(x).clamp(f32::MIN, self.limit);
        let b = self.up_proj.forward(x).clamp(-self.limit, self.limit);
        self.down_proj.forward(&(&a * (&a * 1.702).sigmoid() * (b + 1.0)))
    }
}

struct Phi3Small;

impl Architecture for Phi3Small {
    const MODEL_TYPES: &'static [&'static str] = &["phi3small"];
    type Config = Config;
    type Model = Decoder<Block<SelfAttention, Gegelu>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        let (model, dim) = (w.at("model"), c.hidden_size);
        let embed_tokens = model.embedding("embed_tokens", c.vocab_size, dim);
        let layers = model.at("layers").each(c.num_hidden_layers, |w, layer| {
            let norms = ["input_layernorm", "post_attention_layernorm"].map(|name| c.norm(w, name));
            Ok(Block::pre_norm(norms, attention(&c, &w.at("self_attn"), layer), Gegelu::new(&c, &w.at("mlp"))))
        })?;
        let lm_head = LmHead::new(w, &embed_tokens, c.vocab_size, dim, Some(true));
        let decoder = Decoder::of(embed_tokens, layers, c.norm(&model, "final_layernorm"), lm_head)
            .embed_scale(c.mup_embedding_multiplier)
            .logit_scale(1.0 / c.mup_width_multiplier);
        Ok(decoder)
    }
}

export_plugin!(Phi3Small, examples = ["../../tests/fixtures/tiny/phi3small/config.json"]);
