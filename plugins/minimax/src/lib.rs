//! MiniMax: Text-01 and M1, where lightning attention takes turns with softmax attention, and M2, which has the latter alone.
//! <https://arxiv.org/abs/2501.08313>, <https://huggingface.co/MiniMaxAI/MiniMax-M2>
//!
//! ```text
//! M2       h = x + Mixer(RMSNorm(x)),  y = h + MoE(RMSNorm(h))
//! Text-01  n = RMSNorm(x),  h = α n + β Mixer(n);  m = RMSNorm(h),  y = α m + β MoE(m)     α and β by kind of layer
//! logits = RMSNorm(y) · Wᵀ
//!
//! Attention(x) = softmax(q · kᵀ / √d) · (x Wv) · Wo
//!   q = rope(x Wq), k = rope(x Wk);  in M2 RMSNorm before the rope, all heads as one, and a share of the lanes turned
//! Lightning(x) = (sigmoid(x Wg) * RMSNorm(o)) · Wo
//!   q, k, v = silu(x Wqkv), head by head;  S = exp(-s) S + k vᵀ, o = qᵀ S;  s falls from head to head and from layer to layer
//!
//! MoE(x) = Σ pᵢ SwiGLUᵢ(x)     p scaled to a sum of 1
//!   Text-01: the k largest of p = softmax(x Wgate);  M2: the k largest sigmoid(x Wgate) + b, p their sigmoids
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        model_type: String,
        vocab_size: usize = 200_064,
        hidden_size: usize = 3072,
        intermediate_size: usize = 1536,
        num_hidden_layers: usize = 62,
        num_attention_heads: usize where >= 1 = 48,
        num_key_value_heads: usize = 8,
        head_dim: usize = hidden_size / num_attention_heads,
        hidden_act: Activation = Activation::Silu,
        rms_norm_eps: f32 = if model_type == "minimax" { 1e-5 } else { 1e-6 },
        rope_theta: f32 = if model_type == "minimax" { 1e6 } else { 5e6 },
        rope_scaling: Option<RopeScaling> = None,
        partial_rotary_factor: f32 = 1.0,
        rotary_dim: usize = (head_dim as f32 * partial_rotary_factor) as usize,
        use_qk_norm: bool = true,
        sliding_window: Option<usize> = None,
        layer_types: Option<Vec<String>> = None,
        full_attn_alpha_factor: f32 = 1.0,
        full_attn_beta_factor: f32 = 1.0,
        linear_attn_alpha_factor: f32 = 1.0,
        linear_attn_beta_factor: f32 = 1.0,
        mlp_alpha_factor: f32 = 1.0,
        mlp_beta_factor: f32 = 1.0,
        num_local_experts: usize = 256,
        num_experts_per_tok: usize where >= 1 = 8,
        tie_word_embeddings: Option<bool> = None,
    }
}

impl Config {
    fn is_linear(&self, layer: usize) -> Result<bool> {
        let Some(types) = &self.layer_types else { return Ok(layer % 2 == 1) };
        match types.get(layer).map(String::as_str) {
            Some("linear_attention") => Ok(true),
            Some("full_attention") => Ok(false),
            other => Err(format!("config.json: layer_types has {other:?} for layer {layer}, it should be full_attention or linear_attention").into()),
        }
    }

    /// How fast each head of a layer forgets.
    fn log_decays(&self, layer: usize) -> Vec<f32> {
        let (heads, depth) = (self.num_attention_heads, layer as f64 / (self.num_hidden_layers as f64 - 1.0 + 1e-5));
        let slopes = (1..=heads).map(|head| (-8.0 * head as f64 / heads as f64).exp2());
        slopes.map(|slope| (-slope * (1.0 - depth + 1e-5)) as f32).collect()
    }

    fn heads(&self) -> Heads {
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        Heads { dim: self.hidden_size, heads, kv_heads, head_dim: self.head_dim }
    }
}

struct Lightning {
    qkv_proj: Linear,
    output_gate: Linear,
    out_proj: Linear,
    norm: RmsNorm,
    log_decays: Parameter,
    act: Activation,
    heads: usize,
    head_dim: usize,
}

impl Lightning {
    fn new(c: &Config, w: &Weights, layer: usize) -> Self {
        let (dim, heads, head_dim) = (c.hidden_size, c.num_attention_heads, c.head_dim);
        let width = heads * head_dim;
        // Functions of the decays that transformers stores too.
        ["slope_rate", "query_decay", "key_decay", "diagonal_decay"].iter().for_each(|name| w.ignore(name));
        Self {
            qkv_proj: w.linear("qkv_proj", dim, 3 * width, false),
            output_gate: w.linear("output_gate", dim, width, false),
            out_proj: w.linear("out_proj", width, dim, false),
            // Not of rms_norm_eps.
            norm: w.rms_norm("norm", width, 1e-6),
            log_decays: Parameter::of(Source::numbers(&c.log_decays(layer)), &[heads]),
            act: c.hidden_act,
            heads,
            head_dim,
        }
    }
}

