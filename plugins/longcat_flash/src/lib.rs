//! LongCat Flash: blocks of two attentions and two dense layers, beside which routed experts run from the first half to the end; some
//! experts give back their input. Its n-gram variant adds embeddings of the last tokens together. <https://arxiv.org/abs/2509.01322>
//!
//! ```text
//! h₁ = x + MLA₁(RMSNorm(x)),   n = RMSNorm(h₁)         per layer
//! h₂ = h₁ + SwiGLU₁(n)
//! h₃ = h₂ + MLA₂(RMSNorm(h₂))
//! y = h₃ + SwiGLU₂(RMSNorm(h₃)) + MoE(n)
//! logits = RMSNorm(y) · E
//!
//! MoE(x) = a Σ pᵢ Fᵢ(x)    over the k largest pᵢ + bᵢ of p = softmax(x Wr); Fᵢ is SwiGLU, or x itself for the last experts
//! n-grams: x = (E[ids] + Σ Eᵢ[ngram ids] Wᵢ) / (1 + tables), over tables of 2 .. n tokens, each with a modulus of its own
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        model_type: String,
        vocab_size: usize,
        hidden_size: usize,
        ffn_hidden_size: usize,
        expert_ffn_hidden_size: usize,
        num_layers: usize,
        num_attention_heads: usize where >= 1,
        q_lora_rank: usize where >= 1,
        kv_lora_rank: usize where >= 1 = 512,
        qk_nope_head_dim: usize = 128,
        qk_rope_head_dim: usize where >= 2 = 64,
        v_head_dim: usize where >= 1 = 128,
        mla_scale_q_lora: bool = true,
        mla_scale_kv_lora: bool = true,
        attention_bias: bool = false,
        rms_norm_eps: f32 = 1e-5,
        rope_theta: f32 = 10_000_000.0,
        rope_scaling: Option<RopeScaling> = None,
        n_routed_experts: usize,
        zero_expert_num: usize = 0,
        moe_topk: usize where >= 1 = 12,
        routed_scaling_factor: f32 = 1.0,
        norm_topk_prob: bool = false,
        router_bias: bool = false,
        ngram_vocab_size_ratio: usize = 78,
        emb_neighbor_num: usize where >= 1 = 4,
        emb_split_num: usize where >= 1 = 4,
        tie_word_embeddings: Option<bool> = Some(false),
    }
}

struct Block {
    input_layernorm: [RmsNorm; 2],
    self_attn: [Mla; 2],
    post_attention_layernorm: [RmsNorm; 2],
    mlps: [GatedMlp; 2],
    mlp: Moe,
}

fn mla(c: &Config, w: &Weights) -> Mla {
    let shape = MlaShape {
        hidden_size: c.hidden_size,
        num_attention_heads: c.num_attention_heads,
        q_lora_rank: Some(c.q_lora_rank),
        kv_lora_rank: c.kv_lora_rank,
        qk_nope_head_dim: c.qk_nope_head_dim,
        qk_rope_head_dim: c.qk_rope_head_dim,
        v_head_dim: c.v_head_dim,
        attention_bias: c.attention_bias,
    };
    let rope = w.rope(c.qk_rope_head_dim, c.rope_theta, &c.rope_scaling).interleaved();
    let scale = |yes: bool, rank: usize| if yes { (c.hidden_size as f32 / rank as f32).sqrt() } else { 1.0 };
    let (queries, latents) = (scale(c.mla_scale_q_lora, c.q_lora_rank), scale(c.mla_scale_kv_lora, c.kv_lora_rank));
    Mla::new(w, shape, rope).mscale(&c.rope_scaling).latent_scales(w, queries, latents)
}

fn moe(c: &Config, w: &Weights) -> Moe {
    let (all, router) = (c.n_routed_experts + c.zero_expert_num, w.at("router"));
    let bias = router.tensor("e_score_correction_bias", &[all]);
    let router = Router::softmax(router.linear("classifier", c.hidden_size, all, c.router_bias), c.moe_topk)
        .correction(bias)
        .normalized(c.norm_topk_prob, 1e-20)
        .scale(c.routed_scaling_factor);
    // transformers saves unused projections for experts that have none.
    (c.n_routed_experts..all).for_each(|expert| w.ignore(&format!("experts.{expert}.")));
    let shape = ExpertsShape {
        identity: c.zero_expert_num,
        ..ExpertsShape::new(c.n_routed_experts, c.hidden_size, c.expert_ffn_hidden_size)
    };
    Moe::new(router, w.experts(shape))
}

