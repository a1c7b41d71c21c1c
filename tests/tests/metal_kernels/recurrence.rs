//! Recurrences from a state to a state, against the CPU's own, which are held to their equations where they are.

use super::{Case, Dice, check, tensor};
use candle_core::Tensor;
use dylm::kernels::{
    cpu::recurrence::{self as cpu, GatedDelta, LinearAttention, Shape, Ssd, Wkv7},
    metal::recurrence::{Decay, Rule, conv1d, recur, rg_lru, selective_scan, ssd},
};

/// Inputs of a case: each with its numbers.
#[derive(Default)]
struct Inputs {
    tensors: Vec<Tensor>,
}

impl Inputs {
    fn take(&mut self, numbers: Vec<f32>, dims: &[usize]) -> Vec<f32> {
        self.tensors.push(tensor(&numbers, dims));
        numbers
    }

    fn all(&self) -> Vec<&Tensor> {
        self.tensors.iter().collect()
    }
}

/// Logarithms of what fades: not above 0.
fn falling(numbers: Vec<f32>) -> Vec<f32> {
    numbers.into_iter().map(|x| -x.abs()).collect()
}

fn outcome(out: &[f32], state: &[f32]) -> Vec<(Vec<f64>, f64)> {
    [out, state]
        .map(|x| {
            let largest = x.iter().fold(1.0f32, |most, x| most.max(x.abs()));
            (x.iter().map(|&x| f64::from(x)).collect(), f64::from(largest) * 4.0)
        })
        .into()
}

/// Keys of 5 lanes and of 70, which two threads and more have between them; values that fill no group.
const SHAPES: [Shape; 2] =
    [Shape { tokens: 4, heads: 6, k_heads: 3, d: 5, e: 9 }, Shape { tokens: 3, heads: 2, k_heads: 2, d: 70, e: 6 }];

#[test]
fn states_from_keys_to_values_go_on_as_on_the_cpu() {
    check(|| {
        let mut dice = Dice(9);
        let mut cases = Vec::new();
        for s in SHAPES {
            let Shape { tokens, heads, k_heads, d, e } = s;
            for (rule, by) in [
                (Rule::Linear, Decay::Head),
                (Rule::Linear, Decay::Token),
                (Rule::Linear, Decay::Lane),
                (Rule::Delta, Decay::Token),
                (Rule::Delta, Decay::Lane),
            ] {
                let mut inputs = Inputs::default();
                let q = inputs.take(dice.numbers(tokens * k_heads * d), &[tokens, k_heads, d]);
                let k = inputs.take(dice.numbers(tokens * k_heads * d), &[tokens, k_heads, d]);
                let v = inputs.take(dice.numbers(tokens * heads * e), &[tokens, heads, e]);
                let g_dims = match by {
                    Decay::Head => vec![heads],
                    Decay::Token => vec![tokens, heads],
                    Decay::Lane => vec![tokens, heads, d],
                };
                let g = inputs.take(falling(dice.numbers(g_dims.iter().product())), &g_dims);
                let beta = inputs.take(dice.numbers(tokens * heads), &[tokens, heads]);
                inputs.take(vec![0.0], &[1]);
                let mut state = inputs.take(dice.numbers(heads * d * e), &[heads, d, e]);
                let mut out = vec![0.0; tokens * heads * e];
                let decay = match by {
                    Decay::Head => cpu::Decay::Head(&g),
                    Decay::Token => cpu::Decay::Token(&g),
                    Decay::Lane => cpu::Decay::Lane(&g),
                };
                let (q, k, v, beta) = (&q, &k, &v, &beta);
                match rule {
                    Rule::Delta => {
                        let of = GatedDelta { shape: s, q, k, v, g: decay, beta };
                        cpu::recur(&of, &mut state, &mut out);
                    }
                    _ => cpu::recur(&LinearAttention { shape: s, q, k, v, g: decay }, &mut state, &mut out),
                }
                let y = outcome(&out, &state);
                cases.push(Case::new(format!("{rule:?} {by:?} {s:?}"), recur(rule, by, s), &inputs.all(), y));
            }
            let s = Shape { k_heads: heads, e: d, ..s };
            let mut inputs = Inputs::default();
            let dims = [tokens, heads, d];
            let mut next = || dice.numbers(tokens * heads * d);
            let [r, k, v] = [next(), next(), next()].map(|x| inputs.take(x, &dims));
            let w = inputs.take(falling(next()), &dims);
            // Keys that wash out what they read, so that nothing explodes.
            let [a, b] = [next(), next()].map(|x| inputs.take(x.iter().map(|x| x / d as f32).collect(), &dims));
            let mut state = inputs.take(dice.numbers(heads * d * d), &[heads, d, d]);
            let mut out = vec![0.0; tokens * heads * d];
            let of = Wkv7 { tokens, heads, d, r: &r, w: &w, k: &k, v: &v, a: &a, b: &b };
            cpu::recur(&of, &mut state, &mut out);
            let launch = recur(Rule::Wkv7, Decay::Lane, s);
            cases.push(Case::new(format!("wkv7 {s:?}"), launch, &inputs.all(), outcome(&out, &state)));
        }
        cases
    });
}

