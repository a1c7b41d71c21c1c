//! A prompt -> text, as it streams: decoding, detokenizing, stopping, and the statistics of the run.

use crate::{
    cache::{CacheOptions, State},
    decode::{Chosen, Decoder, Draft},
    detokenize::Detokenizer,
    error::Result,
    load::LanguageModel,
    sampler::Sampling,
    statistics::{FinishReason, Statistics, peak_memory_bytes, tokens_per_second},
    stop::Stop,
};
use std::{sync::atomic::AtomicBool, time::Instant};

/// How to continue a prompt. The default is greedy, 256 tokens at most.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// The most tokens to generate.
    pub max_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// How the KV cache is kept.
    pub cache: CacheOptions,
    /// Texts that end the generation; they are not part of it.
    pub stop: Vec<String>,
    /// Ids that end it, beside the model's own.
    pub extra_eos: Vec<u32>,
    /// Whether the model's own end-of-text tokens are taken as text too.
    pub ignore_eos: bool,
    /// Tokens of the prompt that are read at a time.
    pub prefill_step_size: usize,
    /// Tokens that a draft model proposes at a time.
    pub num_draft_tokens: usize,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        GenerateOptions {
            max_tokens: 256,
            sampling: Sampling::default(),
            cache: CacheOptions::default(),
            stop: Vec::new(),
            extra_eos: Vec::new(),
            ignore_eos: false,
            prefill_step_size: 2048,
            num_draft_tokens: 3,
        }
    }
}

/// One step of a generation: a token, and the text that became certain with it.
#[derive(Clone, Debug)]
pub struct Response {
    /// Text that can be shown; often empty, when a character or a stop string is not complete yet.
    pub text: String,
    /// The token.
    pub token: u32,
    /// Its logarithmic probability.
    pub logprob: f32,
    /// Whether the draft model proposed it.
    pub from_draft: bool,
    /// Set on the last response.
    pub finish_reason: Option<FinishReason>,
}

/// A generation in progress: an iterator over its responses. After the last one, `statistics` has the figures of the whole run.
pub struct Generation<'a> {
    decoder: Decoder<'a>,
    detokenizer: Detokenizer,
    stop: Stop,
    max_tokens: usize,
    generated: usize,
    started: Option<Instant>,
    finished: Option<FinishReason>,
    over: bool,
}

impl<'a> Generation<'a> {
    /// Continues `prompt` (token ids). A `state` from an earlier generation saves reading again what both texts begin with.
    pub fn new(
        lm: &'a LanguageModel,
        prompt: &[u32],
        options: &GenerateOptions,
        state: Option<State>,
        draft: Option<&'a LanguageModel>,
    ) -> Result<Self> {
        let state = match state {
            Some(state) => state,
            None => lm.model.state(&options.cache)?,
        };
        let draft = match draft {
            Some(draft) => {
                let state = draft.model.state(&options.cache)?;
                Some(Draft { model: &draft.model, state, tokens: options.num_draft_tokens })
            }
            None => None,
        };
        let own = if options.ignore_eos { &[] } else { lm.eos_token_ids.as_slice() };
        let stop = Stop::new(own.iter().chain(&options.extra_eos).copied(), options.stop.iter().cloned())?;
        let decoder = Decoder::new(&lm.model, state, prompt, &options.sampling, options.prefill_step_size, draft)?;
        Ok(Generation {
            decoder,
            detokenizer: lm.tokenizer.detokenizer(),
            stop,
            max_tokens: options.max_tokens,
            generated: 0,
            started: None,
            finished: None,
            over: options.max_tokens == 0,
        })
    }

    /// Ends the generation between tokens, or between chunks of the prompt, once `flag` is set.
    pub fn interrupted_by(mut self, flag: &'a AtomicBool) -> Self {
        self.decoder = self.decoder.interrupted_by(flag);
        self
    }

    /// Reads the prompt now, telling `progress` the tokens read and the tokens there are. The first `next` does it otherwise.
    pub fn prefill(&mut self, progress: &mut dyn FnMut(usize, usize)) -> Result<()> {
        self.decoder.prefill(progress)
    }

    /// Text held back, when a generation is ended from outside before its last response.
    pub fn finish(&mut self) -> String {
        self.over = true;
        let rest = self.detokenizer.finish();
        let emitted = self.stop.push(&rest);
        emitted.text + &self.stop.finish()
    }

    /// The figures so far.
    pub fn statistics(&self) -> Statistics {
        let (time, tokens) = self.decoder.prefill;
        let decoding = self.started.map(|s| s.elapsed()).unwrap_or_default();
        Statistics {
            prompt_tokens: self.decoder.prompt_len(),
            prompt_tps: tokens_per_second(tokens, time),
            generation_tokens: self.generated,
            generation_tps: tokens_per_second(self.generated.saturating_sub(1), decoding),
            peak_memory_bytes: peak_memory_bytes(),
            finish_reason: self.finished,
        }
    }

    /// Why the tokens of a model on a GPU are not drawn there, if they are not.
    pub fn drawn_on_the_cpu(&self) -> Option<&'static str> {
        self.decoder.drawn_on_the_cpu()
    }

    /// The model's memory of the text, for a later generation that begins with it.
    pub fn into_state(self) -> State {
        self.decoder.state
    }

    fn respond(&mut self, chosen: Chosen) -> Response {
        self.generated += 1;
        let ends = self.stop.ends(chosen.token);
        let fresh = if ends { String::new() } else { self.detokenizer.push(chosen.token) };
        let mut emitted = self.stop.push(&fresh);
        if !emitted.stopped && (ends || self.generated >= self.max_tokens) {
            let rest = self.detokenizer.finish();
            let tail = self.stop.push(&rest);
            emitted.stopped = tail.stopped;
            emitted.text += &tail.text;
            if !tail.stopped {
                emitted.text += &self.stop.finish();
            }
            self.finished = Some(if ends || tail.stopped { FinishReason::Stop } else { FinishReason::Length });
        } else if emitted.stopped {
            self.finished = Some(FinishReason::Stop);
        }
        self.over = self.finished.is_some();
        let Chosen { token, logprob, from_draft } = chosen;
        Response { text: emitted.text, token, logprob, from_draft, finish_reason: self.finished }
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<Response>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.over {
            return None;
        }
        let next = self.decoder.next_token();
        if self.started.is_none() {
            self.started = Some(Instant::now());
        }
        match next {
            Ok(Some(chosen)) => Some(Ok(self.respond(chosen))),
            Ok(None) => {
                self.over = true;
                None
            }
            Err(e) => {
                self.over = true;
                Some(Err(e))
            }
        }
    }
}