impl Block {
    fn new(c: &Config, w: &Weights) -> Self {
        let norms = |name| [0, 1].map(|i| w.at(name).rms_norm(&i.to_string(), c.hidden_size, c.rms_norm_eps));
        let mlp =
            |i| GatedMlp::new(&w.at(&format!("mlps.{i}")), c.hidden_size, c.ffn_hidden_size, false, Activation::Silu);
        Self {
            input_layernorm: norms("input_layernorm"),
            self_attn: [0, 1].map(|i| mla(c, &w.at(&format!("self_attn.{i}")))),
            post_attention_layernorm: norms("post_attention_layernorm"),
            mlps: [0, 1].map(mlp),
            mlp: moe(c, &w.at("mlp")),
        }
    }

    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let h = x + self.self_attn[0].forward(&self.input_layernorm[0].forward(x), layer);
        let normed = self.post_attention_layernorm[0].forward(&h);
        let h = h + self.mlps[0].forward(&normed);
        let h = &h + self.self_attn[1].forward(&self.input_layernorm[1].forward(&h), layer);
        &h + self.mlps[1].forward(&self.post_attention_layernorm[1].forward(&h)) + self.mlp.forward(&normed)
    }
}

/// A table of n-grams of one length.
struct Ngrams {
    len: usize,
    modulus: usize,
    embedder: Embedding,
    post_proj: Linear,
}

impl Ngrams {
    /// All tables: `emb_split_num` for each length from 2 on, each larger by 2 than the one before.
    fn all(c: &Config, w: &Weights) -> Vec<Self> {
        let tables = c.emb_split_num * (c.emb_neighbor_num - 1);
        let (first, dim) = (c.ngram_vocab_size_ratio * c.vocab_size + 1, c.hidden_size / tables.max(1));
        let table = |i: usize| Ngrams {
            len: 2 + i / c.emb_split_num,
            modulus: first + 2 * i,
            embedder: w.at("embedders").embedding(&i.to_string(), first + 2 * i, dim),
            post_proj: w.at("post_projs").linear(&i.to_string(), dim, c.hidden_size, false),
        };
        (0..tables).map(table).collect()
    }
}

struct LongcatFlash {
    decoder: Decoder<Block>,
    ngrams: Vec<Ngrams>,
    vocab: usize,
}

impl Architecture for LongcatFlash {
    const MODEL_TYPES: &'static [&'static str] = &["longcat_flash", "longcat_flash_ngram"];
    type Config = Config;
    type Model = Self;

    fn new(c: Config, w: &Weights) -> Result<Self> {
        let (model, dim) = (w.at("model"), c.hidden_size);
        model.ignore("mtp.");
        let with_ngrams = c.model_type == "longcat_flash_ngram";
        let tables = model.at("ngram_embeddings");
        let embed_tokens = if with_ngrams && tables.has("word_embeddings.weight") {
            tables.embedding("word_embeddings", c.vocab_size, dim)
        } else {
            model.embedding("embed_tokens", c.vocab_size, dim)
        };
        let layers = model.at("layers").each(c.num_layers, |w, _| Ok(Block::new(&c, w)))?;
        let lm_head = LmHead::new(w, &embed_tokens, c.vocab_size, dim, c.tie_word_embeddings);
        let decoder = Decoder::of(embed_tokens, layers, model.rms_norm("norm", dim, c.rms_norm_eps), lm_head);
        let ngrams = if with_ngrams { Ngrams::all(&c, &tables) } else { Vec::new() };
        Ok(Self { decoder, ngrams, vocab: c.vocab_size })
    }
}

impl Model for LongcatFlash {
    fn caches(&self) -> Vec<Cache> {
        vec![Cache::key_value(None).and(Cache::key_value(None)); self.decoder.layers.len()]
    }

    fn forward(&self, tokens: &Tensor, step: &mut Step) -> Tensor {
        let add = |x: Tensor, n: &Ngrams| {
            let ids = step.ngrams(tokens, n.len, self.vocab, n.modulus);
            x + n.post_proj.forward(&n.embedder.forward(&ids))
        };
        let x = self.ngrams.iter().fold(self.decoder.embed(tokens), add);
        let x = if self.ngrams.is_empty() { x } else { x / (1 + self.ngrams.len()) as f32 };
        self.decoder.forward_from(x, step, Block::forward)
    }

    fn head(&self, hidden: &Tensor) -> Tensor {
        self.decoder.head(hidden)
    }
}

export_plugin!(LongcatFlash, examples = ["../../tests/fixtures/tiny/longcat_flash/config.json"]);
