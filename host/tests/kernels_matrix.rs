//! Packed matrices: layouts held against mlx (stored file) and against candle's GGUF blocks, fast kernels against plain sums.

#[path = "kernels_matrix/coded.rs"]
mod coded;
#[path = "kernels_matrix/halves.rs"]
mod halves;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{Device, Shape};
use dylm::kernels::cpu::{Float, Format, Isa, Matrix};
use dylm::weights::bytes::Bytes;
use safetensors::SafeTensors;

/// A small generator of our own: the same numbers on every machine and in every version of every crate.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.0 >> 33
    }
    fn float(&mut self) -> f32 {
        self.bits() as f32 / (1u64 << 30) as f32 - 1.0
    }
    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }
}

const AFFINE: fn(u32, usize) -> Format = |bits, group| Format::Affine { bits, group, scales: Float::F32 };
const GGUF: [(Format, GgmlDType); 10] = [
    (Format::Q4_0, GgmlDType::Q4_0),
    (Format::Q4_1, GgmlDType::Q4_1),
    (Format::Q5_0, GgmlDType::Q5_0),
    (Format::Q5_1, GgmlDType::Q5_1),
    (Format::Q8_0, GgmlDType::Q8_0),
    (Format::Q2K, GgmlDType::Q2K),
    (Format::Q3K, GgmlDType::Q3K),
    (Format::Q4K, GgmlDType::Q4K),
    (Format::Q5K, GgmlDType::Q5K),
    (Format::Q6K, GgmlDType::Q6K),
];

/// Every format there is.
fn formats() -> Vec<Format> {
    let mut all: Vec<Format> = [Float::F32, Float::F16, Float::BF16].map(Format::Dense).to_vec();
    for bits in [2, 3, 4, 5, 6, 8] {
        for group in [32, 64, 128] {
            all.push(Format::Affine { bits, group, scales: [Float::F32, Float::F16, Float::BF16][group / 32 % 3] });
        }
    }
    all.extend([Format::Mxfp4, Format::Mxfp8, Format::Nvfp4, Format::Nvfp4Scaled]);
    all.extend([128, 48, 1000].map(|block| Format::Fp8 { block }));
    all.extend(GGUF.map(|(format, _)| format));
    all
}

/// Random packed bytes: quantized where we can, otherwise blocks of random bits with sane f16 scales.
fn random(format: Format, rows: usize, cols: usize, random_bits: &mut Random) -> Matrix {
    if !GGUF.iter().any(|(gguf, _)| *gguf == format) {
        return Matrix::quantize(&random_bits.floats(rows * cols), rows, cols, format).unwrap();
    }
    let (block, bytes) = format.block();
    let halves: &[usize] = match format {
        Format::Q4_0 | Format::Q5_0 | Format::Q8_0 => &[0],
        Format::Q2K => &[80, 82],
        Format::Q3K => &[108],
        Format::Q6K => &[208],
        _ => &[0, 2],
    };
    let mut data: Vec<u8> = (0..rows * cols / block * bytes).map(|_| random_bits.bits() as u8).collect();
    for block in data.chunks_exact_mut(bytes) {
        for &at in halves {
            block[at..at + 2].copy_from_slice(&half::f16::from_f32(random_bits.float() * 0.01).to_le_bytes());
        }
    }
    Matrix::new(format, rows, cols, data.into(), None, None).unwrap()
}

fn back(m: &Matrix) -> Vec<f32> {
    let mut out = vec![0.0; m.rows() * m.cols()];
    m.dequantize_rows(0..m.rows(), &mut out);
    out
}

/// An output in f64, and what its error is measured by.
struct Output {
    sum: f64,
    /// Σ |w x|: f32 sums round off a share of it.
    magnitudes: f64,
}

/// out = x · Wᵀ
fn plain(w: &[f32], x: &[f32], cols: usize) -> Vec<Output> {
    let mut out = Vec::new();
    for x in x.chunks_exact(cols) {
        for w in w.chunks_exact(cols) {
            let products = w.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x));
            out.push(Output { sum: products.clone().sum(), magnitudes: products.map(f64::abs).sum() });
        }
    }
    out
}

