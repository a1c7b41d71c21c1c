//! Norms, rotary positions, gates, softmax and argmax against f64.

use dylm::kernels::cpu::{
    Angles, Turn, argmax, gelu_tanh_mul, largest, layer_norm, rms_norm, rope, silu_mul, softmax_rows,
};

fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as f32 / (1u64 << 30) as f32 - 1.0
    };
    (0..n).map(|_| next() * 4.0).collect()
}

fn assert_close(got: &[f32], want: impl IntoIterator<Item = f64>, bound: f64, what: &str) {
    let want: Vec<f64> = want.into_iter().collect();
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (&got, want)) in got.iter().zip(want).enumerate() {
        assert!((f64::from(got) - want).abs() <= bound * (1.0 + want.abs()), "{what}: number {i} is {got}, not {want}");
    }
}

#[test]
fn norms_have_their_textbook_values_for_odd_and_large_rows() {
    for (rows, dim) in [(1, 1), (3, 7), (2, 16), (5, 33), (1, 576), (70, 1000)] {
        let (x, w, b) = (numbers(rows * dim, 1), numbers(dim, 2), numbers(dim, 3));
        let mut out = vec![f32::NAN; x.len()];
        let want = |centred: bool, weighted: bool| {
            x.chunks(dim)
                .flat_map(|row| {
                    let n = dim as f64;
                    let mean = if centred { row.iter().map(|&x| f64::from(x)).sum::<f64>() / n } else { 0.0 };
                    let var = row.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n;
                    let one = |(i, &x): (usize, &f32)| {
                        let v = (f64::from(x) - mean) / (var + 1e-5).sqrt();
                        let v = if weighted { v * f64::from(w[i]) } else { v };
                        if centred && weighted { v + f64::from(b[i]) } else { v }
                    };
                    row.iter().enumerate().map(one).collect::<Vec<_>>()
                })
                .collect::<Vec<_>>()
        };
        rms_norm(&x, Some(&w), 1e-5, dim, &mut out);
        assert_close(&out, want(false, true), 2e-6, "rms");
        rms_norm(&x, None, 1e-5, dim, &mut out);
        assert_close(&out, want(false, false), 2e-6, "rms without weight");
        if dim > 1 {
            layer_norm(&x, Some(&w), Some(&b), 1e-5, dim, &mut out);
            assert_close(&out, want(true, true), 1e-5, "layer norm");
            layer_norm(&x, None, None, 1e-5, dim, &mut out);
            assert_close(&out, want(true, false), 1e-5, "layer norm without weight");
        }
    }
}

#[test]
fn rope_turns_the_first_lanes_of_each_head_and_leaves_the_rest() {
    for (tokens, heads, head_dim, pairs) in
        [(1, 1, 2, 1), (3, 2, 20, 7), (5, 3, 64, 32), (40, 9, 64, 16), (2, 2, 33, 16)]
    {
        let frequencies: Vec<f32> = (0..pairs).map(|i| 10_000f32.powf(-(i as f32) / pairs as f32)).collect();
        let positions: Vec<f32> = (0..tokens).map(|t| (t * 4099) as f32).collect();
        for interleaved in [false, true] {
            let x = numbers(tokens * heads * head_dim, 5);
            let mut want: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
            for (row, head) in want.chunks_mut(head_dim).enumerate() {
                for (i, &frequency) in frequencies.iter().enumerate() {
                    let (a, b) = if interleaved { (2 * i, 2 * i + 1) } else { (i, i + pairs) };
                    let (s, c) = (f64::from(positions[row / heads]) * f64::from(frequency)).sin_cos();
                    (head[a], head[b]) = (1.5 * (head[a] * c - head[b] * s), 1.5 * (head[b] * c + head[a] * s));
                }
            }
            let mut got = x.clone();
            rope(&mut got, &positions, heads, head_dim, &frequencies, interleaved, 1.5);
            assert_close(&got, want, 2e-6, "rope");
            let mut still = x.clone();
            rope(&mut still, &positions, heads, head_dim, &[], interleaved, 1.5);
            assert_eq!(still, x);
        }
    }
}

#[test]
fn rope_turns_the_last_lanes_where_it_is_asked_to_and_back_again() {
    let (heads, head_dim, pairs, tokens) = (3, 44, 18, 4);
    let angles = Angles::new(&[0.0, 3.0, 70.0, 4099.0], &numbers(pairs, 3), 1.0);
    let x = numbers(tokens * heads * head_dim, 5);
    for neighbours in [false, true] {
        // As the first lanes of heads whose lanes have gone round.
        let round = |x: &[f32], by: usize| -> Vec<f32> {
            x.chunks(head_dim).flat_map(|head| [&head[by..], &head[..by]].concat()).collect()
        };
        let mut want = round(&x, head_dim - 2 * pairs);
        angles.rotate(&mut want, heads, head_dim, Turn { neighbours, ..Turn::default() });
        let (mut got, turn) = (x.clone(), Turn { neighbours, last: true, back: false });
        angles.rotate(&mut got, heads, head_dim, turn);
        assert_eq!(got, round(&want, 2 * pairs));
        angles.rotate(&mut got, heads, head_dim, Turn { back: true, ..turn });
        assert_close(&got, x.iter().map(|&x| x.into()), 2e-6, "there and back");
    }
}

