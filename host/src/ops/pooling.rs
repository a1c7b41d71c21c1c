//! The running ops of models that keep one entry for many tokens, and those that mix residual streams: shapes are checked here.

use super::{
    recurring::Turn,
    running::Running,
    value::{Outcome, Value, fault},
};
use crate::{
    cache::memory,
    kernels::cpu::recurrence,
    layers::slices::{filled, with_f32},
};
use candle_core::{D, DType, Device, Tensor};
use plugin_api::abi::Handle;

impl Running<'_> {
    /// x and gate `[tokens, n * d]`, bias `[rate, n * d]` -> `[tokens, d]`, by the declared state `[n, 3, d]`.
    pub fn pool(&mut self, cache: u32, inputs: [Handle; 3]) -> Outcome {
        let [x, gate, bias] = self.values(inputs)?;
        let declared = self.caches.get(cache as usize).map(memory::dims).unwrap_or_default();
        let &[windows, 3, d] = declared.as_slice() else {
            return Err(fault!("needs a state [windows, 3, lanes], the layer's caches() declares one of {declared:?}"));
        };
        let width = windows.saturating_mul(d);
        match (x.dims()?, gate.dims()?, bias.dims()?) {
            (&[tokens, n], &[gates, m], &[rate, o]) if [n, m, o] == [width; 3] && tokens == gates && rate > 0 => {
                let shape = recurrence::Pool { windows, d, rate };
                self.recur(cache, &declared, [&x, &gate], [&bias], &[tokens, d], |turn: Turn<2, 1>| {
                    let ([x, gate], [bias]) = (turn.rows, turn.shared);
                    recurrence::pool(shape, turn.state, x, gate, bias, turn.offset, turn.out)
                })
            }
            (x, gate, bias) => {
                Err(fault!("x {x:?}, gate {gate:?} and bias {bias:?} for {windows} windows of {d} lanes"))
            }
        }
    }
}

impl Value {
    /// Matrices `[.., n, n]`: columns by their sums plus `eps`, then `rounds - 1` times rows and columns.
    pub fn sinkhorn(&self, rounds: u64, eps: f64) -> Outcome {
        let dims = self.own_dims()?;
        match *dims {
            [.., n, m] if n == m && n > 0 && (1..=1000).contains(&rounds) => self.make(dims, |x| {
                let wide = x.to_dtype(DType::F32)?;
                let y = match wide.device() {
                    Device::Cpu => on_cpu(&wide, n, rounds, eps as f32)?,
                    _ => by_candle(&wide, rounds, eps)?,
                };
                y.to_dtype(x.dtype())
            }),
            _ => Err(fault!("{rounds} rounds of {dims:?}: 1 to 1000 over square matrices")),
        }
    }
}

fn on_cpu(x: &Tensor, n: usize, rounds: u64, eps: f32) -> candle_core::Result<Tensor> {
    with_f32(x, |x| {
        filled(x.len(), |out| {
            out.copy_from_slice(x);
            for matrix in out.chunks_exact_mut(n * n) {
                for half in 1..2 * rounds as usize {
                    // A row's numbers are neighbours, a column's lie n apart.
                    let (line, step) = if half % 2 == 1 { (1, n) } else { (n, 1) };
                    for first in (0..n).map(|i| i * line) {
                        let sum: f32 = (0..n).map(|i| matrix[first + i * step]).sum();
                        (0..n).for_each(|i| matrix[first + i * step] /= sum + eps);
                    }
                }
            }
        })
    })??
    .reshape(x.shape())
}

fn by_candle(x: &Tensor, rounds: u64, eps: f64) -> candle_core::Result<Tensor> {
    let over = |x: &Tensor, axis: D| x.broadcast_div(&(x.sum_keepdim(axis)? + eps)?);
    let columns = over(x, D::Minus2)?;
    (1..rounds).try_fold(columns, |x, _| over(&over(&x, D::Minus1)?, D::Minus2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sinkhorn_s_rounds_are_the_same_on_the_cpu_and_by_candle_and_end_with_columns_of_one() {
        let numbers: Vec<f32> = (0..18).map(|i| ((i * 7 % 11) as f32 + 1.0) / 4.0).collect();
        let x = Tensor::from_vec(numbers, (2, 3, 3), &Device::Cpu).unwrap();
        for rounds in [1, 2, 20] {
            let y = on_cpu(&x, 3, rounds, 1e-6).unwrap();
            let other = by_candle(&x, rounds, 1e-6).unwrap();
            let off = (&y - other).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
            assert!(off.to_scalar::<f32>().unwrap() < 1e-6);
            let sums = |axis: usize| y.sum(axis).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert!(sums(1).iter().all(|sum| (sum - 1.0).abs() < 1e-5), "columns {:?}", sums(1));
            assert_eq!(sums(2).iter().all(|sum| (sum - 1.0).abs() < 1e-5), rounds == 20, "rows {:?}", sums(2));
        }
        assert!(
            Value::planned(&[4, 3, 2]).sinkhorn(2, 0.0).is_err() && Value::planned(&[2, 2]).sinkhorn(0, 0.0).is_err()
        );
    }
}
