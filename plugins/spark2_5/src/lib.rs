//! Spark 2.5: three layers with a window to one that sees all keys, each kind with a rope of its own, and a gate for each head.
//! <https://huggingface.co/iflytek>
//!
//! ```text
//! h = x + Attention(RMSNorm(x))            per layer
//! y = h + GEGLU(RMSNorm(h))
//! logits = RMSNorm(y) · Eᵀ
//!
//! Attention(x) = (sigmoid(x Wg) * softmax(rope(q) · rope(k)ᵀ / √d) · v) · Wo,  q, k, v = x Wqkv;  one gate a head
//! GEGLU(x) = (gelu(x Wgate) * (x Wup)) · Wdown
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize,
        hidden_size: usize,
        intermediate_size: usize,
        num_hidden_layers: usize,
        num_attention_heads: usize where >= 1,
        num_key_value_heads: usize where >= 1,
        head_dim: usize,
        hidden_act: Activation = Activation::Gelu,
        rms_norm_eps: f32 = 1e-6,
        rope_parameters: LayerRopes,
        sliding_window: usize,
        layer_types: LayerTypes = LayerTypes::every(4, num_hidden_layers),
        attention_bias: bool = false,
        mlp_bias: bool = false,
        gate_attn_act_mode: String = "sigmoid".into(),
        headwise_attn_output_gate: bool = true,
        tie_word_embeddings: bool = true,
    }
}

fn block(c: &Config, w: &Weights, layer: usize) -> Result<Block> {
    let (dim, heads, kv_heads, head_dim) = (c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim);
    let norms = ["input_layernorm", "post_attention_layernorm"].map(|name| w.rms_norm(name, dim, c.rms_norm_eps));
    let (attn, bias, slides) = (w.at("self_attn"), c.attention_bias, c.layer_types.slides(layer)?);
    let out_proj = attn.linear("out_proj", heads * head_dim, dim, bias);
    let shape = Heads { dim, heads, kv_heads, head_dim };
    let attention = SelfAttention::fused(&attn, "q_k_v_proj", shape, bias, out_proj)
        .rope(c.rope_parameters.rope(w, head_dim, slides))
        .window(slides.then_some(c.sliding_window))
        .head_gate(attn.linear("g_proj", dim, heads, bias));
    let mlp = GatedMlp::new(&w.at("mlp"), dim, c.intermediate_size, c.mlp_bias, c.hidden_act);
    Ok(Block::pre_norm(norms, attention, mlp))
}

struct Spark;

impl Architecture for Spark {
    const MODEL_TYPES: &'static [&'static str] = &["spark2_5"];
    type Config = Config;
    type Model = Decoder;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        if !c.headwise_attn_output_gate || c.gate_attn_act_mode != "sigmoid" {
            return Err("config.json: headwise_attn_output_gate should be true and gate_attn_act_mode sigmoid".into());
        }
        let (model, dim) = (w.at("model"), c.hidden_size);
        let embedding = if model.has("embed_tokens.weight") { "embed_tokens" } else { "embedding" };
        let embedding = model.embedding(embedding, c.vocab_size, dim);
        let layers = model.at("layers").each(c.num_hidden_layers, |w, layer| block(&c, w, layer))?;
        let lm_head = LmHead::new(w, &embedding, c.vocab_size, dim, Some(c.tie_word_embeddings));
        Ok(Decoder::of(embedding, layers, model.rms_norm("norm", dim, c.rms_norm_eps), lm_head))
    }
}

export_plugin!(Spark, examples = ["../../tests/fixtures/tiny/spark2_5/config.json"]);
