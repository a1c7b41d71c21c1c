//! The gated delta rule (Yang et al. 2024; Kimi's variant fades each key lane by its own factor): the state, a map from keys to values,
//! fades, and what it holds at the new key moves towards the new value by the share `beta`.

use super::by_head::{Decay, Recurrence, Shape, row};

/// Inputs of `S = exp(g) S`, `S += k (beta (v - kᵀ S))ᵀ`, `y = qᵀ S`.
#[derive(Clone, Copy, Debug)]
pub struct GatedDelta<'a> {
    /// The sizes.
    pub shape: Shape,
    /// `[tokens, k_heads, d]`
    pub q: &'a [f32],
    /// `[tokens, k_heads, d]`
    pub k: &'a [f32],
    /// `[tokens, heads, e]`
    pub v: &'a [f32],
    /// Logarithms of the fading.
    pub g: Decay<'a>,
    /// `[tokens, heads]`
    pub beta: &'a [f32],
}

impl Recurrence for GatedDelta<'_> {
    fn checked(&self) -> Option<Shape> {
        let s = self.shape;
        let groups = s.k_heads > 0 && s.heads.is_multiple_of(s.k_heads);
        let keys = self.q.len() == s.keys() && self.k.len() == s.keys();
        let values = self.v.len() == s.values() && self.beta.len() == s.tokens * s.heads;
        (groups && keys && values && self.g.fits(&s)).then_some(s)
    }

    #[inline(always)]
    fn walk(&self, s: &Shape, head: usize, state: &mut [f32], out: &mut [f32]) {
        let (mut factors, mut change) = (vec![0.0; s.d], vec![0.0; s.e]);
        for (token, y) in out.chunks_exact_mut(s.e).enumerate() {
            let q = row(self.q, s.k_heads, s.d, token, s.k_head(head));
            let k = row(self.k, s.k_heads, s.d, token, s.k_head(head));
            let v = row(self.v, s.heads, s.e, token, head);
            let beta = self.beta[token * s.heads + head];
            self.g.write(s, token, head, &mut factors);
            change.fill(0.0);
            for ((lanes, &factor), &k) in state.chunks_exact_mut(s.e).zip(&factors).zip(k) {
                for (s, held) in lanes.iter_mut().zip(&mut change) {
                    *s *= factor;
                    *held += k * *s;
                }
            }
            for (change, &v) in change.iter_mut().zip(v) {
                *change = beta * (v - *change);
            }
            for ((lanes, &k), &q) in state.chunks_exact_mut(s.e).zip(k).zip(q) {
                for ((s, &change), y) in lanes.iter_mut().zip(&change).zip(y.iter_mut()) {
                    *s += k * change;
                    *y += q * *s;
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

    const SHAPE: Shape = Shape { tokens: 7, heads: 6, k_heads: 3, d: 5, e: 9 };

    /// The equations, element by element.
    fn naive(of: &GatedDelta, state: &mut [f64]) -> Vec<f64> {
        let Shape { tokens, heads, k_heads, d, e } = of.shape;
        let mut out = Vec::new();
        for t in 0..tokens {
            for h in 0..heads {
                let key = |i: usize| (t * k_heads + h * k_heads / heads) * d + i;
                let at = |i: usize, j: usize| (h * d + i) * e + j;
                for i in 0..d {
                    let g = match of.g {
                        Decay::Head(g) => g[h],
                        Decay::Token(g) => g[t * heads + h],
                        Decay::Lane(g) => g[(t * heads + h) * d + i],
                    };
                    (0..e).for_each(|j| state[at(i, j)] *= f64::from(g).exp());
                }
                for j in 0..e {
                    let held: f64 = (0..d).map(|i| state[at(i, j)] * f64::from(of.k[key(i)])).sum();
                    let change = f64::from(of.beta[t * heads + h]) * (f64::from(of.v[(t * heads + h) * e + j]) - held);
                    (0..d).for_each(|i| state[at(i, j)] += f64::from(of.k[key(i)]) * change);
                    out.push((0..d).map(|i| state[at(i, j)] * f64::from(of.q[key(i)])).sum());
                }
            }
        }
        out
    }

    fn run(of: &GatedDelta, state: &mut [f32]) -> Vec<f32> {
        let mut out = vec![f32::NAN; of.shape.values()];
        recur(of, state, &mut out);
        out
    }

    #[test]
    fn the_gated_delta_rule_is_its_equations_and_its_chunks_are_the_whole() {
        let s = SHAPE;
        let negative = |x: Vec<f32>| x.iter().map(|x| -x.abs()).collect::<Vec<f32>>();
        let (q, k, v) = (numbers(1, s.keys()), numbers(2, s.keys()), numbers(3, s.values()));
        let (beta, g) = (numbers(4, s.tokens * s.heads), negative(numbers(5, s.tokens * s.heads * s.d)));
        let start = numbers(6, s.heads * s.d * s.e);
        for lanes in [false, true] {
            let decay = |from: usize, to: usize| match lanes {
                true => Decay::Lane(&g[from * s.heads * s.d..to * s.heads * s.d]),
                false => Decay::Token(&g[from * s.heads..to * s.heads]),
            };
            let part = |from: usize, to: usize| GatedDelta {
                shape: Shape { tokens: to - from, ..s },
                q: &q[from * s.k_heads * s.d..to * s.k_heads * s.d],
                k: &k[from * s.k_heads * s.d..to * s.k_heads * s.d],
                v: &v[from * s.heads * s.e..to * s.heads * s.e],
                g: decay(from, to),
                beta: &beta[from * s.heads..to * s.heads],
            };
            let mut exact: Vec<f64> = start.iter().map(|&x| x.into()).collect();
            let expected = naive(&part(0, s.tokens), &mut exact);
            let mut state = start.clone();
            let whole = run(&part(0, s.tokens), &mut state);
            assert_close(&whole, &expected);
            assert_close(&state, &exact);

            let mut chunked_state = start.clone();
            let mut chunked = run(&part(0, 4), &mut chunked_state);
            chunked.extend(run(&part(4, s.tokens), &mut chunked_state));
            assert_eq!((chunked, chunked_state), (whole, state));
        }
    }

    #[test]
    #[should_panic(expected = "do not fit each other")]
    fn inputs_of_another_shape_are_refused() {
        let of = GatedDelta { shape: SHAPE, q: &[], k: &[], v: &[], g: Decay::Head(&[]), beta: &[] };
        recur(&of, &mut [], &mut []);
    }
}
