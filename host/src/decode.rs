//! Token ids -> more token ids: prefill in chunks, then one step a token, or one step for several that a draft model proposed.
//!
//! One list holds the whole text, prompt and all. What a model has yet to read of it is whatever lies beyond its state's offset; that
//! makes plain steps, chunked prefill, drafts and rejected drafts the same operation, and gives penalties the whole history.

use crate::{
    cache::State,
    error::{Error, Result},
    model::{Input, Model, Want},
    sampler::{Choice, Distribution, Sampler, Sampling},
    speculate::{Verdict, accept},
};
use std::{
    collections::VecDeque,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

/// A token that the model chose.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Chosen {
    /// Its id.
    pub token: u32,
    /// Its logarithmic probability after penalties, before filters and temperature; of a drafted token, after them.
    pub logprob: f32,
    /// Whether the draft model proposed it.
    pub from_draft: bool,
}

/// A smaller model that proposes tokens.
pub struct Draft<'a> {
    /// The model.
    pub model: &'a Model,
    /// Its memory of the same text.
    pub state: State,
    /// Tokens a proposal.
    pub tokens: usize,
}

/// A text being continued.
pub struct Decoder<'a> {
    model: &'a Model,
    /// The model's memory.
    pub state: State,
    draft: Option<Draft<'a>>,
    sampler: Sampler,
    /// The whole text: prompt and continuation.
    pub text: Vec<u32>,
    prompt: usize,
    chunk: usize,
    ready: VecDeque<Chosen>,
    /// Time spent on the prompt, and tokens of it that had to be read.
    pub prefill: (Duration, usize),
    interrupted: Option<&'a AtomicBool>,
}

impl<'a> Decoder<'a> {
    /// Continues `prompt`. `state` may know its beginning already; `chunk` tokens are prefilled at a time.
    pub fn new(
        model: &'a Model,
        mut state: State,
        prompt: &[u32],
        sampling: &Sampling,
        chunk: usize,
        draft: Option<Draft<'a>>,
    ) -> Result<Self> {
        if prompt.is_empty() {
            return Err(Error::Usage("the prompt has no tokens: give it some text".into()));
        }
        if let Some(draft) = &draft
            && draft.model.vocab_size() != model.vocab_size()
        {
            let (theirs, ours) = (draft.model.vocab_size().unwrap_or(0), model.vocab_size().unwrap_or(0));
            return Err(Error::Usage(format!(
                "--draft-model has {theirs} tokens, the model has {ours}: they must share a vocabulary"
            )));
        }
        model.reuse(&mut state, prompt)?;
        let sampler = Sampler::new(sampling)?;
        let (text, prompt) = (prompt.to_vec(), prompt.len());
        Ok(Decoder {
            model,
            state,
            draft,
            sampler,
            text,
            prompt,
            chunk: chunk.max(1),
            ready: VecDeque::new(),
            prefill: (Duration::ZERO, 0),
            interrupted: None,
        })
    }

    /// Tokens of the prompt.
    pub fn prompt_len(&self) -> usize {
        self.prompt
    }

    /// Stops between chunks and tokens once `flag` is set.
    pub fn interrupted_by(mut self, flag: &'a AtomicBool) -> Self {
        self.interrupted = Some(flag);
        self
    }

