//! Routed experts: each token runs through a few of many small feed-forward blocks. Tokens are gathered by expert, so that every chosen
//! expert's weights are read once and no other's are touched.

mod alone;
mod joined;

use super::{
    linear::Linear,
    slices::{filled, with_f32},
};
use crate::kernels::metal;
use candle_core::{DType, Tensor};
use candle_nn::ops::sigmoid;
pub use joined::Joined;

/// One expert.
pub struct Expert {
    /// `[hidden, dim]`, in the kinds that have one.
    pub gate: Option<Linear>,
    /// `[hidden, dim]`
    pub up: Linear,
    /// `[dim, hidden]`
    pub down: Linear,
}

/// What stands between the projections; g is the gate's output, u that of up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// `silu(g) * u`
    Swiglu,
    /// `gelu_tanh(g) * u`
    Geglu,
    /// `g sigmoid(alpha g) * (u + 1)`, g up to `limit` and u within ± `limit`
    ClampedSwiglu {
        /// Sharpens the gate.
        alpha: f32,
        /// Bounds both.
        limit: f32,
    },
    /// `min(silu(g), limit) * clamp(u, ± limit)`
    LimitedSwiglu {
        /// Bounds both.
        limit: f32,
    },
    /// `silu(g) * u`, g up to `limit` and u within ± `limit`
    BoundedSwiglu {
        /// Bounds both.
        limit: f32,
    },
    /// `beta tanh(g / beta) sigmoid(g) * linear_beta tanh(u / linear_beta)`; with a `linear_beta` of 0, u as it is
    Situ {
        /// Bounds the gate.
        beta: f32,
        /// Bounds what it lets through.
        linear_beta: f32,
    },
    /// `relu(u)²`
    Relu2,
    /// `gelu_tanh(u)`
    GeluTanh,
    /// `silu(u)`
    Silu,
}

impl Activation {
    /// Whether there is a gate.
    pub fn is_gated(self) -> bool {
        !matches!(self, Activation::Relu2 | Activation::GeluTanh | Activation::Silu)
    }

    /// With dylm's own kernels; both of one shape.
    pub fn on_cpu(self, gate: &Tensor, up: &Tensor) -> candle_core::Result<Tensor> {
        let joined =
            with_f32(gate, |gate| with_f32(up, |up| filled(gate.len(), |out| self.on_numbers(gate, up, out))))???;
        joined.reshape(gate.shape())
    }

    /// Of two numbers; without a gate, of `u` alone.
    fn of(self, g: f32, u: f32) -> f32 {
        let silu = |x: f32| x / (1.0 + (-x).exp());
        match self {
            Activation::Swiglu => silu(g) * u,
            Activation::ClampedSwiglu { alpha, limit } => {
                let (g, u) = (g.min(limit), u.clamp(-limit, limit));
                g / (1.0 + (-alpha * g).exp()) * (u + 1.0)
            }
            Activation::LimitedSwiglu { limit } => silu(g).min(limit) * u.clamp(-limit, limit),
            Activation::BoundedSwiglu { limit } => silu(g.min(limit)) * u.clamp(-limit, limit),
            Activation::Situ { beta, linear_beta } => {
                let u = if linear_beta > 0.0 { linear_beta * (u / linear_beta).tanh() } else { u };
                beta * (g / beta).tanh() / (1.0 + (-g).exp()) * u
            }
            Activation::Relu2 => u.max(0.0) * u.max(0.0),
            Activation::Silu => silu(u),
            Activation::Geglu | Activation::GeluTanh => {
                let gelu = |x: f32| 0.5 * x * (1.0 + (0.797_884_6 * (x + 0.044_715 * x * x * x)).tanh());
                if self == Activation::Geglu { gelu(g) * u } else { gelu(u) }
            }
        }
    }

    /// With a kernel of the device, or else with candle's ops.
    pub fn elsewhere(self, gate: &Tensor, up: &Tensor) -> candle_core::Result<Tensor> {
        match metal::ops::gate(self, gate, up)? {
            Some(y) => Ok(y),
            None => self.by_candle(gate, up),
        }
    }

