//! Products that may round activations: how much they do, and that everything else about them is as exact as elsewhere. On a machine
//! without the instructions there are no panels, and the tests of these have nothing to hold.

use super::{Random, back, formats, random};
use dylm::{
    kernels::cpu::{Float, Format, Isa, Matrix, Panels},
    weights::bytes::Bytes,
};

/// Columns whose activations share a step, and the largest error of one relative to the largest of them.
fn rounding(format: Format) -> (usize, f64) {
    let (one_byte, two_bytes) = (1.0 / 254.0, 1.0 / 65_024.0);
    match format {
        Format::Affine { bits: 5 | 6 | 8, group, .. } => (group, two_bytes),
        Format::Q5_0 | Format::Q5_1 | Format::Q8_0 | Format::Q5K => (32, two_bytes),
        Format::Q6K => (16, two_bytes),
        Format::Affine { group, .. } => (group, one_byte),
        Format::Mxfp8 | Format::Fp8 { .. } => (32, 1.0 / 512.0),
        Format::Nvfp4 | Format::Nvfp4Scaled | Format::Q2K | Format::Q3K => (16, one_byte),
        _ => (32, one_byte),
    }
}

/// Whether so many tokens meet panels that are opened, both as bfloat16: on a matrix unit, or where one byte of each activation is not enough.
fn opened(format: Format, tokens: usize) -> bool {
    let float = matches!(format, Format::Mxfp8 | Format::Fp8 { .. });
    let by_pairs = Isa::best().has_vnni() && multiplies_pairs() && (float || rounding(format).1 < 1.0 / 512.0);
    match Isa::best() {
        Isa::Amx => tokens > if float { 16 } else { 32 },
        _ => by_pairs && tokens > if float { 16 } else { 64 },
    }
}

#[cfg(target_arch = "x86_64")]
fn multiplies_pairs() -> bool {
    is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512vbmi")
}

#[cfg(not(target_arch = "x86_64"))]
fn multiplies_pairs() -> bool {
    false
}

/// The fewest columns that a matrix in panels may have.
fn unit(format: Format) -> usize {
    if let Format::Fp8 { block } = format { block } else { format.block().0 }
}

fn panels() -> Vec<Format> {
    let mut r = Random(2);
    formats().into_iter().filter(|&f| Panels::new(&random(f, 16, unit(f), &mut r)).is_some()).collect()
}

#[test]
fn every_format_of_whole_numbers_has_panels_where_any_has() {
    let whole = |&f: &Format| !matches!(f, Format::Dense(_) | Format::Mxfp8 | Format::Fp8 { .. });
    let have: Vec<_> = panels().into_iter().filter(whole).collect();
    let want: Vec<_> = formats().into_iter().filter(whole).collect();
    assert!(have.is_empty() || have == want, "{have:?}");
}

#[test]
fn a_matrix_in_panels_unpacks_to_the_same_numbers() {
    let mut r = Random(41);
    for format in panels() {
        for (rows, blocks) in [(16, 1), (37, 3), (64, 5)] {
            let m = random(format, rows, unit(format) * blocks, &mut r);
            let (p, want) = (Panels::new(&m).unwrap(), back(&m));
            let mut got = vec![f32::NAN; want.len()];
            p.dequantize(&mut got);
            assert!(got == want, "{format:?} [{rows}, {}]", m.cols());
            let ids = [rows as u32 - 1, 0, 7];
            let mut some = vec![f32::NAN; 3 * m.cols()];
            p.gather_rows(&ids, &mut some);
            for (id, row) in ids.iter().zip(some.chunks(m.cols())) {
                assert!(row == &want[*id as usize * m.cols()..][..m.cols()], "{format:?}, row {id}");
            }
        }
    }
}

