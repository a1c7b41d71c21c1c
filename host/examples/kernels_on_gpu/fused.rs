//! Kernels that do in one launch what a model asks for in several: products with a norm ahead and a residual or a gate behind, and what
//! queries and keys go through on their way to attention.

use super::{Checks, product};
use candle_core::{DType, Result, Tensor};
use dylm::{
    kernels::{
        cpu::{Float, Format},
        cuda::{
            norm,
            packed::Tiles,
            product::{Norming, Product, outputs},
            turn::{Joined, Turned, covers, turn},
        },
    },
    layers::experts::Activation,
};

impl Checks {
    /// Products that begin with a norm and end with a residual and the squares of what came out, or with a gate.
    pub fn products(&mut self) -> Result<()> {
        let formats = [
            Format::Dense(Float::BF16),
            Format::Affine { bits: 4, group: 64, scales: Float::BF16 },
            Format::Affine { bits: 4, group: 32, scales: Float::BF16 },
            Format::Affine { bits: 8, group: 128, scales: Float::BF16 },
            Format::Mxfp4,
        ];
        for format in formats {
            let shapes = [(64, 256, 1), (2752, 640, 1), (10592, 256, 1), (320, 8320, 1), (320, 4096, 5), (704, 256, 8)];
            for (rows, cols, tokens) in shapes {
                let (gate, gates) = self.packed(format, rows, cols)?;
                let (up, ups) = self.packed(format, rows, cols)?;
                let (x, weight, more) =
                    (self.random.numbers(tokens * cols), self.random.numbers(cols), self.random.numbers(tokens * rows));
                let squares: Vec<f32> = x.chunks(16).map(|x| x.iter().map(|x| x * x).sum()).collect();
                let mut normed = Vec::new();
                for x in x.chunks(cols) {
                    let mean = x.iter().map(|x| x * x).sum::<f32>() / cols as f32;
                    normed.extend(x.iter().zip(&weight).map(|(x, w)| x * w / (mean + 1e-5).sqrt()));
                }
                let place = |m| Tiles::place(&[m], &self.device);
                let (Some(gate), Some(up)) = (place(gate)?, place(up)?) else {
                    candle_core::bail!("no kernels for {format:?}")
                };
                let squares = Tensor::from_slice(&squares, (tokens, cols / 16), &self.device)?;
                let norm = Norming { weight: self.tensor(&weight, &[cols])?, squares, eps: 1e-5 };
                let x = self.tensor(&x, &[tokens, cols])?;
                let residual = self.tensor(&more, &[tokens, rows])?;
                let out = Tensor::zeros((tokens, rows / 16), DType::F32, &self.device)?;
                let y = outputs(&[&up], &x)?;
                let (matrices, norm) = ([(&up, None)], Some(&norm));
                Product { matrices: &matrices, x: &x, y: &y, norm, residual: Some(&residual), squares: Some(&out) }
                    .run()?;
                let mut expected = product(&ups, &normed, cols, None);
                let of_up = expected.clone();
                expected.iter_mut().zip(&more).for_each(|(y, r)| *y += f64::from(*r));
                let what = format!("{format:?} [{rows}, {cols}] x {tokens}");
                self.held(&format!("{what} after a norm"), &y[0], &expected)?;
                let kept = y[0].to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
                let expected: Vec<f64> =
                    kept.chunks(16).map(|x| x.iter().map(|&x| f64::from(x) * f64::from(x)).sum()).collect();
                self.held(&format!("{what}, its squares"), &out, &expected)?;
                let y = outputs(&[&up], &x)?;
                let matrices = [(&gate, None), (&up, None)];
                Product { matrices: &matrices, x: &x, y: &y, norm, residual: None, squares: None }
                    .run_gated(norm::joint(Activation::Swiglu))?;
                let expected: Vec<f64> = product(&gates, &normed, cols, None)
                    .iter()
                    .zip(of_up)
                    .map(|(g, u)| g / (1.0 + (-g).exp()) * u)
                    .collect();
                self.held(&format!("{what}, gated"), &y[0], &expected)?;
            }
        }
        Ok(())
    }