    /// With candle's ops, on any device.
    pub fn by_candle(self, gate: &Tensor, up: &Tensor) -> candle_core::Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(joined) = crate::kernels::cuda::norm::join(self, gate, up)? {
            return Ok(joined);
        }
        match self {
            Activation::Swiglu => gate.silu()?.broadcast_mul(up),
            Activation::Geglu => gate.gelu()?.broadcast_mul(up),
            Activation::ClampedSwiglu { alpha, limit } => {
                let gate = gate.minimum(limit)?;
                (&gate * sigmoid(&(&gate * alpha as f64)?)?)? * (up.clamp(-limit, limit)? + 1.0)?
            }
            Activation::LimitedSwiglu { limit } => gate.silu()?.minimum(limit)? * up.clamp(-limit, limit)?,
            Activation::BoundedSwiglu { limit } => gate.minimum(limit)?.silu()? * up.clamp(-limit, limit)?,
            Activation::Situ { beta, linear_beta } => {
                let bounded = |x: &Tensor, bound: f32| (x / bound as f64)?.tanh()? * bound as f64;
                let up = if linear_beta > 0.0 { bounded(up, linear_beta)? } else { up.clone() };
                (bounded(gate, beta)? * sigmoid(gate)?)?.broadcast_mul(&up)
            }
            Activation::Relu2 => up.relu()?.sqr(),
            Activation::GeluTanh => up.gelu(),
            Activation::Silu => up.silu(),
        }
    }
}

/// All experts of one layer.
pub struct Experts {
    /// In the router's order.
    pub experts: Vec<Expert>,
    /// How they compute.
    pub kind: Kind,
    /// Whether dylm's own kernel joins gate and up.
    pub native: bool,
    /// All of them for the kernels of an NVIDIA GPU; `experts` is empty then.
    #[cfg(feature = "cuda")]
    pub stacked: Option<std::sync::Arc<crate::kernels::cuda::experts::Stacked>>,
    /// The same experts side by side, where kernels of a GPU find the chosen ones themselves.
    pub joined: Option<Joined>,
}

/// What all experts of a layer have in common, besides their shape.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Kind {
    /// Between the projections.
    pub activation: Activation,
    /// Choices behind the last expert that give back their input.
    pub identity: usize,
    /// The router's weight multiplies the input, not the output.
    pub scaled_input: bool,
}

