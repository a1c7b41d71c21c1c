//! Shapes of a layer's small ops -> their kernels. See rows.metal.

use super::launch::{Kernel, Launch, Source, number, word};
use crate::layers::experts::Activation;
use candle_core::DType;

/// Threads of every group here.
const THREADS: usize = 256;

fn kernel(maker: &'static str, dtype: DType) -> Option<Kernel> {
    Some(Kernel { source: Source::Rows, maker, of: vec![word(dtype)?.to_owned()] })
}

/// One thread for each number of the output.
fn each(maker: &'static str, dtype: DType, dims: &[usize], numbers: &[u32]) -> Option<Launch> {
    let count: usize = dims.iter().product();
    let mut all = vec![u32::try_from(count).ok()?];
    all.extend(numbers);
    Some(Launch {
        kernel: kernel(maker, dtype)?,
        numbers: all,
        groups: [count.div_ceil(THREADS), 1, 1],
        threads: THREADS,
        shared: 0,
        outputs: vec![(dims.to_vec(), dtype)],
    })
}

/// A norm over rows.
#[derive(Clone, Copy, Debug)]
pub struct Norm {
    /// Subtract the mean first.
    pub centred: bool,
    /// Whether there is a weight.
    pub weight: bool,
    /// Whether there is a bias.
    pub bias: bool,
    /// Added under the root.
    pub eps: f32,
}

impl Norm {
    /// Inputs: x of shape `dims`, weight and bias `[last of dims]` in f32, or any tensors where there are none.
    pub fn launch(&self, dims: &[usize], dtype: DType) -> Option<Launch> {
        let dim = *dims.last()?;
        let flags = [self.centred, self.weight, self.bias].map(u32::from);
        Some(Launch {
            kernel: kernel("NORM", dtype)?,
            numbers: [&[number(dim)], flags.as_slice(), &[self.eps.to_bits()]].concat(),
            groups: [dims.iter().product::<usize>() / dim.max(1), 1, 1],
            threads: THREADS,
            shared: THREADS / 32 * 4,
            outputs: vec![(dims.to_vec(), dtype)],
        })
    }
}

/// How lanes turn; names are those of `kernels::cpu::Turn`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Turn {
    /// Pairs of lanes.
    pub pairs: usize,
    /// A pair is two neighbours.
    pub neighbours: bool,
    /// The last lanes of a head turn.
    pub last: bool,
    /// The other way round.
    pub back: bool,
}

impl Turn {
    /// Inputs: x `[tokens, heads, head_dim]`, and in f32 cosines and sines `[tokens, 2 pairs]`.
    pub fn launch(&self, dims: [usize; 3], dtype: DType) -> Option<Launch> {
        let [_, heads, head_dim] = dims;
        let flags = [self.neighbours, self.last, self.back].map(u32::from);
        let sizes = [heads, head_dim, self.pairs].map(number);
        each("ROTATE", dtype, &dims, &[sizes, flags].concat())
    }
}

/// Inputs: gate and up, both of shape `dims`. Output: what the activation makes of them.
pub fn gate(activation: Activation, dims: &[usize], dtype: DType) -> Option<Launch> {
    let (code, [first, second]) = match activation {
        Activation::Swiglu => (0, [0.0; 2]),
        Activation::Geglu => (1, [0.0; 2]),
        Activation::ClampedSwiglu { alpha, limit } => (2, [alpha, limit]),
        Activation::LimitedSwiglu { limit } => (3, [limit, 0.0]),
        Activation::BoundedSwiglu { limit } => (4, [limit, 0.0]),
        Activation::Situ { beta, linear_beta } => (5, [beta, linear_beta]),
        Activation::Relu2 => (6, [0.0; 2]),
        Activation::GeluTanh => (7, [0.0; 2]),
        Activation::Silu => (8, [0.0; 2]),
    };
    each("GATE", dtype, dims, &[code, first.to_bits(), second.to_bits()])
}

/// What chosen experts gave, as one sum a token.
#[derive(Clone, Copy, Debug)]
pub struct Mix {
    /// Tokens.
    pub tokens: usize,
    /// Numbers of a token.
    pub dim: usize,
    /// Experts of a token.
    pub each: usize,
    /// How many experts there are; choices behind them give back their input.
    pub experts: usize,
    /// Whether the router's weight multiplies what an expert gave.
    pub weighted: bool,
}

impl Mix {
    /// Inputs: y `[tokens * each, dim]`, x `[tokens, dim]`, chosen (u32) and shares (f32) `[tokens, each]`. Output `[tokens, dim]`.
    pub fn launch(&self, dtype: DType) -> Option<Launch> {
        let sizes = [self.dim, self.each, self.experts].map(number);
        let numbers = [&sizes[..], &[u32::from(self.weighted)]].concat();
        each("MIX", dtype, &[self.tokens, self.dim], &numbers)
    }
}
