//! Linear attention with decay (Yang et al. 2023): the sum of `k vᵀ` over the tokens so far, each faded by what came after it, seen
//! through the query.

use super::by_head::{Decay, Recurrence, Shape, row};

/// Inputs of `S = exp(g) S + k vᵀ`, `y = qᵀ S`.
#[derive(Clone, Copy, Debug)]
pub struct LinearAttention<'a> {
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
}

impl Recurrence for LinearAttention<'_> {
    fn checked(&self) -> Option<Shape> {
        let s = self.shape;
        let groups = s.k_heads > 0 && s.heads.is_multiple_of(s.k_heads);
        let fits = self.q.len() == s.keys() && self.k.len() == s.keys() && self.v.len() == s.values();
        (groups && fits && self.g.fits(&s)).then_some(s)
    }

    #[inline(always)]
    fn walk(&self, s: &Shape, head: usize, state: &mut [f32], out: &mut [f32]) {
        let mut factors = vec![0.0; s.d];
        for (token, y) in out.chunks_exact_mut(s.e).enumerate() {
            let q = row(self.q, s.k_heads, s.d, token, s.k_head(head));
            let k = row(self.k, s.k_heads, s.d, token, s.k_head(head));
            let v = row(self.v, s.heads, s.e, token, head);
            self.g.write(s, token, head, &mut factors);
            for (((lanes, &factor), &k), &q) in state.chunks_exact_mut(s.e).zip(&factors).zip(k).zip(q) {
                for ((s, &v), y) in lanes.iter_mut().zip(v).zip(y.iter_mut()) {
                    *s = *s * factor + k * v;
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

    const SHAPE: Shape = Shape { tokens: 6, heads: 4, k_heads: 2, d: 7, e: 11 };

    /// `y_t = Σ_{u <= t} Σ_i q_t[i] k_u[i] exp(g_{u+1} + .. + g_t) v_u`, from an empty state.
    fn naive(of: &LinearAttention) -> Vec<f64> {
        let Shape { tokens, heads, k_heads, d, e } = of.shape;
        let g = |t: usize, h: usize, i: usize| match of.g {
            Decay::Head(g) => f64::from(g[h]),
            Decay::Token(g) => f64::from(g[t * heads + h]),
            Decay::Lane(g) => f64::from(g[(t * heads + h) * d + i]),
        };
        let mut out = vec![0.0; tokens * heads * e];
        for t in 0..tokens {
            for h in 0..heads {
                for u in 0..=t {
                    for i in 0..d {
                        let key = |t: usize| (t * k_heads + h * k_heads / heads) * d + i;
                        let fade: f64 = (u + 1..=t).map(|between| g(between, h, i)).sum();
                        let weight = f64::from(of.q[key(t)]) * f64::from(of.k[key(u)]) * fade.exp();
                        for j in 0..e {
                            out[(t * heads + h) * e + j] += weight * f64::from(of.v[(u * heads + h) * e + j]);
                        }
                    }
                }
            }
        }
        out
    }

    #[test]
    fn linear_attention_is_its_sum_and_its_chunks_are_the_whole() {
        let s = SHAPE;
        let (q, k, v) = (numbers(1, s.keys()), numbers(2, s.keys()), numbers(3, s.values()));
        let g: Vec<f32> = numbers(4, s.tokens * s.heads * s.d).iter().map(|x| -x.abs()).collect();
        for kind in 0..3 {
            let part = |from: usize, to: usize| LinearAttention {
                shape: Shape { tokens: to - from, ..s },
                q: &q[from * s.k_heads * s.d..to * s.k_heads * s.d],
                k: &k[from * s.k_heads * s.d..to * s.k_heads * s.d],
                v: &v[from * s.heads * s.e..to * s.heads * s.e],
                g: match kind {
                    0 => Decay::Head(&g[..s.heads]),
                    1 => Decay::Token(&g[from * s.heads..to * s.heads]),
                    _ => Decay::Lane(&g[from * s.heads * s.d..to * s.heads * s.d]),
                },
            };
            let run = |of: LinearAttention, state: &mut [f32]| {
                let mut out = vec![f32::NAN; of.shape.values()];
                recur(&of, state, &mut out);
                out
            };
            let mut state = vec![0.0; s.heads * s.d * s.e];
            let whole = run(part(0, s.tokens), &mut state);
            assert_close(&whole, &naive(&part(0, s.tokens)));

            let mut chunked_state = vec![0.0; s.heads * s.d * s.e];
            let mut chunked = run(part(0, 1), &mut chunked_state);
            chunked.extend(run(part(1, s.tokens), &mut chunked_state));
            assert_eq!((chunked, chunked_state), (whole, state));
        }
    }

    #[test]
    fn many_heads_on_many_threads_give_what_one_thread_gives() {
        let s = Shape { tokens: 32, heads: 8, k_heads: 8, d: 16, e: 16 };
        let (q, k, v) = (numbers(1, s.keys()), numbers(2, s.keys()), numbers(3, s.values()));
        let of = LinearAttention { shape: s, q: &q, k: &k, v: &v, g: Decay::Head(&[-0.1; 8]) };
        assert!(s.heads * s.d * s.e * s.tokens >= super::super::by_head::TASK);
        let (mut state, mut out) = (vec![0.0; s.heads * s.d * s.e], vec![0.0; s.values()]);
        recur(&of, &mut state, &mut out);
        assert_close(&out, &naive(&of));
    }
}