#[test]
fn products_in_panels_are_off_by_the_rounding_of_activations_alone() {
    let mut r = Random(43);
    for format in panels() {
        let (group, rounding) = rounding(format);
        let shapes =
            [(16, 1, 1), (37, 3, 2), (70, 5, 3), (129, 7, 4), (33, 4, 5), (16, 6, 13), (50, 2, 70), (145, 8, 33)];
        // More columns than are opened at a time; four panels that are multiplied together, and one, two and three behind them.
        let long = [(70, 67), (90, 19), (90, 66), (105, 71)]
            .map(|(rows, tokens)| (rows, 1100usize.div_ceil(unit(format)), tokens));
        for (rows, blocks, tokens) in shapes.into_iter().chain(long) {
            let m = random(format, rows, unit(format) * blocks, &mut r);
            let (cols, w) = (m.cols(), back(&m));
            let x: Vec<f32> = r.floats(tokens * cols).into_iter().map(|x| x * x * x).collect();
            let mut got = vec![f32::NAN; tokens * rows];
            Panels::new(&m).unwrap().matmul(&x, &mut got);
            for (t, x) in x.chunks(cols).enumerate() {
                for (row, w) in w.chunks(cols).enumerate() {
                    let (mut want, mut bound) = (0.0, 1e-12);
                    for (x, w) in x.chunks(group).zip(w.chunks(group)) {
                        let peak = x.iter().fold(0f32, |m, x| m.max(x.abs()));
                        // What f32 sums may be off by is relative to all that was added up, biases too: a hundredth of the rounding.
                        bound +=
                            w.iter().map(|w| f64::from(w.abs())).sum::<f64>() * f64::from(peak) * (rounding + 4e-6);
                        want += w.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum::<f64>();
                    }
                    if opened(format, tokens) && cols.is_multiple_of(32) {
                        // Both factors rounded by half a unit in their eighth bit, and sums in f32.
                        let magnitudes = w.iter().zip(x).map(|(&w, &x)| f64::from((w * x).abs())).sum::<f64>();
                        bound = magnitudes * (2f64.powi(-8) + 2f64.powi(-18) + cols as f64 * 2f64.powi(-24)) + 1e-12;
                    }
                    let error = (f64::from(got[t * rows + row]) - want).abs();
                    assert!(
                        error <= bound,
                        "{format:?} [{rows}, {cols}], token {t} of {tokens}: off by {error}, within {bound}"
                    );
                }
            }
        }
    }
}

#[test]
fn products_in_panels_have_the_same_bits_with_every_instruction_set() {
    let mut r = Random(73);
    for format in panels() {
        for (rows, blocks, tokens) in [
            (16, 1, 1),
            (37, 4, 1),
            (37, 3, 2),
            (70, 5, 3),
            (129, 7, 4),
            (33, 4, 5),
            (16, 6, 13),
            (50, 2, 23),
            (18, 3, 40),
        ] {
            let m = random(format, rows, unit(format) * blocks, &mut r);
            let (p, x) = (Panels::new(&m).unwrap(), r.floats(tokens * m.cols()));
            let x: Vec<f32> = x.into_iter().map(|x| x * x * x).collect();
            let on = |isa| {
                let mut out = vec![f32::NAN; tokens * rows];
                p.matmul_on(isa, &x, &mut out);
                out
            };
            let plain = on(Isa::Portable);
            // `opened` speaks of the best one, which need not be all there is.
            let same_way = |&isa: &Isa| isa != Isa::Amx || Isa::best() == Isa::Amx && !opened(format, tokens);
            for isa in Isa::available().into_iter().filter(same_way) {
                let same = on(isa).iter().zip(&plain).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{format:?} [{rows}, {}] x {tokens} tokens, {isa:?}", m.cols());
            }
        }
    }
}

/// The same matrix, in a file.
fn in_a_file(m: &Matrix) -> Matrix {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), m.parts().iter().flat_map(|part| part.to_vec()).collect::<Vec<u8>>()).unwrap();
    let (all, mut at) = (Bytes::map(file.path()).unwrap(), 0);
    let [data, scales, biases] = m.parts().each_ref().map(|part| {
        at += part.len();
        all.slice(at - part.len()..at).unwrap()
    });
    Matrix::new(m.format(), m.rows(), m.cols(), data, Some(scales), Some(biases)).unwrap()
}

