//! Llama 4: chunked attention, every fourth layer without positions, one routed expert a token beside a shared one. MobileLLM-R1
//! (`llama4_text`) has the attention alone. <https://arxiv.org/abs/2601.11659>
//!
//! ```text
//! h = x + Attention(RMSNorm(x))            per layer
//! y = h + MoE(RMSNorm(h))
//! logits = RMSNorm(y) · Wᵀ
//!
//! Attention(x) = softmax(q · kᵀ / √d) · (x Wv) · Wo
//!   most layers, within chunks of the text: q = rms(rope(x Wq)), k = rms(rope(x Wk))
//!   the others, over all of it:             q = t x Wq, k = x Wk, t = 1 + a ln(1 + ⌊(p + 1) / f⌋) at position p
//!
//! MoE(x) = Σ SwiGLUᵢ(sᵢ x) + SwiGLUₛ(x)       over the k largest of s = sigmoid(x Wr); in dense layers: SwiGLU(x)
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize = 202_048,
        hidden_size: usize = 5120,
        intermediate_size: usize = 8192,
        intermediate_size_mlp: usize = 16_384,
        num_hidden_layers: usize = 48,
        num_attention_heads: usize where >= 1 = 40,
        num_key_value_heads: usize = 8,
        head_dim: usize = 128,
        hidden_act: SiluOnly = SiluOnly,
        rms_norm_eps: f32 = 1e-5,
        rope_theta: f32 = 500_000.0,
        rope_scaling: Option<RopeScaling> = None,
        attention_bias: bool = false,
        use_qk_norm: bool = true,
        attention_chunk_size: Option<usize> = Some(8192),
        // 1 for a layer that has rope, whatever the name says.
        no_rope_layers: Option<Vec<usize>> = None,
        no_rope_layer_interval: usize where >= 1 = 4,
        layer_types: Option<Vec<String>> = None,
        attn_temperature_tuning: bool = true,
        floor_scale: f32 = 8192.0,
        attn_scale: f32 = 0.1,
        num_local_experts: usize = 16,
        num_experts_per_tok: usize where >= 1 = 1,
        moe_layers: Option<Vec<usize>> = None,
        interleave_moe_layer_step: usize = 1,
        tie_word_embeddings: Option<bool> = None,
    }
}

impl Config {
    fn turns(&self, layer: usize) -> bool {
        match self.no_rope_layers.as_deref() {
            None | Some([]) => !(layer + 1).is_multiple_of(self.no_rope_layer_interval),
            Some(list) => list.get(layer).is_some_and(|&turns| turns != 0),
        }
    }

    fn chunk(&self, layer: usize) -> Option<usize> {
        let is_chunked = match &self.layer_types {
            Some(types) => types.get(layer).is_some_and(|kind| kind == "chunked_attention"),
            None => self.turns(layer),
        };
        self.attention_chunk_size.filter(|_| is_chunked)
    }

    fn is_sparse(&self, layer: usize) -> bool {
        match &self.moe_layers {
            Some(layers) => layers.contains(&layer),
            None => self.interleave_moe_layer_step > 0 && (layer + 1).is_multiple_of(self.interleave_moe_layer_step),
        }
    }
}

struct Attention {
    inner: SelfAttention,
    /// Factor and span of the queries' growth with their position.
    growth: Option<(f32, f32)>,
}

impl Attention {
    fn new(c: &Config, w: &Weights, layer: usize) -> Self {
        let (dim, heads, kv_heads, head_dim) =
            (c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim);
        let turns = c.turns(layer);
        let inner = SelfAttention::new(w, Heads { dim, heads, kv_heads, head_dim }, c.attention_bias, c.attention_bias)
            .rope(turns.then(|| w.rope(head_dim, c.rope_theta, &c.rope_scaling).interleaved()))
            .chunk(c.chunk(layer));
        let norm = || RmsNorm::plain(head_dim, c.rms_norm_eps);
        let inner = if c.use_qk_norm && turns { inner.turned_norms(norm(), norm()) } else { inner };
        let growth = (c.attn_temperature_tuning && !turns).then_some((c.attn_scale, c.floor_scale));
        Self { inner, growth }
    }
}

impl Mixer for Attention {
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let [q, k, v] = self.inner.project(x, layer);
        let q = match self.growth {
            Some((scale, span)) => {
                let steps = ((layer.positions() + 1.0) / span).floor();
                // [tokens, 1, 1], to meet [tokens, heads, head_dim].
                q * ((steps + 1.0).log() * scale + 1.0).unflatten(1).transpose().unflatten(1)
            }
            None => q,
        };
        self.inner.output(&self.inner.attend([q, k, v], layer))
    }

    fn cache(&self) -> Cache {
        self.inner.cache()
    }
}

fn feed_forward(c: &Config, w: &Weights, layer: usize) -> Ffn {
    let (dim, hidden) = (c.hidden_size, c.intermediate_size);
    if !c.is_sparse(layer) {
        return Ffn::Dense(GatedMlp::new(w, dim, c.intermediate_size_mlp, false, Activation::Silu));
    }
    let router = Router::sigmoid(w.linear("router", dim, c.num_local_experts, false), c.num_experts_per_tok);
    let shape = ExpertsShape { scaled_input: true, ..ExpertsShape::new(c.num_local_experts, dim, hidden) };
    let shared = GatedMlp::new(&w.at("shared_expert"), dim, hidden, false, Activation::Silu);
    Ffn::Sparse(Moe::new(router, w.experts(shape)).shared(shared))
}

fn block(c: &Config, w: &Weights, layer: usize) -> Block<Attention, Ffn> {
    let norm = |name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps);
    let norms = [norm("input_layernorm"), norm("post_attention_layernorm")];
    Block::pre_norm(norms, Attention::new(c, &w.at("self_attn"), layer), feed_forward(c, &w.at("feed_forward"), layer))
}

struct Llama4;

impl Architecture for Llama4 {
    const MODEL_TYPES: &'static [&'static str] = &["llama4", "llama4_text"];
    type Config = Config;
    type Model = Decoder<Block<Attention, Ffn>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        Decoder::new(w, decoder_shape!(c), |w, layer| Ok(block(&c, w, layer)))
    }
}

export_plugin!(Llama4, examples = ["../../tests/fixtures/tiny/llama4/config.json"]);
