//! DeepSeek V4: attention over a window and over entries that stand for many tokens each, between residual streams.
//! <https://huggingface.co/deepseek-ai/DeepSeek-V4-Flash>
//!
//! ```text
//! X = HC(Attention ∘ RMSNorm, X), X = HC(MoE ∘ RMSNorm, X)   per layer, over n residual streams X; see HyperConnection
//! logits = RMSNorm(HyperHead(X)) · E
//!
//! q = rope(RMSNorm(c Wqb)) per head, c = RMSNorm(x Wqa);  k = v = rope(RMSNorm(x Wkv)), one for all heads
//! o = rope⁻¹(softmax(q · [k of the window, entries, sink]) v);  y = Wob [Woa o of each group of heads]
//!   heavily compressed (HCA): an entry stands for many tokens, all are seen; see Compressor
//!   compressed sparse (CSA): it stands for a few and sees those before them, and only the k best Iₛ = Σⱼ wⱼ relu(qⱼ · eₛ) are seen,
//!   over an indexer's heads j and smaller entries e of its own
//!
//! MoE(x) = SwiGLUₛ(x) + a Σ pᵢ SwiGLUᵢ(x), p = s / Σ s over the chosen, s = √softplus(x Wgate)
//!   s + b chooses; in the first layers the token's id does
//! ```

use plugin_api::prelude::*;

config! {
    struct Rates {
        compressed_sparse_attention: usize = 4,
        heavily_compressed_attention: usize = 128,
    }
}

config! {
    struct Ropes {
        main: Option<RopeScaling> = None,
        compress: Option<RopeScaling> = None,
    }
}

config! {
    struct Config {
        vocab_size: usize,
        hidden_size: usize,
        num_hidden_layers: usize,
        num_attention_heads: usize where >= 1,
        head_dim: usize where >= 2 = 512,
        q_lora_rank: usize = 1024,
        o_groups: usize where >= 1 = 8,
        o_lora_rank: usize = 1024,
        rms_norm_eps: f32 = 1e-6,
        hidden_act: SiluOnly = SiluOnly,
        tie_word_embeddings: Option<bool> = None,
        // What a layer's attention sees beside its window: transformers' names, or DeepSeek's numbers.
        layer_types: Option<Vec<String>> = None,
        compress_ratios: Vec<usize> = (0..num_hidden_layers).map(|i| if i > 2 && i % 2 == 1 { SPARSE } else { HEAVY }).collect(),
        compress_rates: Option<Rates> = None,
        compress_rate_csa: usize where >= 1 = compress_rates.as_ref().map_or(SPARSE, |r| r.compressed_sparse_attention),
        compress_rate_hca: usize where >= 1 = compress_rates.as_ref().map_or(HEAVY, |r| r.heavily_compressed_attention),
        sliding_window: usize where >= 1 = 128,
        index_n_heads: usize where >= 1 = 64,
        index_head_dim: usize where >= 2 = 128,
        index_topk: usize where >= 1 = 512,
        qk_rope_head_dim: usize = head_dim / 8,
        partial_rotary_factor: f64 = qk_rope_head_dim as f64 / head_dim as f64,
        rope_theta: f32 = 10_000.0,
        compress_rope_theta: f32 = 160_000.0,
        rope_scaling: Option<RopeScaling> = None,
        rope_parameters: Option<Ropes> = None,
        moe_intermediate_size: usize,
        n_routed_experts: usize where >= 1,
        num_experts_per_tok: usize where >= 1 = 6,
        scoring_func: Score = Score::SqrtSoftplus,
        routed_scaling_factor: f32 = 1.5,
        swiglu_limit: f32 = 10.0,
        mlp_layer_types: Option<Vec<String>> = None,
        num_hash_layers: usize = 3,
        hc_mult: usize where >= 1 = 4,
        hc_sinkhorn_iters: usize where >= 1 = 20,
        hc_eps: f32 = 1e-6,
    }
}

