//! Mamba 2: the state space dual, a recurrence with one decay a head. <https://arxiv.org/abs/2405.21060>
//!
//! ```text
//! y = x + Mixer(RMSNorm(x))                per layer
//! logits = RMSNorm(y) · Eᵀ
//!
//! z, x, B, C, Δ = x Win
//! x, B, C = silu(conv1d([x, B, C]))
//! Δ = softplus(Δ + b)
//! h = exp(Δ A) h + Δ x Bᵀ, y = h C + D x       per head, A = -exp(A_log); groups of heads share B and C
//! Mixer(x) = RMSNorm(silu(z) * y) Wout         each group of lanes normalized alone
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize = 32_768,
        hidden_size: usize = 4096,
        num_heads: usize where >= 1 = 128,
        head_dim: usize = 64,
        state_size: usize where >= 1 = 128,
        num_hidden_layers: usize = 64,
        layer_norm_epsilon: f32 = 1e-5,
        conv_kernel: usize where >= 1 = 4,
        n_groups: usize where >= 1 = 8,
        use_bias: bool = false,
        use_conv_bias: bool = true,
        hidden_act: Activation = Activation::Silu,
        time_step_limit: TimeStepLimit = TimeStepLimit::NONE,
        tie_word_embeddings: Option<bool> = None,
    }
}

fn mixer(c: &Config, w: &Weights) -> Mamba2 {
    let shape = Mamba2Shape {
        dim: c.hidden_size,
        heads: c.num_heads,
        head_dim: c.head_dim,
        groups: c.n_groups,
        state: c.state_size,
        kernel: c.conv_kernel,
        bias: c.use_bias,
        out_bias: c.use_bias,
        conv_bias: c.use_conv_bias,
        act: c.hidden_act,
        time_step_limit: c.time_step_limit,
    };
    Mamba2::new(w, shape, GatedNorm::new(w, "norm", shape.inner(), c.n_groups, c.layer_norm_epsilon))
}

struct Mamba2Model;

impl Architecture for Mamba2Model {
    const MODEL_TYPES: &'static [&'static str] = &["mamba2"];
    type Config = Config;
    type Model = Decoder<Branch<Mamba2>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        let shape = DecoderShape {
            vocab_size: c.vocab_size,
            hidden_size: c.hidden_size,
            num_hidden_layers: c.num_hidden_layers,
            rms_norm_eps: c.layer_norm_epsilon,
            tie_word_embeddings: c.tie_word_embeddings,
        };
        Decoder::backbone(w, shape, |w, _| Ok(mixer(&c, w)))
    }
}

export_plugin!(Mamba2Model, examples = ["../../tests/fixtures/tiny/mamba2/config.json"]);
