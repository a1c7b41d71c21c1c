//! `dylm generate`: a prompt in, text out as it comes, then the figures.

use super::{
    Done,
    conversation::{ConversationFlags, Opening, model_of, open_cache},
    flags::{CacheFlags, ModelFlags, SamplingFlags},
    interrupt,
    printing::{line, show},
    text_or_stdin,
};
use crate::{
    cache::identity::fingerprint,
    error::{Error, Result},
    generate::{GenerateOptions, Generation},
    load::{LanguageModel, LoadOptions, load},
    progress,
    template::{ChatOptions, Message},
};
use clap::Args;
use std::{path::PathBuf, process::ExitCode};

/// Flags of `dylm generate`.
#[derive(Args)]
pub struct Generate {
    #[command(flatten)]
    model: ModelFlags,
    /// What to continue; - reads it from standard input
    #[arg(long, short, default_value = "hello")]
    prompt: String,
    /// The first words of the answer, for the model to go on from
    #[arg(long)]
    prefill_response: Option<String>,
    /// The most tokens to generate
    #[arg(long, short, default_value_t = 100)]
    max_tokens: usize,
    #[command(flatten)]
    sampling: SamplingFlags,
    /// Take the prompt as it is, without the model's chat template
    #[arg(long)]
    ignore_chat_template: bool,
    #[command(flatten)]
    conversation: ConversationFlags,
    /// Text that ends the answer (may be repeated)
    #[arg(long)]
    stop: Vec<String>,
    /// Further tokens that end the answer, as text or id
    #[arg(long)]
    extra_eos_token: Vec<String>,
    #[command(flatten)]
    cache: CacheFlags,
    /// Go on from this file of `dylm cache-prompt`: --prompt follows the text that it holds, in the same message, and only what
    /// is new is read. The model is the file's unless --model names another path to it
    #[arg(long, value_name = "FILE")]
    prompt_cache_file: Option<PathBuf>,
    /// Tokens of the prompt that are read at a time
    #[arg(long, default_value_t = 2048)]
    prefill_step_size: usize,
    /// A smaller model of the same vocabulary that proposes tokens
    #[arg(long)]
    draft_model: Option<String>,
    /// Tokens that it proposes at a time
    #[arg(long, default_value_t = 3)]
    num_draft_tokens: usize,
    /// Print one JSON object in place of the text
    #[arg(long)]
    json: bool,
    /// Print the text with a frame and the figures (false: the text alone)
    #[arg(long, default_value = "true", action = clap::ArgAction::Set, value_parser = clap::builder::BoolishValueParser::new())]
    verbose: bool,
}

impl Generate {
    /// Runs the command.
    pub fn run(&self) -> Done {
        let prompt = text_or_stdin(&self.prompt)?;
        let saved = open_cache(self.prompt_cache_file.as_deref())?;
        let mut lm = self.model.load(model_of(self.model.model.as_deref(), saved.as_ref())?)?;
        self.conversation.set_template(&mut lm.tokenizer)?;
        let draft = self.draft_model.as_deref().map(|spec| self.load_draft(spec)).transpose()?;
        let opening = Opening::new(&self.conversation, saved.as_ref())?;
        let ids = self.encode(&lm, &opening, &prompt)?;
        let options = self.options(&lm)?;
        let mut state = match &saved {
            Some(saved) => {
                let identity = fingerprint(&lm, self.model.adapter_path.as_deref())?;
                Some(saved.state(&lm.model, &identity, &options.cache)?)
            }
            None => None,
        };
        let cached_tokens = state.as_mut().map(|state| lm.model.reuse(state, &ids)).transpose()?.unwrap_or(0);

        let interrupted = interrupt::watch();
        let mut generation = Generation::new(&lm, &ids, &options, state, draft.as_ref())?.interrupted_by(interrupted);
        let bar = progress::bar(ids.len() > options.prefill_step_size, "Reading");
        generation.prefill(&mut |done, all| {
            bar.set_length(all as u64);
            bar.set_position(done as u64);
        })?;
        bar.finish_and_clear();

        let framed = self.verbose && !self.json;
        if framed {
            if let Some(division) = lm.model.division() {
                line(division)?;
            }
            line("==========")?;
        }
        let (mut text, mut tokens) = (self.prefill_response.clone().unwrap_or_default(), Vec::new());
        for response in &mut generation {
            let response = response?;
            tokens.push(response.token);
            let fresh = response.text;
            if !self.json {
                show(&fresh)?;
            }
            text += &fresh;
        }
        let rest = generation.finish();
        let statistics = generation.statistics();
        if self.json {
            text += &rest;
            line(serde_json::json!({
                "model": lm.source.name,
                "prompt": prompt,
                "text": text,
                "tokens": tokens,
                "cached_tokens": cached_tokens,
                "statistics": statistics,
            }))?;
        } else {
            show(&rest)?;
            line("")?;
        }
        if framed {
            line(format_args!("==========\n{statistics}"))?;
            if let Some(why) = lm.model.not_replayed() {
                line(format_args!("Steps ran op by op, for they cannot be replayed: {why}"))?;
            } else if let Some(why) = generation.drawn_on_the_cpu() {
                line(format_args!("Tokens were drawn on the cpu, one step after the other: {why}"))?;
            }
        }
        drop(generation);
        // The process ends with the text: a vocabulary need not be taken apart first, which takes as long as several tokens.
        std::mem::forget(lm.tokenizer);
        let stopped = interrupted.load(std::sync::atomic::Ordering::Relaxed);
        Ok(if stopped { ExitCode::from(130) } else { ExitCode::SUCCESS })
    }

    fn encode(&self, lm: &LanguageModel, opening: &Opening, prompt: &str) -> Result<Vec<u32>> {
        let chat = opening.chat.unwrap_or(!self.ignore_chat_template && lm.tokenizer.has_chat_template());
        if !chat {
            let prefill = self.prefill_response.as_deref().unwrap_or_default();
            return opening.encode_plain(&lm.tokenizer, &format!("{prompt}{prefill}"));
        }
        let mut turns = vec![Message::new("user", prompt)];
        turns.extend(self.prefill_response.iter().map(|text| Message::new("assistant", text)));
        let continues = self.prefill_response.is_some();
        let options = ChatOptions {
            add_generation_prompt: !continues,
            continue_final_message: continues,
            ..self.conversation.options()?
        };
        opening.encode(&lm.tokenizer, &turns, &options)
    }

    fn options(&self, lm: &LanguageModel) -> Result<GenerateOptions> {
        let id = |text: &String| {
            let id = lm.tokenizer.token_to_id(text).or_else(|| text.parse().ok());
            id.ok_or_else(|| Error::Usage(format!("--extra-eos-token {text}: neither a token of this model nor an id")))
        };
        Ok(GenerateOptions {
            max_tokens: self.max_tokens,
            sampling: self.sampling.sampling(lm)?,
            cache: self.cache.options(),
            stop: self.stop.iter().map(|s| s.replace("\\n", "\n")).collect(),
            extra_eos: self.extra_eos_token.iter().map(id).collect::<Result<_>>()?,
            ignore_eos: false,
            prefill_step_size: self.prefill_step_size,
            num_draft_tokens: self.num_draft_tokens,
        })
    }

    fn load_draft(&self, spec: &str) -> Result<LanguageModel> {
        // Overrides and adapters are meant for the model itself.
        let options = LoadOptions { config: Vec::new(), adapter_path: None, ..self.model.options()? };
        // A small model gains nothing from being shared.
        let options = LoadOptions { devices: options.devices.iter().take(1).copied().collect(), ..options };
        load(Some(spec), &options)
    }
}