fn assert_close(got: &[f32], want: &[Output], what: &str) {
    assert_eq!(got.len(), want.len());
    for (i, (&got, want)) in got.iter().zip(want).enumerate() {
        let (error, bound) = ((f64::from(got) - want.sum).abs(), 3e-6 * want.magnitudes + 1e-12);
        assert!(error <= bound, "{what}: output {i} is {got}, not {} (within {bound}, off by {error})", want.sum);
    }
}

fn fixture() -> Vec<u8> {
    std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/quant/quant.safetensors")).unwrap()
}

fn mlx_formats() -> Vec<(String, Format)> {
    let mut all = Vec::new();
    for bits in [2, 3, 4, 5, 6, 8] {
        all.extend([32, 64, 128].map(|group| (format!("affine.{bits}.{group}"), AFFINE(bits, group))));
    }
    let mx = [("mxfp4", Format::Mxfp4), ("mxfp8", Format::Mxfp8), ("nvfp4", Format::Nvfp4)];
    all.extend(mx.map(|(name, format)| (name.to_owned(), format)));
    all
}

fn floats(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    file.tensor(name).unwrap().data().as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
}

#[test]
fn what_mlx_packed_unpacks_to_what_mlx_unpacks() {
    let file = fixture();
    let file = SafeTensors::deserialize(&file).unwrap();
    for (name, format) in mlx_formats() {
        let part = |part: &str| file.tensor(&format!("{name}.{part}")).ok().map(|t| Bytes::from(t.data().to_vec()));
        let m = Matrix::new(format, 2, 128, part("weight").unwrap(), part("scales"), part("biases")).unwrap();
        let want = floats(&file, &format!("{name}.back"));
        for (i, (got, want)) in back(&m).iter().zip(&want).enumerate() {
            assert!((got - want).abs() <= 1e-6 * want.abs() + 1e-9, "{name}: weight {i} is {got}, mlx has {want}");
        }
    }
}

#[test]
fn packing_gives_the_bytes_of_mlx() {
    let file = fixture();
    let file = SafeTensors::deserialize(&file).unwrap();
    let w = floats(&file, "w");
    for (name, format) in mlx_formats() {
        let m = Matrix::quantize(&w, 2, 128, format).unwrap();
        for (part, got) in ["weight", "scales", "biases"].iter().zip(m.parts()) {
            let Ok(want) = file.tensor(&format!("{name}.{part}")) else { continue };
            assert!(got[..] == *want.data(), "{name}.{part}: {:?} where mlx has {:?}", &got[..], want.data());
        }
    }
}

#[test]
fn gguf_blocks_unpack_as_in_candle() {
    let mut r = Random(3);
    for (format, dtype) in GGUF {
        let m = random(format, 3, 512, &mut r);
        let storage = QStorage::from_data(m.parts()[0].to_vec().into(), &Device::Cpu, dtype).unwrap();
        let theirs = QTensor::new(storage, Shape::from((3, 512))).unwrap().dequantize(&Device::Cpu).unwrap();
        let theirs: Vec<f32> = theirs.flatten_all().unwrap().to_vec1().unwrap();
        for (i, (got, want)) in back(&m).iter().zip(&theirs).enumerate() {
            assert!((got - want).abs() <= 1e-6 * want.abs(), "{format:?}: weight {i} is {got}, candle has {want}");
        }
    }
}

#[test]
fn products_agree_with_plain_sums_in_every_format_and_instruction_set() {
    let mut r = Random(11);
    for format in formats() {
        let block = format.block().0;
        for (rows, cols, tokens) in
            [(1, block, 1), (7, block * 3, 2), (13, block * 5, 3), (6, 1280, 4), (9, 768, 5), (5, 768, 70)]
        {
            let m = random(format, rows, cols, &mut r);
            let x = r.floats(tokens * cols);
            let want = plain(&back(&m), &x, cols);
            for isa in Isa::available() {
                let mut got = vec![f32::NAN; tokens * rows];
                m.matmul_on(isa, &x, &mut got);
                assert_close(&got, &want, &format!("{format:?} [{rows}, {cols}] x {tokens} tokens, {isa:?}"));
            }
        }
    }
}