/// What `compress_ratios` says of the two kinds of compressed attention, which need not be their rates.
const SPARSE: usize = 4;
const HEAVY: usize = 128;

impl Config {
    fn compression(&self, layer: usize) -> Result<Option<Compression>> {
        let named = self.layer_types.as_ref().map(|types| match types.get(layer).map(String::as_str) {
            Some("sliding_attention") => Some(0),
            Some("compressed_sparse_attention") => Some(SPARSE),
            Some("heavily_compressed_attention") => Some(HEAVY),
            _ => None,
        });
        match named.unwrap_or(self.compress_ratios.get(layer).copied()) {
            Some(0) => Ok(None),
            Some(SPARSE) => Ok(Some(Compression { rate: self.compress_rate_csa, windows: 2 })),
            Some(HEAVY) => Ok(Some(Compression { rate: self.compress_rate_hca, windows: 1 })),
            _ => Err(format!(
                "config.json: layer {layer} needs sliding_attention, compressed_sparse_attention or heavily_compressed_attention in \
                 layer_types, or 0, {SPARSE} or {HEAVY} in compress_ratios"
            )
            .into()),
        }
    }

    fn rope(&self, w: &Weights, compresses: bool) -> Rope {
        let (theta, named) = match (compresses, &self.rope_parameters) {
            (true, ropes) => (self.compress_rope_theta, ropes.as_ref().and_then(|r| r.compress.clone())),
            (false, ropes) => (self.rope_theta, ropes.as_ref().and_then(|r| r.main.clone())),
        };
        let theta = named.as_ref().and_then(|r| r.number("rope_theta")).unwrap_or(theta);
        // Only where it compresses is it stretched, and never made longer.
        let scaling = self.rope_scaling.clone().filter(|_| compresses).map(|s| s.or("attention_factor", 1.0));
        let lanes = (self.head_dim as f64 * self.partial_rotary_factor) as usize;
        w.rope(lanes, theta, &named.or(scaling)).interleaved().at_the_end()
    }

    fn streams(&self) -> HyperShape {
        let (streams, dim, norm_eps) = (self.hc_mult, self.hidden_size, self.rms_norm_eps);
        HyperShape { streams, dim, norm_eps, rounds: self.hc_sinkhorn_iters, eps: self.hc_eps }
    }
}

/// Chooses the entries that attention sees.
struct Indexer {
    entries: Compressor,
    wq_b: Linear,
    weights_proj: Linear,
    rope: Rope,
    head_dim: usize,
    scale: f32,
    top_k: usize,
}

impl Indexer {
    fn new(c: &Config, w: &Weights, of: Compression) -> Self {
        let (dim, heads, head_dim, rope) = (c.hidden_size, c.index_n_heads, c.index_head_dim, c.rope(w, true));
        Self {
            entries: Compressor::new(&w.at("compressor"), of, [dim, head_dim], c.rms_norm_eps, rope),
            wq_b: w.linear("wq_b", c.q_lora_rank, heads * head_dim, false),
            weights_proj: w.linear("weights_proj", dim, heads, false),
            rope,
            head_dim,
            scale: ((heads * head_dim) as f32).powf(-0.5),
            top_k: c.index_topk,
        }
    }

    fn choose(&self, x: &Tensor, latent: &Tensor, layer: &mut Layer) -> Tensor {
        let q = layer.rotate(&self.rope, self.wq_b.forward(latent).split_heads(self.head_dim));
        let k = self.entries.forward(x, layer);
        layer.index(q, k, self.weights_proj.forward(x) * self.scale, self.top_k)
    }
}

struct Attention {
    wq_a: Linear,
    q_norm: RmsNorm,
    wq_b: Linear,
    head_norm: RmsNorm,
    wkv: Linear,
    kv_norm: RmsNorm,
    wo_a: MultiLinear,
    wo_b: Linear,
    attn_sink: Parameter,
    rope: Rope,
    indexer: Option<Indexer>,
    compressor: Option<Compressor>,
    window: usize,
    head_dim: usize,
    groups: usize,
}

