//! Recurrences by the author's own step, each beside the built-in op that computes the same: on a llama's checkpoint whose attention is
//! replaced, so that `rule` in config.json is the only difference.

use plugin_api::prelude::*;

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
        tie_word_embeddings: Option<bool> = None,
        rule: String,
    }
}

/// The matrices of an attention, put to another use: `values` has as many lanes as all query heads, keys and queries as all key heads.
struct Recurrence {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    rule: String,
    heads: usize,
    d: usize,
    width: usize,
}

impl Recurrence {
    fn new(c: &Config, w: &Weights) -> Self {
        let (heads, d) = (c.num_key_value_heads, c.head_dim);
        let (keys, width) = (heads * d, c.num_attention_heads * d);
        let [k_proj, v_proj, q_proj] =
            w.linears(c.hidden_size, false, [("k_proj", keys), ("q_proj", width), ("v_proj", keys)]);
        let o_proj = w.linear("o_proj", width, c.hidden_size, false);
        Self { q_proj, k_proj, v_proj, o_proj, rule: c.rule.clone(), heads, d, width }
    }

    /// The gated delta rule. <https://arxiv.org/abs/2412.06464>
    fn delta(&self, x: &Tensor, layer: &mut Layer, built_in: bool) -> Tensor {
        let [q, k] = [&self.q_proj, &self.k_proj].map(|proj| proj.forward(x).split_heads(self.d) * 0.2);
        let v = self.v_proj.forward(x).split_heads(self.width / self.heads);
        let (g, beta) = (-x.narrow(0, self.heads).softplus(), x.narrow(self.heads, self.heads).sigmoid());
        if built_in {
            return layer.gated_delta(&q, &k, &v, &g, &beta).merge_heads();
        }
        let y = layer.scan([&q, &k, &v, &g, &beta], |[s], [q, k, v, g, beta]| {
            let s = s * g.exp().column().column();
            let seen = k.row().matmul(&s);
            let s = s + k.column() * ((v.row() - seen) * beta.column().column());
            let y = q.row().matmul(&s).flatten();
            ([s], y)
        });
        y.merge_heads()
    }

    /// The real-gated linear recurrent unit (<https://arxiv.org/abs/2402.19427>), plus half of the token before: two states in one step.
    fn lru(&self, x: &Tensor, layer: &mut Layer, built_in: bool) -> Tensor {
        let x = self.v_proj.forward(x);
        let log_a = -x.softplus();
        if built_in {
            return layer.rg_lru(&x, &log_a) + layer.shift(&x) * 0.5;
        }
        layer.scan([&x, &log_a, &layer.positions()], |[h, last], [x, log_a, position]| {
            let (a, later) = (log_a.exp(), position.clamp(0.0, 1.0));
            let blended = &h * &a + a.square().affine(-1.0, 1.0).sqrt() * &x;
            let h = &blended * &later + &x * later.affine(-1.0, 1.0);
            let y = &h + last.flatten() * 0.5;
            ([h, x.row()], y)
        })
    }
}

impl Mixer for Recurrence {
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let y = match self.rule.as_str() {
            "delta, built in" => self.delta(x, layer, true),
            "delta, by scan" => self.delta(x, layer, false),
            "lru, built in" => self.lru(x, layer, true),
            "lru, by scan" => self.lru(x, layer, false),
            "panic" => layer.scan([x], |[_], [_]| panic!("a deliberate panic in the step")),
            "panic at the third token" => {
                let mut tokens = 0;
                layer.scan([x], |[s], [x]| {
                    tokens += 1;
                    assert!(tokens < 3, "the third token");
                    ([s], self.v_proj.forward(&x))
                })
            }
            "narrow too far" => layer.scan([x], |[s], [x]| ([s], x.narrow(1_000_000, 1))),
            "another state" => layer.scan([x], |[s], [x]| ([s.narrow(0, 1)], x)),
            "another row" => layer.scan([x], |[s], [x]| ([s], x.transpose())),
            "no input by tokens" => layer.scan([&x.transpose()], |[s], [x]| ([s], x)),
            "too many states" => layer.scan([x], |[s, t], [x]| ([s, t], x)),
            _ => Tensor::failed("no such rule"),
        };
        self.o_proj.forward(&y)
    }

    fn cache(&self) -> Cache {
        match self.rule.starts_with("lru") {
            true => Cache::state(&[self.width]).and(Cache::state(&[1, self.width])),
            false => Cache::state(&[self.heads, self.d, self.width / self.heads]),
        }
    }
}

struct Recurrent;

impl Architecture for Recurrent {
    const MODEL_TYPES: &'static [&'static str] = &["recurrence"];
    type Config = Config;
    type Model = Decoder<Block<Recurrence>>;

    fn new(c: Config, w: &Weights) -> Result<Self::Model> {
        Decoder::new(w, decoder_shape!(c), |w, _| {
            let norm = |name| w.rms_norm(name, c.hidden_size, c.rms_norm_eps);
            let mlp = GatedMlp::new(&w.at("mlp"), c.hidden_size, c.intermediate_size, false, Activation::Silu);
            let norms = [norm("input_layernorm"), norm("post_attention_layernorm")];
            Ok(Block::pre_norm(norms, Recurrence::new(&c, &w.at("self_attn")), mlp))
        })
    }
}

export_plugin!(Recurrent);
