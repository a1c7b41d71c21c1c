//! Uniform numbers from a seed: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
//! Counter-based: the n-th number is a function of (seed, n) alone, so there is no state that a platform, a compiler or a new
//! version could carry differently. The algorithm and the layout below are part of dylm's contract: a seed keeps its text.

/// A stream of uniform numbers. The key is the seed, the counter's low 64 bits count the draws, its high 64 bits are zero.
#[derive(Clone, Debug)]
pub(crate) struct Random {
    seed: u64,
    drawn: u64,
}

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Random { seed, drawn: 0 }
    }

    pub(crate) fn seed(&self) -> u64 {
        self.seed
    }

    /// How many numbers were taken.
    #[cfg(feature = "cuda")]
    pub(crate) fn drawn(&self) -> u64 {
        self.drawn
    }

    /// The next number in [0, 1), a multiple of 2^-53: the first 53 bits of the block, its first word the most significant.
    pub(crate) fn uniform(&mut self) -> f64 {
        let [a, b, _, _] = philox([self.drawn as u32, (self.drawn >> 32) as u32, 0, 0], self.seed);
        self.drawn = self.drawn.wrapping_add(1);
        ((u64::from(a) << 32 | u64::from(b)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// A seed nobody chose. `RandomState` is keyed by the system's entropy, which spares a dependency.
pub(crate) fn draw_seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}

fn philox(counter: [u32; 4], seed: u64) -> [u32; 4] {
    let multiply = |a: u32, b: u32| {
        let product = u64::from(a) * u64::from(b);
        ((product >> 32) as u32, product as u32)
    };
    let mut key = (seed as u32, (seed >> 32) as u32);
    let mut c = counter;
    for _ in 0..10 {
        let (high0, low0) = multiply(0xD251_1F53, c[0]);
        let (high1, low1) = multiply(0xCD9E_8D57, c[2]);
        c = [high1 ^ c[1] ^ key.0, low1, high0 ^ c[3] ^ key.1, low0];
        key = (key.0.wrapping_add(0x9E37_79B9), key.1.wrapping_add(0xBB67_AE85));
    }
    c
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_published_answers() {
        assert_eq!(philox([0; 4], 0), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(philox([u32::MAX; 4], u64::MAX), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        let pi = [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344];
        assert_eq!(philox(pi, 0x299f31d0_a4093822), [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]);
    }

    #[test]
    fn the_first_uniform_of_seed_0_is_the_head_of_the_first_block() {
        let expected = (0x6627e8d5_e169c58d_u64 >> 11) as f64 * 2f64.powi(-53);
        assert_eq!(Random::new(0).uniform(), expected);
    }
}
