//! A llama whose activation dylm does not have: SwiGLU's gate as an op of this plugin's own, with sources for GPUs. `activation` in
//! config.json takes the built-in op instead, or makes a mistake.

use plugin_api::{
    own_op::{Device, Kernel, Launch},
    prelude::*,
};

config! {
    struct Config {
        vocab_size: usize,
        hidden_size: usize,
        intermediate_size: usize,
        num_hidden_layers: usize,
        num_attention_heads: usize where >= 1,
        num_key_value_heads: usize where >= 1,
        head_dim: usize,
        rms_norm_eps: f32,
        rope_theta: f32,
        tie_word_embeddings: Option<bool> = None,
        activation: String = "own".into(),
    }
}

/// `silu(gate) * up`
struct Gate {
    mistake: String,
}

impl OwnOp for Gate {
    fn shape(&self, inputs: &[&[usize]]) -> Result<Vec<usize>> {
        match (inputs, self.mistake.as_str()) {
            (_, "panic in shape") => panic!("a deliberate panic in shape"),
            (_, "a huge output") => Ok(vec![1 << 40, 1 << 40]),
            (_, "an output of nine axes") => Ok(vec![1; 9]),
            ([gate, up], _) if gate == up => Ok(gate.to_vec()),
            _ => Err(format!("takes two tensors of one shape, not {inputs:?}").into()),
        }
    }

    fn cpu(&self, inputs: &[View], output: &mut [f32]) -> Result<()> {
        match self.mistake.as_str() {
            "panic in cpu" => panic!("a deliberate panic in cpu"),
            "refuse in cpu" => return Err("these numbers are refused on purpose".into()),
            "call a word in cpu" => drop(Tensor::failed("not here")),
            _ => {}
        }
        let [gate, up] = inputs else { return Err("two inputs".into()) };
        for ((y, g), u) in output.iter_mut().zip(gate.numbers).zip(up.numbers) {
            *y = g / (1.0 + (-g).exp()) * u;
        }
        Ok(())
    }

    fn kernels(&self) -> Vec<Kernel> {
        let cuda = match self.mistake.as_str() {
            "a kernel that does not compile" => "this is no CUDA",
            _ => include_str!("gate.cu"),
        };
        vec![
            Kernel { device: Device::Cuda, source: cuda, entry: "gate_f32" },
            Kernel { device: Device::Metal, source: include_str!("gate.metal"), entry: "gate_f32" },
        ]
    }

    fn launch(&self, _device: Device, _inputs: &[&[usize]], output: &[usize]) -> Launch {
        Launch::of(output.iter().product())
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        if self.mistake == "panic in drop" {
            panic!("a deliberate panic in drop");
        }
    }
}

struct GatedByOp {
    gate_up: [Linear; 2],
    down_proj: Linear,
    gate: Op,
    how: String,
}

impl FeedForward for GatedByOp {
    fn forward(&self, x: &Tensor) -> Tensor {
        let [gate, up] = self.gate_up.each_ref().map(|proj| proj.forward(x));
        let gated = match self.how.as_str() {
            "built in" => gate.silu() * up,
            "unlike shapes" => self.gate.apply(&[&gate, x]),
            "one input" => self.gate.apply(&[&gate]),
            _ => self.gate.apply(&[&gate, &up]),
        };
        self.down_proj.forward(&gated)
    }
}

struct Activated;

impl Architecture for Activated {
    const MODEL_TYPES: &'static [&'static str] = &["activation"];
    type Config = Config;
    type Model = Decoder<Block<SelfAttention, GatedByOp>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        let gate = w.op("gate", Gate { mistake: c.activation.clone() });
        if c.activation == "apply while building" {
            drop(gate.apply(&[]));
        }
        Decoder::new(w, decoder_shape!(c), |w, _| {
            let (norm, mlp) = (|name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps), w.at("mlp"));
            let heads = Heads {
                dim: c.hidden_size,
                heads: c.num_attention_heads,
                kv_heads: c.num_key_value_heads,
                head_dim: c.head_dim,
            };
            let rope = w.rope(c.head_dim, c.rope_theta, &None);
            let attention = SelfAttention::new(&w.at("self_attn"), heads, false, false).rope(rope);
            let hidden = c.intermediate_size;
            let mlp = GatedByOp {
                gate_up: mlp.linears(c.hidden_size, false, [("gate_proj", hidden), ("up_proj", hidden)]),
                down_proj: mlp.linear("down_proj", hidden, c.hidden_size, false),
                gate,
                how: c.activation.clone(),
            };
            Ok(Block::pre_norm([norm("input_layernorm"), norm("post_attention_layernorm")], attention, mlp))
        })
    }
}

export_plugin!(Activated);
