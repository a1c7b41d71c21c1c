//! Alternating updates: K streams `[tokens, K, dim]` where a layer computes one and the others follow by small learned maps.
//! <https://arxiv.org/abs/2301.13310>

use crate::Config;
use plugin_api::prelude::*;

/// One of K streams: `[tokens, K, dim]` -> `[tokens, dim]`.
pub fn stream(x: &Tensor, index: usize, dim: usize) -> Tensor {
    x.clone().flatten().narrow(index * dim, dim)
}

/// From one stream to K, and back.
pub struct Streams {
    altup_projections: Vec<Linear>,
    altup_unembed_projections: Vec<Linear>,
    dim: usize,
}

/// x as large as `like`, by root mean squares over the last axis.
fn sized(x: Tensor, like: &Tensor) -> Tensor {
    let least = |square: Tensor| square.clamp(1e-5, f32::MAX);
    &x * like.square().mean().sqrt() / least(x.square().mean()).sqrt()
}

impl Streams {
    pub fn new(c: &Config, w: &Weights) -> Result<Self> {
        let dim = c.hidden_size;
        let others = |name| {
            let w = w.at(name);
            w.each(c.altup_num_inputs - 1, |_, i| Ok(w.linear(&i.to_string(), dim, dim, false)))
        };
        Ok(Self {
            altup_projections: others("altup_projections")?,
            altup_unembed_projections: others("altup_unembed_projections")?,
            dim,
        })
    }

    /// `[tokens, dim]` -> `[tokens, K, dim]`
    pub fn part(&self, x: Tensor) -> Tensor {
        let others: Vec<Tensor> = self.altup_projections.iter().map(|proj| sized(proj.forward(&x), &x)).collect();
        let all: Vec<&Tensor> = std::iter::once(&x).chain(&others).collect();
        Tensor::concat(&all).unflatten(all.len())
    }

    /// `[tokens, K, dim]` -> `[tokens, dim]`: the mean.
    pub fn join(&self, x: &Tensor) -> Tensor {
        let first = stream(x, 0, self.dim);
        let others = self.altup_unembed_projections.iter().enumerate();
        let others = others.map(|(i, proj)| sized(proj.forward(&stream(x, i + 1, self.dim)), &first));
        let sum = others.fold(first.clone(), |sum, other| sum + other);
        sum / (self.altup_unembed_projections.len() + 1) as f32
    }
}

/// What a layer does to the streams before and after its own work.
pub struct AltUp {
    router_norm: RmsNorm,
    modality_router: Linear,
    prediction_coefs: Linear,
    correction_coefs: Linear,
    correct_output_scale: Parameter,
    scales: bool,
    streams: usize,
    active: usize,
    dim: usize,
}

impl AltUp {
    pub fn new(c: &Config, w: &Weights) -> Self {
        let (streams, dim) = (c.altup_num_inputs, c.hidden_size);
        Self {
            router_norm: c.norm(w, "router_norm"),
            modality_router: w.linear("modality_router", dim, streams, false),
            prediction_coefs: w.linear("prediction_coefs", streams, streams * streams, false),
            correction_coefs: w.linear("correction_coefs", streams, streams, false),
            correct_output_scale: w.tensor("correct_output_scale", &[dim]),
            scales: c.altup_correct_scale,
            streams,
            active: c.altup_active_idx,
            dim,
        }
    }

    fn modalities(&self, x: &Tensor) -> Tensor {
        self.modality_router.forward(&(self.router_norm.forward(x) / self.dim as f32)).tanh()
    }

    /// The stream that layers compute: `[tokens, K, dim]` -> `[tokens, dim]`.
    pub fn active(&self, x: &Tensor) -> Tensor {
        stream(x, self.active, self.dim)
    }

    /// Each stream from all of them: `[tokens, K, dim]` -> the same.
    pub fn predict(&self, x: &Tensor) -> Tensor {
        let coefs = self.prediction_coefs.forward(&self.modalities(&self.active(x))).unflatten(self.streams);
        coefs.matmul(x) + x
    }

    /// All predictions `[tokens, K, dim]`, moved by what the active one `[tokens, dim]` turned out to be.
    pub fn correct(&self, predictions: &Tensor, activated: &Tensor) -> Tensor {
        let coefs = self.correction_coefs.forward(&self.modalities(activated)).unflatten(self.streams) + 1.0;
        let innovation = (activated - self.active(predictions)).unflatten(1);
        coefs * innovation + predictions
    }

    /// The active stream of what was corrected, as the per-layer input sees it.
    pub fn scaled(&self, corrected: &Tensor) -> Tensor {
        let active = self.active(corrected);
        if self.scales { active * self.correct_output_scale.tensor() } else { active }
    }

    /// Adds y `[tokens, dim]` to all streams but the first.
    pub fn add_to_others(&self, x: &Tensor, y: &Tensor) -> Tensor {
        let (flat, others) = (x.flatten(), self.streams - 1);
        if others == 0 {
            return x.clone();
        }
        let rest = flat.narrow(self.dim, others * self.dim).unflatten(others) + y.unflatten(1);
        Tensor::concat(&[&flat.narrow(0, self.dim), &rest.flatten()]).unflatten(self.streams)
    }
}
