//! Whether the kernels for NVIDIA's GPUs compute what scalar loops do, on random numbers in odd shapes; for a machine with a GPU, where
//! tests do not run: `cargo run --release --features cuda --example kernels_on_gpu`. A line for each case; fails if one is off.

mod drawn;
mod fused;
mod joined;
mod recurring;

use candle_core::{DType, Device, Result, Tensor};
use dylm::{
    device::{DeviceChoice, DtypeChoice, Placement},
    kernels::{
        cpu::{Float, Format, Matrix},
        cuda::{
            attend::{Seen, attend},
            attention::attend_by,
            experts::{Projection, Stacked},
            norm,
            packed::Tiles,
        },
    },
    layers::experts::{Activation, Kind},
};
use std::process::ExitCode;

/// Products of bf16 in f32, rounded to bf16 in the end and between two of them.
const OFF: f64 = 8e-3;

struct Random(u64);

impl Random {
    /// Between -1 and 1.
    fn number(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    fn below(&mut self, n: usize) -> usize {
        ((self.number() + 1.0) / 2.0 * n as f32) as usize % n
    }

    /// As bf16 keeps them.
    fn numbers(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| Float::BF16.round(self.number())).collect()
    }
}

struct Checks {
    device: Device,
    random: Random,
    failed: usize,
}

impl Checks {
    fn tensor(&self, numbers: &[f32], dims: &[usize]) -> Result<Tensor> {
        Tensor::from_slice(numbers, dims, &self.device)?.to_dtype(DType::BF16)
    }

    fn held(&mut self, what: &str, ours: &Tensor, reference: &[f64]) -> Result<()> {
        let ours = ours.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let error: f64 = ours.iter().zip(reference).map(|(&a, b)| (f64::from(a) - b).powi(2)).sum();
        let size: f64 = reference.iter().map(|b| b * b).sum();
        let off = (error / size.max(1e-30)).sqrt();
        let fine = ours.len() == reference.len() && off < OFF;
        self.failed += usize::from(!fine);
        println!("{} {what}: {off:.1e}", if fine { "ok " } else { "BAD" });
        Ok(())
    }

    fn packed(&mut self, format: Format, rows: usize, cols: usize) -> Result<(Matrix, Vec<f32>)> {
        let numbers: Vec<f32> = (0..rows * cols).map(|_| self.random.number() * 0.5).collect();
        let matrix = match format {
            Format::Affine { .. }
            | Format::Mxfp4
            | Format::Mxfp8
            | Format::Nvfp4
            | Format::Nvfp4Scaled
            | Format::Fp8 { .. }
            | Format::Dense(_) => Matrix::quantize(&numbers, rows, cols, format),
            // Nobody here makes GGUF's blocks: any bytes are some, if scale and minimum are numbers.
            _ => {
                let (weights, size) = format.block();
                let mut blocks: Vec<u8> =
                    (0..rows * cols / weights * size).map(|_| self.random.below(256) as u8).collect();
                for block in blocks.chunks_mut(size) {
                    // Where the scale of Q6_K lies.
                    let at = if format == Format::Q6K { 209 } else { 1 };
                    block[at] = 0x20 | block[at] & 0x83;
                    if matches!(format, Format::Q4_1 | Format::Q5_1 | Format::Q4K | Format::Q5K) {
                        block[3] = 0x20 | block[3] & 0x83;
                    }
                }
                Matrix::new(format, rows, cols, blocks.into(), None, None)
            }
        };
        let matrix = matrix.map_err(candle_core::Error::wrap)?;
        let mut kept = vec![0.0; rows * cols];
        matrix.dequantize_rows(0..rows, &mut kept);
        Ok((matrix, kept))
    }

