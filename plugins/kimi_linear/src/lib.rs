//! Kimi Linear: three layers of Kimi delta attention to one of multi-head latent attention without positions, and routed experts.
//! <https://arxiv.org/abs/2510.26692>
//!
//! ```text
//! h = x + Mixer(RMSNorm(x))                per layer
//! y = h + FFN(RMSNorm(h))
//! logits = RMSNorm(y) · Eᵀ
//!
//! Delta(x):  q, k, v = silu(conv(x Wq, x Wk, x Wv)),   q and k of length 1, q / √d
//!   S = diag(exp(g)) S,  S += k (β (v - kᵀ S))ᵀ,  o = qᵀ S
//!   g = -exp(A_log) softplus(x Wf₁ Wf₂ + dt_bias), one for each key lane,   β = sigmoid(x Wb)
//!   (RMSNorm(o) * sigmoid(x Wg₁ Wg₂)) · Wo
//! Latent(x):  c = RMSNorm(x Wc), u = x Wu;   head h: q = x Wqₕ, k = [c Wkₕ, u], v = c Wvₕ
//!   softmax(q · kᵀ / √d) · v · Wo          computed with q Wkₕᵀ against c, which alone is kept
//! FFN(x) = Σ pᵢ SwiGLUᵢ(x) + SwiGLU(x) over the k best experts; in the first layers SwiGLU(x)
//! ```

use plugin_api::prelude::*;

config! {
    struct LinearAttention {
        // Counted from 1.
        kda_layers: Vec<usize>,
        num_heads: usize where >= 1,
        head_dim: usize where >= 1,
        short_conv_kernel_size: usize where >= 1 = 4,
    }
}

config! {
    struct Config {
        vocab_size: usize,
        hidden_size: usize,
        intermediate_size: usize,
        num_hidden_layers: usize,
        num_attention_heads: usize where >= 1,
        hidden_act: Activation = Activation::Silu,
        rms_norm_eps: f32 = 1e-5,
        linear_attn_config: LinearAttention,
        kv_lora_rank: usize,
        qk_nope_head_dim: usize = 128,
        qk_rope_head_dim: usize = 64,
        v_head_dim: usize = 128,
        num_experts: usize,
        moe_intermediate_size: usize,
        num_experts_per_token: usize where >= 1 = 8,
        num_shared_experts: usize = 1,
        moe_router_activation_func: String = "sigmoid".into(),
        moe_renormalize: bool = true,
        routed_scaling_factor: f32 = 1.0,
        first_k_dense_replace: usize = 1,
        moe_layer_freq: usize where >= 1 = 1,
        num_expert_group: usize = 1,
        topk_group: usize = 1,
        tie_word_embeddings: Option<bool> = None,
    }
}

struct Delta {
    qkv: [Linear; 3],
    conv: Conv1d,
    f_a_proj: Linear,
    f_b_proj: Linear,
    b_proj: Linear,
    g_a_proj: Linear,
    g_b_proj: Linear,
    a_log: Parameter,
    dt_bias: Parameter,
    unit: RmsNorm,
    o_norm: RmsNorm,
    o_proj: Linear,
    heads: usize,
    d: usize,
}

impl Delta {
    fn new(c: &Config, w: &Weights) -> Self {
        let LinearAttention { num_heads: heads, head_dim: d, short_conv_kernel_size: kernel, .. } =
            c.linear_attn_config;
        let (dim, width) = (c.hidden_size, heads * d);
        let convs = ["q", "k", "v"].map(|part| match w.has(&format!("{part}_conv1d.weight")) {
            true => w.source(&format!("{part}_conv1d.weight")),
            false => w.source(&format!("{part}_conv.conv.weight")),
        });
        Self {
            qkv: w.linears(dim, false, [("q_proj", width), ("k_proj", width), ("v_proj", width)]),
            conv: Conv1d::of(Source::join(&convs, 0), None, 3 * width, kernel),
            f_a_proj: w.linear("f_a_proj", dim, d, false),
            f_b_proj: w.linear("f_b_proj", d, width, false),
            b_proj: w.linear("b_proj", dim, heads, false),
            g_a_proj: w.linear("g_a_proj", dim, d, false),
            g_b_proj: w.linear("g_b_proj", d, width, false),
            a_log: Parameter::of(w.source("A_log").reshape(&[heads, 1]), &[heads, 1]),
            dt_bias: Parameter::of(w.source("dt_bias").reshape(&[heads, d]), &[heads, d]),
            // x / √(Σ x² + 1e-6), but for a factor of √d.
            unit: RmsNorm::plain(d, 1e-6 / d as f32),
            o_norm: w.rms_norm("o_norm", d, c.rms_norm_eps),
            o_proj: w.linear("o_proj", width, dim, false),
            heads,
            d,
        }
    }
}

