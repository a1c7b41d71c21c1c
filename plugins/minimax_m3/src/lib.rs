//! MiniMax M3, its language model: each key head sees a few blocks of keys, which an indexer chooses, and experts whose gates and values
//! are held within limits. <https://huggingface.co/MiniMaxAI/MiniMax-M3>
//!
//! ```text
//! h = x + Attention(Norm(x))                per layer; Norm is RMSNorm by 1 + w
//! y = h + MoE(Norm(h))                      in dense layers F
//! logits = Norm(y) · Wᵀ
//!
//! Attention(x) = softmax(q · kᵀ / √d over the chosen keys) · (x Wv) · Wo      in layers without an indexer: over all keys
//!   q = rope(Norm(x Wq)), k = rope(Norm(x Wk))      each head normalized alone, a share of its lanes turned
//! Indexer(x): the blocks with the largest max q' · k', and the last ones always;      one head q' for each key head, one k' for all
//!   q' = rope(Norm(x Wq')), k' = rope(Norm(x Wk'))
//!
//! MoE(x) = s Σ pᵢ Fᵢ(x) + Fₛ(x)      F(x) = (g sigmoid(α g) * (u + 1)) · Wdown, g = min(x Wgate, l), u = clamp(x Wup, ± l)
//!   the k largest sigmoid(x Wr) + b; p their sigmoids, scaled to a sum of 1
//! ```

use plugin_api::prelude::*;

config! {
    /// Where the keys of the indexer stand in published configs.
    struct SparseAttention {
        sparse_num_index_heads: usize = 4,
        sparse_index_dim: usize = 128,
        sparse_block_size: usize = 128,
        sparse_topk_blocks: usize = 16,
        sparse_local_block: usize = 1,
        sparse_attention_freq: Option<Vec<usize>> = None,
    }
}

config! {
    struct Config {
        vocab_size: usize = 200_064,
        hidden_size: usize = 6144,
        intermediate_size: usize = 3072,
        dense_intermediate_size: usize = 12_288,
        shared_intermediate_size: usize = 3072,
        num_hidden_layers: usize = 60,
        num_attention_heads: usize where >= 1 = 64,
        num_key_value_heads: usize where >= 1 = 4,
        head_dim: usize = 128,
        rms_norm_eps: f32 = 1e-6,
        use_qk_norm: bool = true,
        use_gemma_norm: bool = true,
        rope_theta: f32 = 5e6,
        rope_scaling: Option<RopeScaling> = None,
        partial_rotary_factor: f32 = 0.5,
        rotary_dim: usize = (head_dim as f32 * partial_rotary_factor) as usize,
        swiglu_alpha: f32 = 1.702,
        swiglu_limit: f32 = 7.0,
        num_local_experts: usize = 128,
        num_experts_per_tok: usize where >= 1 = 4,
        routed_scaling_factor: f32 = 2.0,
        mlp_layer_types: Option<Vec<String>> = None,
        moe_layer_freq: Option<Vec<usize>> = None,
        layer_types: Option<Vec<String>> = None,
        sparse_attention_config: Option<SparseAttention> = None,
        index_n_heads: usize where >= 1 = sparse_attention_config.as_ref().map_or(4, |c| c.sparse_num_index_heads),
        index_head_dim: usize = sparse_attention_config.as_ref().map_or(128, |c| c.sparse_index_dim),
        index_block_size: usize where >= 1 = sparse_attention_config.as_ref().map_or(128, |c| c.sparse_block_size),
        index_topk_blocks: usize where >= 1 = sparse_attention_config.as_ref().map_or(16, |c| c.sparse_topk_blocks),
        index_local_blocks: usize = sparse_attention_config.as_ref().map_or(1, |c| c.sparse_local_block),
        tie_word_embeddings: Option<bool> = Some(false),
    }
}

/// What the config says of one layer, by a name or by a flag; `None` where it is silent.
fn said(names: &Option<Vec<String>>, name: &str, flags: Option<&Vec<usize>>, layer: usize) -> Option<bool> {
    let by_name = names.as_ref().and_then(|names| names.get(layer)).map(|found| found == name);
    by_name.or_else(|| flags.and_then(|flags| flags.get(layer)).map(|&flag| flag != 0))
}

impl Config {
    fn has_experts(&self, layer: usize) -> bool {
        said(&self.mlp_layer_types, "sparse", self.moe_layer_freq.as_ref(), layer).unwrap_or(true)
    }

    fn chooses_keys(&self, layer: usize) -> bool {
        let flags = self.sparse_attention_config.as_ref().and_then(|c| c.sparse_attention_freq.as_ref());
        said(&self.layer_types, "minimax_m3_sparse", flags, layer).unwrap_or(false)
    }

    fn norm(&self, w: &Weights, name: &str, dim: usize) -> RmsNorm {
        let weight = w.source(&format!("{name}.weight"));
        RmsNorm::of(if self.use_gemma_norm { weight.plus(1.0) } else { weight }, dim, self.rms_norm_eps)
    }

    fn mlp(&self, w: &Weights, hidden: usize) -> GatedMlp {
        let (dim, act) = (self.hidden_size, Activation::Silu);
        let mlp = match w.has("gate_up_proj.weight") {
            true => GatedMlp::fused(w, "gate_up_proj", dim, hidden, act),
            false => GatedMlp::new(w, dim, hidden, false, act),
        };
        mlp.clamped(self.swiglu_alpha, self.swiglu_limit)
    }