    fn matrices(&mut self) -> Result<()> {
        let mut formats = vec![
            Format::Dense(Float::BF16),
            Format::Mxfp4,
            Format::Q4_0,
            Format::Q4_1,
            Format::Q5_0,
            Format::Q5_1,
            Format::Q8_0,
            Format::Q4K,
            Format::Q5K,
            Format::Q6K,
            Format::Nvfp4,
            Format::Nvfp4Scaled,
            Format::Mxfp8,
            Format::Fp8 { block: 128 },
            Format::Fp8 { block: 1 << 20 },
        ];
        for bits in [2, 3, 4, 5, 6, 8] {
            for (group, scales) in [(32, Float::BF16), (64, Float::F16), (64, Float::BF16), (128, Float::BF16)] {
                formats.push(Format::Affine { bits, group, scales });
            }
        }
        for (i, format) in formats.into_iter().enumerate() {
            let (rows, cols) =
                ([37, 200, 2600][i % 3], [384usize, 640, 1152][i / 3 % 3].next_multiple_of(format.block().0));
            let (matrix, kept) = self.packed(format, rows, cols)?;
            let Some(tiles) = Tiles::place(&[matrix], &self.device)? else {
                self.failed += 1;
                println!("BAD {format:?}: no kernels for it");
                continue;
            };
            for tokens in [1, 3, 8, 13, 32, 50, 100] {
                let (x, bias) = (self.random.numbers(tokens * cols), self.random.numbers(rows));
                let y = tiles.matmul(&self.tensor(&x, &[tokens, cols])?, Some(&self.tensor(&bias, &[rows])?))?;
                self.held(
                    &format!("{format:?} [{rows}, {cols}] x {tokens}"),
                    &y,
                    &product(&kept, &x, cols, Some(&bias)),
                )?;
            }
            let ids: Vec<u32> = (0..5).map(|_| self.random.below(rows) as u32).collect();
            let looked = tiles.gather(&Tensor::new(ids.as_slice(), &self.device)?)?;
            let expected = ids
                .iter()
                .flat_map(|&id| &kept[id as usize * cols..][..cols])
                .map(|&x| f64::from(x))
                .collect::<Vec<_>>();
            self.held(&format!("{format:?} rows by id"), &looked, &expected)?;
        }
        Ok(())
    }

    fn norms(&mut self) -> Result<()> {
        for dim in [64, 128, 584, 2048, 5120, 16384] {
            for centred in [false, true] {
                let (x, more) = (self.random.numbers(7 * dim), self.random.numbers(7 * dim));
                let weight = self.random.numbers(dim);
                let weights = Tensor::from_slice(&weight, dim, &self.device)?;
                let (x_gpu, more_gpu) = (self.tensor(&x, &[7, dim])?, self.tensor(&more, &[7, dim])?);
                let Some([y, sum]) = norm::norm(&x_gpu, Some(&more_gpu), [Some(&weights), None], 1e-5, centred)? else {
                    candle_core::bail!("no kernel for a norm of {dim}")
                };
                let sums: Vec<f64> = x.iter().zip(&more).map(|(a, b)| f64::from(Float::BF16.round(a + b))).collect();
                self.held(&format!("sum ahead of a norm of {dim}"), &sum, &sums)?;
                let added = sum.zeros_like()?;
                norm::add_into(&x_gpu, &more_gpu, &added)?;
                self.held(&format!("sum of {} numbers", sums.len()), &added, &sums)?;
                let mut expected = Vec::new();
                for (x, more) in x.chunks(dim).zip(more.chunks(dim)) {
                    let sum: Vec<f64> = x.iter().zip(more).map(|(a, b)| f64::from(Float::BF16.round(a + b))).collect();
                    let mean = if centred { sum.iter().sum::<f64>() / dim as f64 } else { 0.0 };
                    let square = sum.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / dim as f64;
                    expected.extend(
                        sum.iter().zip(&weight).map(|(x, &w)| (x - mean) / (square + 1e-5).sqrt() * f64::from(w)),
                    );
                }
                self.held(&format!("norm of {dim}, centred {centred}"), &y, &expected)?;
            }
        }
        // Not all of them by eights.
        for count in [8, 1001, 40_000] {
            let (gate, up) = (self.random.numbers(count), self.random.numbers(count));
            let (on, other) = (self.tensor(&gate, &[count])?, self.tensor(&up, &[count])?);
            let expected = |of: fn(f64, f64) -> f64| -> Vec<f64> {
                gate.iter().zip(&up).map(|(&g, &u)| of(f64::from(g), f64::from(u))).collect()
            };
            let y = on.zeros_like()?;
            norm::add_into(&on, &other, &y)?;
            self.held(&format!("sum of {count}"), &y, &expected(|g, u| g + u))?;
            let Some(y) = norm::join(Activation::Swiglu, &on, &other)? else {
                candle_core::bail!("no kernel for a gate of {count}")
            };
            self.held(&format!("gate of {count}"), &y, &expected(|g, u| g / (1.0 + (-g).exp()) * u))?;
        }
        Ok(())
    }

