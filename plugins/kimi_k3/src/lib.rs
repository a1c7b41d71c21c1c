//! Kimi K3: Kimi Linear's two kinds of attention, both gated, experts of a narrower width behind a bounded activation, and residuals that
//! attend to what earlier blocks of layers left behind. <https://arxiv.org/abs/2510.26692>
//!
//! ```text
//! r, B = E, []                             the sum that runs, and the sums as they stood before each block of layers
//! a = mix(B, r);  at the start of a block: B += [r], r = 0
//! r += Mixer(RMSNorm(a));  r += FFN(RMSNorm(mix(B, r)))              per layer
//! logits = RMSNorm(mix(B, r)) · Wᵀ
//!
//! mix(B, r) = Σ pᵢ bᵢ,  p = softmax(RMSNorm(bᵢ) · w) over the bᵢ of B and r      each of the three with a norm and a w of its own
//! Mixer: Kimi delta attention (see `KimiDelta`), or latent attention without positions, each lane gated (see `Mla`)
//! FFN(x) = situ(x Wg, x Wu) · Wd;   situ(g, u) = β tanh(g / β) σ(g) * λ tanh(u / λ)
//!          or RMSNorm(Σ pᵢ situᵢ(x Win)) · Wout + situ(x) over the k best experts
//! ```

use plugin_api::prelude::*;

config! {
    struct LinearAttention {
        // Counted from 1.
        kda_layers: Vec<usize>,
        num_heads: usize where >= 1,
        head_dim: usize where >= 1,
        short_conv_kernel_size: usize where >= 1 = 4,
        gate_lower_bound: Option<f32> = None,
    }
}

config! {
    struct Config {
        vocab_size: usize,
        hidden_size: usize,
        intermediate_size: usize,
        num_hidden_layers: usize,
        num_attention_heads: usize where >= 1,
        rms_norm_eps: f32 = 1e-5,
        hidden_act: String = "situ".into(),
        activation_situ_beta: f32 = 1.0,
        activation_situ_linear_beta: Option<f32> = None,
        attn_res_block_size: Option<usize> = None,
        linear_attn_config: LinearAttention,
        q_lora_rank: Option<usize> = None,
        kv_lora_rank: usize,
        qk_nope_head_dim: usize,
        qk_rope_head_dim: usize,
        v_head_dim: usize,
        mla_use_output_gate: bool = false,
        num_experts: usize = 0,
        num_experts_per_token: usize where >= 1 = 16,
        num_shared_experts: usize = 0,
        moe_intermediate_size: usize = 0,
        moe_renormalize: bool = true,
        routed_scaling_factor: f32 = 1.0,
        first_k_dense_replace: usize = 0,
        moe_layer_freq: usize where >= 1 = 1,
        num_expert_group: usize = 1,
        topk_group: usize = 1,
        routed_expert_hidden_size: Option<usize> = None,
        latent_moe_use_norm: bool = false,
        tie_word_embeddings: Option<bool> = None,
    }
}

fn mixer(c: &Config, w: &Weights, layer: usize) -> AnyMixer {
    let l = &c.linear_attn_config;
    if l.kda_layers.contains(&(layer + 1)) {
        let (heads, head_dim, kernel) = (l.num_heads, l.head_dim, l.short_conv_kernel_size);
        let shape = KimiDeltaShape { dim: c.hidden_size, heads, head_dim, kernel, eps: c.rms_norm_eps };
        return Box::new(KimiDelta::new(w, shape, l.gate_lower_bound));
    }
    let shape = MlaShape {
        hidden_size: c.hidden_size,
        num_attention_heads: c.num_attention_heads,
        q_lora_rank: c.q_lora_rank,
        kv_lora_rank: c.kv_lora_rank,
        qk_nope_head_dim: c.qk_nope_head_dim,
        qk_rope_head_dim: c.qk_rope_head_dim,
        v_head_dim: c.v_head_dim,
        attention_bias: false,
    };
    let mla = Mla::new(w, shape, None);
    Box::new(match c.mla_use_output_gate {
        true => mla.lane_gate(w.linear("g_proj", c.hidden_size, c.num_attention_heads * c.v_head_dim, false)),
        false => mla,
    })
}

/// The feed-forward layer with this model's activation.
struct SituMlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
    beta: f32,
    linear_beta: Option<f32>,
}

