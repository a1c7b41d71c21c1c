//! Mamba: selective state spaces in place of attention. <https://arxiv.org/abs/2312.00752>
//!
//! ```text
//! y = x + Mixer(RMSNorm(x))                per layer
//! logits = RMSNorm(y) · Eᵀ
//!
//! x, z = x Win
//! x = silu(conv1d(x))
//! Δ, B, C = x Wx;  Δ = softplus(Δ WΔ + b)
//! h = exp(Δ A) h + Δ x Bᵀ, y = h C + D x       per channel, A = -exp(A_log)
//! Mixer(x) = (silu(z) * y) Wout
//! ```
//!
//! Falcon Mamba divides Δ, B and C by their root mean squares before use. <https://arxiv.org/abs/2410.05355>

use plugin_api::prelude::*;

config! {
    struct Config {
        model_type: String = "mamba".into(),
        vocab_size: usize = 50_280,
        hidden_size: usize = 768,
        expand: usize = 2,
        intermediate_size: usize = expand * hidden_size,
        state_size: usize where >= 1 = 16,
        num_hidden_layers: usize = 32,
        layer_norm_epsilon: f32 = 1e-5,
        conv_kernel: usize where >= 1 = 4,
        use_bias: bool = false,
        use_conv_bias: bool = true,
        hidden_act: Activation = Activation::Silu,
        time_step_rank: OrAuto = OrAuto::AUTO,
        mixer_rms_eps: f32 = 1e-6,
        tie_word_embeddings: Option<bool> = None,
    }
}

fn mixer(c: &Config, w: &Weights) -> Mamba {
    let shape = MambaShape {
        dim: c.hidden_size,
        inner: c.intermediate_size,
        state: c.state_size,
        kernel: c.conv_kernel,
        dt_rank: c.time_step_rank.or(c.hidden_size.div_ceil(16)),
        bias: c.use_bias,
        conv_bias: c.use_conv_bias,
        act: c.hidden_act,
    };
    let mixer = Mamba::new(w, shape);
    match &*c.model_type {
        "falcon_mamba" => {
            let lanes = [shape.dt_rank, shape.state, shape.state];
            mixer.norms(lanes.map(|lanes| RmsNorm::plain(lanes, c.mixer_rms_eps)))
        }
        _ => mixer,
    }
}

struct MambaModel;

impl Architecture for MambaModel {
    const MODEL_TYPES: &'static [&'static str] = &["mamba", "falcon_mamba"];
    type Config = Config;
    type Model = Decoder<Branch<Mamba>>;

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

export_plugin!(MambaModel, examples = ["../../tests/fixtures/tiny/mamba/config.json"]);