    fn experts(&mut self) -> Result<()> {
        let (dim, hidden, count) = (320, 192, 9);
        for (format, k) in [
            (Format::Affine { bits: 4, group: 64, scales: Float::BF16 }, 3),
            (Format::Mxfp4, 1),
            (Format::Q8_0, 4),
            (Format::Mxfp8, 2),
            (Format::Nvfp4Scaled, 3),
            (Format::Dense(Float::BF16), 2),
        ] {
            let mut all = Vec::new();
            let mut numbers = Vec::new();
            for [rows, cols] in [[hidden, dim], [hidden, dim], [dim, hidden]] {
                let mut matrices = Vec::new();
                let mut kept = Vec::new();
                for _ in 0..count {
                    let (matrix, numbers) = self.packed(format, rows, cols)?;
                    matrices.push(matrix);
                    kept.push(numbers);
                }
                all.extend(Projection::place(&matrices, None, &self.device)?);
                numbers.push(kept);
            }
            let (Ok([gate, up, down]), [gates, ups, downs]) = (<[Projection; 3]>::try_from(all), &numbers[..]) else {
                candle_core::bail!("no kernels for experts in {format:?}")
            };
            let stacked = Stacked { gate: Some(gate), up, down, experts: count };
            let kind = Kind { activation: Activation::Swiglu, identity: 1, scaled_input: false };
            for tokens in [1, 5, 200] {
                let x = self.random.numbers(tokens * dim);
                let chosen: Vec<u32> = (0..tokens * k).map(|_| self.random.below(count + 1) as u32).collect();
                let weights: Vec<f32> = self.random.numbers(tokens * k);
                let ids = Tensor::from_slice(&chosen, (tokens, k), &self.device)?;
                let shares = Tensor::from_slice(&weights, (tokens, k), &self.device)?;
                let y = stacked.forward(&self.tensor(&x, &[tokens, dim])?, &ids, &shares, kind)?;
                let mut expected = vec![0f64; tokens * dim];
                for (i, (&id, &share)) in chosen.iter().zip(&weights).enumerate() {
                    let x = &x[i / k * dim..][..dim];
                    let id = id as usize;
                    let out = if id < count {
                        let (g, u) = (product(&gates[id], x, dim, None), product(&ups[id], x, dim, None));
                        let inner: Vec<f32> =
                            g.iter().zip(u).map(|(g, u)| (g / (1.0 + (-g).exp()) * u) as f32).collect();
                        product(&downs[id], &inner, hidden, None)
                    } else {
                        x.iter().map(|&x| f64::from(x)).collect()
                    };
                    expected[i / k * dim..][..dim]
                        .iter_mut()
                        .zip(out)
                        .for_each(|(y, out)| *y += f64::from(share) * out);
                }
                self.held(&format!("experts in {format:?}, {k} each for {tokens}"), &y, &expected)?;
            }
        }
        Ok(())
    }