impl Mixer for Delta {
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let (d, width) = (self.d, self.heads * self.d);
        let [q, k, v] = self.qkv.each_ref().map(|proj| proj.forward(x));
        let qkv = layer.conv1d(&self.conv, &Tensor::concat(&[&q, &k, &v])).silu();
        let [q, k, v] = [0, width, 2 * width].map(|start| qkv.narrow(start, width).split_heads(d));
        let (q, k) = (self.unit.forward(&q) / d as f32, self.unit.forward(&k) * (d as f32).powf(-0.5));

        let forget = self.f_b_proj.forward(&self.f_a_proj.forward(x)).split_heads(d);
        let g = -(self.a_log.tensor().exp() * (forget + self.dt_bias.tensor()).softplus());
        let o = layer.gated_delta(&q, &k, &v, &g, &self.b_proj.forward(x).sigmoid());
        let gate = self.g_b_proj.forward(&self.g_a_proj.forward(x)).sigmoid();
        self.o_proj.forward(&(self.o_norm.forward(&o).merge_heads() * gate))
    }

    fn cache(&self) -> Cache {
        self.conv.cache().and(Cache::state(&[self.heads, self.d, self.d]))
    }
}

/// Multi-head latent attention. <https://arxiv.org/abs/2405.04434>
struct Latent {
    q_proj: Linear,
    kv_a_proj_with_mqa: Linear,
    kv_a_layernorm: RmsNorm,
    embed_q: MultiLinear,
    unembed_out: MultiLinear,
    o_proj: Linear,
    nope: usize,
    shared: usize,
    rank: usize,
}

impl Latent {
    fn new(c: &Config, w: &Weights) -> Self {
        let (dim, heads, rank) = (c.hidden_size, c.num_attention_heads, c.kv_lora_rank);
        let (nope, shared, v) = (c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim);
        let (embed_q, unembed_out) = match w.has("kv_b_proj.weight") {
            true => {
                let kv_b = w.source("kv_b_proj.weight").reshape(&[heads, nope + v, rank]);
                (kv_b.narrow(1, 0..nope).transpose(), kv_b.narrow(1, nope..nope + v))
            }
            false => (w.source("embed_q.weight"), w.source("unembed_out.weight")),
        };
        Self {
            q_proj: w.linear("q_proj", dim, heads * (nope + shared), false),
            kv_a_proj_with_mqa: w.linear("kv_a_proj_with_mqa", dim, rank + shared, false),
            // Not of rms_norm_eps.
            kv_a_layernorm: w.rms_norm("kv_a_layernorm", rank, 1e-6),
            embed_q: MultiLinear::of(embed_q, None, heads, nope, rank),
            unembed_out: MultiLinear::of(unembed_out, None, heads, rank, v),
            o_proj: w.linear("o_proj", heads * v, dim, false),
            nope,
            shared,
            rank,
        }
    }
}

impl Mixer for Latent {
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let q = self.q_proj.forward(x).split_heads(self.nope + self.shared);
        let q_latent = self.embed_q.forward(&q.narrow(0, self.nope));
        let q = Tensor::concat(&[&q_latent, &q.narrow(self.nope, self.shared)]);

        let kv = self.kv_a_proj_with_mqa.forward(x);
        let latent = self.kv_a_layernorm.forward(&kv.narrow(0, self.rank));
        let k = Tensor::concat(&[&latent, &kv.narrow(self.rank, self.shared)]).unflatten(1);

