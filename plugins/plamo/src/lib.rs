//! PLaMo 13B: attention and feed-forward side by side, query heads that share keys in turns. <https://huggingface.co/pfnet/plamo-13b>
//!
//! ```text
//! n = RMSNorm(x)                           per layer
//! y = x + Attention(n) + SwiGLU(n)
//! logits = RMSNorm(y) · Wlm
//!
//! Attention(x) = softmax(rope(x Wq) · rope(x Wk)ᵀ / √d) · (x Wv) · Wo      query head i looks at key head i mod kv_heads
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize,
        hidden_size: usize,
        intermediate_size: usize,
        num_hidden_layers: usize,
        num_attention_heads: usize where >= 1,
        n_shared_head: usize where >= 1 = 8,
        rms_norm_eps: f32 = 1e-6,
        rope_theta: f32 = 10_000.0,
        rope_scaling: Option<RopeScaling> = None,
        tie_word_embeddings: bool = false,
    }
}

struct Attention {
    qkv: [Linear; 3],
    o_proj: Linear,
    rope: Rope,
    head_dim: usize,
    kv_heads: usize,
    sharing: usize,
}

/// Heads `[tokens, outer * inner * head_dim]` with the two counts exchanged.
fn exchanged(x: &Tensor, outer: usize, inner: usize, head_dim: usize) -> Tensor {
    let outer = x.unflatten(outer);
    let parts: Vec<Tensor> = (0..inner).map(|i| outer.narrow(i * head_dim, head_dim).flatten()).collect();
    Tensor::concat(&parts.iter().collect::<Vec<_>>())
}

impl Attention {
    fn new(c: &Config, w: &Weights) -> Self {
        let (dim, head_dim) = (c.hidden_size, c.hidden_size / c.num_attention_heads);
        let kv_heads = c.num_attention_heads / c.n_shared_head;
        let kv = kv_heads * head_dim;
        Self {
            qkv: w.linears(dim, false, [("q_proj", dim), ("k_proj", kv), ("v_proj", kv)]),
            o_proj: w.linear("o_proj", dim, dim, false),
            rope: w.rope(head_dim, c.rope_theta, &c.rope_scaling),
            head_dim,
            kv_heads,
            sharing: c.n_shared_head,
        }
    }
}

impl Mixer for Attention {
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let (d, kv_heads, sharing) = (self.head_dim, self.kv_heads, self.sharing);
        let [q, k, v] = self.qkv.each_ref().map(|proj| proj.forward(x));
        // Grouped heads stand side by side.
        let q = layer.rotate(&self.rope, exchanged(&q, sharing, kv_heads, d).split_heads(d));
        let k = layer.rotate(&self.rope, k.split_heads(d));
        let how = Attend { scale: (d as f32).powf(-0.5), ..Default::default() };
        let y = layer.attend(q, k, v.split_heads(d), &how).merge_heads();
        self.o_proj.forward(&exchanged(&y, kv_heads, sharing, d))
    }

    fn cache(&self) -> Cache {
        Cache::key_value(None)
    }
}

struct Plamo;

impl Architecture for Plamo {
    const MODEL_TYPES: &'static [&'static str] = &["plamo"];
    type Config = Config;
    type Model = Decoder<Block<Attention>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        if !c.num_attention_heads.is_multiple_of(c.n_shared_head) {
            let (heads, sharing) = (c.num_attention_heads, c.n_shared_head);
            return Err(
                format!("config.json: {heads} heads do not split into groups of n_shared_head {sharing}").into()
            );
        }
        let (model, dim) = (w.at("model"), c.hidden_size);
        let embed_tokens = model.embedding("embed_tokens", c.vocab_size, dim);
        let layers = model.at("layers.layers").each(c.num_hidden_layers, |w, _| {
            let mlp = GatedMlp::new(&w.at("mlp"), dim, c.intermediate_size, false, Activation::Silu);
            Ok(Block::parallel(w.rms_norm("norm", dim, c.rms_norm_eps), Attention::new(&c, &w.at("self_attn")), mlp))
        })?;
        let lm_head = LmHead::new(w, &embed_tokens, c.vocab_size, dim, Some(c.tie_word_embeddings));
        Ok(Decoder::of(embed_tokens, layers, model.rms_norm("norm", dim, c.rms_norm_eps), lm_head))
    }
}

export_plugin!(Plamo, examples = ["../../tests/fixtures/tiny/plamo/config.json"]);
