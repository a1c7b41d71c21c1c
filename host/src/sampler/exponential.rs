//! e^x in plain arithmetic. Every step is an IEEE operation with one right answer, so the sampler's choices are the same on every
//! platform; a system's own `exp` differs between C libraries in the last bit. Branch-free, so that the compiler vectorizes it.

use std::f64::consts::{LN_2, LOG2_E};

/// 1/13!, 1/12!, .. 1/0!.
const SERIES: [f64; 14] = {
    let (mut series, mut factorial, mut n) = ([1.0; 14], 1.0, 1);
    while n < 14 {
        factorial *= n as f64;
        series[13 - n] = 1.0 / factorial;
        n += 1;
    }
    series
};

/// e^x for x <= 0 (negative infinity included) to about 1 part in 10^15; 0 where e^x would be subnormal.
#[inline(always)]
pub(crate) fn exp(x: f64) -> f64 {
    // Adding 1.5 * 2^52 leaves no room for a fraction: the sum's low bits hold x / ln 2 rounded to an integer.
    const ROUND: f64 = 6_755_399_441_055_744.0;
    // ln 2 in two parts; the high one is short enough that its product with any exponent here is exact.
    const HIGH: f64 = f64::from_bits(LN_2.to_bits() & !0xffff_ffff);
    const LOW: f64 = 4.749_325_039_031_672_6e-7;
    let bounded = if x < -708.0 { -708.0 } else { x };
    let shifted = bounded * LOG2_E + ROUND;
    let exponent = shifted - ROUND;
    let r = (bounded - exponent * HIGH) - exponent * LOW;
    // Taylor to r^13: |r| <= ln 2 / 2 makes the rest smaller than half a unit in the last place.
    let [highest, lower @ ..] = SERIES;
    let series = lower.iter().fold(highest, |sum, coefficient| sum * r + coefficient);
    let power = f64::from_bits((shifted.to_bits().wrapping_add(1023)) << 52);
    if x < -708.0 { 0.0 } else { series * power }
}

/// Fills `weights` with e^(logit - top) and returns their sum.
pub(crate) fn exponentiate(logits: &[f32], top: f32, weights: &mut Vec<f64>) -> f64 {
    weights.clear();
    weights.extend(logits.iter().map(|&x| exp(f64::from(x) - f64::from(top))));
    sum_in_lanes(weights, |weight| weight)
}

/// The sum of e^(logit - top), without keeping the terms.
pub(crate) fn sum_of_exponentials(logits: &[f32], top: f32) -> f64 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512dq") {
        // SAFETY: the machine has the instructions. They are the same IEEE operations, eight at a time.
        return unsafe { sum_of_exponentials_by_eights(logits, top) };
    }
    sum_in_lanes(logits, |x| exp(f64::from(x) - f64::from(top)))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512dq")]
fn sum_of_exponentials_by_eights(logits: &[f32], top: f32) -> f64 {
    sum_in_lanes(logits, |x| exp(f64::from(x) - f64::from(top)))
}

/// Adds term i to lane i mod 8, then the lanes in order: vectorizable, and the order of the additions is part of the contract.
#[inline(always)]
pub(crate) fn sum_in_lanes<T: Copy>(values: &[T], term: impl Fn(T) -> f64) -> f64 {
    let (mut lanes, mut terms) = ([0.0; 8], [0.0; 64]);
    for block in values.chunks(terms.len()) {
        // Terms first, additions after: in one loop neither is vectorized.
        terms.iter_mut().zip(block).for_each(|(slot, &value)| *slot = term(value));
        for eight in terms[..block.len()].chunks(8) {
            lanes.iter_mut().zip(eight).for_each(|(lane, term)| *lane += term);
        }
    }
    lanes.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_agrees_with_the_system_to_a_few_units_in_the_last_place() {
        for i in 0..=70_000 {
            let x = -0.01 * f64::from(i) - 1e-5;
            let relative = (exp(x) / x.exp() - 1.0).abs();
            assert!(relative < 1e-15, "e^{x}: off by {relative}");
        }
        assert_eq!((exp(0.0), exp(-709.0), exp(f64::NEG_INFINITY)), (1.0, 0.0, 0.0));
    }

    #[test]
    fn exp_keeps_its_bits_for_ever() {
        // From the same arithmetic in Python.
        let expected = [0x3fecf46d99d52b3a, 0x3fd78b56362cef38, 0x3ecf42ed3f68e690, 0x24dc758233102ace];
        assert_eq!([-0.1, -1.0, -12.5, -300.25].map(|x| exp(x).to_bits()), expected);
    }

    #[test]
    fn summing_with_and_without_the_terms_gives_the_same_bits() {
        let logits: Vec<f32> = (0..1003).map(|i| -((i * 37 % 101) as f32) * 0.11).collect();
        let mut weights = Vec::new();
        assert_eq!(exponentiate(&logits, 0.0, &mut weights), sum_of_exponentials(&logits, 0.0));
    }
}