impl Attention {
    fn new(c: &Config, w: &Weights, layer: usize) -> Result<Self> {
        let (dim, heads, head_dim, groups, rank) =
            (c.hidden_size, c.num_attention_heads, c.head_dim, c.o_groups, c.o_lora_rank);
        let (of, eps) = (c.compression(layer)?, c.rms_norm_eps);
        let (rope, in_group) = (c.rope(w, of.is_some()), heads * head_dim / groups);
        let [wq_a, wkv] = w.linears(dim, false, [("wq_a", c.q_lora_rank), ("wkv", head_dim)]);
        let wo_a = w.source("wo_a.weight").reshape(&[groups, rank, in_group]);
        Ok(Self {
            wq_a,
            q_norm: w.rms_norm("q_norm", c.q_lora_rank, eps),
            wq_b: w.linear("wq_b", c.q_lora_rank, heads * head_dim, false),
            head_norm: RmsNorm::plain(head_dim, eps),
            wkv,
            // transformers saves it under another name.
            kv_norm: w.rms_norm(if w.has("norm.weight") { "norm" } else { "kv_norm" }, head_dim, eps),
            wo_a: MultiLinear::of(wo_a, None, groups, in_group, rank),
            wo_b: w.linear("wo_b", groups * rank, dim, false),
            attn_sink: w.tensor("attn_sink", &[heads]),
            rope,
            indexer: of.filter(|of| of.windows > 1).map(|of| Indexer::new(c, &w.at("indexer"), of)),
            compressor: of.map(|of| Compressor::new(&w.at("compressor"), of, [dim, head_dim], eps, rope)),
            window: c.sliding_window,
            head_dim,
            groups,
        })
    }

    /// The indexer's entries, the window, then the entries.
    fn cache(&self) -> Cache {
        let of = |entries: Option<&Compressor>| entries.map_or(Cache::none(), Compressor::cache);
        let window = Cache::key_value(Some(self.window));
        of(self.indexer.as_ref().map(|indexer| &indexer.entries)).and(window).and(of(self.compressor.as_ref()))
    }

    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let latent = self.q_norm.forward(&self.wq_a.forward(x));
        let q = self.head_norm.forward(&self.wq_b.forward(&latent).split_heads(self.head_dim));
        let kv = self.kv_norm.forward(&self.wkv.forward(x)).split_heads(self.head_dim);
        let (q, kv) = (layer.rotate(&self.rope, q), layer.rotate(&self.rope, kv));
        let selection = self.indexer.as_ref().map(|indexer| indexer.choose(x, &latent, layer));
        let entries = self.compressor.as_ref().map(|compressor| compressor.forward(x, layer));
        let how = Attend {
            scale: (self.head_dim as f32).powf(-0.5),
            window: Some(self.window),
            sinks: Some(&self.attn_sink.tensor()),
            pooled: entries.as_ref().map(|keys| Pooled { keys, values: None, selection: selection.as_ref() }),
            ..Default::default()
        };
        let o = layer.attend_latent(q, kv, self.head_dim, &how);
        let o = layer.rotate(&self.rope.back(), o).merge_heads();
        self.wo_b.forward(&self.wo_a.forward(&o.unflatten(self.groups)).flatten())
    }
}

struct Block {
    hc_attn: HyperConnection,
    attn_norm: RmsNorm,
    attn: Attention,
    hc_ffn: HyperConnection,
    ffn_norm: RmsNorm,
    /// The experts of each token id, in the first layers.
    tid2eid: Option<Embedding>,
    ffn: Moe,
}

