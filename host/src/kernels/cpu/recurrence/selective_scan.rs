//! The selective scan of Mamba 1: every channel has a step width of its own, every number of its state a decay of its own.
//! <https://arxiv.org/abs/2312.00752>

use super::pieces::{Fade, fold, side_by_side};
use crate::kernels::cpu::lanes::{Isa, Job, Lanes, dispatch};

/// `h = exp(dt a) h + dt x bᵀ`, `y = h c`: x, dt and out `[tokens, d]`, b and c `[tokens, n]`, a and state `[d, n]`.
pub fn selective_scan([d, n]: [usize; 2], state: &mut [f32], rows: [&[f32]; 4], a: &[f32], out: &mut [f32]) {
    // As many channels a piece as divide d, up to a cache line's worth of outputs.
    let width = (1..=16).rev().find(|w| d.is_multiple_of(*w)).unwrap_or(1);
    let isa = Isa::best();
    side_by_side(state, width * n, width, out, |piece, state, out| {
        let job = Channels { shape: [d, n], first: piece * width, width, state, rows, a, out };
        // SAFETY: `isa` is available; the job holds no pointers.
        unsafe { dispatch(isa, job) }
    });
}

/// The walk of `width` channels from `first` on through the tokens.
struct Channels<'a> {
    shape: [usize; 2],
    first: usize,
    width: usize,
    state: &'a mut [f32],
    rows: [&'a [f32]; 4],
    a: &'a [f32],
    out: &'a mut [f32],
}

impl Job for Channels<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let ([d, n], [x, dt, b, c]) = (self.shape, self.rows);
        for (token, out) in self.out.chunks_mut(self.width).enumerate() {
            let [b, c] = [b, c].map(|all| &all[token * n..(token + 1) * n]);
            for ((i, y), h) in out.iter_mut().enumerate().zip(self.state.chunks_mut(n)) {
                let channel = self.first + i;
                let [x, dt] = [x, dt].map(|all| all[token * d + channel]);
                let fade = Fade::Each(dt, &self.a[channel * n..(channel + 1) * n]);
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
    fn the_scan_is_the_plain_recurrence_in_pieces_too() {
        for (tokens, d, n) in [(5, 7, 3), (6, 512, 16)] {
            let (x, b, c) = (numbers(1, tokens * d), numbers(4, tokens * n), numbers(5, tokens * n));
            let dt: Vec<f32> = numbers(2, tokens * d).iter().map(|x| x.abs()).collect();
            let a: Vec<f32> = numbers(3, d * n).iter().map(|x| -x.abs()).collect();
            let (mut h, mut plain) = (vec![0f32; d * n], vec![0f32; tokens * d]);
            for t in 0..tokens {
                for i in 0..d {
                    for j in 0..n {
                        let (at, dt) = (i * n + j, dt[t * d + i]);
                        h[at] = (dt * a[at]).exp() * h[at] + dt * x[t * d + i] * b[t * n + j];
                        plain[t * d + i] += h[at] * c[t * n + j];
                    }
                }
            }
            let (mut state, mut out) = (vec![0.0; d * n], vec![0.0; tokens * d]);
            for (from, to) in [(0, 2), (2, 3), (3, tokens)] {
                let rows = [(&x, d), (&dt, d), (&b, n), (&c, n)].map(|(all, width)| &all[from * width..to * width]);
                selective_scan([d, n], &mut state, rows, &a, &mut out[from * d..to * d]);
            }
            near(&out, &plain);
            near(&state, &h);
        }
    }
}
