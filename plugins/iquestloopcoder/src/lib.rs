//! IQuest Loop Coder: LLaMA's layers run twice; the second time each head mixes what all keys of the first run and the last keys of the
//! second have to say. <https://github.com/IQuestLab/IQuest-Coder-V1>
//!
//! ```text
//! h = x + Attention₁(RMSNorm(x))           per layer; then once more through the same layers with Attention₂
//! y = h + SwiGLU(RMSNorm(h))
//! logits = RMSNorm(y) · Wlm
//!
//! Attention₁(x) = attend(q, K₁, V₁) · Wo                           q = rope(x Wq), k = rope(x Wk), v = x Wv
//! Attention₂(x) = (g attend(q, K₁, V₁) + (1 - g) attend(q, K₂, V₂ in a window)) · Wo,  g = σ(q · a + b) of each head
//! ```

use plugin_api::prelude::*;

config! {
    struct Config {
        vocab_size: usize,
        hidden_size: usize,
        intermediate_size: usize,
        num_hidden_layers: usize,
        num_attention_heads: usize where >= 1,
        num_key_value_heads: usize = num_attention_heads,
        head_dim: usize = hidden_size / num_attention_heads,
        hidden_act: Activation = Activation::Silu,
        rms_norm_eps: f32 = 1e-5,
        attention_bias: bool = false,
        mlp_bias: bool = false,
        rope_theta: f32 = 500_000.0,
        rope_scaling: Option<RopeScaling> = None,
        loop_num: usize = 2,
        loop_window_size: usize = 64,
        tie_word_embeddings: Option<bool> = None,
    }
}

struct Layers {
    input_layernorm: RmsNorm,
    self_attn: SelfAttention,
    post_attention_layernorm: RmsNorm,
    mlp: GatedMlp,
    /// `[heads, head_dim]` and `[heads, 1]`
    gate: [Parameter; 2],
    index: usize,
    window: usize,
    scale: f32,
}

impl Layers {
    fn new(c: &Config, w: &Weights, gate: &Weights, index: usize) -> Self {
        let (dim, head_dim, count) = (c.hidden_size, c.head_dim, c.num_attention_heads);
        let heads = Heads { dim, heads: count, kv_heads: c.num_key_value_heads, head_dim };
        let bias = Parameter::of(gate.source("bias").reshape(&[count, 1]), &[count, 1]);
        Self {
            input_layernorm: w.rms_norm("input_layernorm", dim, c.rms_norm_eps),
            self_attn: SelfAttention::new(&w.at("self_attn"), heads, c.attention_bias, c.attention_bias).rope(w.rope(
                head_dim,
                c.rope_theta,
                &c.rope_scaling,
            )),
            post_attention_layernorm: w.rms_norm("post_attention_layernorm", dim, c.rms_norm_eps),
            mlp: GatedMlp::new(&w.at("mlp"), dim, c.intermediate_size, c.mlp_bias, c.hidden_act),
            gate: [gate.tensor("weight", &[count, head_dim]), bias],
            index,
            window: c.loop_window_size,
            scale: (head_dim as f32).powf(-0.5),
        }
    }

    fn fed(&self, h: Tensor) -> Tensor {
        &h + self.mlp.forward(&self.post_attention_layernorm.forward(&h))
    }

    fn first(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        self.fed(x + self.self_attn.forward(&self.input_layernorm.forward(x), layer))
    }

    fn second(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let [q, k, v] = self.self_attn.project(&self.input_layernorm.forward(x), layer);
        let [weight, bias] = self.gate.each_ref().map(Parameter::tensor);
        let gate = ((&q * weight).sum() + bias).sigmoid();
        let how = |window| Attend { scale: self.scale, window, ..Default::default() };
        let global = layer.attend_to(self.index, q.clone(), &how(None));
        let local = layer.attend(q, k, v, &how(Some(self.window)));
        let mixed = &local + gate * (global - &local);
        self.fed(x + self.self_attn.output(&mixed.merge_heads()))
    }
}

struct LoopCoder(Decoder<Layers>);

impl Architecture for LoopCoder {
    const MODEL_TYPES: &'static [&'static str] = &["iquestloopcoder"];
    type Config = Config;
    type Model = Self;

    fn new(c: Config, w: &Weights) -> Result<Self> {
        if c.loop_num != 2 {
            return Err(format!("config.json: loop_num is {}, the layers are made to run 2 times", c.loop_num).into());
        }
        let gates = w.at("model.gate_projections");
        let block = |w: &Weights, layer: usize| Ok(Layers::new(&c, w, &gates.at(&layer.to_string()), layer));
        Ok(Self(Decoder::new(w, decoder_shape!(c), block)?))
    }
}

impl Model for LoopCoder {
    fn caches(&self) -> Vec<Cache> {
        let of = |block: &Layers| Cache::key_value(None).and(Cache::key_value(Some(block.window)));
        self.0.layers.iter().map(of).collect()
    }

    fn forward(&self, tokens: &Tensor, step: &mut Step) -> Tensor {
        let mut layers: Vec<Layer> = step.layers().collect();
        let mut x = self.0.embed(tokens);
        for run in [Layers::first, Layers::second] {
            for (block, layer) in self.0.layers.iter().zip(&mut layers) {
                x = run(block, &x, layer);
            }
        }
        self.0.norm.forward(&x)
    }

    fn head(&self, hidden: &Tensor) -> Tensor {
        self.0.head(hidden)
    }
}

export_plugin!(LoopCoder, examples = ["../../tests/fixtures/tiny/iquestloopcoder/config.json"]);
