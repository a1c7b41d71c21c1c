//! Kernels that do what several others do one after the other, held to these: attention with what queries and keys go through before, of
//! sequences with a cache each; and experts with their choice. And caches in groups of a few bits, held to the CPU's.

use super::Checks;
use candle_core::{DType, Result, Tensor};
use dylm::{
    cache::rows::Table,
    kernels::{
        cpu::{Float, Format, Turn, quantize_rows},
        cuda::{
            attend::{Seen, attend},
            attention::{attend_turned, covers_packed, covers_turned},
            experts::{Projection, Routed, Stacked},
            pack::{Form, Rows},
            route::Route,
            rows::{Chain, RowOp},
            turn::{Joined, Turned, turn},
        },
    },
    layers::experts::{Activation, Kind},
};

/// Position of each cache's first entry.
const ORIGIN: u32 = 5;

/// How the queries of a case look.
fn seen<'a>(case: usize, q: &'a Tensor, [keys, values]: [&'a Tensor; 2], positions: &'a Tensor) -> Seen<'a> {
    Seen {
        q,
        keys,
        values: Some(values),
        lanes: 0,
        positions,
        origin: ORIGIN,
        window: (case == 4).then_some(50),
        chunk: None,
        keep: 0,
        scale: 0.08,
        softcap: (case == 3).then_some(5.0),
        sinks: None,
        slopes: None,
        packed: None,
        fresh: false,
    }
}

fn numbers(t: &Tensor) -> Result<Vec<f64>> {
    Ok(t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f64::from).collect())
}

impl Checks {
    /// Rows of a cache in groups of a few bits, held to what the CPU makes of the same.
    pub fn packed_rows(&mut self) -> Result<()> {
        for (bits, group, dim, dtype) in [
            (8, 64, 128, DType::BF16),
            (4, 32, 64, DType::F32),
            (2, 128, 128, DType::F32),
            (3, 32, 96, DType::BF16),
            (5, 64, 64, DType::F32),
            (6, 32, 256, DType::BF16),
            (4, 64, 192, DType::F16),
        ] {
            let (rows, heads, past, capacity, origin) = (37, 3, 5usize, 60, 11u32);
            let numbers = self.random.numbers(rows * heads * dim);
            let (mut data, mut scales, mut biases) = (Vec::new(), Vec::new(), Vec::new());
            quantize_rows(&numbers, bits, group, &mut data, &mut scales, &mut biases);
            let there = self.tensor(&numbers, &[rows, heads, dim])?.to_dtype(dtype)?;
            let form = Form { dim, bits: bits as usize, group, dtype };
            let table = Tensor::zeros((capacity, heads, form.words()), DType::U32, &self.device)?;
            let positions: Vec<u32> = (0..rows).map(|row| origin + (past + row) as u32).collect();
            let positions = Tensor::from_slice(&positions, rows, &self.device)?;
            form.pack(&[[&there, &table]], Rows::At(&positions, origin))?;
            let words = table.narrow(0, past, rows)?.flatten_all()?.to_vec1::<u32>()?;
            let (mut same, groups) = (true, dim / group);
            for (i, row) in words.chunks(form.words()).enumerate() {
                let (packed, rest) = row.split_at(dim * bits as usize / 32);
                let bytes: Vec<u8> = packed.iter().flat_map(|word| word.to_le_bytes()).collect();
                same &= bytes == data[i * bytes.len()..][..bytes.len()];
                let ours = rest.iter().map(|&word| f32::from_bits(word));
                let theirs = scales[i * groups..][..groups].iter().zip(&biases[i * groups..][..groups]);
                same &= ours.eq(theirs.flat_map(|(&scale, &bias)| [scale, bias]));
            }
            let what = format!("rows of {dim} in {bits} bits, groups of {group}");
            println!(
                "{} {what}: the words are {}",
                if same { "ok " } else { "BAD" },
                if same { "equal" } else { "others" }
            );
            self.failed += usize::from(!same);
            let whole = form.unpack(&table, Rows::At(&positions, origin))?;
            let again = Table::Packed { data, scales, biases, bits, group }.numbers()?;
            let again: Vec<f64> = again.into_iter().map(f64::from).collect();
            self.held(&format!("{what}, unpacked"), &whole.narrow(0, past, rows)?, &again)?;
        }
        Ok(())
    }

