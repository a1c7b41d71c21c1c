//! Gated pooling over time: every window of tokens becomes one entry, lane by lane the softmax average of its tokens. The softmax is
//! summed up token by token (Milakov and Gimelshein 2018), so an open window costs three numbers a lane, however long it is.

/// Sizes of a pooling.
#[derive(Clone, Copy, Debug)]
pub struct Pool {
    /// Windows that an entry is made of: its own and those before it.
    pub windows: usize,
    /// Lanes of an entry.
    pub d: usize,
    /// Tokens of a window.
    pub rate: usize,
}

/// x and gate `[tokens, windows * d]`, bias `[rate, windows * d]`, `out` `[tokens, d]`, written where a window ends. The first token stands
/// at position `offset`. `state` `[windows, 3, d]` holds for each open entry, the one that ends first before the others, the largest score
/// so far, the sum of `exp(score - largest)` and that of `exp(score - largest) x`; a sum of 0 says that nothing has come yet.
///
/// # Panics
/// If the lengths do not agree.
pub fn pool(shape: Pool, state: &mut [f32], x: &[f32], gate: &[f32], bias: &[f32], offset: usize, out: &mut [f32]) {
    let Pool { windows, d, rate } = shape;
    let width = windows * d;
    if x.is_empty() || width == 0 || rate == 0 {
        return;
    }
    let tokens = x.len() / width;
    assert!(x.len() == tokens * width && gate.len() == x.len() && out.len() == tokens * d, "pool: {tokens} tokens");
    assert!(bias.len() == rate * width && state.len() == 3 * width, "pool: {windows} windows of {d} lanes");
    let rows = x.chunks_exact(width).zip(gate.chunks_exact(width)).zip(out.chunks_exact_mut(d));
    for (position, ((x, gate), out)) in (offset..).zip(rows) {
        let bias = &bias[position % rate * width..][..width];
        // The last lanes count for the entry that ends first.
        let parts = x.rchunks_exact(d).zip(gate.rchunks_exact(d)).zip(bias.rchunks_exact(d));
        for (entry, ((x, gate), bias)) in state.chunks_exact_mut(3 * d).zip(parts) {
            add(entry, x, gate, bias);
        }
        if position % rate == rate - 1 {
            let (mass, sum) = state[d..3 * d].split_at(d);
            out.iter_mut().zip(sum).zip(mass).for_each(|((out, sum), mass)| *out = sum / mass);
            state.copy_within(3 * d.., 0);
            state[3 * (width - d)..].fill(0.0);
        }
    }
}

/// One token joins an entry.
fn add(entry: &mut [f32], x: &[f32], gate: &[f32], bias: &[f32]) {
    let d = x.len();
    let (peak, sums) = entry.split_at_mut(d);
    let (mass, sum) = sums.split_at_mut(d);
    for lane in 0..d {
        let score = gate[lane] + bias[lane];
        if mass[lane] > 0.0 && score <= peak[lane] {
            let weight = (score - peak[lane]).exp();
            mass[lane] += weight;
            sum[lane] += weight * x[lane];
        } else {
            let fade = if mass[lane] > 0.0 { (peak[lane] - score).exp() } else { 0.0 };
            mass[lane] = mass[lane] * fade + 1.0;
            sum[lane] = sum[lane] * fade + x[lane];
            peak[lane] = score;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{assert_close, numbers};
    use super::*;

    const TOKENS: usize = 13;

    /// Entry w as a softmax over all tokens of its windows at once.
    fn entry(Pool { windows, d, rate }: Pool, x: &[f32], gate: &[f32], bias: &[f32], w: usize) -> Vec<f64> {
        let width = windows * d;
        let first = (w + 1).saturating_sub(windows) * rate;
        let lane = |lane: usize| {
            let (mut mass, mut sum) = (0.0, 0.0);
            for p in first..(w + 1) * rate {
                let at = (windows - 1 - (w - p / rate)) * d + lane;
                let share = f64::from(gate[p * width + at] + bias[p % rate * width + at]).exp();
                (mass, sum) = (mass + share, sum + share * f64::from(x[p * width + at]));
            }
            sum / mass
        };
        (0..d).map(lane).collect()
    }

    #[test]
    fn an_entry_is_a_softmax_over_its_windows_however_the_tokens_come() {
        for (windows, d, rate) in [(1, 5, 4), (2, 3, 4), (3, 2, 3), (2, 4, 1)] {
            let (shape, width) = (Pool { windows, d, rate }, windows * d);
            let [x, gate, bias] = [(1, TOKENS), (2, TOKENS), (3, rate)].map(|(seed, rows)| numbers(seed, rows * width));
            let gate: Vec<f32> = gate.iter().map(|g| 20.0 * g).collect();
            for size in [1, 2, 5, TOKENS] {
                let (mut state, mut out) = (vec![0.0; 3 * width], vec![0.0; TOKENS * d]);
                for from in (0..TOKENS).step_by(size) {
                    let to = TOKENS.min(from + size);
                    let (rows, y) = (from * width..to * width, from * d..to * d);
                    pool(shape, &mut state, &x[rows.clone()], &gate[rows], &bias, from, &mut out[y]);
                }
                for (p, out) in out.chunks(d).enumerate() {
                    match (p + 1) % rate {
                        0 => assert_close(out, &entry(shape, &x, &gate, &bias, p / rate)),
                        _ => assert!(out.iter().all(|&y| y == 0.0), "{p} ends no window"),
                    }
                }
            }
        }
    }
}