    /// Why the tokens of a model on a GPU are not drawn there, if they are not.
    pub fn drawn_on_the_cpu(&self) -> Option<&'static str> {
        match &self.draft {
            _ if !self.model.place.device.is_cuda() => None,
            Some(_) => Some("a draft's tokens are judged there"),
            None => self.model.not_drawn(&self.sampler),
        }
    }

    /// Whether somebody asked to stop.
    pub fn is_interrupted(&self) -> bool {
        self.interrupted.is_some_and(|flag| flag.load(Ordering::Relaxed))
    }

    /// Reads the prompt but for what goes through the model together with its last token, telling `progress` how far it is. Idempotent;
    /// `next` does it if nobody did. A last token by itself would cost as much again as one that is generated. Beside a draft it is
    /// all that is left over, as the model's next step is to judge the draft's tokens.
    pub fn prefill(&mut self, progress: &mut dyn FnMut(usize, usize)) -> Result<()> {
        let (start, before) = (Instant::now(), self.state.offset);
        self.state.horizon = self.state.horizon.max(self.prompt);
        progress(self.state.offset, self.prompt);
        let left = if self.draft.is_some() { 1 } else { self.chunk };
        while self.state.offset + left < self.prompt && !self.is_interrupted() {
            let end = (self.state.offset + self.chunk).min(self.prompt - 1);
            read(self.model, &mut self.state, &self.text[..end], Want::Nothing)?;
            progress(self.state.offset, self.prompt);
        }
        if let Some(draft) = &mut self.draft {
            draft.model.reuse(&mut draft.state, &self.text)?;
            draft.state.horizon = self.prompt;
            while draft.state.offset + 1 < self.prompt
                && !self.interrupted.is_some_and(|flag| flag.load(Ordering::Relaxed))
            {
                let end = (draft.state.offset + self.chunk).min(self.prompt - 1);
                read(draft.model, &mut draft.state, &self.text[..end], Want::Nothing)?;
            }
        }
        self.prefill.0 += start.elapsed();
        self.prefill.1 += self.state.offset - before;
        Ok(())
    }

    /// The next token; `None` when interrupted.
    pub fn next_token(&mut self) -> Result<Option<Chosen>> {
        if let Some(chosen) = self.ready.pop_front() {
            return Ok(Some(chosen));
        }
        if self.state.offset + 1 < self.prompt {
            self.prefill(&mut |_, _| {})?;
        }
        if self.is_interrupted() {
            return Ok(None);
        }
        let (first, start) = (self.text.len() == self.prompt, Instant::now());
        let unread = self.prompt.saturating_sub(self.state.offset);
        match &self.draft {
            Some(draft) if draft.tokens > 0 => self.speculate()?,
            _ => self.step()?,
        }
        if first {
            self.prefill.0 += start.elapsed();
            self.prefill.1 += unread;
        }
        Ok(self.ready.pop_front())
    }

    fn step(&mut self) -> Result<()> {
        let tokens = self.text.get(self.state.offset..).unwrap_or_default();
        if self.sampler.takes_the_most_likely()
            && let Some(chosen) =
                self.model.choose(&mut [Input { state: &mut self.state, tokens, want: Want::Last }])?
        {
            for (token, logprob) in chosen {
                self.text.push(token);
                self.ready.push_back(Chosen { token, logprob, from_draft: false });
            }
            return Ok(());
        }
        let input = Input { state: &mut self.state, tokens, want: Want::Last };
        let drawn = match self.sampler.takes_the_most_likely() {
            true => None,
            false => self.model.draw(input, &mut self.sampler, &self.text)?,
        };
        let Choice { id, logprob } = match drawn {
            Some(choice) => choice,
            None => {
                let mut logits = last(read(self.model, &mut self.state, &self.text, Want::Last)?)?;
                self.sampler.sample(&mut logits, &self.text)?
            }
        };
        self.text.push(id);
        self.ready.push_back(Chosen { token: id, logprob, from_draft: false });
        Ok(())
    }

    /// The draft proposes, the model judges all proposals in one step, both forget what was refused.
    fn speculate(&mut self) -> Result<()> {
        let Some(draft) = &mut self.draft else { return self.step() };
        let settled = self.text.len();
        let mut proposed: Vec<(u32, Distribution)> = Vec::with_capacity(draft.tokens);
        for _ in 0..draft.tokens {
            let mut logits = last(read(draft.model, &mut draft.state, &self.text, Want::Last)?)?;
            let distribution = self.sampler.distribution(&mut logits, &self.text)?;
            let token = self.sampler.draw(&distribution);
            self.text.push(token);
            proposed.push((token, distribution));
        }
        let rows = read(self.model, &mut self.state, &self.text, Want::All)?;
        // The last rows are those of the last settled token and of each proposal.
        let skip = rows.len().saturating_sub(proposed.len() + 1);
        let mut judged = Vec::with_capacity(proposed.len() + 1);
        for (i, mut row) in rows.into_iter().skip(skip).enumerate() {
            judged.push(self.sampler.distribution(&mut row, &self.text[..settled + i])?);
        }
        let Verdict { accepted, next } = accept(&mut self.sampler, &judged, &proposed)?;
        self.text.truncate(settled + accepted);
        self.text.push(next);
        let known = settled + accepted;
        self.state.trim(self.state.offset.saturating_sub(known))?;
        draft.state.trim(draft.state.offset.saturating_sub(known))?;
        for (i, &token) in self.text[settled..].iter().enumerate() {
            let logprob = judged.get(i).map_or(0.0, |d| d.logprob(token));
            self.ready.push_back(Chosen { token, logprob, from_draft: i < accepted });
        }
        Ok(())
    }
}

/// Lets a model read what it has not read of `text`.
fn read(model: &Model, state: &mut State, text: &[u32], want: Want) -> Result<Vec<Vec<f32>>> {
    let tokens = text.get(state.offset..).unwrap_or_default();
    let mut rows = model.step(&mut [Input { state, tokens, want }])?;
    Ok(rows.pop().unwrap_or_default())
}

fn last(mut rows: Vec<Vec<f32>>) -> Result<Vec<f32>> {
    rows.pop().ok_or_else(|| Error::Generate("the model gave no logits".into()))
}
