//! Products with packed weights, of chosen experts too, and rows by number, in every format that there is.

use super::{Case, Dice, check};
use candle_core::{DType, Device, Tensor};
use dylm::{
    device::Placement,
    kernels::{
        cpu::{Float, Format, Matrix},
        metal::{
            Packed,
            matmul::{Choice, Shape},
        },
    },
};

/// A matrix of random bits; those of scales are made sound.
fn matrix(dice: &mut Dice, format: Format, rows: usize, cols: usize) -> Matrix {
    let sizes = format.row_bytes(cols).map(|bytes| bytes * rows);
    let mut parts = sizes.map(|size| dice.bytes(size));
    let floats = |dice: &mut Dice, float: Float, size: usize| {
        let mut bytes = Vec::new();
        (0..size / float.size()).for_each(|_| float.write(dice.number(), &mut bytes));
        bytes
    };
    // All ones is no number in E4M3.
    let sound = |bytes: &mut Vec<u8>| bytes.iter_mut().filter(|b| **b & 0x7f == 0x7f).for_each(|b| *b = 1);
    match format {
        Format::Affine { scales, .. } => {
            parts[1] = floats(dice, scales, sizes[1]);
            parts[2] = floats(dice, scales, sizes[2]);
        }
        Format::Mxfp4 | Format::Mxfp8 => parts[1].iter_mut().for_each(|b| *b = 120 + *b % 10),
        Format::Nvfp4 | Format::Nvfp4Scaled => sound(&mut parts[1]),
        Format::Fp8 { .. } => parts[1] = floats(dice, Float::F32, sizes[1]),
        _ => {}
    }
    if format == Format::Nvfp4Scaled {
        parts[2] = floats(dice, Float::F32, sizes[2]);
    }
    if matches!(format, Format::Mxfp8 | Format::Fp8 { .. }) {
        sound(&mut parts[0]);
    }
    let (_, block) = format.block();
    let halves: &[usize] = match format {
        Format::Q4_0 | Format::Q5_0 | Format::Q8_0 => &[0],
        Format::Q4_1 | Format::Q5_1 | Format::Q4K | Format::Q5K => &[0, 2],
        Format::Q2K => &[80, 82],
        Format::Q3K => &[108],
        Format::Q6K => &[208],
        _ => &[],
    };
    for bytes in parts[0].chunks_exact_mut(block) {
        for &at in halves {
            bytes[at..at + 2].copy_from_slice(&floats(dice, Float::F16, 2));
        }
    }
    let [data, scales, biases] = parts.map(Into::into);
    Matrix::new(format, rows, cols, data, Some(scales), Some(biases)).unwrap()
}

fn formats() -> Vec<(Format, usize)> {
    let affine = |bits, group, scales| Format::Affine { bits, group, scales };
    let mut formats = Vec::new();
    for (i, bits) in [2, 3, 4, 5, 6, 8].into_iter().enumerate() {
        let scales = [Float::BF16, Float::F16, Float::F32];
        formats.push((affine(bits, 32, scales[i % 3]), 7 * 32));
        formats.push((affine(bits, 64, scales[(i + 1) % 3]), 5 * 64));
        formats.push((affine(bits, 128, scales[(i + 2) % 3]), 3 * 128));
    }
    formats.extend([(Format::Mxfp4, 96), (Format::Mxfp8, 288), (Format::Nvfp4, 272), (Format::Nvfp4Scaled, 48)]);
    formats.extend([
        (Format::Fp8 { block: 128 }, 301),
        (Format::Fp8 { block: 20 }, 77),
        (Format::Fp8 { block: 64 }, 7),
    ]);
    formats.extend([Format::Q4_0, Format::Q4_1, Format::Q5_0, Format::Q5_1, Format::Q8_0].map(|f| (f, 9 * 32)));
    formats.extend([Format::Q2K, Format::Q3K, Format::Q4K, Format::Q5K, Format::Q6K].map(|f| (f, 3 * 256)));
    formats
}