    fn attention(&mut self) -> Result<()> {
        for (case, d) in [(0, 64), (1, 128), (2, 64), (3, 128), (4, 256), (5, 128), (6, 64)] {
            for tokens in if d == 256 { vec![1, 4] } else { vec![1, 4, 150, 301] } {
                let (kv_heads, group, past) = (1 + case % 3, [1, 4, 7, 20][case % 4], [0, 700, 61][case % 3]);
                let (heads, held) = (kv_heads * group, past + tokens);
                let capacity = held + 50;
                let (q, k, v) = (
                    self.random.numbers(tokens * heads * d),
                    self.random.numbers(capacity * kv_heads * d),
                    self.random.numbers(capacity * kv_heads * d),
                );
                let origin = if case == 3 { 11 } else { 0 };
                let positions: Vec<u32> = (0..tokens).map(|t| origin + (past + t) as u32).collect();
                let sinks = self.random.numbers(heads);
                let slopes: Vec<f32> = self.random.numbers(heads).iter().map(|x| x.abs() * 0.1).collect();
                let (window, chunk) = ((case == 2).then_some(40), (case == 3).then_some(32));
                let (softcap, scale) = ((case == 4).then_some(3.0), 1.0 / (d as f32).sqrt());
                let floats = |numbers: &[f32]| Tensor::from_slice(numbers, numbers.len(), &self.device);
                let (sinks_gpu, slopes_gpu) = (floats(&sinks)?, floats(&slopes)?);
                let seen = Seen {
                    q: &self.tensor(&q, &[tokens, heads, d])?,
                    keys: &self.tensor(&k, &[capacity, kv_heads, d])?,
                    values: Some(&self.tensor(&v, &[capacity, kv_heads, d])?),
                    lanes: 0,
                    positions: &Tensor::from_slice(&positions, tokens, &self.device)?,
                    origin,
                    window,
                    chunk,
                    keep: 0,
                    scale,
                    softcap,
                    sinks: (case == 5).then_some(&sinks_gpu),
                    slopes: (case == 6).then_some(&slopes_gpu),
                    packed: None,
                    fresh: case == 0,
                };
                let mut expected = Vec::with_capacity(q.len());
                for (i, q) in q.chunks(d).enumerate() {
                    let (position, head) = (positions[i / heads] as usize, i % heads);
                    let row = |of: &[f32], entry: usize| of[(entry * kv_heads + head / group) * d..][..d].to_vec();
                    let sees = |p: usize| {
                        window.is_none_or(|w| p + w > position) && chunk.is_none_or(|c| p >= position / c * c)
                    };
                    let entries: Vec<usize> =
                        (0..=position - origin as usize).filter(|e| sees(e + origin as usize)).collect();
                    let score = |&e: &usize| {
                        let s = scale as f64
                            * q.iter().zip(row(&k, e)).map(|(a, b)| f64::from(*a) * f64::from(b)).sum::<f64>();
                        let s = softcap.map_or(s, |cap: f32| f64::from(cap) * (s / f64::from(cap)).tanh());
                        s - if case == 6 { f64::from(slopes[head]) * (position - e) as f64 } else { 0.0 }
                    };
                    let shares: Vec<f64> = entries.iter().map(|e| score(e).exp()).collect();
                    let total = shares.iter().sum::<f64>() + if case == 5 { f64::from(sinks[head]).exp() } else { 0.0 };
                    let mut y = vec![0f64; d];
                    for (&e, share) in entries.iter().zip(shares) {
                        y.iter_mut().zip(row(&v, e)).for_each(|(y, v)| *y += share / total * f64::from(v));
                    }
                    expected.extend(y);
                }
                let what = format!(
                    "attention {case} of {d} lanes, {heads} heads over {kv_heads}, {tokens} tokens after {past}"
                );
                self.held(&what, &attend(&seen)?, &expected)?;
                // What a GPU that is not a Hopper runs.
                if let Some(y) = attend_by(&seen, false)? {
                    self.held(&format!("{what}, elsewhere"), &y, &expected)?;
                }
            }
        }
        Ok(())
    }
}

/// W `[.., cols]` times each of x `[.., cols]`.
fn product(w: &[f32], x: &[f32], cols: usize, bias: Option<&[f32]>) -> Vec<f64> {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
    let of = |x| w.chunks(cols).enumerate().map(move |(row, w)| dot(w, x) + bias.map_or(0.0, |b| f64::from(b[row])));
    x.chunks(cols).flat_map(of).collect()
}

fn main() -> ExitCode {
    let run = || -> std::result::Result<usize, Box<dyn std::error::Error>> {
        let device = Placement::new(DeviceChoice::Cuda, DtypeChoice::Bfloat16, DType::BF16)?.device;
        let mut checks = Checks { device, random: Random(17), failed: 0 };
        checks.matrices()?;
        checks.products()?;
        checks.turns()?;
        checks.turned_attention()?;
        checks.packed_rows()?;
        checks.packed_attention()?;
        checks.routed_experts()?;
        checks.norms()?;
        checks.experts()?;
        checks.attention()?;
        checks.drawn()?;
        checks.recurring()?;
        Ok(checks.failed)
    };
    match run() {
        Ok(0) => ExitCode::SUCCESS,
        Ok(failed) => {
            println!("{failed} are off");
            ExitCode::FAILURE
        }
        Err(e) => {
            println!("{e}");
            ExitCode::FAILURE
        }
    }
}
