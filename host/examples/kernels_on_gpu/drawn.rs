//! Tokens drawn on the GPU beside those that the CPU's sampler draws of the same logits, seed and text: they are the same tokens.

use super::Checks;
use candle_core::{DType, Result, Tensor};
use dylm::{
    kernels::cuda::{
        sample::Drawing,
        step::{address, choose, device_of},
    },
    sampler::{Sampler, Sampling},
};
use std::time::Instant;

const STEPS: usize = 40;

fn settings() -> Vec<(&'static str, Sampling)> {
    let plain = Sampling { temp: 0.7, seed: Some(11), ..Default::default() };
    let window = |size| Sampling {
        repetition_penalty: Some(1.3),
        repetition_context_size: Some(size),
        presence_penalty: 0.5,
        frequency_penalty: -0.25,
        frequency_context_size: Some(7),
        ..plain.clone()
    };
    vec![
        ("temperature", plain.clone()),
        ("high temperature", Sampling { temp: 3.0, ..plain.clone() }),
        ("low temperature", Sampling { temp: 0.01, ..plain.clone() }),
        ("top-p", Sampling { top_p: 0.9, ..plain.clone() }),
        ("little top-p", Sampling { top_p: 0.01, ..plain.clone() }),
        ("top-k", Sampling { top_k: 40, ..plain.clone() }),
        ("top-k of one", Sampling { top_k: 1, ..plain.clone() }),
        ("top-k of more than there are", Sampling { top_k: 1 << 20, ..plain.clone() }),
        ("min-p", Sampling { min_p: 0.1, ..plain.clone() }),
        ("all three", Sampling { top_p: 0.95, top_k: 20, min_p: 0.02, ..plain.clone() }),
        ("bias", Sampling { logit_bias: vec![(3, 4.0), (5, f32::NEG_INFINITY), (3, 1.0)], top_k: 9, ..plain.clone() }),
        ("penalties", window(20)),
        ("penalties and top-p", Sampling { top_p: 0.8, ..window(5) }),
        ("penalties, most likely", Sampling { temp: 0.0, ..window(20) }),
    ]
}

impl Checks {
    pub fn drawn(&mut self) -> Result<()> {
        for width in [50, 1000, 49_152, 128_256, 262_144] {
            for (name, sampling) in settings() {
                // As a model gives them: in bf16 many are equal.
                for coarse in [true, false] {
                    let (off, far) = self.draws(&sampling, width, coarse)?;
                    self.failed += usize::from(off > 0 || far > 1e-5);
                    let word = if off > 0 || far > 1e-5 { "BAD" } else { "ok " };
                    println!("{word} {name} of {width}, equals {coarse}: {off} of {STEPS} others, {far:.0e}");
                }
            }
        }
        for (name, sampling) in settings() {
            let logits = self.logits(128_256, true);
            let row = Tensor::from_slice(&logits, (1, 128_256), &self.device)?;
            let device = self.device.clone();
            let numbers = |n: usize| Tensor::zeros(n, DType::U32, &device);
            let (id, told) = (numbers(1)?, numbers(3)?);
            let sampler = Sampler::new(&sampling).map_err(candle_core::Error::wrap)?;
            let Some(drawing) = Drawing::new(&sampler, &[1, 2, 3], 128_256, device_of(&row)?)? else { continue };
            drawing.run(&row, [true, false], &id, &told)?;
            told.to_vec1::<u32>()?;
            let start = Instant::now();
            for _ in 0..500 {
                drawing.run(&row, [true, false], &id, &told)?;
            }
            told.to_vec1::<u32>()?;
            println!("    {name}: {:.1} us of 128256", start.elapsed().as_secs_f64() * 1e6 / 500.0);
        }
        Ok(())
    }

    fn logits(&mut self, width: usize, coarse: bool) -> Vec<f32> {
        let mut logits: Vec<f32> = (0..width).map(|_| 9.0 * self.random.number()).collect();
        // Some stand out, and one is masked.
        for _ in 0..width / 100 {
            let at = self.random.below(width);
            logits[at] += 4.0 * self.random.number();
        }
        if coarse {
            logits.iter_mut().for_each(|x| *x = dylm::kernels::cpu::Float::BF16.round(*x));
        }
        logits[width / 2] = f32::NEG_INFINITY;
        logits
    }

    /// How many tokens differ, and by how much a log-probability does.
    fn draws(&mut self, sampling: &Sampling, width: usize, coarse: bool) -> Result<(usize, f32)> {
        let wrap = candle_core::Error::wrap;
        let mut sampler = Sampler::new(sampling).map_err(wrap)?;
        let mut text: Vec<u32> = (0..30).map(|_| self.random.below(width) as u32).collect();
        let device = self.device.clone();
        let numbers = |n: usize| Tensor::zeros(n, DType::U32, &device);
        let (id, told) = (numbers(1)?, numbers(3)?);
        let Some(mut drawing) = Drawing::new(&sampler, &text, width, device_of(&id)?)? else {
            candle_core::bail!("not to be drawn on the GPU")
        };
        let (mut off, mut far) = (0, 0f32);
        for _ in 0..STEPS {
            let mut logits = self.logits(width, coarse);
            // What was seen is likely again.
            text.iter().for_each(|&t| logits[t as usize] = 10.0);
            let row = Tensor::from_slice(&logits, (1, width), &self.device)?;
            // Every other time the largest is known, as behind a step that has chosen it.
            let known = text.len().is_multiple_of(2);
            if known {
                let kept = row.copy()?;
                let heard = numbers(6)?;
                choose(&row, &kept, [&id, &numbers(1)?, &told], address(&heard)?)?;
            }
            drawing.run(&row, [coarse, known], &id, &told)?;
            let told = told.to_vec1::<u32>()?;
            let choice = sampler.sample(&mut logits, &text).map_err(wrap)?;
            text.push(choice.id);
            drawing.heard(told[0]);
            let same = told[0] == choice.id && told[2] == 1 && id.to_vec1::<u32>()?[0] == choice.id;
            far = far.max((f32::from_bits(told[1]) - choice.logprob).abs() / choice.logprob.abs().max(1.0));
            if !same || !drawing.is_at(&sampler, &text, width) {
                off += 1;
                break;
            }
        }
        Ok((off, far))
    }
}