impl Experts {
    /// x `[tokens, dim]`, chosen (u32) and weights `[tokens, k]` -> the weighted sum `[tokens, dim]`.
    pub fn forward(&self, x: &Tensor, chosen: &Tensor, weights: &Tensor) -> candle_core::Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(stacked) = &self.stacked {
            return stacked.forward(x, chosen, weights, self.kind)?.to_dtype(x.dtype());
        }
        if let Some(joined) = self.joined.as_ref().filter(|_| chosen.elem_count() <= joined::FEW) {
            return joined.forward(self.kind, x, chosen, weights);
        }
        let chosen = chosen.to_dtype(DType::U32)?.to_vec2::<u32>()?;
        let weights = weights.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        if let ([chosen], [shares]) = (&chosen[..], &weights[..])
            && let Some(sum) = self.alone(x, chosen, shares)?
        {
            return Ok(sum);
        }
        let mut of_expert: Vec<Vec<(u32, f32)>> = vec![Vec::new(); self.experts.len()];
        let mut unchanged = vec![0f32; chosen.len()];
        for (token, (ids, shares)) in chosen.iter().zip(&weights).enumerate() {
            for (&id, &share) in ids.iter().zip(shares) {
                match of_expert.get_mut(id as usize) {
                    Some(tokens) => tokens.push((token as u32, share)),
                    None if (id as usize) < self.experts.len() + self.kind.identity => unchanged[token] += share,
                    None => candle_core::bail!("expert {id} of {}", self.experts.len() + self.kind.identity),
                }
            }
        }
        let column = |shares: Vec<f32>| {
            let count = shares.len();
            Tensor::from_vec(shares, (count, 1), x.device())?.to_dtype(x.dtype())
        };
        let mut sum = match self.kind.identity {
            0 => x.zeros_like()?,
            _ => x.broadcast_mul(&column(unchanged)?)?,
        };
        for (expert, tokens) in self.experts.iter().zip(of_expert).filter(|(_, t)| !t.is_empty()) {
            let (rows, shares): (Vec<u32>, Vec<f32>) = tokens.into_iter().unzip();
            let count = rows.len();
            let (rows, shares) = (Tensor::from_vec(rows, count, x.device())?, column(shares)?);
            let input = x.index_select(&rows, 0)?;
            let output = match self.kind.scaled_input {
                true => self.run(expert, &input.broadcast_mul(&shares)?)?,
                false => self.run(expert, &input)?.broadcast_mul(&shares)?,
            };
            sum = sum.index_add(&rows, &output, 0)?;
        }
        Ok(sum)
    }

    fn run(&self, expert: &Expert, x: &Tensor) -> candle_core::Result<Tensor> {
        let up = expert.up.forward(x)?;
        let gate = match &expert.gate {
            Some(gate) => gate.forward(x)?,
            None => up.clone(),
        };
        let activation = self.kind.activation;
        let inner = if self.native { activation.on_cpu(&gate, &up)? } else { activation.elsewhere(&gate, &up)? };
        expert.down.forward(&inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Activation::*;

    #[test]
    fn every_activation_is_the_same_by_candle_and_by_the_kernels() {
        let numbers = [-9.0f32, -3.0, -1.0, -0.25, 0.0, 0.5, 1.5, 2.5, 4.0, 8.0];
        let gate = Tensor::new(&numbers, &candle_core::Device::Cpu).unwrap();
        let up = (gate.neg().unwrap() * 0.75).unwrap();
        let clamped = ClampedSwiglu { alpha: 1.702, limit: 2.0 };
        let (limited, bounded) = (LimitedSwiglu { limit: 2.0 }, BoundedSwiglu { limit: 2.0 });
        for activation in [Swiglu, Geglu, clamped, limited, bounded, Relu2, GeluTanh, Silu] {
            let kernel = activation.on_cpu(&gate, &up).unwrap().to_vec1::<f32>().unwrap();
            let candle = activation.by_candle(&gate, &up).unwrap().to_vec1::<f32>().unwrap();
            let single = numbers.iter().map(|&g| activation.of(g, g * -0.75)).collect::<Vec<_>>();
            for ((k, c), s) in kernel.iter().zip(&candle).zip(&single) {
                assert!(
                    (k - c).abs() < 1e-5 && (k - s).abs() < 1e-5,
                    "{activation:?}: {kernel:?}, {candle:?}, {single:?}"
                );
            }
        }
    }

    #[test]
    fn limits_hold_and_the_clamped_gate_adds_one_to_up() {
        let clamped = ClampedSwiglu { alpha: 1.702, limit: 7.0 };
        assert_eq!(clamped.of(50.0, -50.0), clamped.of(7.0, -7.0));
        assert_eq!(clamped.of(-50.0, 0.0), -50.0 / (1.0 + 85.1f32.exp()));
        assert_eq!(LimitedSwiglu { limit: 7.0 }.of(50.0, 3.0), 21.0);
        assert_eq!(LimitedSwiglu { limit: 7.0 }.of(50.0, 30.0), 49.0);
        assert_eq!(BoundedSwiglu { limit: 7.0 }.of(50.0, 3.0), Swiglu.of(7.0, 3.0));
        assert_eq!(BoundedSwiglu { limit: 7.0 }.of(-50.0, -30.0), Swiglu.of(-50.0, -7.0));
    }

    fn linear(numbers: &[f32], rows: usize) -> Linear {
        let weight = Tensor::new(numbers, &candle_core::Device::Cpu).unwrap().reshape((rows, ())).unwrap();
        Linear { weight: crate::layers::weight::Weight::Dense(weight), bias: None, adapter: None }
    }

    fn squares(identity: usize, scaled_input: bool) -> Experts {
        let expert = |w: f32| Expert { gate: None, up: linear(&[w], 1), down: linear(&[1.0], 1) };
        let kind = Kind { activation: Relu2, identity, scaled_input };
        Experts {
            experts: vec![expert(1.0), expert(2.0)],
            kind,
            native: false,
            #[cfg(feature = "cuda")]
            stacked: None,
            joined: None,
        }
    }

    fn run(experts: &Experts, chosen: [[u32; 2]; 2]) -> candle_core::Result<Vec<f32>> {
        let on = candle_core::Device::Cpu;
        let x = Tensor::new(&[[3.0f32], [5.0]], &on)?;
        let weights = Tensor::new(&[[0.5f32, 0.25], [0.5, 0.25]], &on)?;
        experts.forward(&x, &Tensor::new(&chosen, &on)?, &weights)?.flatten_all()?.to_vec1()
    }

    #[test]
    fn choices_behind_the_last_expert_give_back_their_input_by_weight() {
        assert_eq!(run(&squares(2, false), [[0, 1], [3, 2]]).unwrap(), [0.5 * 9.0 + 0.25 * 36.0, 0.75 * 5.0]);
        assert!(run(&squares(2, false), [[0, 1], [4, 2]]).unwrap_err().to_string().contains("expert 4 of 4"));
    }

    #[test]
    fn the_router_s_weight_multiplies_the_input_where_the_experts_say_so() {
        assert_eq!(run(&squares(0, true), [[0, 1], [1, 0]]).unwrap(), [2.25 + 2.25, 25.0 + 1.5625]);
    }
}
