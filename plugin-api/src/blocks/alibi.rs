//! Attention with linear biases: no positions in queries and keys, but scores that fall with distance, in each head at another rate.
//! <https://arxiv.org/abs/2108.12409>

/// The slopes of so many heads: `2^(-most i / n)` for i from 1 to n, the next power of two. Where there are fewer heads than n, the even
/// ones come first (they are the slopes of half as many heads), then the odd ones. The paper's `most` is 8.
pub fn alibi_slopes(heads: usize, most: f32) -> Vec<f32> {
    let n = heads.next_power_of_two();
    let slope = |i: usize| (-most * i as f32 / n as f32).exp2();
    match n == heads {
        true => (1..=n).map(slope).collect(),
        false => (2..=n).step_by(2).chain((1..=n).step_by(2)).take(heads).map(slope).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_that_are_no_power_of_two_take_the_slopes_of_half_as_many_first() {
        assert_eq!(alibi_slopes(4, 8.0), [0.25, 0.0625, 0.015625, 0.00390625]);
        assert_eq!(alibi_slopes(6, 8.0)[..4], alibi_slopes(4, 8.0));
        assert_eq!(alibi_slopes(6, 8.0)[4..], [0.5, 0.125]);
        assert_eq!(alibi_slopes(3, 16.0), [0.00390625, 0.000_015_258_789, 0.0625]);
        assert!(alibi_slopes(0, 8.0).is_empty());
    }
}
