//! Attention of few queries over a cache of several stretches, with everything that may change what a query sees or how it scores.

use super::{Case, Dice, check, floats, tensor};
use candle_core::{DType, Device, Tensor};
use dylm::kernels::metal::attention::Attention;

/// Where the entries stand.
fn positions(of: &Attention, given: &[u32]) -> Vec<u32> {
    match of.first_key {
        Some(first) => (first as u32..).take(of.entries).collect(),
        None => given.to_vec(),
    }
}

/// Scores, softmax, sum; in f64.
fn expected(
    of: &Attention,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    positions: &[u32],
    slopes: &[f32],
    sinks: &[f32],
) -> Vec<f64> {
    let Attention { tokens, heads, kv_heads, entries, d, e, .. } = *of;
    let mut out = Vec::new();
    for token in 0..tokens {
        for head in 0..heads {
            let p = of.first_query + token;
            let kv_head = head / (heads / kv_heads);
            let score = |entry: usize| {
                let at = positions[entry] as usize;
                let near = of.window.is_none_or(|w| at <= p && p - at < w) || at < of.keep;
                if at > p || !near || of.chunk.is_some_and(|c| p / c != at / c) {
                    return None;
                }
                let (q, k) = (&q[(token * heads + head) * d..][..d], &k[(entry * kv_heads + kv_head) * d..][..d]);
                let dot: f64 = q.iter().zip(k).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                let mut score = dot * f64::from(of.scale);
                if let Some(cap) = of.softcap {
                    score = f64::from(cap) * (score / f64::from(cap)).tanh();
                }
                Some(score + if of.slopes { f64::from(slopes[head]) * (at as f64 - p as f64) } else { 0.0 })
            };
            let scores: Vec<Option<f64>> = (0..entries).map(score).collect();
            let sink = of.sinks.then(|| f64::from(sinks[head]));
            let most = scores.iter().flatten().copied().chain(sink).fold(f64::NEG_INFINITY, f64::max);
            let mass: f64 = scores.iter().flatten().copied().chain(sink).map(|s| (s - most).exp()).sum();
            for lane in 0..e {
                let value = |entry: usize| match of.values_in_keys {
                    true => k[(entry * kv_heads + kv_head) * d + lane],
                    false => v[(entry * kv_heads + kv_head) * e + lane],
                };
                let sum = |(entry, score): (usize, &Option<f64>)| {
                    score.map_or(0.0, |s| (s - most).exp() * f64::from(value(entry)))
                };
                let sum: f64 = scores.iter().enumerate().map(sum).sum();
                out.push(if mass > 0.0 { sum / mass } else { 0.0 });
            }
        }
    }
    out
}

/// The sums of stretches as one softmax: what `joined` is held to.
fn join(of: &Attention, sums: &[f64], stretches: usize, sinks: &[f32]) -> Vec<f64> {
    let mut out = Vec::new();
    for (row, sums) in sums.chunks(stretches * (2 + of.e)).enumerate() {
        let sink = of.sinks.then(|| f64::from(sinks[row % of.heads]));
        let parts: Vec<&[f64]> = sums.chunks(2 + of.e).collect();
        let most = parts.iter().map(|p| p[0]).chain(sink).fold(f64::NEG_INFINITY, f64::max);
        let mass: f64 =
            parts.iter().map(|p| p[1] * (p[0] - most).exp()).sum::<f64>() + sink.map_or(0.0, |s| (s - most).exp());
        for lane in 0..of.e {
            let sum: f64 = parts.iter().map(|p| p[2 + lane] * (p[0] - most).exp()).sum();
            out.push(sum / mass);
        }
    }
    out
}

