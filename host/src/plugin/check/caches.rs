//! What the host promises for every architecture, since it owns the caches: however a text is cut, batched, taken back or saved, the
//! logits are those of reading it at once.

use super::{
    Outcome, Stop,
    steps::{BOUND, finite, in_chunks, near, read, state, text, whole},
    subject::Subject,
};
use crate::{
    cache::{
        CacheOptions,
        prompt::{self, CachedText, Origin, PromptCache},
    },
    error::Error,
    model::{Input, Want},
};

/// A text of this many tokens shows windows and chunks of tiny models.
const TOKENS: usize = 17;

/// In chunks.
pub fn chunked(subject: &Subject) -> Outcome {
    subject.each(|example| {
        let model = subject.model(example)?;
        let text = text(&model, subject.job.seed, TOKENS);
        let whole = whole(&model, &text)?;
        let mut worst = 0f32;
        for sizes in [&[3, 4, 1][..], &[1, 1, 1], &[7], &[16]] {
            let rows = in_chunks(&model, &text, sizes)?;
            worst = worst.max(near(&format!("in chunks of {sizes:?} and the rest"), &rows, &whole, BOUND)?);
        }
        Ok(format!("off by {worst:.0e}"))
    })
}

/// Token by token, with steps of no tokens between.
pub fn singly(subject: &Subject) -> Outcome {
    subject.each(|example| {
        let model = subject.model(example)?;
        let text = text(&model, subject.job.seed, TOKENS);
        let whole = whole(&model, &text)?;
        let (mut state, mut rows) = (state(&model, text.len())?, Vec::new());
        for token in &text {
            if !read(&model, &mut state, &[])?.is_empty() {
                return Err(Stop::fail("a step of no tokens gave logits"));
            }
            rows.extend(read(&model, &mut state, &[*token])?);
        }
        Ok(format!("off by {:.0e}", near("token by token", &rows, &whole, BOUND)?))
    })
}

/// Several sequences in one step, at different places and of different lengths, one of them without new tokens.
pub fn batched(subject: &Subject) -> Outcome {
    subject.each(|example| {
        let model = subject.model(example)?;
        let texts = [(1, TOKENS), (2, 5), (3, 9), (4, 2)].map(|(n, count)| text(&model, subject.job.seed ^ n, count));
        let mut states = Vec::new();
        for text in &texts {
            states.push(state(&model, text.len())?);
        }
        let mut rows = vec![Vec::new(); texts.len()];
        for part in 0..3 {
            let cut = |text: &[u32]| [0, text.len() / 2, text.len() - 1, text.len()];
            let inputs = states.iter_mut().zip(&texts).map(|(state, text)| {
                let cut = cut(text);
                Input { state, tokens: &text[cut[part]..cut[part + 1].max(cut[part])], want: Want::All }
            });
            for (all, new) in rows.iter_mut().zip(model.step(&mut inputs.collect::<Vec<_>>())?) {
                all.extend(new);
            }
        }
        let mut worst = 0f32;
        for (index, (rows, text)) in rows.iter().zip(&texts).enumerate() {
            let what = format!("sequence {index} of {} in one step", texts.len());
            worst = worst.max(near(&what, rows, &whole(&model, text)?, BOUND)?);
        }
        Ok(format!("off by {worst:.0e}"))
    })
}

/// Taken back and read again, with other tokens read in between.
pub fn trimmed(subject: &Subject) -> Outcome {
    subject.each(|example| {
        let model = subject.model(example)?;
        let (text, other) = (text(&model, subject.job.seed, TOKENS), text(&model, subject.job.seed ^ 9, 4));
        let whole = whole(&model, &text)?;
        let mut state = state(&model, text.len())?;
        let mut rows = read(&model, &mut state, &text[..12])?;
        read(&model, &mut state, &other)?;
        state.trim(other.len() + 3)?;
        rows.truncate(9);
        state.horizon = text.len();
        rows.extend(read(&model, &mut state, &text[9..])?);
        Ok(format!("off by {:.0e}", near("taken back by 7 tokens and read again", &rows, &whole, BOUND)?))
    })
}

/// Saved in a prompt cache's file and read from it.
pub fn saved(subject: &Subject) -> Outcome {
    subject.each(|example| {
        let model = subject.model(example)?;
        let text = text(&model, subject.job.seed, TOKENS);
        let whole = whole(&model, &text)?;
        let folder = tempfile::tempdir().map_err(Error::io(std::env::temp_dir()))?;
        let file = folder.path().join("cache.safetensors");
        let mut before = state(&model, text.len())?;
        let mut rows = read(&model, &mut before, &text[..11])?;
        let said = CachedText::default();
        prompt::save(&file, &before, &Origin { model: "synthetic", fingerprint: "synthetic", text: &said })?;
        let mut after = PromptCache::open(&file)?.state(&model, "synthetic", &CacheOptions::default())?;
        after.horizon = text.len();
        rows.extend(read(&model, &mut after, &text[11..])?);
        Ok(format!("off by {:.0e}", near("saved after 11 tokens and read on", &rows, &whole, BOUND)?))
    })
}

/// Kept within so many tokens, the model goes on: the first and the last tokens stay.
pub fn limited(subject: &Subject) -> Outcome {
    subject.each(|example| {
        let model = subject.model(example)?;
        let options = CacheOptions { max_kv_size: Some(16), ..CacheOptions::default() };
        let mut state = model.state(&options)?;
        let text = text(&model, subject.job.seed, 40);
        for chunk in text.chunks(7) {
            finite(&read(&model, &mut state, chunk)?)?;
        }
        Ok(String::new())
    })
}