        let scale = ((self.nope + self.shared) as f32).powf(-0.5);
        let o = layer.attend_latent(q, k, self.rank, &Attend { scale, ..Default::default() });
        self.o_proj.forward(&self.unembed_out.forward(&o).merge_heads())
    }

    fn cache(&self) -> Cache {
        Cache::key_value(None)
    }
}

fn ffn(c: &Config, w: &Weights, layer: usize) -> Result<Ffn> {
    let dim = c.hidden_size;
    let mlp = |w: Weights, hidden| GatedMlp::new(&w, dim, hidden, false, c.hidden_act);
    if layer < c.first_k_dense_replace || !layer.is_multiple_of(c.moe_layer_freq) {
        return Ok(Ffn::Dense(mlp(w.at("mlp"), c.intermediate_size)));
    }
    let (w, correction) = match w.has("block_sparse_moe.gate.weight") {
        true => (w.at("block_sparse_moe"), "gate.e_score_correction_bias"),
        false => (w.at("mlp"), "e_score_correction_bias"),
    };
    let (gate, top_k) = (w.linear("gate", dim, c.num_experts, false), c.num_experts_per_token);
    let router = match c.moe_router_activation_func.as_str() {
        "sigmoid" => Router::sigmoid(gate, top_k),
        "softmax" => Router::softmax(gate, top_k),
        other => {
            return Err(format!(
                "config.json: moe_router_activation_func is {other:?}, it should be \"sigmoid\" or \"softmax\""
            )
            .into());
        }
    };
    let router = router
        .correction(w.tensor(correction, &[c.num_experts]))
        .groups(c.num_expert_group, c.topk_group, GroupScore::BestTwo)
        .normalized(c.moe_renormalize && top_k > 1, 1e-20)
        .scale(c.routed_scaling_factor);
    let experts = w.experts(ExpertsShape::new(c.num_experts, dim, c.moe_intermediate_size));
    let shared =
        (c.num_shared_experts > 0).then(|| mlp(w.at("shared_experts"), c.moe_intermediate_size * c.num_shared_experts));
    Ok(Ffn::Sparse(Moe::new(router, experts).shared(shared)))
}

struct KimiLinear(Decoder<Block<Box<dyn Mixer + Send>, Ffn>>);

impl Architecture for KimiLinear {
    const MODEL_TYPES: &'static [&'static str] = &["kimi_linear"];
    type Config = Config;

    fn new(c: Config, w: &Weights) -> Result<Self> {
        if c.hidden_act != Activation::Silu {
            return Err("config.json: hidden_act of kimi_linear should be silu, the experts know no other".into());
        }
        w.ignore("model.mtp");
        let shape = DecoderShape {
            vocab_size: c.vocab_size,
            hidden_size: c.hidden_size,
            num_hidden_layers: c.num_hidden_layers,
            rms_norm_eps: c.rms_norm_eps,
            tie_word_embeddings: c.tie_word_embeddings,
        };
        let block = |w: &Weights, i: usize| {
            let attn = w.at("self_attn");
            let mixer: Box<dyn Mixer + Send> = match c.linear_attn_config.kda_layers.contains(&(i + 1)) {
                true => Box::new(Delta::new(&c, &attn)),
                false => Box::new(Latent::new(&c, &attn)),
            };
            let norms = ["input_layernorm", "post_attention_layernorm"];
            let norms = norms.map(|name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps));
            Ok(Block::pre_norm(norms, mixer, ffn(&c, w, i)?))
        };
        Ok(Self(Decoder::new(w, shape, block)?))
    }

    fn caches(&self) -> Vec<Cache> {
        self.0.caches()
    }

    fn forward(&self, tokens: &Tensor, step: &mut Step) -> Tensor {
        self.0.run(tokens, step)
    }

    fn head(&self, hidden: &Tensor) -> Tensor {
        self.0.head(hidden)
    }
}

export_plugin!(KimiLinear);
