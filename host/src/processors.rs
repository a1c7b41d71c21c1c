//! Changes logits before they become probabilities: bias, then the repetition, presence and frequency penalties.
//! Penalties look at the whole history, prompt included, unless a context size limits them to its latest tokens.

use crate::error::{Error, Result};
use crate::sampler::Sampling;

/// The processors that a request switched on.
#[derive(Clone, Debug)]
pub struct Processors {
    bias: Vec<(u32, f32)>,
    /// In the order in which they apply.
    penalties: Vec<(Penalty, Option<usize>)>,
    tally: Tally,
}

#[derive(Clone, Copy, Debug)]
enum Penalty {
    Repetition(f32),
    Presence(f32),
    Frequency(f32),
}

impl Processors {
    /// The processors of these settings; those that would change nothing are left out.
    pub fn new(sampling: &Sampling) -> Self {
        let repetition = sampling.repetition_penalty.filter(|p| *p != 1.0).map(Penalty::Repetition);
        let presence = Some(sampling.presence_penalty).filter(|p| *p != 0.0).map(Penalty::Presence);
        let frequency = Some(sampling.frequency_penalty).filter(|p| *p != 0.0).map(Penalty::Frequency);
        let all = [
            (repetition, sampling.repetition_context_size),
            (presence, sampling.presence_context_size),
            (frequency, sampling.frequency_context_size),
        ];
        let penalties = all.into_iter().filter_map(|(penalty, window)| Some((penalty?, window))).collect();
        Processors { bias: sampling.logit_bias.clone(), penalties, tally: Tally::default() }
    }

    /// Whether the logits pass through unchanged.
    pub fn is_empty(&self) -> bool {
        self.bias.is_empty() && self.penalties.is_empty()
    }

    /// Changes one row of logits, given all tokens so far.
    ///
    /// # Errors
    /// [`Error::Usage`] if a bias names a token that the row does not have.
    pub fn apply(&mut self, logits: &mut [f32], history: &[u32]) -> Result<()> {
        let vocabulary = logits.len();
        for &(id, bias) in &self.bias {
            let logit = logits.get_mut(id as usize).ok_or_else(|| {
                Error::Usage(format!("logit_bias: the vocabulary has {vocabulary} tokens, {id} is not one: remove it"))
            })?;
            *logit += bias;
        }
        let mut tallied = None;
        for &(penalty, window) in &self.penalties {
            let start = history.len().saturating_sub(window.unwrap_or(usize::MAX));
            if tallied != Some(start) {
                self.tally.count(history.get(start..).unwrap_or_default(), vocabulary);
                tallied = Some(start);
            }
            for (id, count) in self.tally.iter() {
                let Some(logit) = logits.get_mut(id) else { continue };
                match penalty {
                    Penalty::Repetition(by) => *logit = if *logit < 0.0 { *logit * by } else { *logit / by },
                    Penalty::Presence(by) => *logit -= by,
                    Penalty::Frequency(by) => *logit -= by * count as f32,
                }
            }
        }
        Ok(())
    }
}

/// How often each token occurs. The counts of a whole vocabulary stay allocated; only those of tokens seen are reset.
#[derive(Clone, Debug, Default)]
struct Tally {
    counts: Vec<u32>,
    seen: Vec<usize>,
}

impl Tally {
    /// Counts anew. Ids beyond the row (a placeholder of an image, say) cannot be generated and are passed over.
    fn count(&mut self, tokens: &[u32], vocabulary: usize) {
        for id in self.seen.drain(..) {
            if let Some(count) = self.counts.get_mut(id) {
                *count = 0;
            }
        }
        self.counts.resize(vocabulary, 0);
        for &token in tokens {
            let Some(count) = self.counts.get_mut(token as usize) else { continue };
            if *count == 0 {
                self.seen.push(token as usize);
            }
            *count += 1;
        }
    }

    fn iter(&self) -> impl Iterator<Item = (usize, u32)> {
        self.seen.iter().map(|&id| (id, self.counts.get(id).copied().unwrap_or(0)))
    }
}