#[test]
fn a_matrix_that_is_packed_later_has_the_same_bits_before_and_after() {
    let mut r = Random(79);
    for format in panels() {
        for (rows, blocks, tokens) in [(16, 1, 1), (37, 3, 2), (70, 5, 3), (129, 7, 9), (33, 4, 16), (290, 2, 70)] {
            let m = random(format, rows, unit(format) * blocks, &mut r);
            let (at_once, file) = (Panels::new(&m).unwrap(), in_a_file(&m));
            let later = [Panels::later(&m).unwrap(), Panels::later(&file).unwrap()];
            let x = r.floats(tokens * m.cols());
            let product = |p: &Panels| {
                let mut out = vec![f32::NAN; tokens * rows];
                p.matmul(&x, &mut out);
                out.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            let (want, numbers, ids) = (product(&at_once), back(&m), [rows as u32 - 1, 0, 7]);
            let is = |p: &Panels, when: &str| {
                let what = format!("{format:?} [{rows}, {}] x {tokens} tokens, {when}", m.cols());
                assert!(product(p) == want, "{what}");
                let (mut all, mut some) = (vec![f32::NAN; numbers.len()], vec![f32::NAN; 3 * m.cols()]);
                p.dequantize(&mut all);
                p.gather_rows(&ids, &mut some);
                assert!(all == numbers, "{what}");
                assert!(
                    some.chunks(m.cols())
                        .zip(ids)
                        .all(|(row, id)| row == &numbers[id as usize * m.cols()..][..m.cols()])
                );
            };
            later.iter().for_each(|p| is(p, "as it lies"));
            let shared = later[1].clone();
            // Tests may run at the same time, and the one that finds another at it goes on.
            while later.iter().any(|p| !p.is_packed()) {
                dylm::weights::moving::some();
            }
            later.iter().for_each(|p| is(p, "packed"));
            assert!(shared.is_packed());
        }
    }
}

#[test]
fn bfloat16_products_for_halves_are_off_by_half_a_unit_of_each_activation() {
    let mut r = Random(47);
    let shapes =
        [(1, 1, 1), (5, 33, 2), (13, 64, 3), (8, 200, 4), (37, 96, 5), (9, 1000, 31), (33, 96, 64), (70, 333, 49)];
    // More columns than are multiplied before the next rows come.
    for (rows, cols, tokens) in shapes.into_iter().chain([(35, 4200, 40)]) {
        let m = random(Format::Dense(Float::BF16), rows, cols, &mut r).for_halves();
        let (x, w) = (r.floats(tokens * cols), back(&m));
        let mut got = vec![f32::NAN; tokens * rows];
        m.matmul(&x, &mut got);
        for (t, x) in x.chunks(cols).enumerate() {
            for (row, w) in w.chunks(cols).enumerate() {
                let products = w.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x));
                let (want, bound) =
                    (products.clone().sum::<f64>(), products.map(f64::abs).sum::<f64>() * 2f64.powi(-8));
                let error = (f64::from(got[t * rows + row]) - want).abs();
                assert!(error <= bound, "[{rows}, {cols}], token {t} of {tokens}: off by {error}, within {bound}");
            }
        }
    }
}

#[test]
fn fp8_rows_of_one_scale_lie_in_panels_as_they_are_elsewhere() {
    let mut r = Random(79);
    let format = Format::Fp8 { block: 1000 };
    for (rows, cols, tokens) in [(16, 32, 1), (37, 96, 3), (50, 640, 17)] {
        let m = random(format, rows, cols, &mut r);
        let Some(p) = Panels::new(&m) else { return };
        let (x, mut got, mut want) = (r.floats(tokens * cols), vec![0.0; tokens * rows], vec![0.0; tokens * rows]);
        let x: Vec<f32> = x.into_iter().map(|x| half::bf16::from_f32(x).to_f32()).collect();
        p.matmul(&x, &mut got);
        m.matmul(&x, &mut want);
        let (w, largest) = (back(&m), want.iter().fold(0f32, |m, x| m.max(x.abs())));
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            let (x, w) = (&x[i / rows * cols..][..cols], &w[i % rows * cols..][..cols]);
            // Where they are opened weights with their scales are rounded to bfloat16.
            let rounding = if opened(format, tokens) { 1.0 / 512.0 } else { 0.0 };
            let bound = 1e-5 * largest + rounding * w.iter().zip(x).map(|(w, x)| (w * x).abs()).sum::<f32>();
            assert!((got - want).abs() <= bound, "[{rows}, {cols}] x {tokens} tokens: {got}, not {want}");
        }
    }
    assert!(Panels::new(&random(format, 16, 40, &mut r)).is_none(), "40 columns are not added up by 32");
}

