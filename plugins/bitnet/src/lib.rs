//! BitNet b1.58: ternary weights, a norm before each output projection, squared ReLU. <https://arxiv.org/abs/2504.12285>
//!
//! ```text
//! h = x + Attention(RMSNorm(x))            per layer
//! y = h + Norm(relu(n Wgate)² * (n Wup)) · Wdown,  n = RMSNorm(h)
//! logits = RMSNorm(y) · Eᵀ
//!
//! Attention(x) = Norm(softmax(rope(x Wq) · rope(x Wk)ᵀ / √d) · (x Wv)) · Wo
//! ```
//!
//! That a weight is -1, 0 or 1 times a scale is the host's business, as every packing is.

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize = 128_256,
        hidden_size: usize = 2560,
        intermediate_size: usize = 6912,
        num_hidden_layers: usize = 30,
        num_attention_heads: usize where >= 1 = 20,
        num_key_value_heads: usize = num_attention_heads,
        head_dim: usize = hidden_size / num_attention_heads,
        hidden_act: Activation = Activation::Relu2,
        rms_norm_eps: f32 = 1e-5,
        attention_bias: bool = false,
        mlp_bias: bool = false,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        tie_word_embeddings: Option<bool> = None,
    }
}

struct Attention {
    attention: SelfAttention,
    attn_sub_norm: RmsNorm,
}

impl Mixer for Attention {
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let qkv = self.attention.project(x, layer);
        let attended = self.attention.attend(qkv, layer);
        self.attention.output(&self.attn_sub_norm.forward(&attended))
    }

    fn cache(&self) -> Cache {
        self.attention.cache()
    }
}

struct Feed {
    gate_proj: Linear,
    up_proj: Linear,
    ffn_sub_norm: RmsNorm,
    down_proj: Linear,
    act: Activation,
}

impl FeedForward for Feed {
    fn forward(&self, x: &Tensor) -> Tensor {
        let gated = self.act.forward(&self.gate_proj.forward(x)) * self.up_proj.forward(x);
        self.down_proj.forward(&self.ffn_sub_norm.forward(&gated))
    }
}

type Layers = Block<Attention, Feed>;

impl Config {
    fn block(&self, w: &Weights) -> Layers {
        let (dim, head_dim, hidden, eps) = (self.hidden_size, self.head_dim, self.intermediate_size, self.rms_norm_eps);
        let heads = Heads { dim, heads: self.num_attention_heads, kv_heads: self.num_key_value_heads, head_dim };
        let (attention, mlp) = (w.at("self_attn"), w.at("mlp"));
        let [gate_proj, up_proj] = mlp.linears(dim, self.mlp_bias, [("gate_proj", hidden), ("up_proj", hidden)]);
        let feed = Feed {
            gate_proj,
            up_proj,
            ffn_sub_norm: mlp.rms_norm("ffn_sub_norm", hidden, eps),
            down_proj: mlp.linear("down_proj", hidden, dim, self.mlp_bias),
            act: self.hidden_act,
        };
        let attention =
            Attention {
                attn_sub_norm: attention.rms_norm("attn_sub_norm", heads.heads * head_dim, eps),
                attention: SelfAttention::new(&attention, heads, self.attention_bias, self.attention_bias)
                    .rope(w.rope(head_dim, self.rope_theta, &self.rope_scaling)),
            };
        Block::pre_norm(
            ["input_layernorm", "post_attention_layernorm"].map(|name| w.rms_norm(name, dim, eps)),
            attention,
            feed,
        )
    }
}

struct BitNet;

impl Architecture for BitNet {
    const MODEL_TYPES: &'static [&'static str] = &["bitnet"];
    type Config = Config;
    type Model = Decoder<Layers>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        Decoder::new(w, decoder_shape!(c), |w, _| Ok(c.block(w)))
    }
}

export_plugin!(BitNet, examples = ["../../tests/fixtures/tiny/bitnet/config.json"]);