#[test]
fn mamba_s_scans_go_on_as_on_the_cpu() {
    check(|| {
        let mut dice = Dice(10);
        let mut cases = Vec::new();
        for (tokens, heads, d, groups, n) in [(3, 4, 5, 2, 16), (1, 2, 3, 1, 67)] {
            let mut inputs = Inputs::default();
            let x = inputs.take(dice.numbers(tokens * heads * d), &[tokens, heads, d]);
            let dt = inputs.take(dice.numbers(tokens * heads).iter().map(|x| x.abs()).collect(), &[tokens, heads]);
            let b = inputs.take(dice.numbers(tokens * groups * n), &[tokens, groups, n]);
            let c = inputs.take(dice.numbers(tokens * groups * n), &[tokens, groups, n]);
            let a = inputs.take(falling(dice.numbers(heads)), &[heads]);
            let mut state = inputs.take(dice.numbers(heads * d * n), &[heads, d, n]);
            let mut out = vec![0.0; x.len()];
            let shape = Ssd { heads, d, groups, n };
            cpu::ssd(shape, &mut state, [&x, &dt, &b, &c], &a, &mut out);
            cases.push(Case::new(format!("{shape:?}"), ssd(tokens, shape), &inputs.all(), outcome(&out, &state)));

            let (d, mut inputs) = (heads * d, Inputs::default());
            let x = inputs.take(dice.numbers(tokens * d), &[tokens, d]);
            let dt = inputs.take(dice.numbers(tokens * d).iter().map(|x| x.abs()).collect(), &[tokens, d]);
            let b = inputs.take(dice.numbers(tokens * n), &[tokens, n]);
            let c = inputs.take(dice.numbers(tokens * n), &[tokens, n]);
            let a = inputs.take(falling(dice.numbers(d * n)), &[d, n]);
            let mut state = inputs.take(dice.numbers(d * n), &[d, n]);
            let mut out = vec![0.0; x.len()];
            cpu::selective_scan([d, n], &mut state, [&x, &dt, &b, &c], &a, &mut out);
            let launch = selective_scan(tokens, [d, n]);
            cases.push(Case::new(format!("selective scan {d} {n}"), launch, &inputs.all(), outcome(&out, &state)));
        }
        cases
    });
}

#[test]
fn convolutions_and_gated_units_go_on_as_on_the_cpu() {
    check(|| {
        let mut dice = Dice(11);
        let mut cases = Vec::new();
        // More tokens than are carried, fewer, and a convolution that carries none.
        for (tokens, channels, taps, bias) in [(6, 67, 4, true), (1, 300, 4, false), (2, 9, 1, true)] {
            let mut inputs = Inputs::default();
            let x = inputs.take(dice.numbers(tokens * channels), &[tokens, channels]);
            let weight = inputs.take(dice.numbers(taps * channels), &[taps, channels]);
            let b = inputs.take(dice.numbers(channels), &[channels]);
            let mut state = inputs.take(dice.numbers((taps - 1) * channels), &[taps - 1, channels]);
            let mut out = vec![0.0; x.len()];
            cpu::conv1d(&mut state, &x, &weight, bias.then_some(&b[..]), channels, &mut out);
            let launch = conv1d(tokens, channels, taps, bias);
            let what = format!("{tokens} tokens, {taps} taps of {channels}");
            cases.push(Case::new(what, launch, &inputs.all(), outcome(&out, &state)));
        }
        for (tokens, dim, begins) in [(5, 37, true), (3, 300, false)] {
            let mut inputs = Inputs::default();
            let x = inputs.take(dice.numbers(tokens * dim), &[tokens, dim]);
            // Near 0 as well, where 1 - a² is small.
            let fall = |x: f32| -x.abs() * if x > 0.5 { 1e-3 } else { 4.0 };
            let log_a = inputs.take(dice.numbers(tokens * dim).into_iter().map(fall).collect(), &[tokens, dim]);
            let mut state = inputs.take(dice.numbers(dim), &[dim]);
            let mut out = vec![0.0; x.len()];
            cpu::rg_lru(&x, &log_a, begins, &mut state, &mut out);
            let launch = rg_lru(tokens, dim, begins);
            cases.push(Case::new(format!("rg_lru {dim}"), Some(launch), &inputs.all(), outcome(&out, &state)));
        }
        cases
    });
}
