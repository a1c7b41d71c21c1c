//! A causal convolution of each channel alone. Its weight is kept tap by tap, so that a token's channels are folded in one sweep.

/// The numbers of the convolution, on the CPU: the op that runs it carries a state, which lies there too.
pub struct Conv1d {
    /// `[kernel, channels]`
    pub weight: Vec<f32>,
    /// `[channels]`
    pub bias: Option<Vec<f32>>,
}

impl Conv1d {
    /// From a weight `[channels, kernel]`, as checkpoints have it.
    pub fn new(weight: &[f32], bias: Option<Vec<f32>>, channels: usize) -> Self {
        let kernel = weight.len().checked_div(channels).unwrap_or(0);
        let tap = |k: usize| (0..channels).map(move |c| weight[c * kernel + k]);
        Conv1d { weight: (0..kernel).flat_map(tap).collect(), bias }
    }
}