    /// Attention over such rows as they lie, held to that over what comes out of them.
    pub fn packed_attention(&mut self) -> Result<()> {
        for (case, bits, group, d, tokens, past, room) in [
            (0, 8, 64, 128, 1, 700, 40),
            (1, 4, 64, 128, 1, 2030, 40),
            (2, 4, 32, 64, 3, 33, 7),
            (3, 8, 64, 64, 16, 100, 0),
            (4, 8, 128, 256, 1, 190, 3),
            (4, 4, 32, 256, 2, 15, 0),
            (5, 4, 128, 128, 1, 300, 9000),
            (6, 8, 32, 64, 5, 0, 20000),
        ] {
            let (heads, kv_heads) = [(32, 8), (20, 1), (6, 6)][case % 3];
            let (held, form) = (past + tokens, Form { dim: d, bits, group, dtype: DType::BF16 });
            let capacity = held + room;
            let random = |checks: &mut Self, dims: &[usize]| {
                let numbers = checks.random.numbers(dims.iter().product());
                checks.tensor(&numbers, dims)
            };
            let (q, k, v) = (
                random(self, &[tokens, heads, d])?,
                random(self, &[held, kv_heads, d])?,
                random(self, &[held, kv_heads, d])?,
            );
            let tables = [(); 2].map(|()| Tensor::zeros((capacity, kv_heads, form.words()), DType::U32, &self.device));
            let [keys, values] = tables;
            let (keys, values) = (keys?, values?);
            form.pack(&[[&k, &keys], [&v, &values]], Rows::From(0))?;
            let positions: Vec<u32> = (past..held).map(|at| ORIGIN + at as u32).collect();
            let positions = Tensor::from_slice(&positions, tokens, &self.device)?;
            let at = Rows::At(&positions, ORIGIN);
            let (open_keys, open_values) = (form.unpack(&keys, at)?, form.unpack(&values, at)?);
            let open = Seen { fresh: true, ..seen(case, &q, [&open_keys, &open_values], &positions) };
            let expected = numbers(&attend(&open)?)?;
            if !covers_packed(form, &q)? {
                candle_core::bail!("no kernel for {form:?}")
            }
            let y = attend(&Seen { packed: Some(form), ..seen(case, &q, [&keys, &values], &positions) })?;
            let what =
                format!("attention of {heads} heads over {kv_heads}, {d} lanes in {bits} bits of groups of {group}");
            let same = numbers(&y)? == expected;
            let told = if same { "as unpacked" } else { "others than unpacked" };
            println!("{} {what}, {tokens} behind {past}: {told}", if same { "ok " } else { "BAD" });
            self.failed += usize::from(!same);
        }
        Ok(())
    }

    /// One token each of sequences that are differently long.
    pub fn turned_attention(&mut self) -> Result<()> {
        for (case, lengths, heads, kv_heads, d, dims, normed) in [
            (0, vec![700usize], 32, 8, 128, 128, true),
            (1, vec![0, 15, 16, 400, 33, 1, 250, 999], 8, 2, 64, 32, false),
            (2, vec![9, 140, 3], 20, 1, 256, 256, true),
            (3, vec![2900, 60], 6, 6, 128, 64, false),
            (4, vec![64; 8], 32, 4, 128, 128, true),
        ] {
            let (sequences, on) = (lengths.len(), self.device.clone());
            let kind = Turn { neighbours: case == 1, last: case == 3, back: false };
            let frequencies: Vec<f32> = (0..dims / 2).map(|i| 1.0 / (1.0 + i as f32 * 7.0)).collect();
            let shared = Tensor::from_slice(&frequencies, dims / 2, &on)?;
            let random = |checks: &mut Self, dims: &[usize]| {
                let numbers = checks.random.numbers(dims.iter().product());
                checks.tensor(&numbers, dims)
            };
            let weight = self.random.numbers(d);
            let norm = normed.then(|| Tensor::from_slice(&weight, d, &on).map(|w| (Some(w), 1e-6))).transpose()?;
            let turned = |x: Tensor| -> Result<Turned> {
                let (norm, frequencies) = (norm.clone(), shared.clone());
                Ok(Turned { y: x.zeros_like()?, x, norm, frequencies, amplitude: 1.0, every: 1, turn: kind })
            };
            let queries = turned(random(self, &[sequences, heads, d])?)?;
            let keys = turned(random(self, &[sequences, kv_heads, d])?)?;
            let values = random(self, &[sequences, kv_heads, d])?;
            let origin = ORIGIN;
            let positions: Vec<u32> = lengths.iter().map(|&n| origin + n as u32).collect();
            let positions = Tensor::from_slice(&positions, sequences, &on)?;
            let mut tables = Vec::new();
            for &length in &lengths {
                let dims = [length + 40, kv_heads, d];
                tables.push([random(self, &dims)?, random(self, &dims)?]);
            }
            let copies = tables.iter().map(|t| Ok([t[0].copy()?, t[1].copy()?])).collect::<Result<Vec<_>>>()?;
            let (mut expected, mut entries) = (Vec::new(), Vec::new());
            for (i, [k, v]) in tables.iter().enumerate() {
                let row = |t: &Turned| -> Result<Turned> { turned(t.x.narrow(0, i, 1)?.copy()?) };
                let (q, own) = (row(&queries)?, row(&keys)?);
                let (at, fresh) = (positions.narrow(0, i, 1)?, values.narrow(0, i, 1)?.copy()?);
                turn(&q, &own, &fresh, &Joined { keys: k, values: v, origin }, &at)?;
                expected.extend(numbers(&attend(&seen(case, &q.y, [k, v], &at))?)?);
                entries.push([numbers(&k.narrow(0, lengths[i], 1)?)?, numbers(&v.narrow(0, lengths[i], 1)?)?]);
            }
            if !covers_turned(&queries, kv_heads, sequences)? {
                candle_core::bail!("no kernel for {d} lanes")
            }
            let caches: Vec<_> = copies.iter().map(|[keys, values]| Joined { keys, values, origin }).collect();
            let of = seen(case, &queries.y, [&copies[0][0], &copies[0][1]], &positions);
            let y = attend_turned(&of, &queries, &keys, &values, &caches)?;
            let what = format!("attention {case} of {d} lanes, {heads} heads over {kv_heads}, {sequences} sequences");
            self.held(&format!("{what}, turned"), &y, &expected)?;
            for (i, [k, v]) in copies.iter().enumerate() {
                for (name, table, entry) in [("key", k, &entries[i][0]), ("value", v, &entries[i][1])] {
                    self.held(&format!("{what}: the {name} of {i}"), &table.narrow(0, lengths[i], 1)?, entry)?;
                }
            }
        }
        Ok(())
    }

