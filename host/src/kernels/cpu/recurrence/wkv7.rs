//! The time mixing of RWKV 7 (Peng et al. 2025): a gated delta rule whose removal key `a` and replacement key `b` differ. Its paper writes
//! values down the rows of S; here keys come first, as in the other recurrences.

use super::by_head::{Recurrence, Shape, row};

/// Inputs of `S = S diag(exp(w)) + (S a) bᵀ + v kᵀ`, `y = S r`, all `[tokens, heads, d]`.
#[derive(Clone, Copy, Debug)]
pub struct Wkv7<'a> {
    /// New tokens.
    pub tokens: usize,
    /// Heads.
    pub heads: usize,
    /// Lanes of a head, of keys and values alike.
    pub d: usize,
    /// The receptance, a query.
    pub r: &'a [f32],
    /// Logarithms of the fading of each key lane.
    pub w: &'a [f32],
    /// Keys.
    pub k: &'a [f32],
    /// Values.
    pub v: &'a [f32],
    /// Where the state is read ..
    pub a: &'a [f32],
    /// .. and where that is written.
    pub b: &'a [f32],
}

impl Recurrence for Wkv7<'_> {
    fn checked(&self) -> Option<Shape> {
        let Wkv7 { tokens, heads, d, r, w, k, v, a, b } = *self;
        let fits = [r, w, k, v, a, b].iter().all(|x| x.len() == tokens * heads * d);
        fits.then_some(Shape { tokens, heads, k_heads: heads, d, e: d })
    }

    #[inline(always)]
    fn walk(&self, s: &Shape, head: usize, state: &mut [f32], out: &mut [f32]) {
        let mut read = vec![0.0; s.d];
        for (token, y) in out.chunks_exact_mut(s.d).enumerate() {
            let r = row(self.r, s.heads, s.d, token, head);
            let w = row(self.w, s.heads, s.d, token, head);
            let k = row(self.k, s.heads, s.d, token, head);
            let v = row(self.v, s.heads, s.d, token, head);
            let a = row(self.a, s.heads, s.d, token, head);
            let b = row(self.b, s.heads, s.d, token, head);
            read.fill(0.0);
            for (lanes, &a) in state.chunks_exact(s.d).zip(a) {
                for (read, &s) in read.iter_mut().zip(lanes) {
                    *read += a * s;
                }
            }
            for ((((lanes, w), &k), &b), &r) in state.chunks_exact_mut(s.d).zip(w).zip(k).zip(b).zip(r) {
                let factor = w.exp();
                for (((s, &read), &v), y) in lanes.iter_mut().zip(&read).zip(v).zip(y.iter_mut()) {
                    *s = *s * factor + b * read + k * v;
                    *y += r * *s;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{
        by_head::recur,
        tests::{assert_close, numbers},
    };
    use super::*;

    const TOKENS: usize = 5;
    const HEADS: usize = 3;
    const D: usize = 6;

    /// The paper's matrices, values down the rows.
    fn naive(of: &Wkv7) -> Vec<f64> {
        let mut out = Vec::new();
        let mut states = vec![[[0.0f64; D]; D]; HEADS];
        for t in 0..of.tokens {
            for (h, state) in states.iter_mut().enumerate() {
                let at = |x: &[f32], lane: usize| f64::from(x[(t * HEADS + h) * D + lane]);
                for (i, row) in state.iter_mut().enumerate() {
                    let read: f64 = (0..D).map(|j| row[j] * at(of.a, j)).sum();
                    for (j, s) in row.iter_mut().enumerate() {
                        *s = *s * at(of.w, j).exp() + read * at(of.b, j) + at(of.v, i) * at(of.k, j);
                    }
                    out.push((0..D).map(|j| row[j] * at(of.r, j)).sum());
                }
            }
        }
        out
    }

    #[test]
    fn wkv7_is_its_equations_and_its_chunks_are_the_whole() {
        let [r, w, k, v, a, b] = [1, 2, 3, 4, 5, 6].map(|seed| numbers(seed, TOKENS * HEADS * D));
        let w: Vec<f32> = w.iter().map(|x| -x.abs()).collect();
        let part = |from: usize, to: usize| {
            let span = from * HEADS * D..to * HEADS * D;
            Wkv7 {
                tokens: to - from,
                heads: HEADS,
                d: D,
                r: &r[span.clone()],
                w: &w[span.clone()],
                k: &k[span.clone()],
                v: &v[span.clone()],
                a: &a[span.clone()],
                b: &b[span],
            }
        };
        let run = |of: Wkv7, state: &mut [f32]| {
            let mut out = vec![f32::NAN; of.v.len()];
            recur(&of, state, &mut out);
            out
        };
        let mut state = vec![0.0; HEADS * D * D];
        let whole = run(part(0, TOKENS), &mut state);
        assert_close(&whole, &naive(&part(0, TOKENS)));

        let mut chunked_state = vec![0.0; HEADS * D * D];
        let mut chunked = run(part(0, 3), &mut chunked_state);
        chunked.extend(run(part(3, TOKENS), &mut chunked_state));
        assert_eq!((chunked, chunked_state), (whole, state));
    }
}
