//! DeepSeek V4: attention over a window and over entries that stand for many tokens each, between residual streams.
//! <https://huggingface.co/deepseek-ai/DeepSeek-V4-Flash>
//!
//! ```text
//! X = HC(Attention ∘ RMSNorm, X), X = HC(MoE ∘ RMSNorm, X)   per layer, over n residual streams X; see HyperConnection
//! logits = RMSNorm(HyperHead(X)) · E
//!
//! q = rope(RMSNorm(cq Wqb)) per head, cq = RMSNorm(x Wqa);  k = v = rope(RMSNorm(x Wkv)), one for all heads
//! o = rope⁻¹(softmax(q · [k of the window, entries, sink]) v);  y = Wob [Woa o of each group of heads]
//!
//! entry = rope(RMSNorm(Σ softmax(x Wgate + b) x Wkv)), lane by lane over the m tokens of a window, at the first one's position
//!   heavily compressed (HCA): m is large, every entry is seen
//!   compressed sparse (CSA): m is small, an entry spans the window before too, and only the k best by an indexer are seen:
//!   Σⱼ wⱼ relu(qⱼ · entry') with entries of its own
//!
//! MoE(x) = SwiGLUₛ(x) + a Σ pᵢ SwiGLUᵢ(x), p = s / Σ s over the chosen, s = √softplus(x Wgate); s + b chooses,
//!   in the first layers the token's id does
//! ```

use plugin_api::prelude::*;

config! {
    struct Rates {
        compressed_sparse_attention: usize where >= 1 = 4,
        heavily_compressed_attention: usize where >= 1 = 128,
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
        // Which layers compress, and by how much: by name, or by rate as DeepSeek writes it.
        layer_types: Option<Vec<String>> = None,
        compress_ratios: Option<Vec<usize>> = None,
        compress_rates: Option<Rates> = None,
        compress_rate_csa: usize where >= 1 = compress_rates.as_ref().map_or(4, |r| r.compressed_sparse_attention),
        compress_rate_hca: usize where >= 1 = compress_rates.as_ref().map_or(128, |r| r.heavily_compressed_attention),
        sliding_window: usize where >= 1 = 128,
        index_n_heads: usize where >= 1 = 64,
        index_head_dim: usize where >= 2 = 128,
        index_topk: usize where >= 1 = 512,
        qk_rope_head_dim: usize = head_dim / 8,
        partial_rotary_factor: f64 = qk_rope_head_dim as f64 / head_dim as f64,
        rope_theta: f32 = 10_000.0,
        compress_rope_theta: f32 = 160_000.0,
        // The scaling is that of layers that compress.
        rope_scaling: Option<RopeScaling> = None,
        rope_parameters: Option<Ropes> = None,
        moe_intermediate_size: usize,
        n_routed_experts: usize where >= 1,
        num_experts_per_tok: usize where >= 1 = 6,
        scoring_func: String = "sqrtsoftplus".to_owned(),
        routed_scaling_factor: f32 = 1.5,
        swiglu_limit: f32 = 10.0,
        mlp_layer_types: Option<Vec<String>> = None,
        num_hash_layers: usize = 3,
        hc_mult: usize where >= 1 = 4,
        hc_sinkhorn_iters: usize where >= 1 = 20,
        hc_eps: f32 = 1e-6,
    }
}

/// What a layer's attention sees beside its window.
#[derive(Clone, Copy, PartialEq)]
enum Beside {
    Nothing,
    /// The best entries of a few tokens each.
    Sparse,
    /// All entries of many tokens each.
    Heavy,
}

impl Config {
    fn beside(&self, layer: usize) -> Result<Beside> {
        let named = self.layer_types.as_ref().map(|types| types.get(layer).map_or("nothing", String::as_str));
        let ratio = self.compress_ratios.as_ref().map(|ratios| ratios.get(layer).copied().unwrap_or(usize::MAX));
        match (named, ratio) {
            (Some("sliding_attention"), _) | (None, Some(0)) => Ok(Beside::Nothing),
            (Some("compressed_sparse_attention"), _) | (None, Some(4)) => Ok(Beside::Sparse),
            (Some("heavily_compressed_attention"), _) | (None, Some(128)) => Ok(Beside::Heavy),
            (None, None) => Ok(if layer > 2 && layer % 2 == 1 { Beside::Sparse } else { Beside::Heavy }),
            _ => Err(format!(
                "config.json: layer {layer} should be sliding_attention, compressed_sparse_attention or \
                 heavily_compressed_attention in layer_types, or 0, 4 or 128 in compress_ratios"
            )
            .into()),
        }
    }