#[test]
fn dense_and_fp8_products_take_any_number_of_columns() {
    let mut r = Random(5);
    let dense = [Float::F32, Float::F16, Float::BF16].map(Format::Dense);
    for format in dense.into_iter().chain([128, 48, 200].map(|block| Format::Fp8 { block })) {
        for cols in [1, 2, 15, 16, 17, 33, 63, 65, 127, 129, 200] {
            let m = random(format, 5, cols, &mut r);
            for tokens in [1, 3, 9] {
                let x = r.floats(tokens * cols);
                let want = plain(&back(&m), &x, cols);
                for isa in Isa::available() {
                    let mut got = vec![f32::NAN; tokens * 5];
                    m.matmul_on(isa, &x, &mut got);
                    assert_close(&got, &want, &format!("{format:?}, {cols} columns, {tokens} tokens, {isa:?}"));
                }
            }
        }
    }
}

#[test]
fn a_token_gives_the_same_bits_alone_and_among_others() {
    let mut r = Random(23);
    for format in formats() {
        let (rows, cols, tokens) = (37, 768, 23);
        let m = random(format, rows, cols, &mut r);
        let x = r.floats(tokens * cols);
        for isa in Isa::available() {
            let mut whole = vec![0.0; tokens * rows];
            m.matmul_on(isa, &x, &mut whole);
            for chunk in [1, 2, 3, 4, 5, 7, 8, 16] {
                let mut parts = vec![0.0; tokens * rows];
                for (x, out) in x.chunks(chunk * cols).zip(parts.chunks_mut(chunk * rows)) {
                    m.matmul_on(isa, x, out);
                }
                assert!(parts == whole, "{format:?} in chunks of {chunk}, {isa:?}");
            }
        }
    }
}

#[test]
fn what_is_no_number_stays_none() {
    let mut r = Random(27);
    for format in formats() {
        let m = random(format, 5, 768, &mut r);
        for stray in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for isa in Isa::available() {
                let mut x = r.floats(2 * 768);
                x[768 + 300] = stray;
                let mut out = [0.0; 10];
                m.matmul_on(isa, &x, &mut out);
                assert!(
                    out[..5].iter().all(|y| y.is_finite()),
                    "{format:?}, {isa:?}: the other token is {:?}",
                    &out[..5]
                );
                assert!(out[5..].iter().all(|y| !y.is_finite()), "{format:?}, {isa:?}: {stray} became {:?}", &out[5..]);
            }
        }
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let mut r = Random(29);
    for format in [AFFINE(4, 64), Format::Dense(Float::BF16), Format::Q6K] {
        let m = random(format, 515, 1024, &mut r);
        for tokens in [1, 40] {
            let x = r.floats(tokens * 1024);
            let on = |threads: usize| {
                let mut out = vec![0.0; tokens * 515];
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| m.matmul(&x, &mut out));
                out
            };
            let one = on(1);
            assert!([2, 3, 7].iter().all(|&n| on(n) == one), "{format:?}, {tokens} tokens");
        }
    }
}

#[test]
fn rows_are_cut_stacked_permuted_and_gathered_as_a_dense_matrix_would_be() {
    let mut r = Random(31);
    for format in formats() {
        let m = random(format, 9, 256, &mut r);
        let all = back(&m);
        let rows = |order: &[usize]| order.iter().flat_map(|&r| all[r * 256..][..256].to_vec()).collect::<Vec<_>>();
        let cut = m.slice_rows(2..5).unwrap();
        assert_eq!(back(&cut), rows(&[2, 3, 4]), "{format:?}");
        assert!(m.slice_rows(5..10).is_none());
        assert_eq!(back(&m.permute_rows(&[8, 0, 0])), rows(&[8, 0, 0]), "{format:?}");
        let stacked = Matrix::stack(&[cut, m.slice_rows(0..1).unwrap()]).unwrap();
        assert_eq!(back(&stacked), rows(&[2, 3, 4, 0]), "{format:?}");
        let mut gathered = vec![0.0; 512];
        m.gather_rows(&[7, 1], &mut gathered);
        assert_eq!(gathered, rows(&[7, 1]), "{format:?}");
        let (x, mut a, mut b) = (r.floats(256), vec![0.0; 9], vec![0.0; 3]);
        m.matmul(&x, &mut a);
        m.slice_rows(2..5).unwrap().matmul(&x, &mut b);
        assert_eq!(a[2..5], b, "{format:?}: a slice multiplies like its rows");
    }
}

