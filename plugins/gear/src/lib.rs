//! Gear: Gemma 3's blocks, in most of which a gated convolution of keys and values stands in for attention.
//!
//! ```text
//! x = √dim E[ids]
//! h = x + RMSNorm(Mixer(RMSNorm(x)))       per layer; norms multiply by 1 + w
//! y = h + RMSNorm(GEGLU(RMSNorm(h)))
//! logits = RMSNorm(y) · Eᵀ                 perhaps capped by tanh
//!
//! Mixer of full_attention and sliding_attention: softmax(q · kᵀ · scale) · (x Wv) · Wo
//!   q = rope(RMSNorm(x Wq)), k = rope(RMSNorm(x Wk)), by head; layers with a window turn faster
//! Mixer of conv_mixer: (sigmoid(q * conv(k)) * conv(x Wv)) · Wo
//!   q = RMSNorm(x Wq), k = RMSNorm(x Wk); grouped heads share keys and values
//! ```

// `conv_L_cache` is spelled as in config.json.
#![allow(non_snake_case)]

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize,
        hidden_size: usize,
        intermediate_size: usize,
        num_hidden_layers: usize,
        num_attention_heads: usize where >= 1,
        num_key_value_heads: usize where >= 1 = num_attention_heads,
        head_dim: usize,
        hidden_activation: Activation = Activation::GeluTanh,
        rms_norm_eps: f32,
        layer_types: Vec<String>,
        sliding_window: usize = 512,
        conv_L_cache: usize where >= 1 = 3,
        attention_bias: bool = false,
        query_pre_attn_scalar: f32 = head_dim as f32,
        attn_logit_softcapping: Option<f32> = None,
        final_logit_softcapping: Option<f32> = None,
        rope_theta: f32 = 1_000_000.0,
        rope_local_base_freq: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        use_bidirectional_attention: bool = false,
        tie_word_embeddings: bool = true,
    }
}

impl Config {
    fn heads(&self) -> Heads {
        let (dim, head_dim) = (self.hidden_size, self.head_dim);
        Heads { dim, heads: self.num_attention_heads, kv_heads: self.num_key_value_heads, head_dim }
    }
}

fn norm(c: &Config, w: &Weights, name: &str, dim: usize) -> RmsNorm {
    RmsNorm::of(w.source(&format!("{name}.weight")).plus(1.0), dim, c.rms_norm_eps)
}

fn attention(c: &Config, w: &Weights, slides: bool) -> SelfAttention {
    let rope = match slides {
        true => w.rope(c.head_dim, c.rope_local_base_freq, &None),
        false => w.rope(c.head_dim, c.rope_theta, &c.rope_scaling),
    };
    SelfAttention::new(w, c.heads(), c.attention_bias, c.attention_bias)
        .head_norms(norm(c, w, "q_norm", c.head_dim), norm(c, w, "k_norm", c.head_dim))
        .rope(rope)
        .window(slides.then_some(c.sliding_window))
        .scale(c.query_pre_attn_scalar.powf(-0.5))
        .softcap(c.attn_logit_softcapping)
}

/// Keys and values of the last tokens, folded lane by lane and let through by the query.
struct ConvMixer {
    qkv: [Linear; 3],
    o_proj: Linear,
    q_norm: RmsNorm,
    k_norm: RmsNorm,
    key_conv: Conv1d,
    value_conv: Conv1d,
    heads: Heads,
}

impl ConvMixer {
    fn new(c: &Config, w: &Weights) -> Self {
        let (heads, bias) = (c.heads(), c.attention_bias);
        let (q, kv) = (heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim);
        Self {
            qkv: w.linears(heads.dim, bias, [("q_proj", q), ("k_proj", kv), ("v_proj", kv)]),
            o_proj: w.linear("o_proj", q, heads.dim, bias),
            q_norm: norm(c, w, "q_norm", heads.head_dim),
            k_norm: norm(c, w, "k_norm", heads.head_dim),
            key_conv: w.conv1d("key_conv", kv, c.conv_L_cache, bias),
            value_conv: w.conv1d("value_conv", kv, c.conv_L_cache, bias),
            heads,
        }
    }
}

impl Mixer for ConvMixer {
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let Heads { heads, kv_heads, head_dim, .. } = self.heads;
        let [q, k, v] = self.qkv.each_ref().map(|proj| proj.forward(x));
        let q = self.q_norm.forward(&q.split_heads(head_dim)).merge_heads();
        let k = self.k_norm.forward(&k.split_heads(head_dim)).merge_heads();
        let (k, v) = (layer.conv1d(&self.key_conv, &k), layer.conv1d(&self.value_conv, &v));
        // [tokens, kv_heads, 1, head_dim], to meet the queries of a group, [tokens, kv_heads, heads / kv_heads, head_dim].
        let [k, v] = [k, v].map(|x| x.unflatten(kv_heads).unflatten(1));
        let q = q.unflatten(kv_heads).unflatten(heads / kv_heads);
        self.o_proj.forward(&((q * k).sigmoid() * v).flatten().flatten())
    }

    fn cache(&self) -> Cache {
        self.key_conv.cache().and(self.value_conv.cache())
    }
}

fn block(c: &Config, w: &Weights, layer: usize) -> Result<Block<AnyMixer>> {
    let mixer: AnyMixer = match c.layer_types.get(layer).map(String::as_str) {
        Some("conv_mixer") => Box::new(ConvMixer::new(c, &w.at("local_mixer"))),
        Some("full_attention") => Box::new(attention(c, &w.at("self_attn"), false)),
        Some("sliding_attention") => Box::new(attention(c, &w.at("self_attn"), true)),
        other => return Err(format!("config.json: layer_types has {other:?} for layer {layer}, it should be full_attention, sliding_attention or conv_mixer").into()),
    };
    let names =
        ["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"];
    let norms = names.map(|name| norm(c, w, name, c.hidden_size));
    let mlp = GatedMlp::new(&w.at("mlp"), c.hidden_size, c.intermediate_size, false, c.hidden_activation);
    Ok(Block::both_norms(norms, mixer, mlp))
}

struct Gear;

impl Architecture for Gear {
    const MODEL_TYPES: &'static [&'static str] = &["gear"];
    type Config = Config;
    type Model = Decoder<Block<AnyMixer>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        if c.use_bidirectional_attention {
            return Err("config.json: use_bidirectional_attention is true, a decoder only looks back".into());
        }
        if !c.num_attention_heads.is_multiple_of(c.num_key_value_heads) {
            return Err("config.json: num_key_value_heads should divide num_attention_heads".into());
        }
        // A number that every loader computes.
        w.ignore("model.embed_tokens.embed_scale");
        let (model, dim) = (w.at("model"), c.hidden_size);
        let embed_tokens = model.embedding("embed_tokens", c.vocab_size, dim);
        let layers = model.at("layers").each(c.num_hidden_layers, |w, layer| block(&c, w, layer))?;
        let lm_head = LmHead::new(w, &embed_tokens, c.vocab_size, dim, Some(c.tie_word_embeddings));
        let decoder = Decoder::of(embed_tokens, layers, norm(&c, &model, "norm", dim), lm_head)
            .embed_scale((dim as f32).sqrt())
            .softcap(c.final_logit_softcapping);
        Ok(decoder)
    }
}

export_plugin!(Gear, examples = ["../../tests/fixtures/tiny/gear/config.json"]);
