//! How fast the CPU's matrix kernels are here: `cargo run --release --example kernels [rows cols] [exact] [part of a format's name]`.
//! Decode is one token, in GB/s of packed weights and in weights per second; prefill 512 tokens, in GFLOP/s. Attention: 32
//! query heads over 8 key heads of 128, bf16, one token against 8192 keys and 512 tokens against themselves. Products round activations,
//! as in models of half precision, unless they are to be `exact`.

use dylm::kernels::cpu::{Attend, Float, Format, Isa, Matrix, Panels, Rows, attend};
use dylm::weights::bytes::Bytes;
use std::time::{Duration, Instant};

/// The best of as many runs as fit in a while.
fn seconds(mut run: impl FnMut()) -> f64 {
    run();
    let (start, mut best) = (Instant::now(), Duration::MAX);
    while start.elapsed() < Duration::from_millis(600) {
        let one = Instant::now();
        run();
        best = best.min(one.elapsed());
    }
    best.as_secs_f64()
}

/// A matrix as a model would have it.
enum Weights {
    Rows(Matrix),
    Panels(Panels),
}

impl Weights {
    fn new(m: Matrix, exact: bool) -> Self {
        if exact {
            return Weights::Rows(m);
        }
        let m = m.for_halves();
        Panels::new(&m).map_or(Weights::Rows(m), Weights::Panels)
    }

    fn shape(&self) -> [usize; 2] {
        match self {
            Weights::Rows(m) => [m.rows(), m.cols()],
            Weights::Panels(m) => [m.rows(), m.cols()],
        }
    }

    fn matmul(&self, x: &[f32], out: &mut [f32]) {
        match self {
            Weights::Rows(m) => m.matmul(x, out),
            Weights::Panels(m) => m.matmul(x, out),
        }
    }
}

fn main() {
    let sizes: Vec<usize> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let (rows, cols) = if let [rows, cols] = sizes[..] { (rows, cols) } else { (8192, 2048) };
    let affine = |bits| Format::Affine { bits, group: 64, scales: Float::BF16 };
    let words: Vec<String> = std::env::args().skip(1).filter(|a| a.parse::<usize>().is_err()).collect();
    let exact = words.iter().any(|word| word == "exact");
    let wanted = words.into_iter().find(|word| word != "exact").unwrap_or_default();
    let formats = [
        Format::Dense(Float::F32),
        Format::Dense(Float::F16),
        Format::Dense(Float::BF16),
        affine(2),
        affine(3),
        affine(4),
        affine(5),
        affine(6),
        affine(8),
        Format::Mxfp4,
        Format::Mxfp8,
        Format::Nvfp4,
        Format::Fp8 { block: 128 },
        Format::Nvfp4Scaled,
        Format::Q4_0,
        Format::Q4_1,
        Format::Q5_0,
        Format::Q5_1,
        Format::Q8_0,
        Format::Q2K,
        Format::Q3K,
        Format::Q4K,
        Format::Q5K,
        Format::Q6K,
    ];
    println!("[{rows}, {cols}], {:?}, {} threads", Isa::best(), rayon::current_num_threads());
    println!("{:58} {:>12} {:>14} {:>16}", "format", "decode GB/s", "G weights/s", "prefill GFLOP/s");
    let weights = (rows * cols) as f64;
    for format in formats.into_iter().filter(|format| format!("{format:?}").contains(&wanted)) {
        // Numbers of any kind near 1 (0x3f.. in every float type, 2^-4 as E8M0): only subnormals would take another time.
        let bytes = |n: usize| Bytes::from((0..n).map(|i| [0x7b, 0x3c][i % 2]).collect::<Vec<u8>>());
        let [data, scales, biases] = format.row_bytes(cols).map(|row| bytes(row * rows));
        let m = match Matrix::new(format, rows, cols, data, Some(scales), Some(biases)) {
            Ok(m) => m,
            Err(e) => {
                println!("{e}");
                continue;
            }
        };
        let (packed, m) = (m.bytes(), Weights::new(m, exact));
        let x = vec![0.5f32; 512 * cols];
        let mut out = vec![0.0f32; 512 * rows];
        let decode = seconds(|| m.matmul(&x[..cols], &mut out[..rows]));
        let prefill = seconds(|| m.matmul(&x, &mut out));
        let name = format!("{format:?}");
        let (gb, g, flops) = (packed as f64 / decode / 1e9, weights / decode / 1e9, weights * 1024.0 / prefill / 1e9);
        println!("{name:58} {gb:12.1} {g:14.2} {flops:16.0}");
    }
    if wanted.is_empty() {
        attention();
        [affine(4), affine(8), Format::Dense(Float::BF16), Format::Mxfp4]
            .into_iter()
            .for_each(|format| token(format, exact));
    }
}

/// All matrices that SmolLM2-135M multiplies for one token.
fn token(format: Format, exact: bool) {
    let matrix = |rows: usize, cols: usize| {
        let w: Vec<f32> = (0..rows * cols).map(|i| (i % 1009) as f32 / 1009.0 - 0.5).collect();
        Matrix::quantize(&w, rows, cols, format).map(|m| Weights::new(m, exact))
    };
    let shapes = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)];
    let layers: Result<Vec<Weights>, _> = (0..30).flat_map(|_| shapes).map(|(rows, cols)| matrix(rows, cols)).collect();
    let (Ok(mut all), Ok(head)) = (layers, matrix(49152, 576)) else { return };
    all.push(head);
    let (x, mut out) = (vec![0.5f32; 1536], vec![0.0f32; 49152]);
    let time = seconds(|| {
        for m in &all {
            let [rows, cols] = m.shape();
            m.matmul(&x[..cols], &mut out[..rows]);
        }
    });
    println!("SmolLM2-135M in {format:?}: {:.0} tokens/s", 1.0 / time);
}

fn attention() {
    let how = Attend { scale: 0.1, ..Attend::default() };
    for (tokens, entries) in [(1usize, 8192usize), (512, 512)] {
        let cache = vec![half::bf16::from_f32(0.1); entries * 8 * 128];
        let q = vec![0.1f32; tokens * 32 * 128];
        let mut out = vec![0.0f32; tokens * 32 * 128];
        let keys: Vec<u32> = (0..entries as u32).collect();
        let queries = &keys[entries - tokens..];
        let rows = Rows::BF16(&cache);
        let time = seconds(|| attend(&q, 32, 128, queries, rows, Some(rows), 8, 128, &keys, &how, &mut out));
        let flops = 4.0 * 32.0 * 128.0 * (tokens * entries) as f64 * if tokens == 1 { 1.0 } else { 0.5 };
        let (gb, flops) = (cache.len() as f64 * 4.0 / time / 1e9, flops / time / 1e9);
        println!("attention, {tokens} tokens, {entries} keys: {:.2} ms, {gb:.1} GB/s, {flops:.0} GFLOP/s", time * 1e3);
    }
}
