//! One token through its experts, on the CPU's own kernels: the first projections of all chosen ones are one product, and nothing is
//! gathered or scattered. The bits are those of many tokens at once.

use super::{Activation, Experts, Linear};
use crate::{
    kernels::cpu::{self, Factor, multiply_all},
    layers::slices::with_f32,
};
use candle_core::{Device, Result, Tensor};

/// The matrix of a layer that no adapter changes.
fn factor(linear: &Linear) -> Option<Factor<'_>> {
    linear.weight.factor().filter(|_| linear.adapter.is_none())
}

fn add_bias(linear: &Linear, y: &mut [f32]) -> Result<()> {
    let add = |bias: &[f32]| y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
    linear.bias.as_ref().map_or(Ok(()), |bias| with_f32(bias, add))
}

impl Activation {
    /// With dylm's own kernels; all of one length.
    pub(super) fn on_numbers(self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        match self {
            Activation::Swiglu => cpu::silu_mul(gate, up, out),
            Activation::Geglu => cpu::gelu_tanh_mul(gate, up, out),
            other => out.iter_mut().zip(gate).zip(up).for_each(|((out, &g), &u)| *out = other.of(g, u)),
        }
    }
}

impl Experts {
    /// x `[1, dim]` -> the weighted sum `[1, dim]` of what the chosen experts make of it; `None` where that takes the usual way.
    pub(super) fn alone(&self, x: &Tensor, chosen: &[u32], shares: &[f32]) -> Result<Option<Tensor>> {
        if !self.native || self.kind.scaled_input || x.dims().first() != Some(&1) {
            return Ok(None);
        }
        let mut choices: Vec<(u32, f32)> = chosen.iter().copied().zip(shares.iter().copied()).collect();
        // Experts in their own order, in which sums are taken.
        choices.sort_by_key(|&(id, _)| id);
        let mut experts = Vec::with_capacity(choices.len());
        let mut unchanged = 0f32;
        for &(id, share) in &choices {
            match self.experts.get(id as usize) {
                Some(expert) => experts.push((expert, share)),
                None if (id as usize) < self.experts.len() + self.kind.identity => unchanged += share,
                // Told by the usual way.
                None => return Ok(None),
            }
        }
        let mut first = Vec::with_capacity(2 * experts.len());
        for (expert, _) in &experts {
            for linear in expert.gate.iter().chain([&expert.up]) {
                let Some(factor) = factor(linear) else { return Ok(None) };
                first.push((linear, factor, vec![0.0; linear.weight.rows()]));
            }
            if factor(&expert.down).is_none() {
                return Ok(None);
            }
        }
        let sum = with_f32(x, |x| -> Result<Vec<f32>> {
            multiply_all(first.iter_mut().map(|(_, factor, y)| (*factor, y.as_mut_slice())).collect(), x);
            for (linear, _, y) in &mut first {
                add_bias(linear, y)?;
            }
            let mut sum: Vec<f32> = match self.kind.identity {
                0 => vec![0.0; x.len()],
                _ => x.iter().map(|x| x * unchanged).collect(),
            };
            let mut made = first.iter().map(|(_, _, y)| y.as_slice());
            let (mut inner, mut y) = (Vec::new(), vec![0.0; x.len()]);
            for (expert, share) in &experts {
                let gate = expert.gate.as_ref().and_then(|_| made.next());
                let up = made.next().unwrap_or_default();
                inner.resize(up.len(), 0.0);
                self.kind.activation.on_numbers(gate.unwrap_or(up), up, &mut inner);
                if let Some(down) = factor(&expert.down) {
                    multiply_all(vec![(down, &mut y)], &inner);
                }
                add_bias(&expert.down, &mut y)?;
                sum.iter_mut().zip(&y).for_each(|(sum, y)| *sum += y * share);
            }
            Ok(sum)
        })??;
        Ok(Some(Tensor::from_vec(sum, x.dims(), &Device::Cpu)?))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Expert, Kind};
    use super::*;
    use crate::kernels::cpu::{Float, Format, Matrix};
    use crate::layers::weight::Weight;

    #[test]
    fn a_token_alone_comes_out_as_one_of_many() {
        let numbers =
            |n: usize, seed: usize| (0..n).map(|i| ((i * 7 + seed * 13) % 23) as f32 / 11.0 - 1.0).collect::<Vec<_>>();
        let linear = |rows: usize, cols: usize, seed: usize| Linear {
            weight: Weight::Packed(
                Matrix::quantize(&numbers(rows * cols, seed), rows, cols, Format::Dense(Float::F32)).unwrap(),
            ),
            bias: seed.is_multiple_of(2).then(|| Tensor::new(numbers(rows, seed + 5), &Device::Cpu).unwrap()),
            adapter: None,
        };
        for (activation, identity) in [(Activation::Swiglu, 0), (Activation::Relu2, 0), (Activation::Geglu, 2)] {
            let expert = |i: usize| Expert {
                gate: activation.is_gated().then(|| linear(8, 6, 3 * i)),
                up: linear(8, 6, 3 * i + 1),
                down: linear(6, 8, 3 * i + 2),
            };
            let experts = Experts {
                experts: (0..4).map(expert).collect(),
                kind: Kind { activation, identity, scaled_input: false },
                native: true,
                #[cfg(feature = "cuda")]
                stacked: None,
                joined: None,
            };
            let chosen = [[3u32, 0, 3 + identity as u32], [1, 2, 0]];
            let shares = [[0.5f32, 0.25, 0.125], [0.3, 0.2, 0.1]];
            let x = Tensor::from_vec(numbers(12, 9), (2, 6), &Device::Cpu).unwrap();
            let many = experts.forward(
                &x,
                &Tensor::new(&chosen, &Device::Cpu).unwrap(),
                &Tensor::new(&shares, &Device::Cpu).unwrap(),
            );
            let many = many.unwrap().to_vec2::<f32>().unwrap();
            for i in 0..2 {
                let alone = experts.alone(&x.narrow(0, i, 1).unwrap(), &chosen[i], &shares[i]).unwrap();
                assert_eq!(alone.unwrap().to_vec2::<f32>().unwrap()[0], many[i], "{activation:?}");
            }
        }
    }
}