fn kinds() -> Vec<(Attention, DType)> {
    let plain = Attention {
        tokens: 1,
        heads: 6,
        kv_heads: 2,
        entries: 300,
        d: 64,
        e: 64,
        scale: 0.3,
        first_query: 299,
        first_key: Some(0),
        ..Attention::default()
    };
    vec![
        (plain, DType::F32),
        (Attention { entries: 1, first_query: 0, d: 80, e: 80, ..plain }, DType::BF16),
        (Attention { tokens: 5, first_query: 295, softcap: Some(2.0), ..plain }, DType::F16),
        (Attention { window: Some(37), d: 40, e: 72, ..plain }, DType::BF16),
        (Attention { window: Some(150), keep: 4, first_key: None, first_query: 400, ..plain }, DType::F32),
        (Attention { chunk: Some(64), first_key: Some(17), first_query: 316, sinks: true, ..plain }, DType::F16),
        (Attention { slopes: true, heads: 4, kv_heads: 4, tokens: 3, first_query: 297, ..plain }, DType::BF16),
        // Latent attention: values are lanes of the keys.
        (Attention { heads: 5, kv_heads: 1, d: 96, e: 64, values_in_keys: true, ..plain }, DType::F32),
        // Nothing is seen of the first stretches, or of all.
        (Attention { window: Some(3), entries: 290, first_query: 289, sinks: true, ..plain }, DType::F32),
        (Attention { first_key: Some(500), ..plain }, DType::F32),
    ]
}

#[test]
fn few_queries_over_a_long_cache_give_the_softmax_over_what_they_see() {
    let mut dice = Dice(4);
    let mut first = Vec::new();
    let mut second = Vec::new();
    for (of, dtype) in kinds() {
        let Attention { tokens, heads, kv_heads, entries, d, e, .. } = of;
        let (q, q_tensor) = dice.tensor(&[tokens, heads, d], dtype);
        let (k, k_tensor) = dice.tensor(&[entries, kv_heads, d], dtype);
        let (v, v_tensor) = dice.tensor(&[entries, kv_heads, if of.values_in_keys { 1 } else { e }], dtype);
        let (slopes, slopes_tensor) = dice.tensor(&[heads], DType::F32);
        let (sinks, sinks_tensor) = dice.tensor(&[heads], DType::F32);
        // With a gap, as a cache has that keeps the first tokens and the last.
        let given: Vec<u32> = (0..entries as u32).map(|i| if i < 4 { i } else { i + 100 }).collect();
        let at = Tensor::new(given.as_slice(), &Device::Cpu).unwrap();
        let positions = positions(&of, &given);
        let launch = of.stretched(dtype).unwrap();
        let stretches = launch.outputs[0].0[2];
        let whole = expected(&of, &q, &k, &v, &positions, &slopes, &sinks);
        let v_tensor = if of.values_in_keys { k_tensor.clone() } else { v_tensor };
        first.push((of, dtype, launch, vec![q_tensor, k_tensor, v_tensor, at, slopes_tensor], sinks_tensor, whole));

        let (sums, _) = dice.tensor(&[tokens, heads, stretches, 2 + e], DType::F32);
        let sums: Vec<f32> =
            sums.iter().enumerate().map(|(i, &x)| if i % (2 + e) == 1 { x.abs() + 0.1 } else { x }).collect();
        let exact: Vec<f64> = sums.iter().map(|&x| f64::from(x)).collect();
        let inputs = [&tensor(&sums, &[tokens, heads, stretches, 2 + e]), &tensor(&sinks, &[heads])];
        let y = (join(&of, &exact, stretches, &sinks), 1.0);
        second.push(Case::new(format!("joined {of:?}"), of.joined(dtype), &inputs, vec![y]));
    }
    let Some(device) = super::stage() else { return };
    if device.is_cpu() {
        let joined = first.iter().filter_map(|(of, dtype, ..)| of.joined(*dtype)).collect::<Vec<_>>();
        let launches = first.iter().map(|(_, _, launch, ..)| launch).chain(&joined);
        tests::metal_stage::learn(launches.map(|launch| &launch.kernel));
    }
    check(|| second);
    for (of, dtype, launch, inputs, sinks, whole) in first {
        let run = |launch, inputs: &[Tensor]| {
            let inputs: Vec<Tensor> = inputs.iter().map(|t| t.to_device(&device).unwrap()).collect();
            dylm::kernels::metal::device::run_one(launch, &inputs.iter().collect::<Vec<_>>()).unwrap()
        };
        let sums = run(&launch, &inputs);
        let y = floats(&run(&of.joined(dtype).unwrap(), &[sums, sinks]));
        assert_eq!(y.len(), whole.len());
        for (i, (&found, &exact)) in y.iter().zip(&whole).enumerate() {
            let near = (f64::from(found) - exact).abs() <= super::rounding(dtype) * exact.abs() + 4e-6;
            assert!(near, "{of:?}: number {i} is {found}, not {exact}");
        }
    }
}