    fn ffn(&self, w: &Weights, layer: usize) -> Ffn {
        // As published, or as transformers renames it.
        let [moe, mlp] = ["block_sparse_moe", "mlp"].map(|name| w.at(name));
        if !self.has_experts(layer) {
            // Some exports have it there.
            let mlp = if moe.has("gate_proj.weight") { moe } else { mlp };
            return Ffn::Dense(self.mlp(&mlp, self.dense_intermediate_size));
        }
        let (dim, experts) = (self.hidden_size, self.num_local_experts);
        let (moe, bias) = match moe.has("gate.weight") {
            true => (moe, "e_score_correction_bias"),
            false => (mlp, "gate.e_score_correction_bias"),
        };
        let router = Router::sigmoid(moe.linear("gate", dim, experts, false), self.num_experts_per_tok)
            .correction(moe.tensor(bias, &[experts]))
            .normalized(true, 0.0)
            .scale(self.routed_scaling_factor);
        let kind = ExpertKind::ClampedSwiglu { alpha: self.swiglu_alpha, limit: self.swiglu_limit };
        let shape = ExpertsShape::new(experts, dim, self.intermediate_size).kind(kind);
        let shared = self.mlp(&moe.at("shared_experts"), self.shared_intermediate_size);
        Ffn::Sparse(Moe::new(router, moe.experts(shape)).shared(shared))
    }

    fn attention(&self, w: &Weights, layer: usize) -> Attention {
        let (dim, head_dim) = (self.hidden_size, self.head_dim);
        let shape = Heads { dim, heads: self.num_attention_heads, kv_heads: self.num_key_value_heads, head_dim };
        let rope = w.rope(self.rotary_dim, self.rope_theta, &self.rope_scaling);
        let attention = SelfAttention::new(w, shape, false, false).rope(rope);
        let norm = |name| self.norm(w, name, head_dim);
        let attention = match self.use_qk_norm {
            true => attention.head_norms(norm("q_norm"), norm("k_norm")),
            false => attention,
        };
        Attention { attention, indexer: self.chooses_keys(layer).then(|| Indexer::new(self, w)) }
    }

    fn block(&self, w: &Weights, layer: usize) -> Block<Attention, Ffn> {
        let norms = ["input_layernorm", "post_attention_layernorm"].map(|name| self.norm(w, name, self.hidden_size));
        Block::pre_norm(norms, self.attention(&w.at("self_attn"), layer), self.ffn(w, layer))
    }
}

/// Chooses the blocks of keys that attention sees.
struct Indexer {
    q_proj: Linear,
    k_proj: Linear,
    q_norm: RmsNorm,
    k_norm: RmsNorm,
    rope: Rope,
    head_dim: usize,
    choice: BlockChoice,
}

impl Indexer {
    fn new(c: &Config, w: &Weights) -> Self {
        let (dim, head_dim) = (c.hidden_size, c.index_head_dim);
        let renamed = w.has("indexer.q_proj.weight");
        let name = |part: &str| if renamed { format!("indexer.{part}") } else { format!("index_{part}") };
        Self {
            q_proj: w.linear(&name("q_proj"), dim, c.index_n_heads * head_dim, false),
            k_proj: w.linear(&name("k_proj"), dim, head_dim, false),
            q_norm: c.norm(w, &name("q_norm"), head_dim),
            k_norm: c.norm(w, &name("k_norm"), head_dim),
            rope: w.rope(c.rotary_dim, c.rope_theta, &c.rope_scaling),
            head_dim,
            choice: BlockChoice { size: c.index_block_size, count: c.index_topk_blocks, local: c.index_local_blocks },
        }
    }

    fn choose(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let [q, k] = [(&self.q_proj, &self.q_norm), (&self.k_proj, &self.k_norm)]
            .map(|(proj, norm)| layer.rotate(&self.rope, norm.forward(&proj.forward(x).split_heads(self.head_dim))));
        layer.index_blocks(q, k, self.choice)
    }
}

struct Attention {
    attention: SelfAttention,
    indexer: Option<Indexer>,
}

impl Mixer for Attention {
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let Some(indexer) = &self.indexer else { return self.attention.forward(x, layer) };
        let chosen = indexer.choose(x, layer);
        let qkv = self.attention.project(x, layer);
        self.attention.output(&self.attention.attend_chosen(qkv, &chosen, indexer.choice, layer))
    }

    fn cache(&self) -> Cache {
        match self.indexer {
            // The indexer's keys, then those of attention.
            Some(_) => Cache::key_value(None).and(self.attention.cache()),
            None => self.attention.cache(),
        }
    }
}

struct MiniMaxM3;

impl Architecture for MiniMaxM3 {
    const MODEL_TYPES: &'static [&'static str] = &["minimax_m3_vl", "minimax_m3_vl_text"];
    type Config = Config;
    type Model = Decoder<Block<Attention, Ffn>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        if c.rotary_dim > c.index_head_dim && (0..c.num_hidden_layers).any(|layer| c.chooses_keys(layer)) {
            let (turned, lanes) = (c.rotary_dim, c.index_head_dim);
            return Err(format!("config.json: rotary_dim {turned} is more than an index head has, {lanes}").into());
        }
        let (model, shape) = (w.at("model"), decoder_shape!(c));
        let embed_tokens = model.embedding("embed_tokens", shape.vocab_size, shape.hidden_size);
        let layers = model.at("layers").each(shape.num_hidden_layers, |w, layer| Ok(c.block(w, layer)))?;
        let norm = c.norm(&model, "norm", shape.hidden_size);
        let lm_head = LmHead::new(w, &embed_tokens, shape.vocab_size, shape.hidden_size, shape.tie_word_embeddings);
        Ok(Decoder::of(embed_tokens, layers, norm, lm_head))
    }
}

export_plugin!(MiniMaxM3, examples = ["../../tests/fixtures/tiny/minimax_m3_vl/config.json"]);
