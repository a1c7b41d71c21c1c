//! The filters between the model's distribution and the draw: top-p, min-p, XTC, top-k, in this order.
//! Each finds the logit at which it cuts by selection on a copy, never by sorting the vocabulary, then drops candidates in place:
//! the list stays in the order of ids, so that every later sum runs in the same order whatever the selection did.

use crate::sampler::exponential::{exp, sum_in_lanes};

/// A token that may still be drawn.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidate {
    pub id: u32,
    pub logit: f32,
    /// e^(logit - the row's largest logit); after [`temper`], the probability of the draw.
    pub weight: f64,
}

/// Lists the tokens of a row, except masked ones and, given `floor`, those whose weight is not above it.
pub(crate) fn collect(logits: &[f32], weights: &[f64], floor: Option<f64>, candidates: &mut Vec<Candidate>) {
    candidates.clear();
    let tokens =
        (0u32..).zip(logits.iter().zip(weights)).map(|(id, (&logit, &weight))| Candidate { id, logit, weight });
    match floor {
        Some(floor) => candidates.extend(tokens.filter(|c| c.weight > floor)),
        None => candidates.extend(tokens.filter(|c| c.logit > f32::NEG_INFINITY)),
    }
}

/// A weight below which top-p surely drops a token, so that most of a vocabulary is never looked at twice: all tokens at or under
/// (1 - p) / V of the mass hold at most 1 - p of it together. The margin covers the rounding of the sums.
pub(crate) fn top_p_floor(p: f64, total: f64, vocabulary: usize) -> f64 {
    (1.0 - p) * total / vocabulary as f64 * (1.0 - 1e-6)
}

/// Keeps a token while the tokens more likely than it hold less than `p` of the `total` weight; equals of the last one stay too.
pub(crate) fn top_p(candidates: &mut Vec<Candidate>, p: f64, total: f64, scratch: &mut Vec<(f32, f64)>) {
    scratch.clear();
    scratch.extend(candidates.iter().map(|c| (c.logit, c.weight)));
    let (mut above, mut cut) = (0.0, f32::NEG_INFINITY);
    let (mut rest, mut step) = (scratch.as_mut_slice(), 64);
    'mass: while !rest.is_empty() {
        let n = step.min(rest.len());
        if n < rest.len() {
            rest.select_nth_unstable_by(n - 1, |a, b| b.0.total_cmp(&a.0));
        }
        let (likely, others) = rest.split_at_mut(n);
        likely.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));
        for &(logit, weight) in likely.iter() {
            if above >= p * total {
                break 'mass;
            }
            cut = logit;
            above += weight;
        }
        (rest, step) = (others, step * 4);
    }
    candidates.retain(|c| c.logit >= cut);
}

/// Keeps tokens at least `p` times as likely as the most likely one, and always the `keep` most likely.
pub(crate) fn min_p(candidates: &mut Vec<Candidate>, p: f64, keep: usize, scratch: &mut Vec<f32>) {
    let largest = candidates.iter().fold(0.0f64, |most, c| most.max(c.weight));
    let mut protected = Largest::of(candidates, if keep > 1 { keep } else { 0 }, scratch);
    candidates.retain(|c| protected.holds(c.logit) || c.weight >= p * largest);
}

/// Leaves out the top choices: of the tokens more likely than `threshold`, only the least likely and `special` ones stay.
pub(crate) fn exclude_top_choices(candidates: &mut Vec<Candidate>, threshold: f64, special: &[u32]) {
    let total: f64 = candidates.iter().map(|c| c.weight).sum();
    let obvious = candidates.iter().map(|c| c.weight).filter(|w| *w > threshold * total);
    let least = obvious.fold(f64::INFINITY, f64::min);
    candidates.retain(|c| c.weight <= least || special.contains(&c.id));
}

/// Keeps the `k` most likely tokens; of equals at the border, the lower ids.
pub(crate) fn top_k(candidates: &mut Vec<Candidate>, k: usize, scratch: &mut Vec<f32>) {
    if k < candidates.len() {
        let mut largest = Largest::of(candidates, k, scratch);
        candidates.retain(|c| largest.holds(c.logit));
    }
}

/// Turns weights into the probabilities at a temperature. Measured from the largest logit that is left: XTC may have removed the
/// row's largest, and at a low temperature everything else would vanish.
pub(crate) fn temper(candidates: &mut [Candidate], temp: f64, scratch: &mut Vec<f64>) {
    let top = candidates.iter().fold(f32::NEG_INFINITY, |most, c| most.max(c.logit));
    scratch.clear();
    scratch.extend(candidates.iter().map(|c| exp((f64::from(c.logit) - f64::from(top)) / temp)));
    let total = sum_in_lanes(scratch, |weight| weight);
    candidates.iter_mut().zip(scratch).for_each(|(c, weight)| c.weight = *weight / total);
}

/// Membership in the n largest logits, asked in the order of ids.
struct Largest {
    cut: f32,
    /// How many logits equal to `cut` still belong to the n largest.
    equals: usize,
}

impl Largest {
    fn of(candidates: &[Candidate], n: usize, scratch: &mut Vec<f32>) -> Self {
        if n == 0 {
            return Largest { cut: f32::INFINITY, equals: 0 };
        }
        if n >= candidates.len() {
            return Largest { cut: f32::NEG_INFINITY, equals: usize::MAX };
        }
        scratch.clear();
        scratch.extend(candidates.iter().map(|c| c.logit));
        let (larger, &mut cut, _) = scratch.select_nth_unstable_by(n - 1, |a, b| b.total_cmp(a));
        // total_cmp puts 0 above -0; both are the same logit.
        let equals = n - larger.iter().filter(|&&x| x > cut).count();
        Largest { cut, equals }
    }

    fn holds(&mut self, logit: f32) -> bool {
        if logit == self.cut && self.equals > 0 {
            self.equals -= 1;
            return true;
        }
        logit > self.cut
    }
}
