//! DBRX: fine-grained routed experts, clipped projections, layer norms without biases. <https://huggingface.co/databricks/dbrx-base>
//!
//! ```text
//! h = x + Attention(LayerNorm(x))          per layer
//! y = h + MoE(LayerNorm(h))
//! logits = LayerNorm(y) · Wᵀ
//!
//! Attention(x) = softmax(rope(q) · rope(k)ᵀ / √d) · v · Wo      q, k, v = clip(x Wqkv)
//! MoE(x) = Σ pᵢ (silu(x W1ᵢ) * (x V1ᵢ)) · W2ᵢ     over the k largest pᵢ of softmax(x Wr), scaled to a sum of 1
//! ```

use plugin_api::prelude::*;

config! {
    struct AttnConfig {
        clip_qkv: Option<f32> = None,
        kv_n_heads: usize = 1,
        rope_theta: f32 = 10_000.0,
    }
}

config! {
    struct FfnConfig {
        ffn_hidden_size: usize = 3584,
        moe_num_experts: usize = 4,
        moe_top_k: usize where >= 1 = 1,
        moe_normalize_expert_weights: Option<f32> = Some(1.0),
    }
}

config! {
    struct Config {
        vocab_size: usize = 32_000,
        d_model: usize = 2048,
        n_layers: usize = 24,
        n_heads: usize where >= 1 = 16,
        attn_config: AttnConfig,
        ffn_config: FfnConfig,
        tie_word_embeddings: Option<bool> = Some(false),
    }
}

const EPS: f32 = 1e-5;

fn attention(c: &Config, w: &Weights) -> SelfAttention {
    let (dim, heads, kv_heads) = (c.d_model, c.n_heads, c.attn_config.kv_n_heads);
    let shape = Heads { dim, heads, kv_heads, head_dim: dim / heads };
    SelfAttention::fused(w, "Wqkv", shape, false, w.linear("out_proj", dim, dim, false))
        .clip(c.attn_config.clip_qkv)
        .rope(w.rope(dim / heads, c.attn_config.rope_theta, &None))
}

/// All experts' rows one below the other, the last projection turned; or, converted by MLX, one expert after the other.
fn experts(c: &FfnConfig, w: &Weights, dim: usize) -> Experts {
    let (experts, hidden) = (c.moe_num_experts, c.ffn_hidden_size);
    let shape = ExpertsShape::new(experts, dim, hidden);
    if !w.has("experts.mlp.w1") {
        return w.experts(shape);
    }
    let mlp = w.at("experts").at("mlp");
    let [w1, v1, w2] = ["w1", "v1", "w2"].map(|name| mlp.source(name).reshape(&[experts, hidden, dim]));
    Experts::of(shape, Some(w1), v1, w2.transpose(), [None; 3])
}

fn block(c: &Config, w: &Weights) -> Block<SelfAttention, Moe> {
    let (norms, ffn) = (w.at("norm_attn_norm"), w.at("ffn"));
    let attention = attention(c, &norms.at("attn"));
    let norms = ["norm_1", "norm_2"].map(|name| norms.layer_norm(name, c.d_model, EPS, false));
    let layer = ffn.at("router").linear("layer", c.d_model, c.ffn_config.moe_num_experts, false);
    let is_normalized = c.ffn_config.moe_normalize_expert_weights.is_some();
    let router = Router::softmax(layer, c.ffn_config.moe_top_k).normalized(is_normalized, 0.0);
    Block::pre_norm(norms, attention, Moe::new(router, experts(&c.ffn_config, &ffn, c.d_model)))
}

struct Dbrx;

impl Architecture for Dbrx {
    const MODEL_TYPES: &'static [&'static str] = &["dbrx"];
    type Config = Config;
    type Model = Decoder<Block<SelfAttention, Moe>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        if c.ffn_config.moe_normalize_expert_weights.is_some_and(|p| p != 1.0) {
            return Err("config.json: ffn_config.moe_normalize_expert_weights should be 1, the norm that the weights are divided by".into());
        }
        let transformer = w.at("transformer");
        let wte = transformer.embedding("wte", c.vocab_size, c.d_model);
        let blocks = transformer.at("blocks").each(c.n_layers, |w, _| Ok(block(&c, w)))?;
        let norm_f = transformer.layer_norm("norm_f", c.d_model, EPS, false);
        let lm_head = LmHead::new(w, &wte, c.vocab_size, c.d_model, c.tie_word_embeddings);
        Ok(Decoder::of(wte, blocks, norm_f, lm_head))
    }
}

export_plugin!(Dbrx, examples = ["../../tests/fixtures/tiny/dbrx/config.json"]);