    pub fn turns(&mut self) -> Result<()> {
        for (tokens, heads, kv_heads, d, dims, last, neighbours, normed) in [
            (1, 32, 8, 128, 128, false, false, true),
            (3, 6, 2, 64, 64, false, true, false),
            (2, 4, 4, 256, 64, false, false, true),
            (1, 5, 1, 64, 32, true, false, false),
            (300, 6, 2, 128, 96, true, true, true),
            (41, 12, 4, 64, 64, false, false, false),
        ] {
            let (origin, past, capacity) = (3u32, 9usize, 320);
            let positions: Vec<u32> = (0..tokens).map(|t| origin + (past + t) as u32).collect();
            let frequencies: Vec<f32> = (0..dims / 2).map(|i| 1.0 / (1.0 + i as f32)).collect();
            let (q, k, v) = (
                self.random.numbers(tokens * heads * d),
                self.random.numbers(tokens * kv_heads * d),
                self.random.numbers(tokens * kv_heads * d),
            );
            let weight: Vec<f32> = self.random.numbers(d);
            let on = &self.device;
            let kind = dylm::kernels::cpu::Turn { neighbours, last, back: false };
            let norm = normed.then(|| Tensor::from_slice(&weight, d, on).map(|w| (Some(w), 1e-6))).transpose()?;
            let shared = Tensor::from_slice(&frequencies, dims / 2, on)?;
            let turned = |x: Tensor| -> Result<Turned> {
                let y = x.zeros_like()?;
                let (norm, frequencies) = (norm.clone(), shared.clone());
                Ok(Turned { x, y, norm, frequencies, amplitude: 1.5, every: 1, turn: kind })
            };
            let queries = turned(self.tensor(&q, &[tokens, heads, d])?)?;
            let keys = turned(self.tensor(&k, &[tokens, kv_heads, d])?)?;
            let values = self.tensor(&v, &[tokens, kv_heads, d])?;
            let tables = [(); 2].map(|()| Tensor::zeros((capacity, kv_heads, d), DType::BF16, on));
            let [key_table, value_table] = tables;
            let (key_table, value_table) = (key_table?, value_table?);
            let at = Tensor::from_slice(&positions, tokens, on)?;
            if !covers(&queries, &keys) {
                candle_core::bail!("no turn for {d} lanes")
            }
            turn(&queries, &keys, &values, &Joined { keys: &key_table, values: &value_table, origin }, &at)?;
            let expected = |x: &[f32], heads: usize| {
                let mut y = Vec::with_capacity(x.len());
                for (i, x) in x.chunks(d).enumerate() {
                    let position = f64::from(positions[i / heads]);
                    let mut x: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
                    if normed {
                        let mean = x.iter().map(|x| x * x).sum::<f64>() / d as f64;
                        x.iter_mut().zip(&weight).for_each(|(x, &w)| *x *= f64::from(w) / (mean + 1e-6).sqrt());
                    }
                    let first = if last { d - dims } else { 0 };
                    for (pair, &f) in frequencies.iter().enumerate() {
                        let a = first + if neighbours { 2 * pair } else { pair };
                        let b = if neighbours { a + 1 } else { a + dims / 2 };
                        let (s, c) = (position * f64::from(f)).sin_cos();
                        (x[a], x[b]) = (1.5 * (x[a] * c - x[b] * s), 1.5 * (x[b] * c + x[a] * s));
                    }
                    y.extend(x);
                }
                y
            };
            let what = format!("turn of {d} lanes, {heads} heads over {kv_heads}, {tokens} tokens");
            self.held(&format!("{what}: queries"), &queries.y, &expected(&q, heads))?;
            let rows = |table: &Tensor| table.narrow(0, past, tokens);
            self.held(&format!("{what}: keys"), &rows(&key_table)?, &expected(&k, kv_heads))?;
            let v: Vec<f64> = v.iter().map(|&x| f64::from(x)).collect();
            self.held(&format!("{what}: values"), &rows(&value_table)?, &v)?;
        }
        Ok(())
    }
}
