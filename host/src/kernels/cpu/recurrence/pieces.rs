//! How Mamba's recurrences are cut: each head, or few channels, knows nothing of the others, whatever the number of tokens.

use super::by_head::TASK;
use crate::kernels::cpu::{
    lanes::{Lanes, exp},
    team::each_chunk_of_two,
};

/// Splits a recurrence into pieces that know nothing of each other: piece i has its own `chunk` numbers of the state and its own `width`
/// numbers in each row of `out` `[tokens, pieces * width]`. `work` gets i, that state, and its part of `out` as `[tokens, width]`.
pub fn side_by_side(
    state: &mut [f32],
    chunk: usize,
    width: usize,
    out: &mut [f32],
    work: impl Fn(usize, &mut [f32], &mut [f32]) + Sync,
) {
    if out.is_empty() || chunk == 0 || width == 0 {
        return;
    }
    let row = state.len() / chunk * width;
    let tokens = out.len() / row;
    let alone = state.len() * tokens <= TASK;
    if tokens == 1 {
        match alone {
            true => {
                let pieces = state.chunks_mut(chunk).zip(out.chunks_mut(width)).enumerate();
                pieces.for_each(|(i, (state, out))| work(i, state, out));
            }
            false => each_chunk_of_two((state, chunk), (out, width), work),
        }
        return;
    }
    let mut pieces = vec![Vec::new(); row / width];
    let piece = |i: usize, state: &mut [f32], own: &mut Vec<f32>| {
        own.resize(tokens * width, 0.0);
        work(i, state, own);
    };
    match alone {
        true => {
            let each = state.chunks_mut(chunk).zip(&mut pieces).enumerate();
            each.for_each(|(i, (state, own))| piece(i, state, own));
        }
        false => each_chunk_of_two((state, chunk), (&mut pieces, 1), |i, state, own| piece(i, state, &mut own[0])),
    }
    for (token, row) in out.chunks_mut(row).enumerate() {
        for (to, piece) in row.chunks_mut(width).zip(&pieces) {
            to.copy_from_slice(&piece[token * width..(token + 1) * width]);
        }
    }
}

/// What the numbers of a state are multiplied by before a token.
#[derive(Clone, Copy)]
pub enum Fade<'a> {
    /// All by the same.
    One(f32),
    /// Each by its `exp(dt a)`.
    Each(f32, &'a [f32]),
}

impl Fade<'_> {
    /// # Safety
    /// As for [`Lanes`]; there are `L::W` numbers from `at` on.
    #[inline(always)]
    unsafe fn lanes<L: Lanes>(&self, at: usize) -> L::F {
        // SAFETY: the caller vouches for both.
        unsafe {
            match self {
                Fade::One(decay) => L::splat(*decay),
                Fade::Each(dt, a) => exp::<L>(L::mul(L::splat(*dt), L::load(a.as_ptr().add(at)))),
            }
        }
    }
}

/// `h = decay h + input b`, gives `h · c`; all of one length.
///
/// # Safety
/// As for [`Lanes`].
#[inline(always)]
pub unsafe fn fold<L: Lanes>(h: &mut [f32], fade: Fade, input: f32, b: &[f32], c: &[f32]) -> f32 {
    let n = h.len();
    let each = if let Fade::Each(_, a) = fade { a.len() } else { n };
    assert!(b.len() == n && c.len() == n && each == n, "recurrence: {n} numbers of state against {}", b.len());
    let mut at = 0;
    // SAFETY: every load and store is of W numbers from `at` on, and `at + W <= n`.
    let mut sum = unsafe {
        let mut sums = L::splat(0.0);
        while at + L::W <= n {
            let added = L::mul(L::splat(input), L::load(b.as_ptr().add(at)));
            let new = L::fma(L::load(h.as_ptr().add(at)), fade.lanes::<L>(at), added);
            L::store(h.as_mut_ptr().add(at), new);
            sums = L::fma(new, L::load(c.as_ptr().add(at)), sums);
            at += L::W;
        }
        L::sum(sums)
    };
    for i in at..n {
        let decay = match fade {
            Fade::One(decay) => decay,
            Fade::Each(dt, a) => (dt * a[i]).exp(),
        };
        h[i] = h[i] * decay + input * b[i];
        sum += h[i] * c[i];
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_lie_side_by_side_in_every_row_however_many_tokens() {
        for (pieces, tokens) in [(3, 1), (3, 4), (3000, 1), (3000, 20)] {
            let (mut state, mut out) = (vec![0.0; pieces * 2], vec![0.0; tokens * pieces * 2]);
            side_by_side(&mut state, 2, 2, &mut out, |i, state, out| {
                for (token, row) in out.chunks_mut(2).enumerate() {
                    row.copy_from_slice(&[i as f32, token as f32]);
                    state[0] += 1.0;
                }
            });
            for (token, row) in out.chunks(pieces * 2).enumerate() {
                assert!(row.chunks(2).enumerate().all(|(i, x)| x == [i as f32, token as f32]));
            }
            assert!(state.chunks(2).all(|s| s == [tokens as f32, 0.0]));
        }
    }
}
