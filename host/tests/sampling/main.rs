//! From logits to the end of a text: samplers, processors, speculation, stop strings, statistics.
//! One binary for all of them, since linking is what takes long.

mod anchors;
mod properties;
mod reproducibility;
mod speculation;
mod statistics;
mod stopping;

use dylm::sampler::{Distribution, Sampler, Sampling};

/// The distribution after everything, one probability a token of the row.
fn probabilities(sampling: &Sampling, logits: &[f32], history: &[u32]) -> Vec<f64> {
    let mut row = logits.to_vec();
    let distribution = Sampler::new(sampling).unwrap().distribution(&mut row, history).unwrap();
    spread(&distribution, logits.len())
}

fn spread(distribution: &Distribution, vocabulary: usize) -> Vec<f64> {
    (0..vocabulary as u32).map(|id| distribution.probability(id)).collect()
}

/// The natural logarithms of probabilities, as logits.
fn logs(probabilities: &[f32]) -> Vec<f32> {
    probabilities.iter().map(|p| p.ln()).collect()
}

#[track_caller]
fn assert_close(actual: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(actual.len(), expected.len());
    for (id, (a, e)) in actual.iter().zip(expected).enumerate() {
        assert!((a - e).abs() <= tolerance, "token {id}: {a}, expected {e}\n{actual:?}\n{expected:?}");
    }
}

/// Seeded numbers for tests, apart from the sampler's own.
struct Seeded(Sampler);

impl Seeded {
    fn new(seed: u64) -> Self {
        Seeded(Sampler::new(&Sampling { seed: Some(seed), ..Sampling::default() }).unwrap())
    }

    fn below(&mut self, n: usize) -> usize {
        (self.0.uniform() * n as f64) as usize
    }

    /// Roughly normal: the sum of twelve uniforms.
    fn normal(&mut self) -> f32 {
        ((0..12).map(|_| self.0.uniform()).sum::<f64>() - 6.0) as f32
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}
