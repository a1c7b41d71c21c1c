//! The smallest useful llama, as somebody might write it who has never seen the host. Equal weights must give equal tokens.

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
        rms_norm_eps: f32,
        rope_theta: f32 = 10_000.0,
    }
}

struct Block {
    input_layernorm: RmsNorm,
    qkv: [Linear; 3],
    o_proj: Linear,
    post_attention_layernorm: RmsNorm,
    gate_up: [Linear; 2],
    down_proj: Linear,
    rope: Rope,
    head_dim: usize,
}

impl Block {
    fn new(c: &Config, w: &Weights) -> Result<Self> {
        let (dim, hidden) = (c.hidden_size, c.intermediate_size);
        let (q, kv) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
        let (attn, mlp) = (w.at("self_attn"), w.at("mlp"));
        Ok(Self {
            input_layernorm: w.rms_norm("input_layernorm", dim, c.rms_norm_eps),
            qkv: attn.linears(dim, false, [("q_proj", q), ("k_proj", kv), ("v_proj", kv)]),
            o_proj: attn.linear("o_proj", q, dim, false),
            post_attention_layernorm: w.rms_norm("post_attention_layernorm", dim, c.rms_norm_eps),
            gate_up: mlp.linears(dim, false, [("gate_proj", hidden), ("up_proj", hidden)]),
            down_proj: mlp.linear("down_proj", hidden, dim, false),
            rope: w.rope(c.head_dim, c.rope_theta, &None),
            head_dim: c.head_dim,
        })
    }

    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let normed = self.input_layernorm.forward(x);
        let [q, k, v] = self.qkv.each_ref().map(|proj| proj.forward(&normed).split_heads(self.head_dim));
        let (q, k) = (layer.rotate(&self.rope, q), layer.rotate(&self.rope, k));
        let scale = (self.head_dim as f32).powf(-0.5);
        let attended = layer.attend(q, k, v, &Attend { scale, ..Default::default() });
        let h = x + self.o_proj.forward(&attended.merge_heads());
        let normed = self.post_attention_layernorm.forward(&h);
        let [gate, up] = self.gate_up.each_ref().map(|proj| proj.forward(&normed));
        &h + self.down_proj.forward(&(gate.silu() * up))
    }
}

struct Outsider {
    embed_tokens: Embedding,
    layers: Vec<Block>,
    norm: RmsNorm,
    lm_head: Linear,
}

impl Architecture for Outsider {
    const MODEL_TYPES: &'static [&'static str] = &["outsider"];
    type Config = Config;
    type Model = Self;

    fn new(c: Config, w: &Weights) -> Result<Self> {
        let model = w.at("model");
        Ok(Self {
            embed_tokens: model.embedding("embed_tokens", c.vocab_size, c.hidden_size),
            layers: model.at("layers").each(c.num_hidden_layers, |w, _| Block::new(&c, w))?,
            norm: model.rms_norm("norm", c.hidden_size, c.rms_norm_eps),
            lm_head: w.linear("lm_head", c.hidden_size, c.vocab_size, false),
        })
    }
}

impl Model for Outsider {
    fn caches(&self) -> Vec<Cache> {
        vec![Cache::key_value(None); self.layers.len()]
    }

    fn forward(&self, tokens: &Tensor, step: &mut Step) -> Tensor {
        let h = step.through(&self.layers, self.embed_tokens.forward(tokens), Block::forward);
        self.norm.forward(&h)
    }

    fn head(&self, hidden: &Tensor) -> Tensor {
        self.lm_head.forward(hidden)
    }
}

export_plugin!(Outsider);
