//! The state space dual of Mamba 2, as a recurrence: one decay a head and token. <https://arxiv.org/abs/2405.21060>

use super::pieces::{Fade, fold, side_by_side};
use crate::kernels::cpu::lanes::{Isa, Job, Lanes, dispatch};

/// The shape of the recurrence.
#[derive(Clone, Copy, Debug)]
pub struct Ssd {
    /// Heads of x.
    pub heads: usize,
    /// Lanes of a head.
    pub d: usize,
    /// Heads of b and c, which divide those of x.
    pub groups: usize,
    /// Numbers of state a lane.
    pub n: usize,
}

/// `h = exp(dt a) h + dt x bᵀ`, `y = h c`: x and out `[tokens, heads, d]`, dt `[tokens, heads]`, b and c `[tokens, groups, n]`, a `[heads]`,
/// state `[heads, d, n]`.
pub fn ssd(shape: Ssd, state: &mut [f32], rows: [&[f32]; 4], a: &[f32], out: &mut [f32]) {
    let isa = Isa::best();
    side_by_side(state, shape.d * shape.n, shape.d, out, |head, state, out| {
        // SAFETY: `isa` is available; the job holds no pointers.
        unsafe { dispatch(isa, Head { shape, head, state, rows, a, out }) }
    });
}

/// One head's walk through the tokens.
struct Head<'a> {
    shape: Ssd,
    head: usize,
    state: &'a mut [f32],
    rows: [&'a [f32]; 4],
    a: &'a [f32],
    out: &'a mut [f32],
}

impl Job for Head<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let (Ssd { heads, d, groups, n }, head, [x, dt, b, c]) = (self.shape, self.head, self.rows);
        let group = head / (heads / groups);
        for (token, out) in self.out.chunks_mut(d).enumerate() {
            let dt = dt[token * heads + head];
            let fade = Fade::One((dt * self.a[head]).exp());
            let x = &x[(token * heads + head) * d..][..d];
            let [b, c] = [b, c].map(|all| &all[(token * groups + group) * n..][..n]);
            for ((y, h), x) in out.iter_mut().zip(self.state.chunks_mut(n)).zip(x) {
                // SAFETY: the caller vouches for the instruction set.
                *y = unsafe { fold::<L>(h, fade, dt * x, b, c) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::tests::{near, numbers},
        *,
    };

    #[test]
    fn the_dual_is_the_plain_recurrence_in_pieces_too() {
        for (tokens, heads, d, groups, n) in [(5, 4, 3, 2, 10), (7, 8, 16, 1, 64)] {
            let x = numbers(1, tokens * heads * d);
            let dt: Vec<f32> = numbers(2, tokens * heads).iter().map(|x| x.abs()).collect();
            let a: Vec<f32> = numbers(3, heads).iter().map(|x| -x.abs()).collect();
            let (b, c) = (numbers(4, tokens * groups * n), numbers(5, tokens * groups * n));
            let (mut h, mut plain) = (vec![0f32; heads * d * n], vec![0f32; x.len()]);
            for t in 0..tokens {
                for head in 0..heads {
                    let (dt, group) = (dt[t * heads + head], head / (heads / groups));
                    for i in 0..d {
                        for j in 0..n {
                            let at = (head * d + i) * n + j;
                            let (b, c) = (b[(t * groups + group) * n + j], c[(t * groups + group) * n + j]);
                            h[at] = (dt * a[head]).exp() * h[at] + dt * x[(t * heads + head) * d + i] * b;
                            plain[(t * heads + head) * d + i] += h[at] * c;
                        }
                    }
                }
            }
            let shape = Ssd { heads, d, groups, n };
            let (mut state, mut out) = (vec![0.0; h.len()], vec![0.0; x.len()]);
            for (from, to) in [(0, 3), (3, 4), (4, tokens)] {
                let rows = [(&x, heads * d), (&dt, heads), (&b, groups * n), (&c, groups * n)]
                    .map(|(all, width)| &all[from * width..to * width]);
                ssd(shape, &mut state, rows, &a, &mut out[from * heads * d..to * heads * d]);
            }
            near(&out, &plain);
            near(&state, &h);
        }
    }
}