#[test]
fn gates_have_their_textbook_values_and_survive_extremes() {
    for n in [1, 5, 16, 31, 1000, 40_000] {
        let (gate, up) = (numbers(n, 7).iter().map(|x| x * 5.0).collect::<Vec<_>>(), numbers(n, 8));
        let mut out = vec![f32::NAN; n];
        let pairs = || gate.iter().zip(&up).map(|(&g, &u)| (f64::from(g), f64::from(u)));
        silu_mul(&gate, &up, &mut out);
        assert_close(&out, pairs().map(|(g, u)| g / (1.0 + (-g).exp()) * u), 2e-6, "silu");
        gelu_tanh_mul(&gate, &up, &mut out);
        let inner = |g: f64| (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g.powi(3));
        assert_close(&out, pairs().map(|(g, u)| 0.5 * g * (1.0 + inner(g).tanh()) * u), 2e-6, "gelu");
    }
    let (x, mut out) = ([-1e30, -200.0, -0.0, 0.0, 200.0, 1e30], [0.0; 6]);
    silu_mul(&x, &[1.0; 6], &mut out);
    assert!(out[..4].iter().all(|x| x.abs() < 1e-6) && out[4..] == [200.0, 1e30], "{out:?}");
    gelu_tanh_mul(&x, &[1.0; 6], &mut out);
    assert!(out[..4].iter().all(|x| x.abs() < 1e-6) && out[4..] == [200.0, 1e30], "{out:?}");
}

#[test]
fn softmax_rows_add_up_to_one_or_to_nothing() {
    for cols in [1, 3, 16, 33, 1000, 49_152] {
        let mut x = numbers(3 * cols, 9);
        x[..cols].fill(f32::NEG_INFINITY);
        x[cols] = f32::NEG_INFINITY;
        x[cols * 2 - 1] += 90.0;
        let want: Vec<f64> = x[cols..]
            .chunks(cols)
            .flat_map(|row| {
                let peak = row.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
                let e: Vec<f64> = row.iter().map(|&x| f64::from(x - peak).exp()).collect();
                let sum: f64 = e.iter().sum();
                e.into_iter().map(move |e| e / sum).collect::<Vec<_>>()
            })
            .collect();
        softmax_rows(&mut x, cols);
        assert!(x[..cols].iter().all(|&x| x == 0.0), "a row of -inf");
        if cols > 1 {
            assert_eq!(x[cols], 0.0, "a masked number weighs exactly nothing");
            assert_close(&x[cols..], want, 3e-6, "softmax");
        }
    }
}

#[test]
fn argmax_is_the_first_of_the_largest_and_ignores_nan() {
    assert_eq!(argmax(&[]), 0);
    assert_eq!(argmax(&[f32::NAN, f32::NAN]), 0);
    assert_eq!(argmax(&[f32::NAN, -3.0, -2.0, f32::NAN, -2.0]), 2);
    for n in [1, 15, 16, 17, 100, 5000] {
        let mut x = numbers(n, 10);
        for at in [0, n / 2, n - 1] {
            let before = x[at];
            x[at] = 99.0;
            assert_eq!(argmax(&x), at);
            x[n - 1] = 99.0;
            assert_eq!(argmax(&x), at, "the first of equals");
            x[n - 1] = if at == n - 1 { before } else { 0.5 };
            x[at] = before;
        }
        x[n / 3] = f32::NAN;
        x[n - 1] = 99.0;
        assert_eq!(argmax(&x), n - 1);
    }
}

#[test]
fn the_largest_come_in_their_order_and_of_equals_the_first_one_first() {
    assert!(largest(&[], 3).is_empty());
    assert_eq!(largest(&[1.0, f32::NAN, 2.0, 1.0, -0.0, 0.0], 9), [1, 2, 0, 3, 5, 4]);
    for n in [1, 2, 17, 128, 1000] {
        let x: Vec<f32> = numbers(n, 12).into_iter().map(f32::round).collect();
        let mut sorted: Vec<u32> = (0..n as u32).collect();
        sorted.sort_by(|&a, &b| x[b as usize].total_cmp(&x[a as usize]));
        for k in [0, 1, n / 2, n - 1, n] {
            assert_eq!(largest(&x, k), sorted[..k], "{k} of {n}");
        }
    }
}

/// The instruction set is chosen once a process, so the others are tested in processes of their own.
#[test]
fn all_of_this_holds_with_the_lesser_instruction_sets() {
    if std::env::var_os("DYLM_ISA").is_some() {
        return;
    }
    for isa in dylm::kernels::cpu::Isa::available() {
        let run =
            std::process::Command::new(std::env::current_exe().unwrap()).env("DYLM_ISA", format!("{isa:?}")).output();
        let run = run.unwrap();
        assert!(run.status.success(), "{isa:?}:\n{}", String::from_utf8_lossy(&run.stdout));
    }
}