/// The instruction set is chosen once a process, so a machine with a matrix unit is tested without it in another one.
#[test]
fn all_of_this_holds_without_a_matrix_unit() {
    if Isa::best() == Isa::Amx {
        let mut run = std::process::Command::new(std::env::current_exe().unwrap());
        let run = run.arg("halves::").env("DYLM_ISA", "vnni").output().unwrap();
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stdout));
    }
}

/// Some products of one kind.
type Product<'a> = Box<dyn Fn(&[f32], &mut [f32]) + Sync + 'a>;

fn kinds(rows: usize, cols: usize, r: &mut Random) -> Vec<(Format, Product<'static>)> {
    let in_panels = panels().into_iter().map(|format| {
        let p = Panels::new(&random(format, rows, cols, r)).unwrap();
        (format, Box::new(move |x: &[f32], out: &mut [f32]| p.matmul(x, out)) as Product)
    });
    let mut all: Vec<_> = in_panels.collect();
    let m = random(Format::Dense(Float::BF16), rows, cols, r).for_halves();
    all.push((m.format(), Box::new(move |x: &[f32], out: &mut [f32]| m.matmul(x, out))));
    all
}

#[test]
fn a_rounded_token_gives_the_same_bits_alone_and_among_others() {
    let mut r = Random(53);
    let (rows, cols, tokens) = (101, 768, 70);
    for (format, product) in kinds(rows, cols, &mut r) {
        let x = r.floats(tokens * cols);
        let (mut whole, mut alone) = (vec![0.0; tokens * rows], vec![0.0; tokens * rows]);
        product(&x, &mut whole);
        x.chunks(cols).zip(alone.chunks_mut(rows)).for_each(|(x, out)| product(x, out));
        // Every number of tokens up to which the next weights are fetched while they pass.
        for chunk in (2..=64).chain([tokens]) {
            for (i, x) in x.chunks(chunk * cols).enumerate() {
                let mut part = vec![0.0; x.len() / cols * rows];
                product(x, &mut part);
                let apart = opened(format, x.len() / cols) && format != Format::Dense(Float::BF16);
                let like = if apart { &whole } else { &alone };
                assert!(part == like[i * chunk * rows..][..part.len()], "{format:?} in chunks of {chunk}");
            }
        }
    }
}

#[test]
fn what_is_no_number_stays_none_when_it_is_rounded() {
    let mut r = Random(59);
    for (format, product) in kinds(16, 768, &mut r) {
        for (stray, tokens) in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY].into_iter().zip([2, 40, 70]) {
            let mut x = r.floats(tokens * 768);
            x[(tokens - 1) * 768 + 300] = stray;
            let mut out = vec![0.0; tokens * 16];
            product(&x, &mut out);
            let (others, last) = out.split_at((tokens - 1) * 16);
            assert!(others.iter().all(|y| y.is_finite()), "{format:?}: another token is {others:?}");
            assert!(last.iter().all(|y| !y.is_finite()), "{format:?}: {stray} became {last:?}");
        }
    }
}

#[test]
fn rounded_results_do_not_depend_on_the_number_of_threads() {
    let mut r = Random(61);
    for (format, product) in kinds(515, 1024, &mut r) {
        for tokens in [1, 40, 70] {
            let x = r.floats(tokens * 1024);
            let on = |threads: usize| {
                let mut out = vec![0.0; tokens * 515];
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| product(&x, &mut out));
                out
            };
            let one = on(1);
            assert!([2, 3, 7].iter().all(|&n| on(n) == one), "{format:?}, {tokens} tokens");
        }
    }
}