    /// The rope of layers that compress, or of those that do not.
    fn rope(&self, w: &Weights, compresses: bool) -> Rope {
        let named =
            self.rope_parameters.as_ref().and_then(|r| if compresses { r.compress.clone() } else { r.main.clone() });
        let theta = if compresses { self.compress_rope_theta } else { self.rope_theta };
        let theta = named.as_ref().and_then(|r| r.number("rope_theta")).unwrap_or(theta);
        // Unlike elsewhere, YaRN stretches without making keys longer.
        let scaling = self.rope_scaling.clone().filter(|_| compresses).map(|s| s.or("attention_factor", 1.0));
        let dims = (self.head_dim as f64 * self.partial_rotary_factor) as usize;
        w.rope(dims, theta, &named.or(scaling)).interleaved().at_the_end()
    }

    fn hashes(&self, layer: usize) -> bool {
        let by_name = self.mlp_layer_types.as_ref().and_then(|types| types.get(layer));
        by_name.map_or(layer < self.num_hash_layers, |name| name == "hash_moe")
    }
}

/// Makes one entry of each window of tokens.
struct Compressor {
    wkv: Linear,
    wgate: Linear,
    ape: Parameter,
    norm: RmsNorm,
    rope: Rope,
    windows: usize,
    rate: usize,
    dim: usize,
}

impl Compressor {
    fn new(c: &Config, w: &Weights, beside: Beside, dim: usize) -> Self {
        let (windows, rate) =
            if beside == Beside::Sparse { (2, c.compress_rate_csa) } else { (1, c.compress_rate_hca) };
        let [wkv, wgate] = w.linears(c.hidden_size, false, [("wkv", windows * dim), ("wgate", windows * dim)]);
        let ape = w.tensor("ape", &[rate, windows * dim]);
        let norm = w.rms_norm("norm", dim, c.rms_norm_eps);
        Self { wkv, wgate, ape, norm, rope: c.rope(w, true).in_blocks(rate), windows, rate, dim }
    }

    fn cache(&self) -> Cache {
        Cache::pooling(self.windows, self.dim).and(Cache::pooled(self.rate))
    }

    /// `[tokens, 1, dim]`, an entry where a window ends.
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let pooled = layer.pool(&self.wkv.forward(x), &self.wgate.forward(x), &self.ape.tensor());
        layer.rotate(&self.rope, self.norm.forward(&pooled).split_heads(self.dim))
    }
}

/// Chooses the entries that are seen.
struct Indexer {
    compressor: Compressor,
    wq_b: Linear,
    weights_proj: Linear,
    rope: Rope,
    head_dim: usize,
    scale: f32,
    top_k: usize,
}

impl Indexer {
    fn new(c: &Config, w: &Weights) -> Self {
        let (heads, head_dim) = (c.index_n_heads, c.index_head_dim);
        Self {
            compressor: Compressor::new(c, &w.at("compressor"), Beside::Sparse, head_dim),
            wq_b: w.linear("wq_b", c.q_lora_rank, heads * head_dim, false),
            weights_proj: w.linear("weights_proj", c.hidden_size, heads, false),
            rope: c.rope(w, true),
            head_dim,
            scale: ((heads * head_dim) as f32).powf(-0.5),
            top_k: c.index_topk,
        }
    }