impl SituMlp {
    fn new(c: &Config, w: &Weights, hidden: usize) -> Self {
        let [gate_proj, up_proj] = w.linears(c.hidden_size, false, [("gate_proj", hidden), ("up_proj", hidden)]);
        let down_proj = w.linear("down_proj", hidden, c.hidden_size, false);
        let (beta, linear_beta) = (c.activation_situ_beta, c.activation_situ_linear_beta);
        Self { gate_proj, up_proj, down_proj, beta, linear_beta }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let bounded = |x: &Tensor, by: f32| (x / by).tanh() * by;
        let (gate, up) = (self.gate_proj.forward(x), self.up_proj.forward(x));
        let up = self.linear_beta.map_or(up.clone(), |by| bounded(&up, by));
        self.down_proj.forward(&(bounded(&gate, self.beta) * gate.sigmoid() * up))
    }
}

struct LatentMoe {
    router: Router,
    experts: Experts,
    /// Into the experts' width and out of it.
    narrow: Option<[Linear; 2]>,
    norm: Option<RmsNorm>,
    shared: Option<SituMlp>,
}

enum FeedForwardLayer {
    Dense(SituMlp),
    Sparse(LatentMoe),
}

impl FeedForwardLayer {
    fn new(c: &Config, w: &Weights, layer: usize) -> Self {
        if c.num_experts == 0 || layer < c.first_k_dense_replace || !layer.is_multiple_of(c.moe_layer_freq) {
            return Self::Dense(SituMlp::new(c, &w.at("mlp"), c.intermediate_size));
        }
        let w = if w.has("block_sparse_moe.gate.weight") { w.at("block_sparse_moe") } else { w.at("mlp") };
        let in_gate = w.has("gate.e_score_correction_bias");
        let correction = if in_gate { "gate.e_score_correction_bias" } else { "e_score_correction_bias" };
        let (dim, count) = (c.hidden_size, c.num_experts);
        let router = Router::sigmoid(w.linear("gate", dim, count, false), c.num_experts_per_token)
            .correction(w.tensor(correction, &[count]))
            .groups(c.num_expert_group, c.topk_group, GroupScore::BestTwo)
            .normalized(c.moe_renormalize && c.num_experts_per_token > 1, 1e-20)
            .scale(c.routed_scaling_factor);
        let width = c.routed_expert_hidden_size.unwrap_or(dim);
        let situ = ExpertKind::Situ { beta: c.activation_situ_beta, linear_beta: c.activation_situ_linear_beta };
        let proj = |name, from, to| w.linear(&format!("routed_expert_{name}_proj"), from, to, false);
        Self::Sparse(LatentMoe {
            router,
            experts: w.experts(ExpertsShape::new(count, width, c.moe_intermediate_size).kind(situ)),
            narrow: c.routed_expert_hidden_size.map(|_| [proj("down", dim, width), proj("up", width, dim)]),
            norm: (c.latent_moe_use_norm && c.routed_expert_hidden_size.is_some())
                .then(|| w.rms_norm("routed_expert_norm", width, c.rms_norm_eps)),
            shared: (c.num_shared_experts > 0)
                .then(|| SituMlp::new(c, &w.at("shared_experts"), c.moe_intermediate_size * c.num_shared_experts)),
        })
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let moe = match self {
            Self::Dense(mlp) => return mlp.forward(x),
            Self::Sparse(moe) => moe,
        };
        let (chosen, weights) = moe.router.forward(x);
        let narrow = moe.narrow.as_ref().map_or(x.clone(), |[down, _]| down.forward(x));
        let y = moe.experts.forward(&narrow, &chosen, &weights);
        let y = moe.norm.as_ref().map_or(y.clone(), |norm| norm.forward(&y));
        let y = moe.narrow.as_ref().map_or(y.clone(), |[_, up]| up.forward(&y));
        moe.shared.as_ref().map_or(y.clone(), |shared| &y + shared.forward(x))
    }
}

/// Attention over the sums that earlier blocks of layers left behind.
struct Residual {
    norm: RmsNorm,
    proj: Linear,
}