fn bytes(part: &[u8]) -> Tensor {
    // A part that is not there is never read.
    let part = if part.is_empty() { &[0][..] } else { part };
    Tensor::from_slice(part, part.len(), &Device::Cpu).unwrap()
}

/// A matrix with its numbers and its parts as tensors.
struct Weights {
    shape: Shape,
    numbers: Vec<f32>,
    parts: [Tensor; 3],
}

impl Weights {
    fn new(dice: &mut Dice, format: Format, rows: usize, cols: usize) -> Self {
        let m = matrix(dice, format, rows, cols);
        let mut numbers = vec![0.0; rows * cols];
        m.dequantize_rows(0..rows, &mut numbers);
        assert!(numbers.iter().all(|x| x.is_finite()));
        let [data, scales, biases] = m.parts();
        Weights { shape: Shape { format, rows, cols }, numbers, parts: [bytes(data), bytes(scales), bytes(biases)] }
    }

    /// A row of x times rows `from..from + rows`; and how large the terms are.
    fn times(&self, x: &[f32], from: usize, rows: usize, out: &mut (Vec<f64>, f64)) {
        for row in self.numbers[from * x.len()..].chunks(x.len()).take(rows) {
            let terms: Vec<f64> = row.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x)).collect();
            out.0.push(terms.iter().sum());
            out.1 = out.1.max(terms.iter().map(|t| t.abs()).sum());
        }
    }

    fn inputs<'a>(&'a self, rest: &[&'a Tensor]) -> Vec<&'a Tensor> {
        self.parts.iter().chain(rest.iter().copied()).collect()
    }
}

const TYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

#[test]
fn products_with_few_rows_are_the_sums_in_every_format() {
    check(|| {
        let mut dice = Dice(1);
        let mut cases = Vec::new();
        for (i, (format, cols)) in formats().into_iter().enumerate() {
            // One token and several, in all types over the formats.
            for (tokens, dtype) in [(1, TYPES[i % 3]), ([2, 3, 5, 8][i % 4], TYPES[(i + 1) % 3])] {
                let rows = 1 + dice.below(21);
                let w = Weights::new(&mut dice, format, rows, cols);
                let (x, x_tensor) = dice.tensor(&[tokens, cols], dtype);
                let mut y = (Vec::new(), 0.0);
                x.chunks(cols).for_each(|x| w.times(x, 0, rows, &mut y));
                let what = format!("{tokens} tokens in {dtype:?} by {format:?} [{rows}, {cols}]");
                cases.push(Case::new(what, w.shape.matmul(tokens, dtype), &w.inputs(&[&x_tensor]), vec![y]));
            }
        }
        cases
    });
}

#[test]
fn products_with_many_rows_are_the_sums_in_every_format() {
    check(|| {
        let mut dice = Dice(2);
        let mut cases = Vec::new();
        for (i, (format, cols)) in formats().into_iter().enumerate() {
            let (tokens, rows, dtype) = (9 + dice.below(50), 1 + dice.below(70), TYPES[i % 3]);
            let w = Weights::new(&mut dice, format, rows, cols);
            let (x, x_tensor) = dice.tensor(&[tokens, cols], dtype);
            let mut y = (Vec::new(), 0.0);
            x.chunks(cols).for_each(|x| w.times(x, 0, rows, &mut y));
            let what = format!("{tokens} tokens in {dtype:?} by {format:?} [{rows}, {cols}]");
            cases.push(Case::new(what, w.shape.matmul(tokens, dtype), &w.inputs(&[&x_tensor]), vec![y]));
        }
        cases
    });
}

