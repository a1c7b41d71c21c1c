//! OpenELM: deeper layers have more heads and wider feed-forward layers. <https://arxiv.org/abs/2404.14619>
//!
//! ```text
//! h = x + Attention(RMSNorm(x))            per layer, each with its own number of heads and width
//! y = h + SwiGLU(RMSNorm(h))
//! logits = RMSNorm(y) · Eᵀ
//!
//! Attention(x) = softmax(rope(Norm(q)) · rope(Norm(k))ᵀ / √d) · v · Wout,  q, k, v parts of x Wqkv, Norm of each head
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize = 32_000,
        model_dim: usize = 2048,
        head_dim: usize = 128,
        num_transformer_layers: usize = 12,
        num_query_heads: PerLayer<usize>,
        num_kv_heads: PerLayer<usize>,
        ffn_multipliers: PerLayer<f64>,
        ffn_dim_divisor: usize where >= 1 = 256,
        ffn_with_glu: bool = true,
        normalize_qk_projections: bool = false,
        share_input_output_layers: bool = false,
        rms_norm_eps: f32 = 1e-6,
        rope_freq_constant: f32 = 10_000.0,
    }
}

impl Config {
    /// The nearest multiple of the divisor, the next one where that would be more than a tenth below.
    fn width(&self, layer: usize) -> Result<usize> {
        let exact = self.ffn_multipliers.at(layer, "ffn_multipliers")? * self.model_dim as f64;
        let divisor = self.ffn_dim_divisor;
        // By way of u32, which leaves room for the rounding.
        let nearest = ((exact + divisor as f64 / 2.0) as u32 as usize / divisor * divisor).max(divisor);
        Ok(if (nearest as f64) < 0.9 * exact { nearest + divisor } else { nearest })
    }

    fn attention(&self, w: &Weights, layer: usize) -> Result<SelfAttention> {
        let heads = Heads {
            dim: self.model_dim,
            heads: self.num_query_heads.at(layer, "num_query_heads")?,
            kv_heads: self.num_kv_heads.at(layer, "num_kv_heads")?,
            head_dim: self.head_dim,
        };
        let out_proj = w.linear("out_proj", heads.heads * heads.head_dim, heads.dim, false);
        let attention = SelfAttention::fused(w, "qkv_proj", heads, false, out_proj).rope(w.rope(
            self.head_dim,
            self.rope_freq_constant,
            &None,
        ));
        let norm = |name| w.rms_norm(name, self.head_dim, self.rms_norm_eps);
        Ok(match self.normalize_qk_projections {
            true => attention.head_norms(norm("q_norm"), norm("k_norm")),
            false => attention,
        })
    }

    fn mlp(&self, w: &Weights, layer: usize) -> Result<GatedMlp> {
        let (dim, hidden, both) = (self.model_dim, self.width(layer)?, w.source("proj_1.weight"));
        let [gate, up] = [0, hidden].map(|at| Linear::of(both.rows(at..at + hidden), None, dim, hidden));
        Ok(GatedMlp::of(gate, up, w.linear("proj_2", hidden, dim, false), Activation::Silu))
    }
}

struct OpenElm;

impl Architecture for OpenElm {
    const MODEL_TYPES: &'static [&'static str] = &["openelm"];
    type Config = Config;
    type Model = Decoder;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        if !c.ffn_with_glu {
            return Err("config.json: ffn_with_glu is false, which no OpenELM has".into());
        }
        let (model, dim) = (w.at("transformer"), c.model_dim);
        let token_embeddings = model.embedding("token_embeddings", c.vocab_size, dim);
        let layers = model.at("layers").each(c.num_transformer_layers, |w, layer| {
            let norms = ["attn_norm", "ffn_norm"].map(|name| w.rms_norm(name, dim, c.rms_norm_eps));
            Ok(Block::pre_norm(norms, c.attention(&w.at("attn"), layer)?, c.mlp(&w.at("ffn"), layer)?))
        })?;
        let lm_head = LmHead::new(w, &token_embeddings, c.vocab_size, dim, Some(c.share_input_output_layers));
        Ok(Decoder::of(token_embeddings, layers, model.rms_norm("norm", dim, c.rms_norm_eps), lm_head))
    }
}

export_plugin!(OpenElm, examples = ["../../tests/fixtures/tiny/openelm/config.json"]);
