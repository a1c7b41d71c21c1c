//! The real-gated linear recurrent unit of Griffin (De et al. 2024): a leaky sum in each channel, whose input is scaled so that the state
//! keeps its variance, but for a sequence's first token, which has no past to make room for.

use crate::kernels::cpu::team::each_chunk_of_two;

/// Numbers worth a task of their own: each costs an exponential and a root.
const TASK: usize = 1 << 12;

/// `h = a h + √(1 - a²) x` over x and log_a `[tokens, dim]` into `out`, likewise; `state` `[dim]` is left after the last token. Where
/// `first` says that the first token is its sequence's first, `h = x` there and the state before it does not count.
///
/// # Panics
/// If x, log_a and `out` are not equally long, or not rows as long as the state.
pub fn rg_lru(x: &[f32], log_a: &[f32], first: bool, state: &mut [f32], out: &mut [f32]) {
    let dim = state.len();
    assert!(x.len() == log_a.len() && x.len() == out.len(), "rg_lru: {} and {} numbers", x.len(), log_a.len());
    if x.is_empty() {
        return;
    }
    assert!(dim > 0 && x.len().is_multiple_of(dim), "rg_lru: {} numbers in rows of {dim}", x.len());
    let mut factors = vec![0.0; x.len()];
    let gate = |(((a, y), &x), &log_a): (((&mut f32, &mut f32), &f32), &f32)| {
        *a = log_a.exp();
        // 1 - a², without losing the small difference of an a near 1.
        *y = (-(2.0 * log_a).exp_m1()).sqrt() * x;
    };
    each_chunk_of_two((&mut factors, TASK), (&mut *out, TASK), |i, a, y| {
        a.iter_mut().zip(y).zip(&x[i * TASK..]).zip(&log_a[i * TASK..]).for_each(gate);
    });
    if first {
        out[..dim].copy_from_slice(&x[..dim]);
        factors[..dim].fill(0.0);
        state.fill(0.0);
    }
    for (y, a) in out.chunks_exact_mut(dim).zip(factors.chunks_exact(dim)) {
        for ((h, y), a) in state.iter_mut().zip(y).zip(a) {
            *h = *h * a + *y;
            *y = *h;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{assert_close, numbers};
    use super::*;

    const TOKENS: usize = 5;
    const DIM: usize = 7;

    #[test]
    fn the_unit_is_its_equation_and_its_chunks_are_the_whole() {
        let x = numbers(1, TOKENS * DIM);
        let log_a: Vec<f32> = numbers(2, TOKENS * DIM).iter().map(|x| -x.abs()).collect();
        for first in [false, true] {
            let start = numbers(3, DIM);
            let mut h: Vec<f64> = start.iter().map(|&x| x.into()).collect();
            let mut expected = Vec::new();
            for t in 0..TOKENS {
                for (i, h) in h.iter_mut().enumerate() {
                    let (x, a) = (f64::from(x[t * DIM + i]), f64::from(log_a[t * DIM + i]).exp());
                    *h = if first && t == 0 { x } else { a * *h + (1.0 - a * a).sqrt() * x };
                    expected.push(*h);
                }
            }
            let (mut state, mut whole) = (start.clone(), vec![f32::NAN; TOKENS * DIM]);
            rg_lru(&x, &log_a, first, &mut state, &mut whole);
            assert_close(&whole, &expected);
            assert_eq!(state, whole[(TOKENS - 1) * DIM..]);

            let (mut chunked_state, mut chunked) = (start, vec![f32::NAN; TOKENS * DIM]);
            let (head, tail) = chunked.split_at_mut(2 * DIM);
            rg_lru(&x[..2 * DIM], &log_a[..2 * DIM], first, &mut chunked_state, head);
            rg_lru(&x[2 * DIM..], &log_a[2 * DIM..], false, &mut chunked_state, tail);
            assert_eq!(chunked, whole);
        }
    }

    #[test]
    fn a_factor_near_one_keeps_its_small_share_of_the_input() {
        let (mut state, mut out) = ([0.0], [0.0]);
        rg_lru(&[1.0], &[-1e-9], false, &mut state, &mut out);
        assert!((f64::from(out[0]) - 2e-9f64.sqrt()).abs() < 1e-9, "{}", out[0]);
    }
}
