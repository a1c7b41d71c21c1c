//! `dylm chat`: a conversation. Each turn renders all of it with the chat template; the KV cache keeps what the new text has in common
//! with the old one, so that a turn reads what is new, whatever the template did to the turns before.

use super::{
    Done,
    conversation::{ConversationFlags, Opening, model_of, open_cache},
    flags::{CacheFlags, ModelFlags, SamplingFlags},
    interrupt,
    lines::Lines,
    printing::{Paint, line, show},
};
use crate::{
    cache::{State, identity::fingerprint},
    error::{Error, Result},
    generate::{GenerateOptions, Generation},
    load::LanguageModel,
    progress,
    template::{ChatOptions, Message},
};
use clap::Args;
use std::{path::PathBuf, process::ExitCode, sync::atomic::Ordering};

const HELP: &str = "\
q or Ctrl-D  quit
r            reset: forget the conversation
h            this help
Ctrl-C       end the answer; what was said of it stays in the conversation
Anything else is said to the model.";

/// Flags of `dylm chat`.
#[derive(Args)]
#[command(after_help = format!("In the conversation:\n{HELP}\n\nWithout a terminal, each line of standard input is one message."))]
pub struct Chat {
    #[command(flatten)]
    model: ModelFlags,
    #[command(flatten)]
    conversation: ConversationFlags,
    /// The most tokens of an answer
    #[arg(long, short, default_value_t = 256)]
    max_tokens: usize,
    #[command(flatten)]
    sampling: SamplingFlags,
    #[command(flatten)]
    cache: CacheFlags,
    /// Tokens that are read at a time
    #[arg(long, default_value_t = 2048)]
    prefill_step_size: usize,
    /// Begin with this file of `dylm cache-prompt`: the first message follows the text that it holds
    #[arg(long, value_name = "FILE")]
    prompt_cache_file: Option<PathBuf>,
    /// Print one JSON object for each answer
    #[arg(long)]
    json: bool,
}

/// A conversation in progress.
struct Conversation<'a> {
    lm: &'a LanguageModel,
    opening: Opening,
    turns: Vec<Message>,
    /// The model's memory; none before the first turn and after a failure.
    state: Option<State>,
    chat: ChatOptions,
    options: GenerateOptions,
    json: bool,
}

impl Chat {
    /// Runs the command.
    pub fn run(&self) -> Done {
        let saved = open_cache(self.prompt_cache_file.as_deref())?;
        let mut lm = self.model.load(model_of(self.model.model.as_deref(), saved.as_ref())?)?;
        self.conversation.set_template(&mut lm.tokenizer)?;
        if !lm.tokenizer.has_chat_template() {
            return Err(Error::Usage(format!(
                "{}: has no chat template, so it is no model to chat with; add --use-default-chat-template to try it anyway",
                lm.source.name
            )));
        }
        let options = GenerateOptions {
            max_tokens: self.max_tokens,
            sampling: self.sampling.sampling(&lm)?,
            cache: self.cache.options(),
            prefill_step_size: self.prefill_step_size,
            ..Default::default()
        };
        options.cache.validate()?;
        let opening = Opening::new(&self.conversation, saved.as_ref())?;
        if opening.chat == Some(false) {
            return Err(Error::Usage(format!(
                "--prompt-cache-file {}: holds a plain text and no conversation; make it without --ignore-chat-template",
                saved.map(|s| s.path.display().to_string()).unwrap_or_default()
            )));
        }
        let state = match &saved {
            Some(saved) => {
                let identity = fingerprint(&lm, self.model.adapter_path.as_deref())?;
                Some(saved.state(&lm.model, &identity, &options.cache)?)
            }
            None => None,
        };
        let chat = self.conversation.options()?;
        let mut talk = Conversation { lm: &lm, opening, turns: Vec::new(), state, chat, options, json: self.json };

        let mut lines = Lines::open();
        lines.remark(&format!("{}: h for help, q to quit", lm.source.name));
        while let Some(text) = lines.read()? {
            match text.trim() {
                "q" => break,
                "r" => {
                    talk.turns.clear();
                    lines.remark("The conversation begins anew.");
                }
                "h" => eprintln!("{HELP}"),
                "" => {}
                _ => match talk.say(&text) {
                    // Somebody who types can say something else; a program must learn of it.
                    Err(e) if lines.is_typed() => eprintln!("{} {e}", Paint::Red.err("error:")),
                    other => other?,
                },
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Conversation<'_> {
    /// One turn: the user's message in, the answer out.
    fn say(&mut self, text: &str) -> Result<()> {
        self.turns.push(Message::new("user", text));
        let answer = self.answer();
        match &answer {
            // What was cut is kept as it was shown; a question that got no word of an answer was not asked.
            Ok(Some(answer)) => self.turns.push(Message::new("assistant", answer)),
            _ => drop(self.turns.pop()),
        }
        answer.map(drop)
    }

    fn answer(&mut self) -> Result<Option<String>> {
        let ids = self.opening.encode(&self.lm.tokenizer, &self.turns, &self.chat)?;
        let mut state = match self.state.take() {
            Some(state) => state,
            None => self.lm.model.state(&self.options.cache)?,
        };
        let reused = self.lm.model.reuse(&mut state, &ids)?;
        let interrupted = interrupt::watch();
        let mut generation =
            Generation::new(self.lm, &ids, &self.options, Some(state), None)?.interrupted_by(interrupted);
        let bar = progress::bar(ids.len() - reused > self.options.prefill_step_size, "Reading");
        generation.prefill(&mut |done, all| {
            bar.set_length(all as u64);
            bar.set_position(done as u64);
        })?;
        bar.finish_and_clear();

        let mut text = String::new();
        for response in &mut generation {
            let fresh = response?.text;
            if !self.json {
                show(&fresh)?;
            }
            text += &fresh;
        }
        let rest = generation.finish();
        text += &rest;
        let statistics = generation.statistics();
        self.state = Some(generation.into_state());
        let cut = interrupted.load(Ordering::Relaxed);
        interrupt::release();
        if self.json {
            line(serde_json::json!({ "text": text, "cached_tokens": reused, "statistics": statistics }))?;
        } else {
            show(&rest)?;
            line("")?;
        }
        Ok((!cut || !text.is_empty()).then_some(text))
    }
}