#[test]
fn rows_by_number_are_the_rows_and_chosen_experts_give_their_products() {
    check(|| {
        let mut dice = Dice(3);
        let mut cases = Vec::new();
        for (i, (format, cols)) in formats().into_iter().enumerate() {
            let dtype = TYPES[i % 3];
            let w = Weights::new(&mut dice, format, 13, cols);
            let ids: Vec<u32> = (0..6).map(|_| dice.below(13) as u32).collect();
            let row = |&id: &u32| w.numbers[id as usize * cols..(id as usize + 1) * cols].iter().map(|&x| f64::from(x));
            // An affine weight is a product and a sum, of which the sum may be small.
            let largest = w.numbers.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            let y = (ids.iter().flat_map(row).collect(), f64::from(largest) / 4.0);
            let ids = Tensor::new(ids.as_slice(), &Device::Cpu).unwrap();
            cases.push(Case::new(format!("rows of {format:?}"), w.shape.gather(6, dtype), &w.inputs(&[&ids]), vec![y]));

            let (experts, rows, each) = (4, 11, if i % 2 == 0 { 2 } else { 1 });
            let w = Weights::new(&mut dice, format, experts * rows, cols);
            // The fifth is none.
            let chosen: Vec<u32> = (0..6).map(|_| dice.below(5) as u32).collect();
            let (x, x_tensor) = dice.tensor(&[6 / each, cols], dtype);
            let mut y = (Vec::new(), 0.0);
            for (pair, &expert) in chosen.iter().enumerate() {
                match expert {
                    4 => y.0.extend([0.0; 11]),
                    e => w.times(&x[pair / each * cols..(pair / each + 1) * cols], e as usize * rows, rows, &mut y),
                }
            }
            let chosen = Tensor::new(chosen.as_slice(), &Device::Cpu).unwrap();
            let launch = Shape { rows, ..w.shape }.chosen(6, Choice { experts, each }, dtype);
            cases.push(Case::new(format!("experts in {format:?}"), launch, &w.inputs(&[&x_tensor, &chosen]), vec![y]));
        }
        cases
    });
}

#[test]
fn columns_in_another_order_and_some_of_the_rows_give_what_they_stand_for() {
    let Some(device) = super::stage() else { return };
    let (mut dice, format) = (Dice(12), Format::Affine { bits: 4, group: 32, scales: Float::F32 });
    let (rows, cols) = (12, 96);
    let order: Vec<u32> = (0..cols as u32).map(|i| i * 35 % cols as u32).collect();
    let m = matrix(&mut dice, format, rows, cols).with_column_order(order).unwrap();
    let place = Placement { device: device.clone(), dtype: DType::F32, native: false };
    let packed = Packed::place(&m, &place).unwrap().unwrap();
    let part = packed.slice_rows(4..9).unwrap();
    assert!(packed.slice_rows(4..13).is_none());
    let halves = [packed.slice_rows(0..6).unwrap(), packed.slice_rows(6..12).unwrap()];
    assert_eq!(Packed::joined(&halves).map(|whole| whole.rows()), Some(12));
    assert!(Packed::joined(halves.iter().rev()).is_none());
    let mut numbers = vec![0.0; rows * cols];
    m.dequantize_rows(0..rows, &mut numbers);
    let near = |what: &str, found: &Tensor, exact: Vec<f64>| {
        let found = super::floats(found);
        assert_eq!(found.len(), exact.len());
        for (a, b) in found.iter().zip(exact) {
            assert!((f64::from(*a) - b).abs() < 1e-4, "{what}: {a} is not {b}");
        }
    };
    for tokens in [3, 10] {
        let (x, x_tensor) = dice.tensor(&[tokens, cols], DType::F32);
        let dot = |x: &[f32], row: &[f32]| x.iter().zip(row).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum::<f64>();
        let exact = x.chunks(cols).flat_map(|x| numbers.chunks(cols).skip(4).take(5).map(move |row| dot(x, row)));
        near("product", &part.matmul(&x_tensor.to_device(&device).unwrap()).unwrap(), exact.collect());
    }
    let ids = Tensor::new(&[2u32, 0], &device).unwrap();
    let exact =
        [6, 4].into_iter().flat_map(|row: usize| numbers[row * cols..(row + 1) * cols].iter().map(|&w| f64::from(w)));
    near("rows", &part.gather(&ids).unwrap(), exact.collect());
}
