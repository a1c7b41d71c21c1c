//! bfloat16 in twelve bits: the same numbers and the same bits of every product, before and after, whatever the weights are. On a machine that
//! codes none these tests have nothing to hold.

use super::{Random, back};
use dylm::kernels::cpu::{Coded, Factor, Float, Format, Matrix, multiply_all};

/// Numbers as trained weights are: normal ones, by the sum of twelve even ones.
fn normal(count: usize, r: &mut Random) -> Vec<f32> {
    (0..count).map(|_| (0..12).map(|_| r.float()).sum::<f32>() * 0.01).collect()
}

fn halves(numbers: &[f32], rows: usize, cols: usize) -> Matrix {
    Matrix::quantize(numbers, rows, cols, Format::Dense(Float::BF16)).unwrap().for_halves()
}

/// Until all is done that is done later: tests may run at the same time, and the one that finds another at it goes on.
fn settle(of: &[Coded]) {
    while of.iter().any(|m| !m.is_settled()) {
        dylm::weights::moving::some();
    }
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|x| x.to_bits()).collect()
}

fn product(m: &Coded, x: &[f32]) -> Vec<u32> {
    let mut out = vec![f32::NAN; x.len() / m.cols() * m.rows()];
    m.matmul(x, &mut out);
    bits(&out)
}

#[test]
fn products_of_coded_weights_have_the_bits_of_the_matrix() {
    let mut r = Random(101);
    for (rows, cols) in [(128, 128), (130, 192), (67, 576), (45, 1000), (9, 4101), (515, 2048)] {
        let m = halves(&normal(rows * cols, &mut r), rows, cols);
        let Some(coded) = Coded::later(&m) else { return };
        for after in [false, true] {
            if after {
                settle(std::slice::from_ref(&coded));
            }
            // Before, another test of the same process may have had it coded.
            assert!(coded.is_coded() || !after, "[{rows}, {cols}]");
            for tokens in [1, 2, 3, 4, 5, 7, 16, 17, 41, 64, 70] {
                let x = r.floats(tokens * cols);
                let mut want = vec![0.0; tokens * rows];
                m.matmul(&x, &mut want);
                assert!(product(&coded, &x) == bits(&want), "[{rows}, {cols}] x {tokens} tokens, coded: {after}");
            }
        }
    }
}

#[test]
fn weights_that_have_no_code_stay_what_they_are() {
    let mut r = Random(103);
    let (rows, cols) = (70, 1000);
    let mut numbers = normal(rows * cols, &mut r);
    // In the first and the last column, twice in one chunk, in chunks that follow each other and in what no chunk holds.
    let strays = [f32::NAN, f32::INFINITY, -1e30, 1e-30, f32::MIN_POSITIVE / 2.0, -0.0, 3e38];
    let places =
        [0, 127, 128, 5 * cols - 1, 6 * cols + 3, 6 * cols + 4, 7 * cols + 895, 7 * cols + 896, 69 * cols + 999];
    for (i, at) in places.into_iter().enumerate() {
        numbers[at] = strays[i % strays.len()];
    }
    let m = halves(&numbers, rows, cols);
    let Some(coded) = Coded::later(&m) else { return };
    settle(std::slice::from_ref(&coded));
    assert!(coded.is_coded());
    let (want, mut got) = (back(&m), vec![0.0; rows * cols]);
    coded.dequantize(&mut got);
    assert!(bits(&got) == bits(&want));
    let (ids, mut some) = ([69, 0, 6], vec![0.0; 3 * cols]);
    coded.gather_rows(&ids, &mut some);
    assert!(some.chunks(cols).zip(ids).all(|(got, id)| bits(got) == bits(&want[id as usize * cols..][..cols])));
    for tokens in [1, 3, 6, 33] {
        let x = r.floats(tokens * cols);
        let mut want = vec![0.0; tokens * rows];
        m.matmul(&x, &mut want);
        let same =
            |(got, want): (u32, u32)| got == want || f32::from_bits(got).is_nan() && f32::from_bits(want).is_nan();
        assert!(product(&coded, &x).into_iter().zip(bits(&want)).all(same), "{tokens} tokens");
    }
}

#[test]
fn weights_of_too_many_magnitudes_are_left_as_they_are() {
    let mut r = Random(107);
    let (rows, cols) = (80, 512);
    let wide: Vec<f32> = r.floats(rows * cols).iter().map(|x| (x * 60.0).exp() * x.signum()).collect();
    let m = halves(&wide, rows, cols);
    let Some(coded) = Coded::later(&m) else { return };
    settle(std::slice::from_ref(&coded));
    assert!(!coded.is_coded());
    let (x, mut want) = (r.floats(3 * cols), vec![0.0; 3 * rows]);
    m.matmul(&x, &mut want);
    assert!(product(&coded, &x) == bits(&want));
}

#[test]
fn coded_weights_and_others_are_multiplied_as_one() {
    let mut r = Random(109);
    let (cols, tokens) = (256, 3);
    let matrices = [64, 100, 33].map(|rows| halves(&normal(rows * cols, &mut r), rows, cols));
    let (Some(first), Some(second)) = (Coded::later(&matrices[0]), Coded::later(&matrices[1])) else { return };
    settle(std::slice::from_ref(&second));
    let x = r.floats(tokens * cols);
    let want = matrices.each_ref().map(|m| {
        let mut out = vec![0.0; tokens * m.rows()];
        m.matmul(&x, &mut out);
        out
    });
    let mut got = want.each_ref().map(|out| vec![f32::NAN; out.len()]);
    let factors = [Factor::Coded(&first), Factor::Coded(&second), Factor::Rows(&matrices[2])];
    multiply_all(factors.into_iter().zip(got.iter_mut().map(Vec::as_mut_slice)).collect(), &x);
    assert!(got.each_ref().map(|out| bits(out)) == want.each_ref().map(|out| bits(out)));
}
