//! Norms, rotary positions, gates and the sum over experts, against their formulas in f64.

use super::{Case, Dice, check, rounding};
use candle_core::{DType, Device, Tensor};
use dylm::{
    kernels::metal::rows::{Mix, Norm, Turn, gate},
    layers::experts::Activation,
};

const TYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

#[test]
fn norms_of_rows_of_any_length_are_their_formulas() {
    check(|| {
        let mut dice = Dice(5);
        let mut cases = Vec::new();
        for (i, dim) in [1, 5, 64, 255, 576, 1030].into_iter().enumerate() {
            for (centred, weight, bias) in
                [(false, true, false), (true, true, true), (false, false, false), (true, false, true)]
            {
                let (x, x_tensor) = dice.tensor(&[3, dim], TYPES[i % 3]);
                let (w, w_tensor) = dice.tensor(&[dim], DType::F32);
                let (b, b_tensor) = dice.tensor(&[dim], DType::F32);
                let mut y = Vec::new();
                for row in wide(&x).chunks(dim) {
                    let mean = if centred { row.iter().sum::<f64>() / dim as f64 } else { 0.0 };
                    let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / dim as f64;
                    for (j, x) in row.iter().enumerate() {
                        let y_j = (x - mean) / (variance + 1e-3).sqrt() * if weight { f64::from(w[j]) } else { 1.0 };
                        y.push(y_j + if bias { f64::from(b[j]) } else { 0.0 });
                    }
                }
                let how = Norm { centred, weight, bias, eps: 1e-3 };
                let launch = how.launch(&[3, dim], TYPES[i % 3]);
                cases.push(Case::new(
                    format!("{how:?} of {dim}"),
                    launch,
                    &[&x_tensor, &w_tensor, &b_tensor],
                    vec![(y, 4.0)],
                ));
            }
        }
        cases
    });
}

#[test]
fn lanes_turn_in_every_way_and_the_others_stay() {
    check(|| {
        let mut dice = Dice(6);
        let mut cases = Vec::new();
        let [tokens, heads, head_dim] = [3, 5, 22];
        for (i, bits) in (0..8).enumerate() {
            let [neighbours, last, back] = [1, 2, 4].map(|bit| bits & bit != 0);
            let pairs = [4, 11][i % 2];
            let (x, x_tensor) = dice.tensor(&[tokens, heads, head_dim], TYPES[i % 3]);
            let (turns, turns_tensor) = dice.tensor(&[tokens, 2 * pairs], DType::F32);
            let mut y = wide(&x);
            for (row, y) in y.chunks_mut(head_dim).enumerate() {
                let turns = &turns[row / heads * 2 * pairs..][..2 * pairs];
                let first = if last { head_dim - 2 * pairs } else { 0 };
                for pair in 0..pairs {
                    let (a, b) = if neighbours { (2 * pair, 2 * pair + 1) } else { (pair, pair + pairs) };
                    let (a, b) = (first + a, first + b);
                    let (c, s) =
                        (f64::from(turns[pair]), f64::from(turns[pairs + pair]) * if back { -1.0 } else { 1.0 });
                    (y[a], y[b]) = (y[a] * c - y[b] * s, y[b] * c + y[a] * s);
                }
            }
            let how = Turn { pairs, neighbours, last, back };
            let launch = how.launch([tokens, heads, head_dim], TYPES[i % 3]);
            cases.push(Case::new(format!("{how:?}"), launch, &[&x_tensor, &turns_tensor], vec![(y, 2.0)]));
        }
        cases
    });
}

#[test]
fn gates_are_what_candle_s_ops_make_of_them() {
    check(|| {
        let mut dice = Dice(7);
        let kinds = [
            Activation::Swiglu,
            Activation::Geglu,
            Activation::ClampedSwiglu { alpha: 1.7, limit: 3.0 },
            Activation::LimitedSwiglu { limit: 2.0 },
            Activation::BoundedSwiglu { limit: 2.5 },
            Activation::Situ { beta: 2.0, linear_beta: 1.5 },
            Activation::Situ { beta: 3.0, linear_beta: 0.0 },
            Activation::Relu2,
            Activation::GeluTanh,
            Activation::Silu,
        ];
        let mut cases = Vec::new();
        for (i, kind) in kinds.into_iter().enumerate() {
            let dtype = TYPES[i % 3];
            // Beyond all limits, and where tanh is 1.
            let wider = |t: Tensor| (t.to_dtype(DType::F32).unwrap() * 8.0).unwrap().to_dtype(dtype).unwrap();
            let (g, u) = (wider(dice.tensor(&[7, 61], dtype).1), wider(dice.tensor(&[7, 61], dtype).1));
            let exact = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
            let y = kind.by_candle(&exact(&g), &exact(&u)).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
            let largest = y.iter().fold(0.0, |most: f64, y| most.max(y.abs()));
            cases.push(Case::new(format!("{kind:?}"), gate(kind, &[7, 61], dtype), &[&g, &u], vec![(y, largest)]));
        }
        cases
    });
}

#[test]
fn what_experts_gave_is_added_up_by_the_router_s_weights() {
    check(|| {
        let mut dice = Dice(8);
        let mut cases = Vec::new();
        for (i, weighted) in [true, false, true].into_iter().enumerate() {
            let (tokens, dim, each, experts, dtype) = (3, 19, 4, 6, TYPES[i]);
            let (y, y_tensor) = dice.tensor(&[tokens * each, dim], dtype);
            let (x, x_tensor) = dice.tensor(&[tokens, dim], dtype);
            let (shares, shares_tensor) = dice.tensor(&[tokens, each], DType::F32);
            // From 6 on they give back their input.
            let chosen: Vec<u32> = (0..tokens * each).map(|_| dice.below(9) as u32).collect();
            let mut sums = Vec::new();
            for token in 0..tokens {
                for lane in 0..dim {
                    let one = |e: usize| {
                        let pair = token * each + e;
                        let share = f64::from(shares[pair]);
                        match chosen[pair] as usize >= experts {
                            true => share * f64::from(x[token * dim + lane]),
                            false => f64::from(y[pair * dim + lane]) * if weighted { share } else { 1.0 },
                        }
                    };
                    sums.push((0..each).map(one).sum());
                }
            }
            let chosen = Tensor::from_vec(chosen, (tokens, each), &Device::Cpu).unwrap();
            let how = Mix { tokens, dim, each, experts, weighted };
            let inputs = [&y_tensor, &x_tensor, &chosen, &shares_tensor];
            cases.push(Case::new(format!("{how:?}"), how.launch(dtype), &inputs, vec![(sums, 4.0 + rounding(dtype))]));
        }
        cases
    });
}
