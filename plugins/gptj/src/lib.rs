//! GPT-J, <https://github.com/kingoflolz/mesh-transformer-jax>, and CodeGen, which fuses its projections. <https://arxiv.org/abs/2203.13474>
//!
//! ```text
//! n = LayerNorm(x)                         per layer
//! y = x + Attention(n) + gelu(n Win) · Wout
//! logits = LayerNorm(y) · Wlm + b
//!
//! Attention(x) = softmax(rope(x Wq) · rope(x Wk)ᵀ / √d) · (x Wv) · Wo      the first `rotary_dim` lanes turn, neighbours in pairs
//! ```

use plugin_api::prelude::*;

/// CodeGen was trained over four chips; each has queries, values and keys of a quarter of the heads, in this order.
const CODEGEN_CHIPS: usize = 4;

config! {
    struct Config {
        model_type: String,
        vocab_size: usize = 50_400,
        n_embd: usize = 4096,
        n_layer: usize = 28,
        n_head: usize where >= 1 = 16,
        n_inner: usize = 4 * n_embd,
        rotary_dim: usize = 64,
        activation_function: Activation = Activation::GeluTanh,
        layer_norm_epsilon: f32 = 1e-5,
    }
}

enum Projections {
    Apart([Linear; 3]),
    Fused(Linear),
}

struct Attention {
    projections: Projections,
    out_proj: Linear,
    rope: Rope,
    head_dim: usize,
    dim: usize,
}

impl Attention {
    fn new(c: &Config, w: &Weights) -> Self {
        let dim = c.n_embd;
        // Masks that old exporters stored.
        for mask in ["bias", "masked_bias", "causal_mask"] {
            w.ignore(mask);
        }
        Self {
            projections: match c.model_type.as_str() {
                "codegen" => Projections::Fused(w.linear("qkv_proj", dim, 3 * dim, false)),
                _ => Projections::Apart(w.linears(dim, false, [("q_proj", dim), ("k_proj", dim), ("v_proj", dim)])),
            },
            out_proj: w.linear("out_proj", dim, dim, false),
            rope: w.rope(c.rotary_dim, 10_000.0, &None).interleaved(),
            head_dim: dim / c.n_head,
            dim,
        }
    }
}

impl Mixer for Attention {
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let [q, k, v] = match &self.projections {
            Projections::Apart(qkv) => qkv.each_ref().map(|proj| proj.forward(x)),
            Projections::Fused(qkv) => {
                let (chips, lanes) = (qkv.forward(x).unflatten(CODEGEN_CHIPS), self.dim / CODEGEN_CHIPS);
                [0, 2, 1].map(|part| chips.narrow(part * lanes, lanes).flatten())
            }
        };
        let [q, k, v] = [q, k, v].map(|x| x.split_heads(self.head_dim));
        let (q, k) = (layer.rotate(&self.rope, q), layer.rotate(&self.rope, k));
        let scale = (self.head_dim as f32).powf(-0.5);
        self.out_proj.forward(&layer.attend(q, k, v, &Attend { scale, ..Default::default() }).merge_heads())
    }

    fn cache(&self) -> Cache {
        Cache::key_value(None)
    }
}

struct GptJ;

impl Architecture for GptJ {
    const MODEL_TYPES: &'static [&'static str] = &["gptj", "codegen"];
    type Config = Config;
    type Model = Decoder<Block<Attention, Mlp>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        if !(c.n_embd / c.n_head).is_multiple_of(2)
            || (c.model_type == "codegen" && !c.n_head.is_multiple_of(CODEGEN_CHIPS))
        {
            return Err(format!(
                "config.json: n_head {} does not divide n_embd {} as {} needs it",
                c.n_head, c.n_embd, c.model_type
            )
            .into());
        }
        let model = w.at(if w.has("model.wte.weight") { "model" } else { "transformer" });
        let norm = |w: &Weights, name| w.layer_norm(name, c.n_embd, c.layer_norm_epsilon, true);
        let layers = model.at("h").each(c.n_layer, |w, _| {
            let (names, act) = (["fc_in", "fc_out"], c.activation_function);
            let mlp = Mlp::new(&w.at("mlp"), names, c.n_embd, c.n_inner, true, act);
            Ok(Block::parallel(norm(w, "ln_1"), Attention::new(&c, &w.at("attn")), mlp))
        })?;
        let lm_head = LmHead::Own(w.linear("lm_head", c.n_embd, c.vocab_size, true));
        Ok(Decoder::of(model.embedding("wte", c.vocab_size, c.n_embd), layers, norm(&model, "ln_f"), lm_head))
    }
}

export_plugin!(GptJ, examples = ["../../tests/fixtures/tiny/gptj/config.json"]);