#[test]
fn columns_stored_in_another_order_multiply_and_unpack_where_they_belong() {
    let mut r = Random(41);
    let order: Vec<u32> = (0..256).map(|j| (j * 37 + 11) % 256).collect();
    for format in formats() {
        let stored = random(format, 6, 256, &mut r);
        let ordered = stored.clone().with_column_order(order.clone()).unwrap();
        let rows = back(&stored);
        let mut want = vec![0.0; 6 * 256];
        for (j, &column) in order.iter().enumerate() {
            (0..6).for_each(|row| want[row * 256 + column as usize] = rows[row * 256 + j]);
        }
        assert_eq!(back(&ordered), want, "{format:?}");
        assert_eq!(back(&ordered.slice_rows(2..4).unwrap()), want[512..1024], "{format:?}");
        for tokens in [1, 7] {
            let (x, mut got) = (r.floats(tokens * 256), vec![0.0; tokens * 6]);
            ordered.matmul(&x, &mut got);
            assert_close(&got, &plain(&want, &x, 256), &format!("{format:?}, {tokens} tokens"));
        }
        assert!(Matrix::stack(&[ordered.clone(), stored.clone()]).is_err(), "rows in two orders");
        assert_eq!(back(&Matrix::stack(&[ordered.clone(), ordered]).unwrap())[..1536], want);
    }
    let m = random(Format::Mxfp4, 2, 64, &mut r);
    for wrong in [vec![0; 64], (0..63).collect(), (1..65).collect(), vec![]] {
        assert!(m.clone().with_column_order(wrong).unwrap_err().to_string().contains("order of the columns"));
    }
}

#[test]
fn weights_at_an_odd_address_are_read_all_the_same() {
    let mut r = Random(37);
    for format in formats() {
        let m = random(format, 6, 512, &mut r);
        let shift = |part: &Bytes| {
            let mut bytes = vec![0u8; 3];
            bytes.extend_from_slice(part);
            Bytes::from(bytes).slice(3..3 + part.len()).unwrap()
        };
        let [data, scales, biases] = m.parts();
        let odd = Matrix::new(format, 6, 512, shift(data), Some(shift(scales)), Some(shift(biases))).unwrap();
        for tokens in [1, 6] {
            let (x, mut a, mut b) = (r.floats(tokens * 512), vec![0.0; tokens * 6], vec![0.0; tokens * 6]);
            m.matmul(&x, &mut a);
            odd.matmul(&x, &mut b);
            assert_eq!(a, b, "{format:?}");
        }
    }
}

#[test]
fn a_matrix_of_the_wrong_size_is_refused_with_its_shape() {
    let new = |format, rows, cols, n: usize| Matrix::new(format, rows, cols, vec![0u8; n].into(), None, None);
    let text = new(Format::Q4_0, 2, 64, 71).unwrap_err().to_string();
    assert!(text.contains("[2, 64]") && text.contains("71 bytes") && text.contains("72"), "{text}");
    let text = new(Format::Q4K, 2, 64, 72).unwrap_err().to_string();
    assert!(text.contains("multiple of 256"), "{text}");
    assert!(new(AFFINE(4, 64), 2, 64, 64).unwrap_err().to_string().contains("scales"));
    assert!(new(AFFINE(7, 64), 2, 64, 112).is_err() && new(AFFINE(4, 48), 2, 96, 96).is_err());
    assert!(new(Format::Dense(Float::F32), usize::MAX, 64, 64).is_err(), "sizes may not wrap around");
    assert!(
        Matrix::quantize(&[0.0; 64], 2, 32, Format::Q4_0).is_err()
            && Matrix::quantize(&[0.0; 64], 2, 33, Format::Mxfp4).is_err()
    );
}
