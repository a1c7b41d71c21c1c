//! How Mamba's recurrences are cut: each head, or few channels, knows nothing of the others, whatever the number of tokens.

use super::by_head::TASK;
use rayon::prelude::*;

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
        let pieces = state.chunks_mut(chunk).zip(out.chunks_mut(width)).enumerate();
        match alone {
            true => pieces.for_each(|(i, (state, out))| work(i, state, out)),
            false => {
                let pieces = state.par_chunks_mut(chunk).zip(out.par_chunks_mut(width)).enumerate();
                pieces.for_each(|(i, (state, out))| work(i, state, out));
            }
        }
        return;
    }
    let piece = |(i, state): (usize, &mut [f32])| {
        let mut own = vec![0.0; tokens * width];
        work(i, state, &mut own);
        own
    };
    let pieces: Vec<Vec<f32>> = match alone {
        true => state.chunks_mut(chunk).enumerate().map(piece).collect(),
        false => state.par_chunks_mut(chunk).enumerate().map(piece).collect(),
    };
    for (token, row) in out.chunks_mut(row).enumerate() {
        for (to, piece) in row.chunks_mut(width).zip(&pieces) {
            to.copy_from_slice(&piece[token * width..(token + 1) * width]);
        }
    }
}

/// `h = decay h + input b`, gives `h · c`.
pub fn fold(h: &mut [f32], decay: f32, input: f32, b: &[f32], c: &[f32]) -> f32 {
    // Several sums at once, for the compiler to put them into one register.
    const LANES: usize = 8;
    let mut sums = [0.0; LANES];
    let whole = h.len() / LANES * LANES;
    for ((h, b), c) in h[..whole].chunks_exact_mut(LANES).zip(b.chunks_exact(LANES)).zip(c.chunks_exact(LANES)) {
        for i in 0..LANES {
            h[i] = h[i] * decay + input * b[i];
            sums[i] += h[i] * c[i];
        }
    }
    let mut sum = sums.iter().sum();
    for ((h, b), c) in h[whole..].iter_mut().zip(&b[whole..]).zip(&c[whole..]) {
        *h = *h * decay + input * b;
        sum += *h * c;
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
