//! What is left of a row of logits after processors, filters and temperature: the distribution the next token is drawn from.
//! Tokens that cannot be drawn are not stored; the rest lie in the order of ids, the order in which a draw adds them up.

use std::cmp::Ordering;

/// The distribution of the next token.
#[derive(Clone, Debug, PartialEq)]
pub enum Distribution {
    /// Always this token: greedy decoding.
    Greedy(u32),
    /// Any of several tokens.
    Weighted(Weighted),
}

/// Tokens and their probabilities, in ascending order of ids.
#[derive(Clone, Debug, PartialEq)]
pub struct Weighted {
    pub(super) ids: Vec<u32>,
    pub(super) probabilities: Vec<f64>,
}

impl Distribution {
    /// Builds a distribution from weights that need not sum to one. `None` if no weight is positive, or one is negative or not finite.
    pub fn from_weights(weights: &[f64]) -> Option<Self> {
        let total: f64 = weights.iter().sum();
        if !(total > 0.0 && total.is_finite()) || weights.iter().any(|w| *w < 0.0) {
            return None;
        }
        let kept = (0u32..).zip(weights).filter(|(_, w)| **w > 0.0);
        let (ids, probabilities) = kept.map(|(id, w)| (id, w / total)).unzip();
        Some(Distribution::Weighted(Weighted { ids, probabilities }))
    }

    /// The probability of a token: 0 for one that cannot be drawn.
    pub fn probability(&self, id: u32) -> f64 {
        match self {
            Distribution::Greedy(only) => f64::from(u8::from(*only == id)),
            Distribution::Weighted(w) => match w.ids.binary_search(&id) {
                Ok(at) => w.probabilities.get(at).copied().unwrap_or(0.0),
                Err(_) => 0.0,
            },
        }
    }

    /// The natural logarithm of [`Self::probability`]: negative infinity for a token that cannot be drawn.
    pub fn logprob(&self, id: u32) -> f32 {
        self.probability(id).ln() as f32
    }

    /// How many tokens can be drawn.
    pub fn len(&self) -> usize {
        match self {
            Distribution::Greedy(_) => 1,
            Distribution::Weighted(w) => w.ids.len(),
        }
    }

    /// Whether no token can be drawn; no constructor makes such a distribution.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The tokens that can be drawn with their probabilities, in ascending order of ids.
    pub fn iter(&self) -> impl Iterator<Item = (u32, f64)> {
        let (ids, probabilities): (&[u32], &[f64]) = match self {
            Distribution::Greedy(id) => (std::slice::from_ref(id), &[1.0]),
            Distribution::Weighted(w) => (&w.ids, &w.probabilities),
        };
        ids.iter().copied().zip(probabilities.iter().copied())
    }

    /// The normalised positive part of `self - other`: what is left to draw once a token drawn from `other` was refused
    /// (Leviathan et al. 2023, section 2.3). `None` if `other` covers all of `self`.
    pub fn residual(&self, other: &Distribution) -> Option<Distribution> {
        let mut theirs = other.iter().peekable();
        let (mut ids, mut probabilities, mut total) = (Vec::new(), Vec::new(), 0.0);
        for (id, p) in self.iter() {
            let mut q = 0.0;
            while let Some((there, probability)) = theirs.next_if(|(there, _)| there.cmp(&id) != Ordering::Greater) {
                if there == id {
                    q = probability;
                }
            }
            if p > q {
                ids.push(id);
                probabilities.push(p - q);
                total += p - q;
            }
        }
        probabilities.iter_mut().for_each(|p| *p /= total);
        (total > 0.0).then_some(Distribution::Weighted(Weighted { ids, probabilities }))
    }
}