    fn choose(&self, x: &Tensor, latent: &Tensor, layer: &mut Layer) -> Tensor {
        let q = layer.rotate(&self.rope, self.wq_b.forward(latent).split_heads(self.head_dim));
        let k = self.compressor.forward(x, layer);
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
        let (dim, heads, head_dim, groups, eps) =
            (c.hidden_size, c.num_attention_heads, c.head_dim, c.o_groups, c.rms_norm_eps);
        let (beside, in_group, latent) = (c.beside(layer)?, heads * head_dim / groups, groups * c.o_lora_rank);
        let wo_a = w.source("wo_a.weight").reshape(&[groups, c.o_lora_rank, in_group]);
        let [wq_a, wkv] = w.linears(dim, false, [("wq_a", c.q_lora_rank), ("wkv", head_dim)]);
        let compressor = || Compressor::new(c, &w.at("compressor"), beside, head_dim);
        Ok(Self {
            wq_a,
            q_norm: w.rms_norm("q_norm", c.q_lora_rank, eps),
            wq_b: w.linear("wq_b", c.q_lora_rank, heads * head_dim, false),
            head_norm: RmsNorm::plain(head_dim, eps),
            wkv,
            // transformers calls it so when it saves a model.
            kv_norm: w.rms_norm(if w.has("norm.weight") { "norm" } else { "kv_norm" }, head_dim, eps),
            wo_a: MultiLinear::of(wo_a, None, groups, in_group, c.o_lora_rank),
            wo_b: w.linear("wo_b", latent, dim, false),
            attn_sink: w.tensor("attn_sink", &[heads]),
            rope: c.rope(w, beside != Beside::Nothing),
            indexer: (beside == Beside::Sparse).then(|| Indexer::new(c, &w.at("indexer"))),
            compressor: (beside != Beside::Nothing).then(compressor),
            window: c.sliding_window,
            head_dim,
            groups,
        })
    }

    /// The indexer's entries come first, then the window, then the entries.
    fn cache(&self) -> Cache {
        let indexed = self.indexer.as_ref().map_or(Cache::none(), |indexer| indexer.compressor.cache());
        let entries = self.compressor.as_ref().map_or(Cache::none(), Compressor::cache);
        indexed.and(Cache::key_value(Some(self.window))).and(entries)
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
        let connection = |name| HyperConnection::new(w, name, streams(c));
        let (ffn, norm) = (w.at("ffn"), |name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps));
        let (dim, hidden, experts, k) =
            (c.hidden_size, c.moe_intermediate_size, c.n_routed_experts, c.num_experts_per_tok);
        let gate = ffn.linear("gate", dim, experts, false);
        let router = match c.scoring_func.as_str() {
            "sqrtsoftplus" => Router::sqrt_softplus(gate, k),
            "sigmoid" => Router::sigmoid(gate, k),
            "softmax" => Router::softmax(gate, k),
            other => {
                let known = "sqrtsoftplus, sigmoid or softmax";
                return Err(format!("config.json: scoring_func is {other:?}, it should be {known}").into());
            }
        };
        let hashes = c.hashes(layer);
        let router = router.correction((!hashes).then(|| ffn.tensor("gate.bias", &[experts])));
        let kind = ExpertKind::BoundedSwiglu { limit: c.swiglu_limit };
        let shared =
            GatedMlp::named(&ffn.at("shared_experts"), ["w1", "w3", "w2"], dim, hidden, false, Activation::Silu);
        let experts = ffn.experts(ExpertsShape::new(experts, dim, hidden).kind(kind));
        Ok(Self {
            hc_attn: connection("hc_attn_"),
            attn_norm: norm("attn_norm"),
            attn: Attention::new(c, &w.at("attn"), layer)?,
            hc_ffn: connection("hc_ffn_"),
            ffn_norm: norm("ffn_norm"),
            tid2eid: hashes.then(|| Embedding::of(ffn.source("gate.tid2eid"), c.vocab_size, k)),
            ffn: Moe::new(router.normalized(true, 1e-20).scale(c.routed_scaling_factor), experts)
                .shared(shared.bounded(c.swiglu_limit)),
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

fn streams(c: &Config) -> HyperShape {
    HyperShape {
        streams: c.hc_mult,
        dim: c.hidden_size,
        norm_eps: c.rms_norm_eps,
        rounds: c.hc_sinkhorn_iters,
        eps: c.hc_eps,
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
        // transformers saves these under other names than DeepSeek, all but the head below `model`.
        let saved = w.has("model.embed_tokens.weight");
        let (model, embed, hc_head) =
            if saved { (w.at("model"), "embed_tokens", "hc_head.hc_") } else { (w.clone(), "embed", "hc_head_") };
        let (vocab, dim) = (c.vocab_size, c.hidden_size);
        let embed = model.embedding(embed, vocab, dim);
        // Layers that predict further tokens.
        w.ignore("mtp.");
        Ok(Self {
            streams: streams(&c),
            layers: model.at("layers").each(c.num_hidden_layers, |w, layer| Block::new(&c, w, layer))?,
            hc_head: HyperHead::new(&model, hc_head, streams(&c)),
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

export_plugin!(DeepseekV4);
