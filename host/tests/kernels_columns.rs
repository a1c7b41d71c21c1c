//! Columns of packed matrices, as the ranks of a model on several devices take them: the same numbers, in bytes of the same kind.

use dylm::kernels::cpu::{Float, Format, Matrix};

const FORMATS: [Format; 9] = [
    Format::Dense(Float::F32),
    Format::Dense(Float::BF16),
    Format::Affine { bits: 4, group: 64, scales: Float::BF16 },
    Format::Affine { bits: 3, group: 32, scales: Float::F32 },
    Format::Mxfp4,
    Format::Mxfp8,
    Format::Nvfp4,
    Format::Nvfp4Scaled,
    Format::Fp8 { block: 128 },
];

fn numbers(count: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 2_654_435_761) % 1000) as f32 / 500.0 - 1.0).collect()
}

fn unpacked(matrix: &Matrix) -> Vec<f32> {
    let mut numbers = vec![0.0; matrix.rows() * matrix.cols()];
    matrix.dequantize_rows(0..matrix.rows(), &mut numbers);
    numbers
}

#[test]
fn columns_of_a_packed_matrix_are_its_numbers_and_stay_packed() {
    let (rows, cols) = (3, 512);
    for format in FORMATS {
        let whole = Matrix::quantize(&numbers(rows * cols), rows, cols, format).unwrap();
        let all = unpacked(&whole);
        for range in [0..128, 128..384, 384..512, 0..512] {
            let part = whole.slice_cols(range.clone()).unwrap_or_else(|| panic!("{format:?} {range:?}"));
            assert_eq!((part.format(), part.rows(), part.cols()), (format, rows, range.len()));
            let expected: Vec<f32> = all.chunks(cols).flat_map(|row| &row[range.clone()]).copied().collect();
            assert_eq!(unpacked(&part), expected, "{format:?} {range:?}");
        }
    }
}

#[test]
fn weights_that_share_a_scale_are_not_parted() {
    for (format, unit) in [(FORMATS[2], 64), (FORMATS[4], 32), (FORMATS[8], 128)] {
        let whole = Matrix::quantize(&numbers(512), 1, 512, format).unwrap();
        assert!(whole.slice_cols(0..unit / 2).is_none() && whole.slice_cols(unit / 2..512).is_none(), "{format:?}");
        assert!(whole.slice_cols(unit..513).is_none(), "{format:?}");
    }
    let turned = Matrix::quantize(&numbers(64), 1, 64, FORMATS[0]).unwrap();
    assert!(turned.with_column_order((0..64).rev().collect()).unwrap().slice_cols(0..32).is_none());
}