impl Block {
    fn new(c: &Config, w: &Weights, layer: usize) -> Result<Self> {
        let (dim, hidden, experts, k) =
            (c.hidden_size, c.moe_intermediate_size, c.n_routed_experts, c.num_experts_per_tok);
        let by_name = c.mlp_layer_types.as_ref().and_then(|types| types.get(layer)).map(|name| name == "hash_moe");
        let (ffn, hashes) = (w.at("ffn"), by_name.unwrap_or(layer < c.num_hash_layers));
        let router = Router::by(c.scoring_func, ffn.linear("gate", dim, experts, false), k)
            .correction((!hashes).then(|| ffn.tensor("gate.bias", &[experts])))
            .normalized(true, 1e-20)
            .scale(c.routed_scaling_factor);
        let kind = ExpertKind::BoundedSwiglu { limit: c.swiglu_limit };
        let (w123, silu) = (["w1", "w3", "w2"], Activation::Silu);
        let shared = GatedMlp::named(&ffn.at("shared_experts"), w123, dim, hidden, false, silu).bounded(c.swiglu_limit);
        Ok(Self {
            hc_attn: HyperConnection::new(w, "hc_attn_", c.streams()),
            attn_norm: w.rms_norm("attn_norm", dim, c.rms_norm_eps),
            attn: Attention::new(c, &w.at("attn"), layer)?,
            hc_ffn: HyperConnection::new(w, "hc_ffn_", c.streams()),
            ffn_norm: w.rms_norm("ffn_norm", dim, c.rms_norm_eps),
            tid2eid: hashes.then(|| Embedding::of(ffn.source("gate.tid2eid"), c.vocab_size, k)),
            ffn: Moe::new(router, ffn.experts(ExpertsShape::new(experts, dim, hidden).kind(kind))).shared(shared),
        })
    }

    fn forward(&self, streams: &Tensor, tokens: &Tensor, layer: &mut Layer) -> Tensor {
        let streams = self.hc_attn.around(streams, |x| self.attn.forward(&self.attn_norm.forward(x), layer));
        self.hc_ffn.around(&streams, |x| {
            let x = self.ffn_norm.forward(x);
            match &self.tid2eid {
                Some(experts) => self.ffn.forward_to(&x, &experts.forward(tokens)),
                None => self.ffn.forward(&x),
            }
        })
    }
}

struct DeepseekV4 {
    embed: Embedding,
    streams: HyperShape,
    layers: Vec<Block>,
    hc_head: HyperHead,
    norm: RmsNorm,
    head: LmHead,
}

impl Architecture for DeepseekV4 {
    const MODEL_TYPES: &'static [&'static str] = &["deepseek_v4"];
    type Config = Config;
    type Model = Self;

    fn new(c: Config, w: &Weights) -> Result<Self> {
        // transformers saves all but the head below `model`.
        let (model, embed, hc_head) = match w.has("model.embed_tokens.weight") {
            true => (w.at("model"), "embed_tokens", "hc_head.hc_"),
            false => (w.clone(), "embed", "hc_head_"),
        };
        let (vocab, dim) = (c.vocab_size, c.hidden_size);
        let embed = model.embedding(embed, vocab, dim);
        // Layers that predict further tokens.
        w.ignore("mtp.");
        Ok(Self {
            streams: c.streams(),
            layers: model.at("layers").each(c.num_hidden_layers, |w, layer| Block::new(&c, w, layer))?,
            hc_head: HyperHead::new(&model, hc_head, c.streams()),
            norm: model.rms_norm("norm", dim, c.rms_norm_eps),
            head: LmHead::named(w, "head", &embed, vocab, dim, c.tie_word_embeddings),
            embed,
        })
    }
}

impl Model for DeepseekV4 {
    fn caches(&self) -> Vec<Cache> {
        self.layers.iter().map(|block| block.attn.cache()).collect()
    }

    fn forward(&self, tokens: &Tensor, step: &mut Step) -> Tensor {
        let streams = self.streams.spread(&self.embed.forward(tokens));
        let streams = step.through(&self.layers, streams, |block, x, layer| block.forward(x, tokens, layer));
        self.norm.forward(&self.hc_head.forward(&streams))
    }

    fn head(&self, hidden: &Tensor) -> Tensor {
        self.head.forward(hidden)
    }
}

export_plugin!(DeepseekV4, examples = ["../../tests/fixtures/tiny/deepseek_v4/config.json"]);
