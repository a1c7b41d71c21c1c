//! Apple's foundation model on devices: the last layers reuse the keys of the last layer before them, which are rounded to 8 bits.
//! <https://arxiv.org/abs/2507.13575>
//!
//! ```text
//! h = x + Attention(RMSNorm(x))            per layer
//! y = h + SwiGLU(RMSNorm(h))
//! logits = RMSNorm(y) · Eᵀ
//!
//! Attention(x) = softmax(Norm(rope(q)) · r(Norm(rope(k)))ᵀ / √d) · r(v) · Wo,  q, k, v parts of x Wqkv
//!   in the last layers: q = x Wq alone
//! r(u) = s · clamp(round(u / s), -128, 127)
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize,
        hidden_dim: usize,
        num_layers: usize,
        num_kv_reuse_layers: usize,
        num_heads: usize where >= 1,
        num_kv_heads: usize,
        hidden_dim_scale_factor: f64 = 3.25,
        rope_theta: f32 = 50_000.0,
        rms_norm_eps: f32 = 1e-5,
    }
}

/// The norms of heads leave their epsilon to MLX.
const HEAD_NORM_EPSILON: f32 = 1e-5;

/// Keys and values of a layer that has its own.
struct Own {
    k_proj: Linear,
    v_proj: Linear,
    k_norm: RmsNorm,
    quant_key_scale: Parameter,
    quant_value_scale: Parameter,
}

enum Keys {
    Own(Own),
    Of(usize),
}

struct Attention {
    q_proj: Linear,
    q_norm: RmsNorm,
    keys: Keys,
    out_proj: Linear,
    rope: Rope,
    head_dim: usize,
}

/// To whole steps of `scale`, of which there are 256.
fn rounded(x: Tensor, scale: &Parameter) -> Tensor {
    let scale = scale.tensor();
    (x / &scale).round().clamp(-128.0, 127.0) * scale
}

impl Attention {
    fn new(c: &Config, w: &Weights, reused: Option<usize>) -> Self {
        let (dim, head_dim) = (c.hidden_dim, c.hidden_dim / c.num_heads);
        let kv = c.num_kv_heads * head_dim;
        let norm = |name| w.rms_norm(name, head_dim, HEAD_NORM_EPSILON);
        let part =
            |at: usize, outputs| Linear::of(w.source("qkv_proj.weight").rows(at..at + outputs), None, dim, outputs);
        let scale = |name: &str| Parameter::of(w.source(name).reshape(&[1]), &[1]);
        let (q_proj, keys) = match reused {
            Some(layer) => (w.linear("q_proj", dim, dim, false), Keys::Of(layer)),
            None => (
                part(0, dim),
                Keys::Own(Own {
                    k_proj: part(dim, kv),
                    v_proj: part(dim + kv, kv),
                    k_norm: norm("k_norm"),
                    quant_key_scale: scale("quant_key_scale"),
                    quant_value_scale: scale("quant_value_scale"),
                }),
            ),
        };
        let rope = w.rope(head_dim, c.rope_theta, &None).interleaved();
        Self { q_proj, q_norm: norm("q_norm"), keys, out_proj: w.linear("out_proj", dim, dim, false), rope, head_dim }
    }
}

impl Mixer for Attention {
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let heads = |proj: &Linear| proj.forward(x).split_heads(self.head_dim);
        let how = Attend { scale: (self.head_dim as f32).powf(-0.5), ..Default::default() };
        let q = self.q_norm.forward(&layer.rotate(&self.rope, heads(&self.q_proj)));
        let y = match &self.keys {
            Keys::Of(other) => layer.attend_to(*other, q, &how),
            Keys::Own(own) => {
                let k = own.k_norm.forward(&layer.rotate(&self.rope, heads(&own.k_proj)));
                let v = rounded(heads(&own.v_proj), &own.quant_value_scale);
                layer.attend(q, rounded(k, &own.quant_key_scale), v, &how)
            }
        };
        self.out_proj.forward(&y.merge_heads())
    }

    fn cache(&self) -> Cache {
        match self.keys {
            Keys::Own(_) => Cache::key_value(None),
            Keys::Of(_) => Cache::none(),
        }
    }
}

struct Afm;

impl Architecture for Afm {
    const MODEL_TYPES: &'static [&'static str] = &["afm7"];
    type Config = Config;
    type Model = Decoder<Block<Attention>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        let own = c.num_layers.saturating_sub(c.num_kv_reuse_layers);
        if own == 0 {
            let (all, reusing) = (c.num_layers, c.num_kv_reuse_layers);
            return Err(
                format!("config.json: num_kv_reuse_layers {reusing} of num_layers {all} leave none with keys").into()
            );
        }
        let (model, dim) = (w.at("model"), c.hidden_dim);
        let block = |w: &Weights, reused| {
            let hidden = (dim as f64 * c.hidden_dim_scale_factor) as usize;
            let norms =
                ["input_layernorm", "post_attention_layernorm"].map(|name| w.rms_norm(name, dim, c.rms_norm_eps));
            let mlp = GatedMlp::new(&w.at("mlp"), dim, hidden, false, Activation::Silu);
            Ok(Block::pre_norm(norms, Attention::new(&c, &w.at("self_attn"), reused), mlp))
        };
        let mut layers = model.at("layers").each(own, |w, _| block(w, None))?;
        layers.extend(model.at("kv_reuse_layers").each(c.num_kv_reuse_layers, |w, _| block(w, Some(own - 1)))?);
        let embedding = model.embedding("embedding", c.vocab_size, dim);
        let lm_head = LmHead::new(w, &embedding, c.vocab_size, dim, Some(true));
        Ok(Decoder::of(embedding, layers, model.rms_norm("output_norm", dim, c.rms_norm_eps), lm_head))
    }
}

export_plugin!(Afm, examples = ["../../tests/fixtures/tiny/afm7/config.json"]);
