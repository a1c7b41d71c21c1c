//! One trial: prompts of random tokens for some sequences, behind a cache that is filled already, then more tokens of each.
//!
//! A single sequence goes the way of `dylm generate`, with sampler, detokenizer and all. Several are read in common steps, of as many
//! tokens together as a single prompt's steps have, and each takes the likeliest token. The cache is filled once: after a trial it goes
//! back to what it was, by forgetting where it can and from a copy where there is a recurrence.

use super::super::interrupt;
use crate::{
    cache::State,
    error::{Error, Result},
    generate::{GenerateOptions, Generation},
    kernels::cpu::argmax,
    load::LanguageModel,
    model::{Input, Want},
    statistics::{Statistics, peak_memory_bytes, tokens_per_second},
};
use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

/// What every trial does.
pub struct Workload {
    /// Tokens of each prompt; 0 measures generation alone.
    pub prompt: usize,
    /// Tokens that each sequence goes on by; 0 measures the prompt alone.
    pub generated: usize,
    /// Tokens that are in each cache before anything is measured.
    pub depth: usize,
    /// Sequences.
    pub batch: usize,
    /// How the rest is done.
    pub options: GenerateOptions,
}

/// A workload on a model.
pub struct Trials<'a> {
    lm: &'a LanguageModel,
    work: &'a Workload,
    /// A text a sequence: what fills its cache, then its prompt.
    texts: Vec<Vec<u32>>,
    /// Filled caches; none before the first trial, or where the last one could not go back.
    filled: Vec<State>,
    interrupted: &'static AtomicBool,
}

impl<'a> Trials<'a> {
    /// Makes up the prompts, the same in every run.
    pub fn new(lm: &'a LanguageModel, work: &'a Workload) -> Self {
        let vocab = lm.model.vocab_size().unwrap_or(lm.tokenizer.vocab_size());
        // Something must be read before anything can follow.
        let length = work.depth + work.prompt.max(1);
        let tokens = random_tokens(length * work.batch, vocab);
        let texts = tokens.chunks(length).map(<[u32]>::to_vec).collect();
        Trials { lm, work, texts, filled: Vec::new(), interrupted: interrupt::watch() }
    }

    /// Runs once more; `None` when interrupted. Counts and speeds are those of all sequences together.
    pub fn run(&mut self) -> Result<Option<Statistics>> {
        let mut states = std::mem::take(&mut self.filled);
        if states.is_empty() {
            for text in &self.texts {
                let mut state = self.lm.model.state(&self.work.options.cache)?;
                for chunk in text[..self.work.depth].chunks(self.work.options.prefill_step_size.max(1)) {
                    if self.is_interrupted() {
                        return Ok(None);
                    }
                    self.lm.model.step(&mut [Input { state: &mut state, tokens: chunk, want: Want::Nothing }])?;
                }
                states.push(state);
            }
        }
        let recurs = states.iter().flat_map(|s| &s.layers).any(|layer| layer.state().is_some());
        let copies = if recurs { states.clone() } else { Vec::new() };
        let statistics = match (self.texts.as_slice(), states.pop()) {
            ([text], Some(state)) => self.alone(text, state, &mut states)?,
            (_, last) => {
                states.extend(last);
                self.together(&mut states)?
            }
        };
        self.filled = if recurs { copies } else { self.back(states)? };
        Ok(statistics.filter(|_| !self.is_interrupted()))
    }

    fn is_interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }

    /// The caches as they were before the trial; none if they cannot be had.
    fn back(&self, mut states: Vec<State>) -> Result<Vec<State>> {
        for state in &mut states {
            let more = state.offset.saturating_sub(self.work.depth);
            if !state.can_trim(more) {
                return Ok(Vec::new());
            }
            state.trim(more)?;
        }
        Ok(states)
    }

    fn alone(&self, text: &[u32], state: State, after: &mut Vec<State>) -> Result<Option<Statistics>> {
        let Workload { prompt, generated, options, .. } = self.work;
        let options = GenerateOptions { max_tokens: (*generated).max(1), ..options.clone() };
        let mut generation =
            Generation::new(self.lm, text, &options, Some(state), None)?.interrupted_by(self.interrupted);
        for response in &mut generation {
            response?;
        }
        let statistics = generation.statistics();
        after.push(generation.into_state());
        Ok(Some(Statistics {
            prompt_tokens: *prompt,
            prompt_tps: if *prompt > 0 { statistics.prompt_tps } else { 0.0 },
            generation_tokens: *generated,
            ..statistics
        }))
    }

    fn together(&self, states: &mut [State]) -> Result<Option<Statistics>> {
        let Workload { prompt, generated, depth, batch, ref options } = *self.work;
        let length = depth + prompt.max(1);
        let each = (options.prefill_step_size / batch).max(1);
        let (mut at, mut next, started) = (depth, Vec::new(), Instant::now());
        while at < length {
            let end = (at + each).min(length);
            let want = if end == length { Want::Last } else { Want::Nothing };
            next = self.step(states, self.texts.iter().map(|text| &text[at..end]), want)?;
            at = end;
            if self.is_interrupted() {
                return Ok(None);
            }
        }
        let (reading, started) = (started.elapsed(), Instant::now());
        // The first token of each came with its prompt.
        for _ in 1..generated {
            next = self.step(states, next.iter().map(std::slice::from_ref), Want::Last)?;
            if self.is_interrupted() {
                return Ok(None);
            }
        }
        Ok(Some(Statistics {
            prompt_tokens: prompt * batch,
            prompt_tps: tokens_per_second(prompt * batch, reading),
            generation_tokens: generated * batch,
            generation_tps: tokens_per_second(generated.saturating_sub(1) * batch, started.elapsed()),
            peak_memory_bytes: peak_memory_bytes(),
            finish_reason: None,
        }))
    }

    fn step<'t>(&self, states: &mut [State], tokens: impl Iterator<Item = &'t [u32]>, want: Want) -> Result<Vec<u32>> {
        let mut inputs: Vec<Input> =
            states.iter_mut().zip(tokens).map(|(state, tokens)| Input { state, tokens, want }).collect();
        // As a decoder without a sampler has it.
        if want == Want::Last
            && let Some(chosen) = self.lm.model.choose(&mut inputs)?
        {
            return Ok(chosen.into_iter().map(|(id, _)| id).collect());
        }
        let rows = self.lm.model.step(&mut inputs)?;
        let likeliest = |rows: &Vec<Vec<f32>>| rows.last().map(|row| argmax(row) as u32);
        match want {
            Want::Nothing => Ok(Vec::new()),
            _ => rows
                .iter()
                .map(likeliest)
                .collect::<Option<_>>()
                .ok_or_else(|| Error::Generate("the model gave no logits".into())),
        }
    }
}

/// The same tokens in every run: a linear congruential generator, Knuth's multiplier.
fn random_tokens(count: usize, vocab: usize) -> Vec<u32> {
    let mut state = 0u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) as usize % vocab.max(1)) as u32
    };
    (0..count).map(|_| next()).collect()
}
