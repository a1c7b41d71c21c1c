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

struct Attention {
    query_key_value: Linear,
    dense: Linear,
    rope: Rope,
    scale: f32,
    blocks: Option<SparseBlocks>,
    head_dim: usize,
    kv_heads: usize,
    group: usize,
}

impl Attention {
    fn new(c: &Config, w: &Weights, layer: usize) -> Self {
        let (dim, head_dim, kv_heads) = (c.hidden_size, c.hidden_size / c.num_attention_heads, c.num_key_value_heads);
        let every = c.dense_attention_every_n_layers;
        let is_dense = every > 0 && (layer + 1).is_multiple_of(every);
        let blocks = SparseBlocks {
            size: c.blocksparse_block_size,
            local: c.blocksparse_num_local_blocks,
            stride: c.blocksparse_vert_stride,
        };
        let stretch = RopeScaling::of("linear", &[("factor", 1.0 / c.rope_position_scale)]);
        Self {
            query_key_value: w.linear("query_key_value", dim, dim + 2 * kv_heads * head_dim, true),
            dense: w.linear("dense", dim, dim, true),
            rope: w.rope(head_dim, c.rope_embedding_base, &(c.rope_position_scale != 1.0).then_some(stretch)),
            scale: match c.mup_use_scaling {
                true => c.mup_attn_multiplier / head_dim as f32,
                false => (head_dim as f32).powf(-0.5),
            },
            blocks: (!is_dense).then_some(blocks),
            head_dim,
            kv_heads,
            group: c.num_attention_heads / kv_heads,
        }
    }
}

impl Mixer for Attention {
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let (d, q_lanes) = (self.head_dim, self.group * self.head_dim);
        let groups = self.query_key_value.forward(x).unflatten(self.kv_heads);
        let q = layer.rotate(&self.rope, groups.narrow(0, q_lanes).flatten().split_heads(d));
        let k = layer.rotate(&self.rope, groups.narrow(q_lanes, d));
        let how = Attend { scale: self.scale, blocks: self.blocks, ..Default::default() };
        self.dense.forward(&layer.attend(q, k, groups.narrow(q_lanes + d, d), &how).merge_heads())
    }

    fn cache(&self) -> Cache {
        Cache::key_value(None)
    }
}

struct Gegelu {
    up_proj: Linear,
    down_proj: Linear,
    hidden: usize,
    limit: f32,
}

impl FeedForward for Gegelu {
    fn forward(&self, x: &Tensor) -> Tensor {
        let pairs = self.up_proj.forward(x).unflatten(self.hidden);
        let a = pairs.narrow(0, 1).flatten().clamp(f32::MIN, self.limit);
        let b = pairs.narrow(1, 1).flatten().clamp(-self.limit, self.limit);
        self.down_proj.forward(&(&a * (&a * 1.702).sigmoid() * (b + 1.0)))
    }
}

struct Phi3Small(Decoder<Block<Attention, Gegelu>>);

impl Architecture for Phi3Small {
    const MODEL_TYPES: &'static [&'static str] = &["phi3small"];
    type Config = Config;

    fn new(c: Config, w: &Weights) -> Result<Self> {
        let (model, dim, hidden) = (w.at("model"), c.hidden_size, c.ff_intermediate_size);
        let embed_tokens = model.embedding("embed_tokens", c.vocab_size, dim);
        let layers = model.at("layers").each(c.num_hidden_layers, |w, layer| {
            let (up_proj, down_proj) = ("mlp.up_proj", "mlp.down_proj");
            let mlp = Gegelu {
                up_proj: w.linear(up_proj, dim, 2 * hidden, true),
                down_proj: w.linear(down_proj, hidden, dim, true),
                hidden,
                limit: c.gegelu_limit,
            };
            let norms = ["input_layernorm", "post_attention_layernorm"].map(|name| c.norm(w, name));
            Ok(Block::pre_norm(norms, Attention::new(&c, &w.at("self_attn"), layer), mlp))
        })?;
        let lm_head = LmHead::new(w, &embed_tokens, c.vocab_size, dim, Some(true));
        let decoder = Decoder::of(embed_tokens, layers, c.norm(&model, "final_layernorm"), lm_head)
            .embed_scale(c.mup_embedding_multiplier)
            .logit_scale(1.0 / c.mup_width_multiplier);
        Ok(Self(decoder))
    }

    fn caches(&self) -> Vec<Cache> {
        self.0.caches()
    }

    fn forward(&self, tokens: &Tensor, step: &mut Step) -> Tensor {
        self.0.run(tokens, step)
    }

    fn head(&self, hidden: &Tensor) -> Tensor {
        self.0.head(hidden)
    }
}

export_plugin!(Phi3Small);
