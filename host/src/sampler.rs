//! Logits to token: processors, then either the most likely token or filters, temperature and a draw, in mlx-lm's order.
//! Reproducible: the same seed and logits give the same ids on every platform and in every version. Random numbers are Philox's,
//! one a draw (and one a token for XTC), and everything a choice depends on is plain IEEE arithmetic in a fixed order.

mod distribution;
mod exponential;
mod filters;
mod random;
mod settings;

pub use distribution::{Distribution, Weighted};
pub use settings::Sampling;

use crate::error::{Error, Result};
use crate::processors::Processors;
use filters::Candidate;
use random::Random;

/// Chooses tokens for one sequence.
#[derive(Clone, Debug)]
pub struct Sampler {
    sampling: Sampling,
    processors: Processors,
    random: Random,
    weights: Vec<f64>,
    candidates: Vec<Candidate>,
    by_logit: Vec<(f32, f64)>,
    selection: Vec<f32>,
}

/// A chosen token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// The token.
    pub id: u32,
    /// The natural logarithm of its probability under the model: after the processors, before filters and temperature.
    pub logprob: f32,
}

/// The largest logit of a row and the first token that has it.
#[derive(Clone, Copy)]
struct Top {
    id: u32,
    logit: f32,
}

impl Sampler {
    /// A sampler for these settings; without a seed it picks its own, which [`Self::seed`] tells.
    ///
    /// # Errors
    /// As [`Sampling::validate`].
    pub fn new(sampling: &Sampling) -> Result<Self> {
        sampling.validate()?;
        Ok(Sampler {
            sampling: sampling.clone(),
            processors: Processors::new(sampling),
            random: Random::new(sampling.seed.unwrap_or_else(random::draw_seed)),
            weights: Vec::new(),
            candidates: Vec::new(),
            by_logit: Vec::new(),
            selection: Vec::new(),
        })
    }

    /// Whether the choice is the most likely token of the logits as they are, and nothing else.
    pub fn takes_the_most_likely(&self) -> bool {
        let Sampling { logit_bias, repetition_penalty, presence_penalty, frequency_penalty, .. } = &self.sampling;
        self.sampling.temp == 0.0
            && logit_bias.is_empty()
            && repetition_penalty.is_none_or(|penalty| penalty == 1.0)
            && [*presence_penalty, *frequency_penalty] == [0.0; 2]
    }

    /// Why a GPU cannot draw the tokens of these settings by itself, if it cannot.
    pub fn not_on_a_gpu(&self) -> Option<&'static str> {
        match &self.sampling {
            s if s.temp > 0.0 && s.xtc_probability > 0.0 => Some("XTC is done on the cpu"),
            s if s.temp > 0.0 && s.min_p > 0.0 && s.min_tokens_to_keep > 1 => {
                Some("tokens that min-p keeps by their number are counted on the cpu")
            }
            _ => None,
        }
    }

    /// The seed in use.
    pub fn seed(&self) -> u64 {
        self.random.seed()
    }

    /// The distribution of the next token, given one row of logits `[vocabulary]` and all tokens so far, prompt included.
    /// The row is left as the processors made it.
    ///
    /// # Errors
    /// [`Error::Generate`] if the row is empty, holds NaN or positive infinity, or masks every token; [`Error::Usage`] if a
    /// bias names a token outside the row.
    pub fn distribution(&mut self, logits: &mut [f32], history: &[u32]) -> Result<Distribution> {
        let top = self.process(logits, history)?;
        if self.sampling.temp == 0.0 {
            return Ok(Distribution::Greedy(top.id));
        }
        self.filter(logits, top);
        let drawable = self.candidates.iter().filter(|c| c.weight > 0.0);
        let (ids, probabilities) = drawable.map(|c| (c.id, c.weight)).unzip();
        Ok(Distribution::Weighted(Weighted { ids, probabilities }))
    }

    /// Chooses the next token: what [`Self::draw`] gives for [`Self::distribution`], with less copying.
    ///
    /// # Errors
    /// As [`Self::distribution`].
    pub fn sample(&mut self, logits: &mut [f32], history: &[u32]) -> Result<Choice> {
        let top = self.process(logits, history)?;
        let (id, total) = if self.sampling.temp == 0.0 {
            (top.id, exponential::sum_of_exponentials(logits, top.logit))
        } else {
            let total = self.filter(logits, top);
            let uniform = self.random.uniform();
            (pick(uniform, self.candidates.iter().map(|c| (c.id, c.weight))).unwrap_or(top.id), total)
        };
        let logit = logits.get(id as usize).copied().unwrap_or(top.logit);
        Ok(Choice { id, logprob: (f64::from(logit) - f64::from(top.logit) - total.ln()) as f32 })
    }

    /// Draws a token. A greedy distribution uses up no random number.
    pub fn draw(&mut self, distribution: &Distribution) -> u32 {
        match distribution {
            Distribution::Greedy(id) => *id,
            weighted => pick(self.random.uniform(), weighted.iter()).unwrap_or(0),
        }
    }

    /// The settings in use.
    #[cfg(feature = "cuda")]
    pub(crate) fn sampling(&self) -> &Sampling {
        &self.sampling
    }

    /// How many random numbers were drawn.
    #[cfg(feature = "cuda")]
    pub(crate) fn drawn(&self) -> u64 {
        self.random.drawn()
    }

    /// Counts the number with which a GPU has drawn a token.
    #[cfg(feature = "cuda")]
    pub(crate) fn drew(&mut self) {
        if self.sampling.temp > 0.0 {
            self.random.uniform();
        }
    }

    /// The next random number in [0, 1).
    pub fn uniform(&mut self) -> f64 {
        self.random.uniform()
    }

    fn process(&mut self, logits: &mut [f32], history: &[u32]) -> Result<Top> {
        self.processors.apply(logits, history)?;
        find_top(logits)
    }

    /// Leaves the tokens that can be drawn in `candidates`, their weights summing to one; returns the sum of e^(logit - top) over
    /// the whole row.
    fn filter(&mut self, logits: &[f32], top: Top) -> f64 {
        let settings = &self.sampling;
        let total = exponential::exponentiate(logits, top.logit, &mut self.weights);
        let p = f64::from(settings.top_p);
        let floor = (p < 1.0).then(|| filters::top_p_floor(p, total, logits.len()));
        filters::collect(logits, &self.weights, floor, &mut self.candidates);
        if p < 1.0 {
            filters::top_p(&mut self.candidates, p, total, &mut self.by_logit);
        }
        if settings.min_p > 0.0 {
            let keep = settings.min_tokens_to_keep;
            filters::min_p(&mut self.candidates, f64::from(settings.min_p), keep, &mut self.selection);
        }
        let often = f64::from(settings.xtc_probability);
        if often > 0.0 && self.random.uniform() < often {
            let threshold = f64::from(settings.xtc_threshold);
            filters::exclude_top_choices(&mut self.candidates, threshold, &settings.xtc_special_tokens);
        }
        if settings.top_k > 0 {
            filters::top_k(&mut self.candidates, settings.top_k, &mut self.selection);
        }
        filters::temper(&mut self.candidates, f64::from(settings.temp), &mut self.weights);
        total
    }
}

