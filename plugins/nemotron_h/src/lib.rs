//! Nemotron-H: each layer is one thing only, Mamba 2's mixer, attention, a feed-forward layer or experts.
//! <https://arxiv.org/abs/2504.03624>
//!
//! ```text
//! y = x + F(RMSNorm(x))                    per layer, F by hybrid_override_pattern:
//! logits = RMSNorm(y) · Eᵀ
//!
//! M  Mamba 2, each group of lanes normalized alone
//! *  attention without positions
//! -  relu(x Wup)² Wdown
//! E  MLP_shared(x) + (Σ pᵢ MLPᵢ(x W₁)) W₂ over the k best by sigmoid(x Wgate) + bias within the best groups, p the sigmoids scaled to
//!    a sum of 1 and by routed_scaling_factor; W₁ and W₂ only where moe_latent_size is set
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize = 131_072,
        hidden_size: usize = 4096,
        hybrid_override_pattern: Option<String> = None,
        layer_types: Option<Vec<String>> = None,
        layers_block_type: Vec<String> = match (&hybrid_override_pattern, &layer_types) {
            (Some(pattern), _) => pattern.chars().map(String::from).collect(),
            (None, types) => types.clone().ok_or("config.json: hybrid_override_pattern is missing")?,
        },
        num_attention_heads: usize where >= 1 = 32,
        num_key_value_heads: usize = 8,
        head_dim: usize = hidden_size / num_attention_heads,
        attention_bias: bool = false,
        intermediate_size: usize = 21_504,
        mlp_hidden_act: Activation = Activation::Relu2,
        mlp_bias: bool = false,
        mamba_num_heads: usize where >= 1 = 128,
        mamba_head_dim: usize = 64,
        mamba_hidden_act: Activation = Activation::Silu,
        mamba_proj_bias: bool = false,
        use_bias: bool = mamba_proj_bias,
        ssm_state_size: usize where >= 1 = 128,
        n_groups: usize where >= 1 = 8,
        conv_kernel: usize where >= 1 = 4,
        use_conv_bias: bool = true,
        time_step_limit: TimeStepLimit = TimeStepLimit::NONE,
        layer_norm_epsilon: f32 = 1e-5,
        n_routed_experts: usize = 8,
        n_shared_experts: usize = 1,
        num_experts_per_tok: usize where >= 1 = 2,
        moe_intermediate_size: usize = 7688,
        moe_shared_expert_intermediate_size: usize = 7688,
        moe_latent_size: Option<usize> = None,
        n_group: usize where >= 1 = 1,
        topk_group: usize where >= 1 = 1,
        norm_topk_prob: bool = true,
        routed_scaling_factor: f32 = 1.0,
        tie_word_embeddings: Option<bool> = None,
    }
}

fn mamba(c: &Config, w: &Weights) -> Mamba2 {
    let shape = Mamba2Shape {
        dim: c.hidden_size,
        heads: c.mamba_num_heads,
        head_dim: c.mamba_head_dim,
        groups: c.n_groups,
        state: c.ssm_state_size,
        kernel: c.conv_kernel,
        bias: c.use_bias,
        out_bias: c.use_bias,
        conv_bias: c.use_conv_bias,
        act: c.mamba_hidden_act,
        time_step_limit: c.time_step_limit,
    };
    Mamba2::new(w, shape, GatedNorm::new(w, "norm", shape.inner(), c.n_groups, c.layer_norm_epsilon))
}

fn attention(c: &Config, w: &Weights) -> SelfAttention {
    let (dim, heads, kv_heads) = (c.hidden_size, c.num_attention_heads, c.num_key_value_heads);
    SelfAttention::new(w, Heads { dim, heads, kv_heads, head_dim: c.head_dim }, c.attention_bias, c.attention_bias)
}

fn mlp(c: &Config, w: &Weights, hidden: usize) -> Mlp {
    Mlp::new(w, ["up_proj", "down_proj"], c.hidden_size, hidden, c.mlp_bias, c.mlp_hidden_act)
}

struct LatentMoe {
    router: Router,
    experts: Experts,
    latent: Option<[Linear; 2]>,
    shared: Option<Mlp>,
}

impl LatentMoe {
    fn new(c: &Config, w: &Weights) -> Result<Self> {
        if c.mlp_hidden_act != Activation::Relu2 {
            return Err("config.json: mlp_hidden_act of nemotron_h should be relu2, the experts know no other".into());
        }
        let (dim, count) = (c.hidden_size, c.n_routed_experts);
        let width = c.moe_latent_size.unwrap_or(dim);
        let router = Router::sigmoid(w.linear("gate", dim, count, false), c.num_experts_per_tok)
            .correction(w.tensor("gate.e_score_correction_bias", &[count]))
            .groups(c.n_group, c.topk_group, GroupScore::BestTwo)
            .normalized(c.norm_topk_prob, 1e-20)
            .scale(c.routed_scaling_factor);
        let latent = c.moe_latent_size.map(|latent| {
            [w.linear("fc1_latent_proj", dim, latent, c.mlp_bias), w.linear("fc2_latent_proj", latent, dim, c.mlp_bias)]
        });
        let shape = ExpertsShape::new(count, width, c.moe_intermediate_size).kind(ExpertKind::Relu2);
        let shared =
            (c.n_shared_experts > 0).then(|| mlp(c, &w.at("shared_experts"), c.moe_shared_expert_intermediate_size));
        Ok(Self { router, experts: w.experts(shape), latent, shared })
    }
}

impl FeedForward for LatentMoe {
    fn forward(&self, x: &Tensor) -> Tensor {
        let (chosen, weights) = self.router.forward(x);
        let routed = match &self.latent {
            Some([down, up]) => up.forward(&self.experts.forward(&down.forward(x), &chosen, &weights)),
            None => self.experts.forward(x, &chosen, &weights),
        };
        match &self.shared {
            Some(shared) => routed + shared.forward(x),
            None => routed,
        }
    }
}

fn mixer(c: &Config, w: &Weights, layer: usize) -> Result<AnyMixer> {
    Ok(match c.layers_block_type.get(layer).map(String::as_str) {
        Some("M" | "mamba" | "linear_attention") => Box::new(mamba(c, w)),
        Some("*" | "attention" | "full_attention") => Box::new(attention(c, w)),
        Some("-" | "mlp") => Box::new(Unmixed(mlp(c, w, c.intermediate_size))),
        Some("E" | "moe") => Box::new(Unmixed(LatentMoe::new(c, w)?)),
        kind => return Err(format!("config.json: layer {layer} is {kind:?}, it should be one of M, *, - and E").into()),
    })
}

struct NemotronH;

impl Architecture for NemotronH {
    const MODEL_TYPES: &'static [&'static str] = &["nemotron_h"];
    type Config = Config;
    type Model = Decoder<Branch>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        // Layers that predict further tokens, for training.
        w.ignore("mtp.");
        let shape = DecoderShape {
            vocab_size: c.vocab_size,
            hidden_size: c.hidden_size,
            num_hidden_layers: c.layers_block_type.len(),
            rms_norm_eps: c.layer_norm_epsilon,
            tie_word_embeddings: c.tie_word_embeddings,
        };
        Decoder::backbone(w, shape, |w, layer| mixer(&c, w, layer))
    }
}

export_plugin!(NemotronH, examples = ["../../tests/fixtures/tiny/nemotron_h/config.json"]);
