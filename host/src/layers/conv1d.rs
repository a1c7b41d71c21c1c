//! A causal convolution of each channel alone. Its weight is kept tap by tap, so that a token's channels are folded in one sweep.

use crate::{device::Placement, kernels::metal};
use candle_core::{Result, Tensor};

/// The numbers of the convolution.
pub struct Conv1d {
    /// `[kernel, channels]`
    pub weight: Vec<f32>,
    /// `[channels]`
    pub bias: Option<Vec<f32>>,
    /// Both as tensors, where a GPU has a kernel for it; without a bias, the weight twice.
    pub away: Option<[Tensor; 2]>,
}

impl Conv1d {
    /// From a weight `[channels, kernel]`, as checkpoints have it.
    pub fn new(weight: &[f32], bias: Option<Vec<f32>>, channels: usize) -> Self {
        let kernel = weight.len().checked_div(channels).unwrap_or(0);
        let tap = |k: usize| (0..channels).map(move |c| weight[c * kernel + k]);
        Conv1d { weight: (0..kernel).flat_map(tap).collect(), bias, away: None }
    }

    /// The same where it is used.
    pub fn on(self, place: &Placement, channels: usize) -> Result<Self> {
        if place.native || !(metal::serves(&place.device) || place.device.is_cuda()) || self.weight.is_empty() {
            return Ok(self);
        }
        let weight = Tensor::from_slice(&self.weight, ((), channels), &place.device)?;
        let bias = self.bias.as_ref().map(|bias| Tensor::new(bias.as_slice(), &place.device)).transpose()?;
        let away = Some([weight.clone(), bias.unwrap_or(weight)]);
        Ok(Conv1d { away, ..self })
    }
}