    /// Experts that are chosen by their own kernel.
    pub fn routed_experts(&mut self) -> Result<()> {
        let (dim, hidden, count) = (256, 128, 40);
        let format = Format::Affine { bits: 4, group: 64, scales: Float::BF16 };
        let mut all = Vec::new();
        for [rows, cols] in [[hidden, dim], [hidden, dim], [dim, hidden]] {
            let matrices = (0..count).map(|_| Ok(self.packed(format, rows, cols)?.0)).collect::<Result<Vec<_>>>()?;
            all.extend(Projection::place(&matrices, None, &self.device)?);
        }
        let Ok([gate, up, down]) = <[Projection; 3]>::try_from(all) else { candle_core::bail!("no kernels") };
        let stacked = Stacked { gate: Some(gate), up, down, experts: count };
        let kind = Kind { activation: Activation::Swiglu, identity: 0, scaled_input: false };
        for (case, tokens, k) in [(0, 1, 8), (1, 3, 4), (2, 8, 6), (3, 1, 1)] {
            let logits = self.random.numbers(tokens * count);
            let logits = self.tensor(&logits, &[tokens, count])?;
            let logits = if case == 1 { logits.to_dtype(DType::F32)? } else { logits };
            let bias = self.random.numbers(count);
            let bias = self.tensor(&bias, &[count])?.to_dtype(logits.dtype())?;
            let chain = || -> Result<(Chain, Tensor, Tensor)> {
                let (mut chain, dtype) = (Chain::default(), logits.dtype());
                let mut push = |op, a: &Tensor, b: Option<&Tensor>, width, numbers| {
                    chain.push(op, a, b, (tokens, width, dtype), numbers)
                };
                let first = match case {
                    0 => push(RowOp::Softmax, &logits, None, count, [0.0; 2])?.0,
                    1 | 2 => push(RowOp::Sigmoid, &logits, None, count, [0.0; 2])?.0,
                    _ => logits.clone(),
                };
                let scores =
                    if case == 2 { push(RowOp::Add, &first, Some(&bias), count, [0.0; 2])?.0 } else { first.clone() };
                let (_, indices) = push(RowOp::TopK, &scores, None, k, [0.0; 2])?;
                let Some(indices) = indices else { candle_core::bail!("no indices") };
                let mut weights = push(RowOp::Gather, &first, Some(&indices), k, [0.0; 2])?.0;
                if case == 3 {
                    weights = push(RowOp::Softmax, &weights, None, k, [0.0; 2])?.0;
                } else {
                    let sum = push(RowOp::Sum, &weights, None, 1, [0.0; 2])?.0;
                    let sum = push(RowOp::Affine, &sum, None, 1, [1.0, 1e-3])?.0;
                    weights = push(RowOp::Div, &weights, Some(&sum), k, [0.0; 2])?.0;
                    weights = push(RowOp::Affine, &weights, None, k, [2.5, 0.0])?.0;
                }
                Ok((chain, indices, weights))
            };
            let x = self.random.numbers(tokens * dim);
            let x = self.tensor(&x, &[tokens, dim])?;
            let (done, chosen, weights) = chain()?;
            done.run()?;
            let expected = numbers(&stacked.forward(&x, &chosen, &weights, kind)?)?;
            let (told, ours, rounded) = chain()?;
            let Some(route) = Route::of(&told, &ours, &rounded) else {
                candle_core::bail!("chain {case} is no choice")
            };
            let wide = Tensor::zeros((tokens, k), DType::F32, &self.device)?;
            let y = x.zeros_like()?;
            let routed =
                Routed { x: x.clone(), norm: None, chosen: ours, weights: wide.clone(), route: Some(route), kind };
            stacked.run(&routed, &y, None, None)?;
            let what = format!("experts by choice {case}, {k} of {count} for {tokens}");
            self.held(&what, &y, &expected)?;
            self.held(&format!("{what}: which"), &routed.chosen, &numbers(&chosen)?)?;
            self.held(&format!("{what}: their weights"), &wide, &numbers(&weights)?)?;
        }
        Ok(())
    }
}
