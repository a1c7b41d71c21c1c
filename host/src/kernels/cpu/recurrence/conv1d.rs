//! Depthwise causal convolution and its simplest case, the token before. The state holds the last inputs, the oldest first.

use crate::kernels::cpu::team::each_chunk;

/// Tokens that are worth a task of their own.
const TOKENS: usize = 16;

/// `y(t) = bias + Σ weight(k) * x(t - kernel + 1 + k)` for each channel: weight `[kernel, channels]`, bias `[channels]`, state
/// `[kernel - 1, channels]`, x and out `[tokens, channels]`.
pub fn conv1d(state: &mut [f32], x: &[f32], weight: &[f32], bias: Option<&[f32]>, channels: usize, out: &mut [f32]) {
    if channels == 0 {
        return;
    }
    let carried = state.len() / channels;
    let input = |at: usize| match at.checked_sub(carried) {
        None => &state[at * channels..(at + 1) * channels],
        Some(token) => &x[token * channels..(token + 1) * channels],
    };
    let one = |token: usize, out: &mut [f32]| {
        match bias {
            Some(bias) => out.copy_from_slice(bias),
            None => out.fill(0.0),
        }
        for (k, weight) in weight.chunks(channels).enumerate() {
            for ((y, w), x) in out.iter_mut().zip(weight).zip(input(token + k)) {
                *y += w * x;
            }
        }
    };
    each_chunk(out, TOKENS * channels, |i, out| {
        out.chunks_mut(channels).enumerate().for_each(|(token, out)| one(i * TOKENS + token, out));
    });
    carry(state, x);
}

/// Each token's predecessor: state `[1, dim]`, x and out `[tokens, dim]`.
pub fn shift(state: &mut [f32], x: &[f32], out: &mut [f32]) {
    let (first, rest) = out.split_at_mut(state.len().min(x.len()));
    first.copy_from_slice(&state[..first.len()]);
    rest.copy_from_slice(&x[..rest.len()]);
    carry(state, x);
}

/// The last inputs of those carried and the new ones.
fn carry(state: &mut [f32], x: &[f32]) {
    let new = x.len().min(state.len());
    state.copy_within(new.., 0);
    let kept = state.len() - new;
    state[kept..].copy_from_slice(&x[x.len() - new..]);
}

#[cfg(test)]
mod tests {
    use super::{
        super::tests::{near, numbers},
        *,
    };

    #[test]
    fn a_convolution_in_pieces_is_the_sum_over_the_last_tokens() {
        let (tokens, channels, kernel) = (9, 5, 4);
        let (x, weight, bias) = (numbers(1, tokens * channels), numbers(2, kernel * channels), numbers(3, channels));
        let mut plain = vec![0.0; tokens * channels];
        for t in 0..tokens {
            for c in 0..channels {
                let tap = |k: usize| match (t + k).checked_sub(kernel - 1) {
                    Some(from) => weight[k * channels + c] * x[from * channels + c],
                    None => 0.0,
                };
                plain[t * channels + c] = bias[c] + (0..kernel).map(tap).sum::<f32>();
            }
        }
        for cuts in [vec![9], vec![1; 9], vec![2, 6, 1]] {
            let (mut state, mut out, mut from) = (vec![0.0; (kernel - 1) * channels], vec![0.0; x.len()], 0);
            for cut in cuts {
                let range = from * channels..(from + cut) * channels;
                conv1d(&mut state, &x[range.clone()], &weight, Some(&bias), channels, &mut out[range]);
                from += cut;
            }
            near(&out, &plain);
            assert_eq!(state, x[(tokens - kernel + 1) * channels..]);
        }
    }

    #[test]
    fn a_kernel_of_one_token_needs_no_state() {
        let (mut out, x) = ([0.0; 4], [1.0, 2.0, 3.0, 4.0]);
        conv1d(&mut [], &x, &[2.0, 3.0], None, 2, &mut out);
        assert_eq!(out, [2.0, 6.0, 6.0, 12.0]);
    }

    #[test]
    fn a_shift_gives_the_token_before_across_pieces() {
        let (mut state, mut out) = ([0.0, 0.0], [0.0; 4]);
        shift(&mut state, &[1.0, 2.0, 3.0, 4.0], &mut out);
        assert_eq!((state, out), ([3.0, 4.0], [0.0, 0.0, 1.0, 2.0]));
        let mut out = [0.0; 2];
        shift(&mut state, &[5.0, 6.0], &mut out);
        assert_eq!((state, out), ([5.0, 6.0], [3.0, 4.0]));
    }
}