/// The `n` most likely tokens of a row with their log-probabilities, most likely first, lower ids first among equals.
/// Fewer if the row is shorter or masked.
pub fn most_likely(logits: &[f32], n: usize) -> Result<Vec<(u32, f32)>> {
    let top = find_top(logits)?;
    let normaliser = exponential::sum_of_exponentials(logits, top.logit).ln() + f64::from(top.logit);
    let descending = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    let mut best: Vec<(u32, f32)> = (0u32..).zip(logits.iter().copied()).filter(|(_, x)| x.is_finite()).collect();
    if n < best.len() {
        best.select_nth_unstable_by(n, descending);
        best.truncate(n);
    }
    best.sort_unstable_by(descending);
    best.iter_mut().for_each(|(_, x)| *x = (f64::from(*x) - normaliser) as f32);
    Ok(best)
}

/// Finds the most likely token, refusing rows from which nothing can be chosen.
fn find_top(logits: &[f32]) -> Result<Top> {
    // One pass in lanes, without branches; which token is broken is looked up only if one is.
    let (mut largest, mut sound) = ([f32::NEG_INFINITY; 16], [true; 16]);
    let (blocks, rest) = logits.as_chunks::<16>();
    let mut look = |lane: usize, x: f32| {
        sound[lane] &= x < f32::INFINITY;
        largest[lane] = if x > largest[lane] { x } else { largest[lane] };
    };
    for block in blocks {
        (0..16).for_each(|lane| look(lane, block[lane]));
    }
    rest.iter().enumerate().for_each(|(lane, &x)| look(lane, x));
    let largest = largest.into_iter().fold(f32::NEG_INFINITY, f32::max);
    if sound.contains(&false) {
        let at = logits.iter().position(|x| x.is_nan() || *x == f32::INFINITY).unwrap_or(0);
        let what = if logits.get(at).is_some_and(|x| x.is_nan()) { "NaN" } else { "infinite" };
        return Err(Error::Generate(format!(
            "logits: that of token {at} is {what}, so no token can be chosen: the weights are damaged, or the dtype is too narrow \
             for this model"
        )));
    }
    match logits.iter().position(|x| *x == largest) {
        Some(id) if largest > f32::NEG_INFINITY => Ok(Top { id: id as u32, logit: largest }),
        _ if logits.is_empty() => Err(Error::Generate("logits: the row is empty, the model returned no vocabulary".into())),
        _ => Err(Error::Generate(
            "logits: every token is at negative infinity, so none can be chosen: a bias or a grammar bans them all, or the \
             weights are damaged"
                .into(),
        )),
    }
}

/// The token in whose share of the probabilities, added up in order, `uniform` falls; the last one that can be drawn if rounding
/// leaves the sum short.
fn pick(uniform: f64, tokens: impl Iterator<Item = (u32, f64)>) -> Option<u32> {
    let (mut below, mut last) = (0.0, None);
    for (id, probability) in tokens {
        if probability > 0.0 {
            below += probability;
            last = Some(id);
            if uniform < below {
                break;
            }
        }
    }
    last
}
