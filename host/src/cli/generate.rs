//! `dylm generate`: a prompt in, text out as it comes, then the figures.

use super::{
    Done,
    flags::{CacheFlags, ModelFlags, SamplingFlags},
    interrupt,
};
use crate::{
    error::{Error, Result},
    generate::{GenerateOptions, Generation},
    load::{LanguageModel, LoadOptions, load},
    progress,
    template::{ChatOptions, Message},
};
use clap::Args;
use std::{
    io::{Read, Write, stdin, stdout},
    process::ExitCode,
};

/// Flags of `dylm generate`.
#[derive(Args)]
pub struct Generate {
    #[command(flatten)]
    model: ModelFlags,
    /// What to continue; - reads it from standard input
    #[arg(long, short, default_value = "hello")]
    prompt: String,
    /// Instructions that come before the prompt
    #[arg(long)]
    system_prompt: Option<String>,
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
    /// Use a plain chat template in place of the model's
    #[arg(long)]
    use_default_chat_template: bool,
    /// Values for the chat template, as JSON: {"enable_thinking": false}
    #[arg(long, value_name = "JSON")]
    chat_template_config: Option<String>,
    /// Text that ends the answer (may be repeated)
    #[arg(long)]
    stop: Vec<String>,
    /// Further tokens that end the answer, as text or id
    #[arg(long)]
    extra_eos_token: Vec<String>,
    #[command(flatten)]
    cache: CacheFlags,
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
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    verbose: bool,
}

impl Generate {
    /// Runs the command.
    pub fn run(&self) -> Done {
        let prompt = self.prompt()?;
        let lm = self.model.load()?;
        let draft = self.draft_model.as_deref().map(|spec| self.load_draft(spec)).transpose()?;
        let ids = self.encode(&lm, &prompt)?;
        let options = self.options(&lm)?;

        let interrupted = interrupt::watch();
        let mut generation = Generation::new(&lm, &ids, &options, None, draft.as_ref())?.interrupted_by(interrupted);
        let bar = progress::bar(ids.len() > options.prefill_step_size, "Reading");
        generation.prefill(&mut |done, all| {
            bar.set_length(all as u64);
            bar.set_position(done as u64);
        })?;
        bar.finish_and_clear();

        let framed = self.verbose && !self.json;
        if framed {
            println!("==========");
        }
        let (mut out, mut text) = (stdout(), self.prefill_response.clone().unwrap_or_default());
        for response in &mut generation {
            let fresh = response?.text;
            if !self.json {
                show(&mut out, &fresh)?;
            }
            text += &fresh;
        }
        let rest = generation.finish();
        let statistics = generation.statistics();
        if self.json {
            text += &rest;
            let model = &lm.source.name;
            let object =
                serde_json::json!({ "model": model, "prompt": prompt, "text": text, "statistics": statistics });
            println!("{object}");
        } else {
            show(&mut out, &rest)?;
            println!();
        }
        if framed {
            println!("==========\n{statistics}");
        }
        let stopped = interrupted.load(std::sync::atomic::Ordering::Relaxed);
        Ok(if stopped { ExitCode::from(130) } else { ExitCode::SUCCESS })
    }

    /// The prompt, with \n and \t as a shell user types them.
    fn prompt(&self) -> Result<String> {
        if self.prompt != "-" {
            return Ok(self.prompt.replace("\\n", "\n").replace("\\t", "\t"));
        }
        let mut text = String::new();
        stdin().read_to_string(&mut text).map_err(Error::io("standard input"))?;
        Ok(text)
    }

    fn encode(&self, lm: &LanguageModel, prompt: &str) -> Result<Vec<u32>> {
        let tokenizer = &lm.tokenizer;
        if self.ignore_chat_template || !(tokenizer.has_chat_template() || self.use_default_chat_template) {
            let parts = [self.system_prompt.as_deref(), Some(prompt), self.prefill_response.as_deref()];
            return tokenizer.encode(&parts.into_iter().flatten().collect::<String>());
        }
        let mut messages: Vec<Message> = self.system_prompt.iter().map(|text| Message::new("system", text)).collect();
        messages.push(Message::new("user", prompt));
        messages.extend(self.prefill_response.iter().map(|text| Message::new("assistant", text)));
        let extra = match &self.chat_template_config {
            Some(json) => serde_json::from_str(json)
                .map_err(|e| Error::Usage(format!("--chat-template-config: not a JSON object: {e}")))?,
            None => Default::default(),
        };
        let continues = self.prefill_response.is_some();
        let options = ChatOptions {
            add_generation_prompt: !continues,
            continue_final_message: continues,
            extra,
            ..Default::default()
        };
        tokenizer.encode_chat(&messages, &options)
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
        load(Some(spec), &options)
    }
}

/// Writes text for a person: at once, and without control characters that a terminal would obey.
pub fn show(out: &mut impl Write, text: &str) -> Result<()> {
    let clean: String = text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect();
    let written = out.write_all(clean.as_bytes()).and_then(|()| out.flush());
    match written {
        // Whoever read the text has had enough of it, which is no failure.
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        other => other.map_err(Error::io("standard output")),
    }
}
