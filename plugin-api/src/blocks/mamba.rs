//! The mixer of Mamba: a gated convolution and a selective scan in place of attention. Its state has the same size after any number of
//! tokens. <https://arxiv.org/abs/2312.00752>

use crate::{
    Activation, Cache, Conv1d, Layer, Linear, Mixer, Parameter, RmsNorm, Tensor, Weights,
    config::{Json, Read},
};

/// A size in config.json that may be `"auto"`: the author says what that means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OrAuto(Option<usize>);

impl OrAuto {
    /// `"auto"`
    pub const AUTO: Self = OrAuto(None);

    /// The size, or what `auto` stands for.
    pub fn or(self, auto: usize) -> usize {
        self.0.unwrap_or(auto)
    }
}

impl Read for OrAuto {
    const WHAT: &'static str = "a whole number from 0 to 2^31, or \"auto\"";
    fn read(json: &Json) -> Option<Self> {
        if json.as_str() == Some("auto") { Some(Self::AUTO) } else { usize::read(json).map(|n| OrAuto(Some(n))) }
    }
}

/// The shape of a mixer.
#[derive(Debug, Clone, Copy)]
pub struct MambaShape {
    /// Width of the model.
    pub dim: usize,
    /// Channels of the scan.
    pub inner: usize,
    /// Numbers of state a channel.
    pub state: usize,
    /// Tokens that the convolution reaches over.
    pub kernel: usize,
    /// Lanes that the step widths are made from.
    pub dt_rank: usize,
    /// Whether `in_proj` and `out_proj` have biases.
    pub bias: bool,
    /// Whether the convolution has one.
    pub conv_bias: bool,
    /// After the convolution, and of the gate.
    pub act: Activation,
}

/// `out_proj(act(z) * (scan(x, dt, B, C) + D x))`, with `x, z = in_proj(..)`, `x = act(conv1d(x))`, `dt, B, C = x_proj(x)`,
/// `dt = softplus(dt_proj(dt))`, `A = -exp(A_log)`.
#[derive(Debug)]
pub struct Mamba {
    in_proj: Linear,
    conv1d: Conv1d,
    x_proj: Linear,
    dt_proj: Linear,
    a_log: Parameter,
    d: Parameter,
    out_proj: Linear,
    norms: Option<[RmsNorm; 3]>,
    shape: MambaShape,
}

impl Mamba {
    /// Under the names of the paper's code: `in_proj`, `conv1d`, `x_proj`, `dt_proj`, `A_log`, `D`, `out_proj`. Thread: new.
    #[track_caller]
    pub fn new(w: &Weights, shape: MambaShape) -> Self {
        let MambaShape { dim, inner, state, kernel, dt_rank, bias, conv_bias, .. } = shape;
        Self {
            in_proj: w.linear("in_proj", dim, 2 * inner, bias),
            conv1d: w.conv1d("conv1d", inner, kernel, conv_bias),
            x_proj: w.linear("x_proj", inner, dt_rank + 2 * state, false),
            dt_proj: w.linear("dt_proj", dt_rank, inner, true),
            a_log: w.tensor("A_log", &[inner, state]),
            d: w.tensor("D", &[inner]),
            out_proj: w.linear("out_proj", inner, dim, bias),
            norms: None,
            shape,
        }
    }

    /// Normalizes dt (`dt_rank` lanes), B and C (`state` lanes) as `x_proj` gives them.
    pub fn norms(self, norms: [RmsNorm; 3]) -> Self {
        Self { norms: Some(norms), ..self }
    }
}

impl Mixer for Mamba {
    #[track_caller]
    fn forward(&self, x: &Tensor, layer: &mut Layer) -> Tensor {
        let MambaShape { inner, state, dt_rank, act, .. } = self.shape;
        let projected = self.in_proj.forward(x);
        let (x, gate) = (projected.narrow(0, inner), projected.narrow(inner, inner));
        let x = act.forward(&layer.conv1d(&self.conv1d, &x));
        let picked = self.x_proj.forward(&x);
        let parts = [(0, dt_rank), (dt_rank, state), (dt_rank + state, state)];
        let parts = parts.map(|(start, len)| picked.narrow(start, len));
        let [dt, b, c] = match &self.norms {
            Some([dt, b, c]) => [dt.forward(&parts[0]), b.forward(&parts[1]), c.forward(&parts[2])],
            None => parts,
        };
        let dt = self.dt_proj.forward(&dt).softplus();
        let scanned = layer.selective_scan(&x, &dt, &-self.a_log.tensor().exp(), &b, &c) + x * self.d.tensor();
        self.out_proj.forward(&(act.forward(&gate) * scanned))
    }

    fn cache(&self) -> Cache {
        self.conv1d.cache().and(Cache::state(&[self.shape.inner, self.shape.state]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::key;

    #[test]
    fn a_size_is_a_number_or_auto() {
        let config = Json::from_iter([("rank", Json::from(7)), ("auto", "auto".into()), ("odd", "many".into())]);
        let size = |name| key::<OrAuto>(&config, "", name).map(|size| size.map(|size| size.or(3)));
        assert_eq!((size("rank"), size("auto")), (Ok(Some(7)), Ok(Some(3))));
        assert_eq!(
            size("odd").unwrap_err().0,
            "config.json: odd is \"many\", it should be a whole number from 0 to 2^31, or \"auto\""
        );
    }
}
