//! Draft and verify: a small model proposes tokens, the large one judges them all in one pass. Rejection sampling (Leviathan et al.
//! 2023; Chen et al. 2023) makes the output's distribution exactly the large model's, however bad the draft: it only costs speed.

use crate::error::{Error, Result};
use crate::sampler::{Distribution, Sampler};

/// What the target made of a draft: so many drafted tokens stand, and then comes `next`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// How many of the drafted tokens stand, counted from the first.
    pub accepted: usize,
    /// The token after them: a replacement of the first refused one, or a further one if all stand.
    pub next: u32,
}

/// Judges a draft of k tokens. `draft` holds each drafted token with the distribution it was drawn from, `target` the target's k + 1
/// distributions: at each drafted position and after the last. A token stands with probability min(1, p / q); the first that does
/// not is replaced by a draw from the normalised positive part of p - q. Greedy distributions count as one-hot, so that greedy
/// drafts stand exactly while both models agree. Uses up one random number a judged token and at most one for `next`.
///
/// # Errors
/// [`Error::Generate`] if there are not k + 1 target distributions.
pub fn accept(sampler: &mut Sampler, target: &[Distribution], draft: &[(u32, Distribution)]) -> Result<Verdict> {
    let [judged @ .., further] = target else {
        return Err(Error::Generate("speculation: the target model gave no distribution to judge the draft by".into()));
    };
    if judged.len() != draft.len() {
        return Err(Error::Generate(format!(
            "speculation: {} drafted tokens need {} target distributions, got {}",
            draft.len(),
            draft.len() + 1,
            target.len()
        )));
    }
    for (accepted, (p, (token, q))) in judged.iter().zip(draft).enumerate() {
        if sampler.uniform() * q.probability(*token) < p.probability(*token) {
            continue;
        }
        // Nothing is left only if p and q are equal but for rounding: then a draw from p is the same.
        let next = match p.residual(q) {
            Some(rest) => sampler.draw(&rest),
            None => sampler.draw(p),
        };
        return Ok(Verdict { accepted, next });
    }
    Ok(Verdict { accepted: draft.len(), next: sampler.draw(further) })
}
