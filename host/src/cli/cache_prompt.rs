//! `dylm cache-prompt`: reads a long text once and keeps the model's memory of it in a file, for `--prompt-cache-file` of other commands.

use super::{
    Done,
    conversation::{ConversationFlags, Opening},
    flags::{CacheFlags, ModelFlags},
    interrupt,
    printing::line,
    text_or_stdin,
};
use crate::{
    cache::{
        identity::fingerprint,
        prompt::{CachedText, Origin, save},
    },
    error::Error,
    model::{Input, Want},
    progress,
    statistics::{peak_memory_bytes, tokens_per_second},
    template::{ChatOptions, Message},
};
use clap::Args;
use std::{path::PathBuf, process::ExitCode, sync::atomic::Ordering, time::Instant};

/// Flags of `dylm cache-prompt`.
#[derive(Args)]
#[command(after_help = "\
The text becomes the beginning of the first user message. Later,

  dylm generate --prompt-cache-file FILE --prompt QUESTION

answers TEXT followed by QUESTION, as if both had been given in --prompt, and reads only the question. The file remembers the
model, the system prompt and how the cache is kept; a model with other weights is refused.")]
pub struct CachePrompt {
    #[command(flatten)]
    model: ModelFlags,
    /// Where to write the cache
    #[arg(long, value_name = "FILE")]
    prompt_cache_file: PathBuf,
    /// The text to read; - takes it from standard input
    #[arg(long, short)]
    prompt: String,
    /// Take the text as it is, without the model's chat template
    #[arg(long)]
    ignore_chat_template: bool,
    #[command(flatten)]
    conversation: ConversationFlags,
    #[command(flatten)]
    cache: CacheFlags,
    /// Tokens that are read at a time
    #[arg(long, default_value_t = 2048)]
    prefill_step_size: usize,
}

impl CachePrompt {
    /// Runs the command.
    pub fn run(&self) -> Done {
        let text = text_or_stdin(&self.prompt)?;
        let mut lm = self.model.load(self.model.model.as_deref())?;
        self.conversation.set_template(&mut lm.tokenizer)?;
        let chat = !self.ignore_chat_template && lm.tokenizer.has_chat_template();
        let opening = Opening::new(&self.conversation, None)?;
        let ids = if chat {
            let open = ChatOptions {
                add_generation_prompt: false,
                continue_final_message: true,
                ..self.conversation.options()?
            };
            opening.encode(&lm.tokenizer, &[Message::new("user", &text)], &open)?
        } else {
            opening.encode_plain(&lm.tokenizer, &text)?
        };
        if ids.is_empty() {
            return Err(Error::Usage("--prompt: there is nothing to read; give it some text".into()));
        }

        let interrupted = interrupt::watch();
        let mut state = lm.model.state(&self.cache.options())?;
        state.horizon = ids.len();
        let bar = progress::bar(ids.len() > self.prefill_step_size, "Reading");
        bar.set_length(ids.len() as u64);
        let start = Instant::now();
        for tokens in ids.chunks(self.prefill_step_size.max(1)) {
            lm.model.step(&mut [Input { state: &mut state, tokens, want: Want::Nothing }])?;
            bar.set_position(state.offset as u64);
            if interrupted.load(Ordering::Relaxed) {
                return Ok(ExitCode::from(130));
            }
        }
        bar.finish_and_clear();
        let speed = tokens_per_second(ids.len(), start.elapsed());

        let text = CachedText { system_prompt: self.conversation.system_prompt.clone(), text, chat };
        let identity = fingerprint(&lm, self.model.adapter_path.as_deref())?;
        save(&self.prompt_cache_file, &state, &Origin { model: &lm.source.name, fingerprint: &identity, text: &text })?;
        line(format_args!("Prompt: {} tokens, {speed:.3} tokens-per-sec", ids.len()))?;
        line(format_args!("Peak memory: {:.3} GB", peak_memory_bytes() as f64 / 1e9))?;
        line(format_args!("Saved to {}", self.prompt_cache_file.display()))?;
        Ok(ExitCode::SUCCESS)
    }
}