impl Residual {
    fn new(c: &Config, w: &Weights, name: &str) -> Self {
        let source = |part: &str| match w.has(&format!("{name}_{part}.weight")) {
            true => w.source(&format!("{name}_{part}.weight")),
            false => w.source(&format!("{name}.{part}_weight")),
        };
        let dim = c.hidden_size;
        let norm = RmsNorm::of(source("norm").reshape(&[dim]), dim, c.rms_norm_eps);
        Self { norm, proj: Linear::of(source("proj").reshape(&[1, dim]), None, dim, 1) }
    }

    fn mix(&self, blocks: &[Tensor], sum: &Tensor) -> Tensor {
        let all: Vec<&Tensor> = blocks.iter().chain([sum]).collect();
        let logits: Vec<Tensor> = all.iter().map(|x| self.proj.forward(&self.norm.forward(x))).collect();
        let p = Tensor::concat(&logits.iter().collect::<Vec<_>>()).softmax();
        let part = |i: usize| all[i] * p.narrow(i, 1);
        (1..all.len()).fold(part(0), |mixed, i| mixed + part(i))
    }
}

struct K3Block {
    norms: [RmsNorm; 2],
    mixer: AnyMixer,
    ffn: FeedForwardLayer,
    /// Before the mixer and before the feed-forward layer, and whether a block of layers starts here.
    residuals: Option<([Residual; 2], bool)>,
}

struct KimiK3 {
    decoder: Decoder<K3Block>,
    output: Option<Residual>,
}

impl K3Block {
    fn forward(&self, x: Tensor, blocks: &mut Vec<Tensor>, layer: &mut Layer) -> Tensor {
        let (mixed, starts) = match &self.residuals {
            Some(([residual, _], starts)) => (residual.mix(blocks, &x), *starts),
            None => (x.clone(), false),
        };
        let y = self.mixer.forward(&self.norms[0].forward(&mixed), layer);
        let sum = if starts { y } else { &x + y };
        if starts {
            blocks.push(x);
        }
        let mixed = self.residuals.as_ref().map_or(sum.clone(), |([_, residual], _)| residual.mix(blocks, &sum));
        &sum + self.ffn.forward(&self.norms[1].forward(&mixed))
    }
}

impl Architecture for KimiK3 {
    const MODEL_TYPES: &'static [&'static str] = &["kimi_k3"];
    type Config = Config;
    type Model = Self;

    fn new(c: Config, w: &Weights) -> Result<Self> {
        if c.hidden_act != "situ" {
            return Err(format!("config.json: hidden_act is {:?}, it should be \"situ\"", c.hidden_act).into());
        }
        w.ignore("mtp");
        w.ignore("model.mtp");
        let decoder = Decoder::new(w, decoder_shape!(c), |w, i| {
            let norms = ["input_layernorm", "post_attention_layernorm"];
            let residual = |name| Residual::new(&c, w, name);
            Ok(K3Block {
                norms: norms.map(|name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps)),
                mixer: mixer(&c, &w.at("self_attn"), i),
                ffn: FeedForwardLayer::new(&c, w, i),
                residuals: c
                    .attn_res_block_size
                    .filter(|&size| size > 0)
                    .map(|size| (["self_attention_res", "mlp_res"].map(residual), i.is_multiple_of(size))),
            })
        })?;
        let output = c.attn_res_block_size.map(|_| Residual::new(&c, &w.at("model"), "output_attn_res"));
        Ok(Self { decoder, output })
    }
}

impl Model for KimiK3 {
    fn caches(&self) -> Vec<Cache> {
        self.decoder.layers.iter().map(|block| block.mixer.cache()).collect()
    }

    fn forward(&self, tokens: &Tensor, step: &mut Step) -> Tensor {
        let mut blocks = Vec::new();
        let layers = self.decoder.layers.iter().zip(step.layers());
        let sum =
            layers.fold(self.decoder.embed(tokens), |x, (block, mut layer)| block.forward(x, &mut blocks, &mut layer));
        let mixed = self.output.as_ref().map_or(sum.clone(), |output| output.mix(&blocks, &sum));
        self.decoder.norm.forward(&mixed)
    }

    fn head(&self, hidden: &Tensor) -> Tensor {
        self.decoder.head(hidden)
    }
}

export_plugin!(KimiK3, examples = ["../../tests/fixtures/tiny/kimi_k3/config.json"]);