impl Mixer for Lightning {
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let d = self.head_dim;
        let qkv = self.act.forward(&self.qkv_proj.forward(x)).split_heads(3 * d);
        let [q, k, v] = [0, d, 2 * d].map(|start| qkv.narrow(start, d));
        let o = layer.linear_attention(&q, &k, &v, &self.log_decays.tensor()).merge_heads();
        self.out_proj.forward(&(self.output_gate.forward(x).sigmoid() * self.norm.forward(&o)))
    }

    fn cache(&self) -> Cache {
        Cache::state(&[self.heads, self.head_dim, self.head_dim])
    }
}

/// α and β where a mixer's or an expert's result joins what it was made of.
type Factors = Option<[[f32; 2]; 2]>;

struct Layers {
    norms: [RmsNorm; 2],
    mixer: AnyMixer,
    moe: Moe,
    factors: Factors,
}

impl Layers {
    fn text_01(c: &Config, w: &Weights, layer: usize) -> Result<Self> {
        let (attn, is_linear) = (w.at("self_attn"), c.is_linear(layer)?);
        let mixer: AnyMixer = match is_linear {
            true => Box::new(Lightning::new(c, &attn, layer)),
            false => Box::new(
                SelfAttention::new(&attn, c.heads(), false, false)
                    .rope(w.rope(c.head_dim, c.rope_theta, &c.rope_scaling))
                    .window(c.sliding_window),
            ),
        };
        let of_mixer = match is_linear {
            true => [c.linear_attn_alpha_factor, c.linear_attn_beta_factor],
            false => [c.full_attn_alpha_factor, c.full_attn_beta_factor],
        };
        let factors = Some([of_mixer, [c.mlp_alpha_factor, c.mlp_beta_factor]]);
        Ok(Self::of(c, w, mixer, factors, |gate, _| Router::softmax(gate, c.num_experts_per_tok).normalized(true, 0.0)))
    }

    fn m2(c: &Config, w: &Weights) -> Self {
        let (attn, head_dim) = (w.at("self_attn"), c.head_dim);
        let attention = SelfAttention::new(&attn, c.heads(), false, false);
        let attention = attention.rope(w.rope(c.rotary_dim, c.rope_theta, &c.rope_scaling));
        let norm = |name, heads| attn.rms_norm(name, heads * head_dim, c.rms_norm_eps);
        let attention = match c.use_qk_norm {
            true => attention.whole_norms(norm("q_norm", c.num_attention_heads), norm("k_norm", c.num_key_value_heads)),
            false => attention,
        };
        Self::of(c, w, Box::new(attention), None, |gate, w| {
            let correction = w.tensor("e_score_correction_bias", &[c.num_local_experts]);
            Router::sigmoid(gate, c.num_experts_per_tok).correction(correction).normalized(true, 1e-20)
        })
    }

    fn of(
        c: &Config,
        w: &Weights,
        mixer: AnyMixer,
        factors: Factors,
        router: impl FnOnce(Linear, &Weights) -> Router,
    ) -> Self {
        let (dim, experts, moe) = (c.hidden_size, c.num_local_experts, w.at("block_sparse_moe"));
        let router = router(moe.linear("gate", dim, experts, false), &moe);
        let norms = ["input_layernorm", "post_attention_layernorm"].map(|name| w.rms_norm(name, dim, c.rms_norm_eps));
        let moe = Moe::new(router, moe.experts(ExpertsShape::new(experts, dim, c.intermediate_size)));
        Self { norms, mixer, moe, factors }
    }

    fn joined(&self, which: usize, x: &Tensor, branch: impl FnOnce(&Tensor) -> Tensor) -> Tensor {
        let seen = self.norms[which].forward(x);
        match self.factors.map(|factors| factors[which]) {
            None => x + branch(&seen),
            Some([alpha, beta]) => &seen * alpha + branch(&seen) * beta,
        }
    }

    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let h = self.joined(0, x, |seen| self.mixer.forward(seen, layer));
        self.joined(1, &h, |seen| self.moe.forward(seen))
    }
}

struct MiniMax(Decoder<Layers>);

impl Architecture for MiniMax {
    const MODEL_TYPES: &'static [&'static str] = &["minimax", "minimax_m2"];
    type Config = Config;
    type Model = Self;

    fn new(c: Config, w: &Weights) -> Result<Self> {
        if c.hidden_act != Activation::Silu {
            return Err("config.json: hidden_act should be silu, the experts know no other".into());
        }
        let shape = decoder_shape!(c);
        // M2 has gone by the name of minimax too; it alone corrects its routing.
        let is_m2 = w.has("model.layers.0.block_sparse_moe.e_score_correction_bias");
        Ok(Self(Decoder::new(
            w,
            shape,
            |w, layer| if is_m2 { Ok(Layers::m2(&c, w)) } else { Layers::text_01(&c, w, layer) },
        )?))
    }
}

impl Model for MiniMax {
    fn caches(&self) -> Vec<Cache> {
        self.0.layers.iter().map(|layer| layer.mixer.cache()).collect()
    }

    fn forward(&self, tokens: &Tensor, step: &mut Step) -> Tensor {
        self.0.forward(tokens, step, Layers::forward)
    }

    fn head(&self, hidden: &Tensor) -> Tensor {
        self.0.head(hidden)
    }
}

export_plugin!(MiniMax, examples = ["../../tests/fixtures/tiny/minimax/config.json"]);
