//! Running a model under test: texts by seed, steps in one go, and how near two rows of logits must lie.

use super::{Outcome, Stop};
use crate::{
    cache::{CacheOptions, State},
    model::{Input, Model, Want},
};

/// f32's own noise over a few layers, with a margin, relative to the largest logit.
pub const BOUND: f32 = 2e-5;

/// One step of Steele, Lea and Flood's generator (2014).
pub fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Numbers that look random, and are the same for the same seed.
pub struct Dice(u64);

impl Dice {
    /// The numbers of this seed.
    pub fn new(seed: u64) -> Self {
        Dice(mix(seed))
    }

    /// One of `0..n`.
    pub fn below(&mut self, n: usize) -> usize {
        self.0 = mix(self.0);
        (self.0 % n.max(1) as u64) as usize
    }
}

/// A text of `count` tokens that the model knows.
pub fn text(model: &Model, seed: u64, count: usize) -> Vec<u32> {
    let (mut dice, vocab) = (Dice::new(seed), model.vocab_size().unwrap_or(2).max(1));
    (0..count).map(|_| dice.below(vocab) as u32).collect()
}

/// An empty memory that knows how long the text will be.
pub fn state(model: &Model, horizon: usize) -> Outcome<State> {
    let mut state = model.state(&CacheOptions::default())?;
    state.horizon = horizon;
    Ok(state)
}

/// Reads tokens; gives a row of logits for each.
pub fn read(model: &Model, state: &mut State, tokens: &[u32]) -> Outcome<Vec<Vec<f32>>> {
    let mut rows = model.step(&mut [Input { state, tokens, want: Want::All }])?;
    Ok(rows.pop().unwrap_or_default())
}

/// Reads a text in chunks of these sizes, and one of what is left.
pub fn in_chunks(model: &Model, text: &[u32], sizes: &[usize]) -> Outcome<Vec<Vec<f32>>> {
    let (mut state, mut rows, mut rest) = (state(model, text.len())?, Vec::new(), text);
    for &size in sizes.iter().chain([&usize::MAX]) {
        let (chunk, after) = rest.split_at(size.min(rest.len()));
        rows.extend(read(model, &mut state, chunk)?);
        rest = after;
        if rest.is_empty() {
            break;
        }
    }
    Ok(rows)
}

/// Reads a text at once.
pub fn whole(model: &Model, text: &[u32]) -> Outcome<Vec<Vec<f32>>> {
    in_chunks(model, text, &[])
}

/// Holds rows of logits to others, within `bound` of each row's largest. `ours` says what they are of.
pub fn near(what: &str, ours: &[Vec<f32>], theirs: &[Vec<f32>], bound: f32) -> Outcome<f32> {
    if ours.len() != theirs.len() {
        return Err(Stop::fail(format!("{what}: {} rows of logits, not {}", ours.len(), theirs.len())));
    }
    let mut most = 0f32;
    for (row, (a, b)) in ours.iter().zip(theirs).enumerate() {
        if a.len() != b.len() {
            return Err(Stop::fail(format!("{what}: {} logits, not {}", a.len(), b.len())));
        }
        let scale = b.iter().fold(f32::MIN_POSITIVE, |m, x| m.max(x.abs()));
        let worst = a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0f32, f32::max) / scale;
        // Also where it is no number.
        if !(worst <= bound && a.iter().all(|x| x.is_finite())) {
            return Err(Stop::fail(format!(
                "{what}: the logits of token {row} are off by {worst:.1e} of the largest, {bound:.0e} is allowed"
            )));
        }
        most = most.max(worst);
    }
    Ok(most)
}

/// A failure unless all of them are numbers.
pub fn finite(rows: &[Vec<f32>]) -> Outcome<()> {
    for (token, row) in rows.iter().enumerate() {
        if let Some(id) = row.iter().position(|x| !x.is_finite()) {
            let bad = row.iter().filter(|x| !x.is_finite()).count();
            return Err(Stop::fail(format!(
                "of the {} logits of token {token}, {bad} are no numbers, the first of id {id}",
                row.len()
            )));
        }
    }
    Ok(())
}
